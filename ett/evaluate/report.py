"""A run as one page that needs no network: what was run, how the losses went, what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ett.errors import UserError
from ett.evaluate.charts import Series, line_chart, number
from ett.evaluate.health_charts import health_charts
from ett.evaluate.html import compared, duration, finite, folded, safe, spread, table, titled, words
from ett.evaluate.metrics import exact_match
from ett.evaluate.page import DESCRIPTIONS, page
from ett.evaluate.run_folder import (
    RECIPE_NAME,
    TRAINING_DATA,
    Pictures,
    RunFacts,
    keep_pictures,
    kept_pictures,
    read_run,
    write_whole,
)

REPORT_NAME, SUMMARY_NAME = "report.html", "report.json"
_TRAINED_ON = (
    "The run was trained on these examples: right answers show that it learned them, not that it can do others."
)
NUM_SAMPLES = 8
"""Right and wrong answers shown, of each kind, for each evaluation."""


def write_report(run_folder: str | Path, pictures: Pictures | None = None) -> Path:
    """Write ``report.html`` and ``report.json`` into a run's folder, from its recipe, log and ``evaluation*.json`` files.

    Args:
        run_folder: written by `ett train` or `ett demo`.
        pictures: originals with their reconstructions, after tuning and before; they are kept in the folder
            (``samples.json``, ``samples/``), so that a later report shows them again. None shows what is kept there.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: no run's folder, or a file in it that cannot be read or written.
    """
    folder = Path(run_folder)
    facts = read_run(folder)
    try:
        if pictures is not None:
            keep_pictures(folder, pictures)
        shown = kept_pictures(folder) if pictures is None else pictures
        summary = json.dumps(summarize(facts), indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(folder / SUMMARY_NAME, summary + "\n")
        write_whole(folder / REPORT_NAME, render(facts, shown))
    except OSError as error:
        raise UserError(f"The report in {folder} cannot be written: {error.strerror or error}.") from error
    return folder / REPORT_NAME


def summarize(facts: RunFacts) -> dict[str, Any]:
    """``report.json``: of each stage steps, seconds, last losses and gradient norms; every evaluation's metrics."""
    return {
        "name": facts.name,
        "stages": {name: _stage_summary(facts, name) for name in facts.stage_names},
        "evaluations": {name: dict(content["metrics"]) for name, content in facts.evaluations.items()},
    }


def _stage_summary(facts: RunFacts, stage: str) -> dict[str, Any]:
    steps = facts.of(stage, "step")
    validations = facts.of(stage, "validation")
    reaches = facts.of(stage, "reach")
    times = [float(event["time"]) for event in facts.events if event["stage"] == stage and "time" in event]
    return {
        "steps": max((int(event["step"]) for event in steps), default=0),
        "seconds": round(max(times) - min(times), 1) if times else 0.0,
        "training": finite(steps[-1].get("losses", {})) if steps else {},
        "validation": finite(validations[-1].get("losses", {})) if validations else {},
        "caption_gradient_norms": finite(reaches[-1].get("caption_gradient_norms", {})) if reaches else {},
    }


# -- the page ----------------------------------------------------------------------------------------------------------


def render(facts: RunFacts, pictures: Pictures) -> str:
    """The page's HTML."""
    sections = [
        ("What was run", _what_was_run(facts)),
        ("Results", "".join(_evaluation_table(name, content) for name, content in facts.evaluations.items())),
        ("Answers", "".join(_samples(name, content) for name, content in facts.evaluations.items())),
        ("Pictures through the tokenizer", _pictures(pictures)),
        ("Losses", "".join(_stage_charts(facts, stage) for stage in facts.stage_names)),
        ("Health of the tokenizer", "".join(health_charts(facts, stage) for stage in facts.stage_names)),
        ("Where the caption loss reaches", _reach_table(facts)),
        ("Recipe", folded(RECIPE_NAME, f"<pre>{safe(facts.recipe_text)}</pre>")),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return page(safe(facts.name), body)


def _what_was_run(facts: RunFacts) -> str:
    model = facts.recipe.get("model")
    model = model if isinstance(model, Mapping) else {}
    language_model = model.get("language_model")
    language_model = language_model if isinstance(language_model, Mapping) else {}
    config = language_model.get("config")
    named = language_model.get("path") or (config.get("model_type") if isinstance(config, Mapping) else None)
    pairs = {
        "Pictures": f"{model.get('image_size')} px" if model.get("image_size") else None,
        "Visual input": model.get("visual_input"),
        "Language model": named,
        "Precision": facts.recipe.get("precision"),
        "Seed": facts.recipe.get("seed"),
    }
    items = "".join(f"<div><dt>{k}</dt><dd>{safe(v)}</dd></div>" for k, v in pairs.items() if v is not None)
    rows = []
    configured = facts.recipe.get("stages")
    configured = [s for s in configured if isinstance(s, Mapping)] if isinstance(configured, list) else []
    names = _configured_names(configured)
    for name in dict.fromkeys([*names, *facts.stage_names]):
        config = configured[names.index(name)] if name in names else {}
        summary = _stage_summary(facts, name)
        rates = _last_peak(facts.of(name, "step"))
        trains = config.get("trains") or list(rates)
        rows.append(
            [
                safe(name),
                f"{summary['steps']} of {safe(config.get('steps', '?'))}",
                safe(config.get("batch_size", "")),
                "<br>".join(safe(words(part)) for part in trains),
                "<br>".join(f"{safe(words(part))} {number(rate)}" for part, rate in rates.items()),
                duration(summary["seconds"]),
            ]
        )
    stages = table(
        ["Stage", "Steps", "Batch", "Trains", "Highest learning rate logged", "Time"], rows, numeric=(1, 2, 5)
    )
    return f"<dl>{items}</dl>{stages if rows else ''}"


def _configured_names(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names as the log has them: the kind, numbered where it comes again."""
    names: list[str] = []
    kinds = [str(stage.get("stage", "stage")) for stage in stages]
    for i, kind in enumerate(kinds):
        earlier = kinds[:i].count(kind)
        names.append(kind if earlier == 0 else f"{kind}-{earlier + 1}")
    return names


def _last_peak(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    peaks: dict[str, float] = {}
    for event in steps:
        for part, rate in finite(event.get("learning_rates", {})).items():
            peaks[part] = max(rate, peaks.get(part, 0.0))
    return peaks


def _stage_charts(facts: RunFacts, stage: str) -> str:
    steps, validations = facts.of(stage, "step"), facts.of(stage, "validation")
    terms = dict.fromkeys(name for event in [*steps, *validations] for name in event.get("losses", {}))
    charts = [
        line_chart(
            DESCRIPTIONS.get(term, (titled(term), "", ""))[0],
            [
                Series("training", _points(steps, term)),
                Series("validation", _points(validations, term)),
            ],
            "step",
            DESCRIPTIONS.get(term, ("", "", ""))[1],
        )
        for term in terms
    ]
    norms = [(float(e["step"]), float(e["grad_norm"])) for e in steps if isinstance(e.get("grad_norm"), int | float)]
    charts.append(line_chart("Gradient norm", [Series("before clipping", norms)], "step", ""))
    drawn = "".join(charts)
    return f'<h3>{safe(stage)}</h3><div class="charts">{drawn}</div>' if drawn else ""


def _points(events: Sequence[Mapping[str, Any]], term: str) -> list[tuple[float, float]]:
    return [
        (float(event["step"]), float(event["losses"][term]))
        for event in events
        if isinstance(event.get("losses", {}).get(term), int | float)
    ]


def _reach_table(facts: RunFacts) -> str:
    found = {stage: _stage_summary(facts, stage)["caption_gradient_norms"] for stage in facts.stage_names}
    parts = list(dict.fromkeys(part for norms in found.values() for part in norms))
    if not parts:
        return ""
    rows = [
        [safe(stage), *("frozen" if not norms.get(part) else number(norms[part]) for part in parts)]
        for stage, norms in found.items()
        if norms
    ]
    note = "<p>Norm of the caption loss's gradient at one weight of each part, at the first step of the stage.</p>"
    return note + table(["Stage", *(safe(titled(part)) for part in parts)], rows, range(1, len(parts) + 1))


def evaluation_page(name: str, content: Mapping[str, Any]) -> str:
    """A page of its own, HTML, for one evaluation as `Evaluation.to_json` gives it: figures and samples of answers."""
    return page(safe(name), _evaluation_table("Results", content) + _samples("Answers", content), "an evaluation")


def _evaluation_table(name: str, content: Mapping[str, Any]) -> str:
    """A row for each measure, a column for each source; intervals and numbers of examples below the values."""
    cells: dict[str, dict[str, str]] = {}
    split = [(*str(metric).rpartition(".")[::2], found) for metric, found in content["metrics"].items()]
    sizes: dict[str, int] = {}
    for source, _, found in split:
        sizes[source] = max(sizes.get(source, 0), int(found.get("num_examples") or 0))
    for source, plain, found in split:
        interval, value, size = found.get("interval"), found.get("value"), int(found.get("num_examples") or 0)
        lines = [f"{number(interval[0])} to {number(interval[1])}"] if interval else []
        lines += [f"n = {size}"] if size != sizes[source] else []
        below = "".join(f'<br><span class="unit">{line}</span>' for line in lines)
        cells.setdefault(plain, {})[source] = ("–" if value is None else number(float(value))) + below
    rows = []
    for plain, row in cells.items():
        label, unit, better = DESCRIPTIONS.get(plain, (titled(plain), "", ""))
        notes = ", ".join(note for note in (unit, better) if note)
        below = f'<br><span class="unit">{safe(notes)}</span>' if notes else ""
        rows.append([safe(label) + below, *(row.get(source, "–") for source in sizes)])
    heads = [f'{safe(source) or "Value"}<br><span class="unit">n = {size}</span>' for source, size in sizes.items()]
    note = '<p class="unit">n examples; below each value its 95 % interval over examples.</p>'
    note += f"<p>{_TRAINED_ON}</p>" if name == TRAINING_DATA else ""
    return f"<h3>{safe(titled(name))}</h3>{note}{table(['Measure', *heads], rows, range(1, len(sizes) + 1))}"


def _samples(name: str, content: Mapping[str, Any]) -> str:
    pairs = [p for p in content["predictions"] if isinstance(p, Mapping) and p.get("reference") is not None]
    right = [p for p in pairs if exact_match(str(p.get("prediction", "")), str(p["reference"]))]
    wrong = [p for p in pairs if not exact_match(str(p.get("prediction", "")), str(p["reference"]))]
    if not pairs:
        return ""
    blocks = []
    for title, chosen in (("Right", right), ("Wrong", wrong)):
        rows = [
            [
                f'{safe(p["reference"])}<br><span class="unit">{safe(p.get("id", ""))}</span>',
                safe(p.get("prediction", "")) or "<em>(nothing)</em>",
            ]
            for p in spread(chosen, NUM_SAMPLES)
        ]
        answers = table(["Reference", "Answer"], rows) if rows else "<p>None.</p>"
        blocks.append(f"<div><h4>{title}: {len(chosen)} of {len(pairs)}</h4>{answers}</div>")
    return f'<h3>{safe(titled(name))}</h3><div class="pair">{"".join(blocks)}</div>'


def _pictures(pictures: Pictures) -> str:
    cards = []
    for caption, original, reconstruction, before in pictures:
        cells = [(["original"], original)]
        cells += [(["before tuning"], before), (["after tuning"], reconstruction)] if before else []
        cells += [] if before else [(["reconstruction"], reconstruction)]
        cards.append(compared(caption, cells))
    return f'<div class="pictures">{"".join(cards)}</div>' if cards else ""

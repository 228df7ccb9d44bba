"""The report of a comparison: figures of every arm and their paired differences, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ett.data.manifest import question_and_reference
from ett.errors import UserError
from ett.evaluate.base import Metric
from ett.evaluate.comparison import compare, pooled
from ett.evaluate.comparison_markdown import comparison_markdown
from ett.evaluate.comparison_page import ComparedPicture, ComparisonFacts, render_comparison
from ett.evaluate.drawing_report import asked_examples
from ett.evaluate.pareto import pareto_svg
from ett.evaluate.run import load_for_evaluation
from ett.evaluate.run_folder import read_run, write_whole
from ett.evaluate.wall_clock import running_times
from ett.experiments.comparison import (
    EVALUATION_NAME,
    REPORTS,
    START,
    Arm,
    Comparison,
    initial_tokenizer,
    open_comparison,
    read_evaluation,
    report_sources,
)
from ett.experiments.folder import RECIPE_NAME
from ett.experiments.run import resolve_model_folder
from ett.experiments.search import SEARCH_NAME
from ett.generate.draw import Request, draw
from ett.generate.reconstruct import reconstruct, sized
from ett.images import from_array
from ett.tokenizers import VisionTokenizer

REPORT_NAME, SUMMARY_NAME, TABLE_NAME, PARETO_NAME = REPORTS
REFERENCE = "ett"
"""The arm that the others are compared with, where the recipe names none; where none is called so, the last one."""
SHOWN_PICTURES = 8

_PACKAGE = Path(__file__).resolve().parents[1]
PROOFS = _PACKAGE / "results" if (_PACKAGE / "results").is_dir() else _PACKAGE.parent / "docs" / "results"
"""Committed figures (inside the wheel, or in the documents of a clone)."""


def write_comparison_report(out: str | Path) -> Path:
    """Write ``report.html``, ``report.json``, ``table.md`` and ``pareto.svg`` into a comparison's folder, from what the
    finished seeds left there; the others are named.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: no seed has all its arms yet, or a file cannot be read or written.
    """
    folder = Path(out)
    whole = open_comparison(folder)
    comparison = whole.finished(folder)
    if not comparison.arms:
        raise UserError(f"No seed of the comparison in {folder} has all its arms yet. Go on with --resume.")
    evaluations = {arm.key: read_evaluation(folder / arm.folder / EVALUATION_NAME) for arm in comparison.arms}
    summary = summarize_comparison(comparison, folder, evaluations)
    summary["unfinished_seeds"] = [seed for seed in whole.seeds if seed not in comparison.seeds]
    firsts = {name: comparison.of(name)[0] for name in comparison.names}
    facts = ComparisonFacts(
        summary=summary,
        events={name: [read_run(folder / arm.folder).events for arm in comparison.of(name)] for name in firsts},
        predictions={name: evaluations[arm.key]["predictions"] for name, arm in firsts.items()},
        pictures=_pictures(firsts, folder),
        proof=committed_proof(comparison),
        drawings=_drawings(firsts, folder),
    )
    try:
        text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(folder / SUMMARY_NAME, text + "\n")
        write_whole(folder / REPORT_NAME, render_comparison(facts))
        write_whole(folder / TABLE_NAME, comparison_markdown(summary))
        if drawing := pareto_svg(summary):
            write_whole(folder / PARETO_NAME, drawing + "\n")
    except OSError as error:
        raise UserError(f"The report in {folder} cannot be written: {error.strerror or error}.") from error
    return folder / REPORT_NAME


def summarize_comparison(
    comparison: Comparison, folder: Path, evaluations: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """``report.json``: each arm's model and metrics, paired differences from the reference arm, recipe, versions, data."""
    names, reference = comparison.names, reference_of(comparison)
    parts = {name: [evaluations[arm.key]["parts"] for arm in comparison.of(name)] for name in names}
    start = folder / START / EVALUATION_NAME
    first = next(iter(evaluations.values()))
    return {
        "name": comparison.name,
        "reference": reference,
        "arms": {name: _arm_summary(comparison.of(name), folder, evaluations) for name in names},
        "start": {"metrics": _metrics([read_evaluation(start)])} if start.is_file() else None,
        "differences": {
            pair: {metric: found.to_json() for metric, found in metrics.items()}
            for pair, metrics in compare(parts, reference).items()
        },
        "search": json.loads((folder / SEARCH_NAME).read_text(encoding="utf-8"))
        if (folder / SEARCH_NAME).is_file()
        else None,
        "recipe": dict(comparison.values),
        "data": first["data"],
        "versions": first["versions"],
        "command": f"ett ablate {RECIPE_NAME} --out {folder.name}",
    }


def reference_of(comparison: Comparison) -> str:
    """The arm that the others are compared with."""
    names = comparison.names
    return str(comparison.values.get("reference") or (REFERENCE if REFERENCE in names else names[-1]))


def _arm_summary(arms: Sequence[Arm], folder: Path, evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    models = {arm.seed: str(resolve_model_folder(folder / arm.folder).relative_to(folder)) for arm in arms}
    times = [_seconds(folder / arm.folder) for arm in arms]
    return {
        "model": models[arms[0].seed],
        "seconds": round(sum(times) / len(times), 1),
        "metrics": _metrics([evaluations[arm.key] for arm in arms]),
        "seeds": {
            str(arm.seed): {"model": models[arm.seed], "metrics": _metrics([evaluations[arm.key]])} for arm in arms
        },
    }


def _metrics(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics over all seeds, for each source and pooled; those of a whole set as means over seeds.

    Intervals are over examples, each with all its seeds: more seeds are not more examples.
    """
    tables = [pooled(evaluation["parts"]) for evaluation in evaluations]
    found: dict[str, Any] = {}
    for name in tables[0]:
        totals = np.sum([table[name] for table in tables], axis=0)
        found[name] = Metric.mean(totals[:, 0], totals[:, 1]).to_json()
    for name, metric in evaluations[0]["metrics"].items():
        values = [each["metrics"][name]["value"] for each in evaluations]
        if name not in found and all(value is not None for value in values):
            found[name] = {**metric, "value": sum(values) / len(values), "interval": None}
    return found


def _seconds(run: Path) -> float:
    """Of training and validation, from each stage's first logged event to its last."""
    return max(running_times(read_run(run).events), default=0.0)


def committed_proof(comparison: Comparison) -> dict[str, Any] | None:
    """The committed figures of a longer comparison of the same arms, or None: ``docs/results/<name>-proof/report.json``."""
    path = PROOFS / f"{comparison.name}-proof" / SUMMARY_NAME
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _pictures(firsts: Mapping[str, Arm], folder: Path) -> list[ComparedPicture]:
    """A few pictures of every source that has any, with what each arm's tokenizer makes of them."""
    recipe = next(iter(firsts.values())).recipe
    sources = [(name, source) for name, source in report_sources(recipe) if source[0].images]
    if not sources:
        return []
    captions, originals = list[str](), list[PIL.Image.Image]()
    places = dict.fromkeys(
        # spread over the source; a short one has the same place twice
        (i % len(sources), (2 * i + 1) * len(sources[i % len(sources)][1]) // (2 * SHOWN_PICTURES))
        for i in range(SHOWN_PICTURES)
    )
    for number, position in places:
        name, source = sources[number]
        if (example := source[position]).images:
            captions.append(f"{name}: {question_and_reference(example)[1] or example.id}")
            originals.append(example.images[0])
    tokenizers: dict[str, VisionTokenizer] = {}
    if (start := initial_tokenizer(recipe)) is not None:
        tokenizers[START] = start
    processor = None
    for name, arm in firsts.items():
        _, tokenizers[name], processor = load_for_evaluation(resolve_model_folder(folder / arm.folder))
    assert processor is not None
    found = {
        label: list(reconstruct(tokenizer, sized(tokenizer, processor.image_processor), originals))
        for label, tokenizer in tokenizers.items()
    }
    any_label = next(iter(found))
    return [
        ComparedPicture(caption, found[any_label][i].original, {label: each[i].image for label, each in found.items()})
        for i, caption in enumerate(captions)
    ]


def _drawings(firsts: Mapping[str, Arm], folder: Path) -> list[ComparedPicture]:
    """A few prompts of the judges, with what each arm that can draw makes of them; none where nothing is judged."""
    config = next(iter(firsts.values())).recipe.evaluation.drawings
    if config is None:
        return []
    drawn: dict[str, list[PIL.Image.Image]] = {}
    asked, originals = [], list[PIL.Image.Image]()
    for name, arm in firsts.items():
        model, _, processor = load_for_evaluation(resolve_model_folder(folder / arm.folder))
        if model is None or model.image_head is None:
            continue
        images = processor.image_processor
        asked = asked_examples(config, min(images.height, images.width), SHOWN_PICTURES)
        originals = [from_array(images.fit(example.images[0])[0]) for _, example in asked]
        requests = [Request(prompt, config.seed + i) for i, (prompt, _) in enumerate(asked)]
        drawn[name] = [picture.image for picture in draw(model, processor, requests, config.sampling)]
    return [
        ComparedPicture(prompt, originals[i], {name: each[i] for name, each in drawn.items()})
        for i, (prompt, _) in enumerate(asked)
    ]

"""A comparison of arms as one page that needs no network: what was compared, what came out, and what that rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ett.evaluate.charts import Point
from ett.evaluate.comparison_evidence import ComparedPicture, Events, Predictions, curves, drawings, pictures, samples
from ett.evaluate.comparison_figures import (
    Summary,
    arms_table,
    by_seed,
    forest,
    other_figures,
    seeds_of,
    split_of,
    verdict,
)
from ett.evaluate.html import finite, folded, safe, table, titled
from ett.evaluate.page import page
from ett.evaluate.pareto import pareto_section
from ett.evaluate.verdict import arm_title, fixed
from ett.evaluate.wall_clock import equal_time_section, loss_by_time

__all__ = ["ComparedPicture", "ComparisonFacts", "render_comparison"]

ARMS = {
    "index_frozen": (
        "The tokenizer stays as it was; the language model reads its own table of vectors, looked up by the tokenizer's "
        "indices. Projector, table and language model are trained: how most multimodal models are built."
    ),
    "embedding_frozen": (
        "The tokenizer stays as it was; the language model reads the codebook's own vectors through a projector. Projector and "
        "language model are trained."
    ),
    "reconstruction_only": (
        "The tokenizer is tuned too, but by reconstruction alone; the caption loss does not reach it: the control that tells "
        "whether mere extra training of the tokenizer explains a gain."
    ),
    "ett": (
        "End-to-end tuning: tokenizer, projector and language model are trained together, and the caption loss reaches the "
        "tokenizer beside the reconstruction loss."
    ),
}
"""What is trained and what the language model reads, of arms that are known by name."""

BASELINE = "embedding_frozen"
"""Whose answers the reference arm's are sorted against; where there is none, the first other arm's."""

_COUNTS = {2: "Two", 3: "Three", 4: "Four", 5: "Five", 6: "Six"}
_EQUAL = {"steps", "batch_size", "seed", "data", "weight", "evaluation", "init", "path"}
"""Keys of a recipe that touch the start, the data or the budget: where arms differ in one, the page says so."""


@dataclass(frozen=True)
class ComparisonFacts:
    """Everything the page is made from.

    Attributes:
        summary: the content of ``report.json``: name, reference, arms, start, differences, recipe, versions, data, command.
        events: arm -> for each seed the events of its log.
        predictions: arm -> answers (id, prediction, reference) of the first seed, the same examples in all arms.
        pictures: originals, and reconstructions by label: "start" first, then the arms.
        proof: the summary of a committed, longer comparison with several seeds, or None.
        drawings: prompts as captions, their real pictures, and under "reconstructions" what each arm of them drew.
    """

    summary: Mapping[str, Any]
    events: Events
    predictions: Predictions
    pictures: Sequence[ComparedPicture]
    proof: Mapping[str, Any] | None
    drawings: Sequence[ComparedPicture] = ()


def render_comparison(facts: ComparisonFacts) -> str:
    """The page's HTML: self-contained, without scripts, for light and dark, desk and phone."""
    summary = facts.summary
    reference = str(summary["reference"])
    others = [arm for arm in summary["arms"] if arm != reference]
    baseline = BASELINE if BASELINE in others else next(iter(others), None)
    sections = [
        ("What was compared", _introduction(summary)),
        ("What came out", verdict(summary)),
        ("Figures", arms_table(summary, also=True) + forest(summary)),
        ("Understanding against reconstruction", pareto_section(summary)),
        ("", "" if facts.proof is None else _proof(facts.proof)),
        ("Curves", curves(facts.events, reference)),
        ("At equal time instead of equal steps", equal_time_section(_times(facts))),
        ("Settings searched on validation data", _search(summary)),
        ("Pictures through the tokenizer", pictures(facts.pictures, reference)),
        ("What was drawn", drawings(facts.drawings, reference)),
        (
            "Answers",
            samples(facts.predictions, reference, baseline, "first seed" if len(seeds_of(summary)) > 1 else ""),
        ),
        ("All other figures", other_figures(summary)),
        ("Where the caption loss reaches", _reach(facts.events)),
        ("What exactly was run", _what_was_run(summary)),
    ]
    body = "".join(
        f"<section><h2>{title}</h2>{content}</section>" if title else content for title, content in sections if content
    )
    return page(safe(summary["name"]), body, "arms of one recipe side by side, and what came of each")


# -- what was compared -------------------------------------------------------------------------------------------------


def _introduction(summary: Summary) -> str:
    arms, changes, seeds, split = summary["arms"], _changes(summary), seeds_of(summary), split_of(summary)
    steps = _steps(summary)
    each = f"{len(seeds)} seeds ({', '.join(seeds)})" if len(seeds) > 1 else "one seed"
    if left := summary.get("unfinished_seeds"):
        each += f" (not yet finished, and not in any figure: {', '.join(map(str, left))})"
    kept = (
        "held-out data, which nothing was trained or tuned on"
        if split == "heldout"
        else f"the {split} split, which nothing was trained on, though settings may have been chosen by it"
    )
    data = [entry for entry in summary.get("data") or () if isinstance(entry, Mapping)]
    sources = ", ".join(f"{entry.get('name')} {entry.get('num_examples')}" for entry in data)
    total = sum(int(entry.get("num_examples") or 0) for entry in data)
    unlike = [f"{arm}: {key}" for arm, keys in changes.items() for each in keys.items() for key in _unlike(*each)]
    same = "the same start and saw the same data in the same order for the same number of steps"
    text = (
        "A vision tokenizer turns pictures into discrete tokens, and a language model reads them. "
        f"{_COUNTS.get(len(arms), str(len(arms)))} ways to train the two were compared. All began from {same}"
        f"{f' ({steps})' if steps else ''}{', but for the exceptions below' if unlike else ''}. Only the settings listed at "
        f"the end of this page differ. Each was run with {each}. The figures are from {kept}: {total} examples"
        f"{f' ({sources})' if sources else ''}."
    )
    warning = (
        f"<p><strong>Not equal in everything.</strong> These changes touch the start, the data or the budget: "
        f"{safe(', '.join(unlike))}.</p>"
        if unlike
        else ""
    )
    rows = [
        [
            f"{safe(arm_title(arm))}{_reference_note(summary, arm)}",
            safe(ARMS.get(arm, "")) or _change_list(changes.get(arm, {})),
        ]
        for arm in arms
    ]
    return f"<p>{safe(text)}</p>{warning}{table(['Arm', 'What it is, or what it changes in the recipe'], rows, kind='arms')}"


def _reference_note(summary: Summary, arm: str) -> str:
    return '<br><span class="unit">the others are compared with it</span>' if arm == summary["reference"] else ""


def _steps(summary: Summary) -> str:
    """What every stage does, plain text: "semantic: 150 steps of 16 examples"."""
    stages = summary["recipe"].get("stages")
    said = [
        f"{stage.get('stage', 'stage')}: {stage.get('steps', '?')} steps of {stage.get('batch_size', '?')} examples"
        for stage in (stages if isinstance(stages, list) else [])
        if isinstance(stage, Mapping)
    ]
    return "; ".join(said)


def _changes(summary: Summary) -> dict[str, dict[str, Any]]:
    """Arm -> dotted key -> value, as the recipe states them."""
    given = summary["recipe"].get("arms")
    given = given if isinstance(given, Mapping) else {}
    return {str(arm): dict(keys) if isinstance(keys, Mapping) else {} for arm, keys in given.items()}


def _unlike(key: str, value: Any) -> list[str]:
    """The dotted keys in a change that should be equal in all arms."""
    if isinstance(value, Mapping):
        return [found for inner, of in value.items() for found in _unlike(f"{key}.{inner}", of)]
    return [key] if _EQUAL & set(key.split(".")) else []


def _change_list(changes: Mapping[str, Any]) -> str:
    lines = [f"<code>{safe(key)}: {safe(_flow(value))}</code>" for key, value in changes.items()]
    return "<br>".join(lines) or "Nothing: the recipe as it is."


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.strip().removesuffix("...").strip()


def _proof(proof: Summary) -> str:
    """The committed comparison, in a box of its own so that nobody takes it for this run's."""
    seeds, steps = seeds_of(proof), _steps(proof)
    facts = [f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'} ({', '.join(seeds)})", *([steps] if steps else [])]
    facts += [f"dated {proof['date']}"] if proof.get("date") else []
    return (
        "<aside><h2>Earlier figures, committed with the code: not from this run</h2>"
        f"<p>A longer comparison of the same kind, “{safe(proof['name'])}”, run before and kept with the code: "
        f"{safe('; '.join(facts))}.</p>"
        f"{verdict(proof, brief=True)}{arms_table(proof, also=False)}{by_seed(proof)}{forest(proof)}</aside>"
    )


def _times(facts: ComparisonFacts) -> dict[str, list[Point]]:
    """`loss_by_time` of the arms that begin where all others do, the reference first."""
    changes, reference = _changes(facts.summary), str(facts.summary["reference"])
    later = {arm for arm, keys in changes.items() if any(str(value).startswith("arm:") for value in keys.values())}
    arms = sorted((arm for arm in facts.events if arm not in later), key=lambda arm: arm != reference)
    return {arm: loss_by_time(facts.events[arm]) for arm in arms}


def _search(summary: Summary) -> str:
    """Every trial of every arm, the chosen one marked; nothing where nothing was searched."""
    found = summary.get("search")
    if not found:
        return ""
    rows = [
        [
            safe(arm_title(arm)),
            _change_list(trial["values"]),
            f"{_trial_loss(trial)}{' ★' if trial['values'] == each['chosen'] else ''}",
        ]
        for arm, each in found.items()
        for trial in each["trials"]
    ]
    note = (
        "<p>Loss of the last validation: of captions, or of image tokens where an arm only draws [nats per token], or of "
        "pixels where it does neither; the arms were then run with the values marked ★.</p>"
    )
    return note + table(["Arm", "Values", "Loss"], rows, (2,), "arms")


def _trial_loss(trial: Mapping[str, Any]) -> str:
    """The one figure beside a trial's values."""
    (name,) = set(trial) - {"values"}
    return f"{fixed(trial[name], 4)} ({name.removesuffix('_loss')})"


# -- how it was made ---------------------------------------------------------------------------------------------------


def _reach(events: Events) -> str:
    """Gradient norms of the caption loss by part, for each arm and stage, as its first seed logged them."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for arm, runs in events.items():
        for event in runs[0] if runs else ():
            if event.get("event") == "reach":
                found[arm, str(event["stage"])] = finite(event.get("caption_gradient_norms", {}))
    parts = list(dict.fromkeys(part for norms in found.values() for part in norms))
    if not parts:
        return ""
    rows = [
        [
            safe(arm_title(arm)),
            safe(stage),
            *("not reached" if not norms.get(part) else fixed(norms[part], -1) for part in parts),
        ]
        for (arm, stage), norms in found.items()
    ]
    note = (
        "<p>Norm of the caption loss's gradient at one weight of each part, at the first step of the stage. What is not "
        "reached is frozen, or trained by another loss alone.</p>"
    )
    head = ["Arm", "Stage", *(safe(titled(part)) for part in parts)]
    return note + table(head, rows, range(2, len(head)), "arms")


def _what_was_run(summary: Summary) -> str:
    changes = _changes(summary)
    rows = [
        [
            safe(arm).replace("_", "_<wbr>"),
            _change_list(changes.get(arm, {})),
            f"<code>{safe(content.get('model', ''))}</code>",
        ]
        for arm, content in summary["arms"].items()
    ]
    versions = summary.get("versions") or {}
    items = "".join(f"<div><dt>{safe(name)}</dt><dd>{safe(version)}</dd></div>" for name, version in versions.items())
    recipe = yaml.safe_dump(dict(summary["recipe"]), sort_keys=False, allow_unicode=True)
    return (
        f"<p>Command: <code>{safe(summary.get('command', ''))}</code></p>"
        + table(["Arm", "What it changes in the recipe", "Its model, in this folder"], rows, kind="arms")
        + folded("Recipe", f"<pre>{safe(recipe)}</pre>")
        + (f"<h3>Versions</h3><dl>{items}</dl>" if items else "")
    )

"""What a comparison's figures come from, every arm side by side: curves, pictures, answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from ett.evaluate.charts import Point, Series, line_chart
from ett.evaluate.html import compared, finite, folded, safe, spread, table, titled
from ett.evaluate.metrics import exact_match
from ett.evaluate.page import DESCRIPTIONS
from ett.evaluate.verdict import arm_title, capital

START = "start"
"""What the reconstructions of the common start are filed under; the other labels are arms."""
CURVE_POINTS = 30
"""A training curve's points: each is a mean over as many steps as that takes."""
FACTORS = (1, 2, 4, 8, 16)
"""By which a difference of pictures can be made visible."""
NUM_SAMPLES = 6
"""Answers shown of each kind."""

Events = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
"""Arm -> for each seed the events of its log."""
Predictions = Mapping[str, Sequence[Mapping[str, Any]]]
"""Arm -> answers: id, prediction, reference."""


@dataclass(frozen=True)
class ComparedPicture:
    """A picture and what tokenizers make of it, mode RGB, all of one size.

    Attributes:
        caption: where it is from and what it shows.
        original: as it went in.
        reconstructions: by label: "start" (before tuning) where there is one, then the arms.
    """

    caption: str
    original: PIL.Image.Image
    reconstructions: Mapping[str, PIL.Image.Image]


# -- curves ------------------------------------------------------------------------------------------------------------


def curves(events: Events, reference: str) -> str:
    """Validation and training losses of each stage, all arms in one chart, the reference arm first."""
    arms = [reference, *(arm for arm in events if arm != reference)]
    stages = dict.fromkeys(str(e["stage"]) for runs in events.values() for run in runs for e in run)
    drawn = []
    for stage in stages:
        validation = _charts(events, arms, stage, "validation", lambda points: points)
        if validation:
            validation = [validation[0], *_gaps(events, arms, stage), *validation[1:]]
        training = _charts(events, arms, stage, "step", _smoothed)
        blocks = [
            f'<h3>{safe(titled(stage))}: {kind}</h3><div class="charts">{"".join(charts)}</div>'
            for kind, charts in (("validation", validation), ("training", training))
            if charts
        ]
        drawn.append("".join(blocks))
    if not any(drawn):
        return ""
    seeds = max(len(runs) for runs in events.values())
    mean = f" Lines are means over {seeds} seeds." if seeds > 1 else ""
    note = (
        f"<p>One line for each arm.{mean} The sum of all losses is left out, for arms add up different terms. Where one "
        "arm's loss is taken away from the others', a line above 0 is worse than that arm. Training losses are those of single "
        "batches and noisy: where there are many, each point is the mean of several logged steps.</p>"
    )
    return note + "".join(drawn)


def _charts(
    events: Events, arms: Sequence[str], stage: str, kind: str, shape: Callable[[list[Point]], list[Point]]
) -> list[str]:
    terms = dict.fromkeys(
        term
        for arm in arms
        for run in events.get(arm, ())
        for event in run
        if event.get("event") == kind and event["stage"] == stage
        for term in event.get("losses", {})
    )
    ordered = sorted(terms, key=lambda term: term != "caption_loss")
    if len(ordered) > 1:
        ordered = [term for term in ordered if term != "loss"]
    found = [
        line_chart(
            DESCRIPTIONS.get(term, (titled(term), "", ""))[0],
            [Series(arm_title(arm), shape(mean_curve(events.get(arm, ()), stage, kind, term))) for arm in arms],
            "step",
            DESCRIPTIONS.get(term, ("", "", ""))[1],
        )
        for term in ordered
    ]
    return [chart for chart in found if chart]


def _gaps(events: Events, arms: Sequence[str], stage: str) -> list[str]:
    """The caption loss of each arm less the reference's: differences are small beside what all arms learn."""
    table = {arm: dict(mean_curve(events.get(arm, ()), stage, "validation", "caption_loss")) for arm in arms}
    base = table[arms[0]]
    lines = [
        Series(arm_title(arm), [(step, loss - base[step]) for step, loss in table[arm].items() if step in base])
        for arm in arms
    ]
    if not any(line.points for line in lines[1:]):
        return []
    name = arm_title(arms[0])
    return [line_chart(f"Caption loss less that of {name}", lines, "step", "nats per token")]


def mean_curve(runs: Sequence[Sequence[Mapping[str, Any]]], stage: str, kind: str, term: str) -> list[Point]:
    """(step, mean of a loss over seeds) at the steps at which every seed has one."""
    tables = [
        {
            float(event["step"]): finite(event.get("losses", {}))[term]
            for event in run
            if event.get("event") == kind and event["stage"] == stage and term in finite(event.get("losses", {}))
        }
        for run in runs
    ]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    return [(step, sum(table[step] for table in tables) / len(tables)) for step in steps]


def _smoothed(points: list[Point]) -> list[Point]:
    """Means of neighbouring points, so that about `CURVE_POINTS` are left."""
    block = -(-len(points) // CURVE_POINTS)
    groups = [points[i : i + block] for i in range(0, len(points), block)] if block > 1 else [[p] for p in points]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


# -- pictures ----------------------------------------------------------------------------------------------------------


def pictures(shown: Sequence[ComparedPicture], reference: str) -> str:
    """Each picture, what the start and every arm make of it, and where the reference arm's differs from the start's."""
    if not shown:
        return ""
    changes = [_change(picture, reference) for picture in shown]
    factor = _factor([change for change in changes if change is not None])
    note = "<p>The original, and what is left of it after encoding to indices and decoding again. Pictures that are equal in "
    note += "every pixel are shown once, under all their names"
    if any(change is not None for change in changes):
        note += (
            f"; the last one is the absolute difference between the start's and {safe(arm_title(reference))}'s, "
            f"{f'{factor} times amplified' if factor > 1 else 'not amplified'} (black: none)"
        )
    return note + ".</p>" + "".join(_row(*each, reference, factor) for each in zip(shown, changes, strict=True))


def drawings(shown: Sequence[ComparedPicture], reference: str) -> str:
    """What every arm that can draw made of each prompt, beside the real picture."""
    if not shown:
        return ""
    note = (
        "<p>Prompts of the judges, spread over their data, each drawn once, with the same seed in every arm; nothing is "
        "picked. The "
    )
    return f"{note}original is the real picture of the prompt.</p>" + "".join(
        _row(each, None, reference, 1) for each in shown
    )


def _row(picture: ComparedPicture, change: npt.NDArray[np.int16] | None, reference: str, factor: int) -> str:
    cells: list[tuple[list[str], PIL.Image.Image]] = [(["original"], picture.original)]
    for label in sorted(picture.reconstructions, key=lambda label: (label != START, label != reference)):
        image = picture.reconstructions[label]
        same = next((labels for labels, other in cells[1:] if _equal(other, image)), None)
        if same is None:
            cells.append(([arm_title(label)], image))
        else:
            same.append(arm_title(label))
    if change is not None:
        amplified = PIL.Image.fromarray(np.clip(change * factor, 0, 255).astype(np.uint8))
        cells.append(([f"start against {arm_title(reference)}, ×{factor}"], amplified))
    return compared(picture.caption, cells)


def _change(picture: ComparedPicture, reference: str) -> npt.NDArray[np.int16] | None:
    """|start - reference arm|, int16[H, W, 3]; None where one is missing."""
    before, after = (picture.reconstructions.get(label) for label in (START, reference))
    if before is None or after is None or before.size != after.size:
        return None
    first, second = (np.asarray(image.convert("RGB")).astype(np.int16) for image in (before, after))
    return np.abs(first - second)


def _factor(changes: Sequence[npt.NDArray[np.int16]]) -> int:
    """The largest of `FACTORS` at which no more than a hundredth of all values is cut off."""
    if not changes:
        return FACTORS[0]
    top = float(np.percentile(np.concatenate([change.ravel() for change in changes]), 99))
    return max(factor for factor in FACTORS if factor == FACTORS[0] or factor * top <= 255)


def _equal(first: PIL.Image.Image, second: PIL.Image.Image) -> bool:
    return first.size == second.size and first.mode == second.mode and first.tobytes() == second.tobytes()


# -- answers -----------------------------------------------------------------------------------------------------------


def samples(predictions: Predictions, reference: str, baseline: str | None, of: str = "") -> str:
    """Answers to the same questions, grouped by whether the reference arm and `baseline` got them right.

    Args:
        of: which run of each arm they come from, where there are several.
    """
    answers = {
        arm: {str(each.get("id", i)): each for i, each in enumerate(listed) if each.get("reference") is not None}
        for arm, listed in predictions.items()
    }
    if reference not in answers or baseline not in answers:
        return ""
    shared = [key for key in answers[reference] if all(key in each for each in answers.values())]
    if not shared:
        return ""
    arms = sorted(answers, key=lambda arm: (arm != reference, arm != baseline))
    groups: dict[tuple[bool, bool], list[str]] = {}
    for key in shared:
        verdict = (_right(answers[reference][key]), _right(answers[baseline][key]))
        groups.setdefault(verdict, []).append(key)
    own, other = arm_title(reference), arm_title(baseline)
    counts = ", ".join(f"{safe(arm_title(arm))} {sum(_right(answers[arm][key]) for key in shared)}" for arm in arms)
    parts = [
        f"<p>Right answers out of {len(shared)}{f' ({safe(of)})' if of else ''}, case and a final period aside: {counts}.</p>"
    ]
    for verdict, title in (
        ((True, False), f"{own} right, {other} wrong"),
        ((False, True), f"{other} right, {own} wrong"),
        ((False, False), "both wrong"),
        ((True, True), "both right"),
    ):
        keys = groups.get(verdict, [])
        rows = [
            [
                f'{safe(answers[reference][key]["reference"])}<br><span class="unit">{safe(key).replace("/", "/<wbr>")}</span>',
                *(_answer(answers[arm][key]) for arm in arms),
            ]
            for key in spread(keys, NUM_SAMPLES)
        ]
        heading = f"{capital(title)}: {len(keys)} of {len(shared)}"
        head = ["Reference", *(safe(arm_title(arm)) for arm in arms)]
        shown = table(head, rows, kind="arms answers") if rows else ""
        parts.append(folded(heading, shown) if verdict == (True, True) and rows else f"<h3>{safe(heading)}</h3>{shown}")
    return "".join(parts)


def _right(answer: Mapping[str, Any]) -> bool:
    return exact_match(str(answer.get("prediction", "")), str(answer["reference"]))


def _answer(answer: Mapping[str, Any]) -> str:
    sign = '<span class="better" title="right">✓</span>' if _right(answer) else '<span title="wrong">✗</span>'
    return f"{sign} {safe(answer.get('prediction', '')) or '<em>(nothing)</em>'}"

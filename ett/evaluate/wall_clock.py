"""Arms by the clock instead of by steps: what each had reached when the fastest one was done."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ett.evaluate.charts import Point, Series, line_chart
from ett.evaluate.html import duration, finite, safe, table
from ett.evaluate.verdict import arm_title

MEASURE = "caption_loss"


@dataclass(frozen=True)
class AtEqualTime:
    """What an arm had reached after some time.

    Attributes:
        arm: its name. loss: validation caption loss, nats per token, between two validations on the line that joins them.
        seconds: that its training took in all. final: the loss it ended with.
    """

    arm: str
    loss: float
    seconds: float
    final: float


def running_times(events: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds of work up to each of the events, in their order: stages one after another, validation included; not what lies
    between two stages, nor the pauses of a run that was stopped and resumed."""
    spent, found = 0.0, list[float]()
    before: Mapping[str, Any] | None = None
    for event in events:
        if before is not None and before["stage"] == event["stage"] and event.get("event") != "resumed":
            spent += float(event["time"]) - float(before["time"])
        found.append(spent)
        before = event
    return found


def loss_by_time(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[Point]:
    """(seconds, validation caption loss) of an arm, both means over its seeds, at every validation that all seeds have.

    Seconds count from a stage's first logged event, stages one after another, validation included and pauses of an interrupted
    run left out; compare arms that ran the same number at a time.
    """
    curves = []
    for events in runs:
        found = list[Point]()
        for event, spent in zip(events, running_times(events), strict=True):
            losses = finite(event.get("losses", {}))
            if event.get("event") == "validation" and MEASURE in losses:
                found.append((spent, losses[MEASURE]))
        curves.append(found)
    if not curves or len({len(curve) for curve in curves}) != 1:
        return []
    return [(sum(x for x, _ in at) / len(at), sum(y for _, y in at) / len(at)) for at in zip(*curves, strict=True)]


def at_equal_time(curves: Mapping[str, Sequence[Point]]) -> tuple[float, list[AtEqualTime]]:
    """(the time at which the fastest arm was done, where every arm was then); arms without a validation are left out."""
    measured = {arm: curve for arm, curve in curves.items() if curve}
    if not measured:
        return 0.0, []
    limit = min(curve[-1][0] for curve in measured.values())
    return limit, [
        AtEqualTime(arm, _interpolated(curve, limit), curve[-1][0], curve[-1][1]) for arm, curve in measured.items()
    ]


def equal_time_section(curves: Mapping[str, Sequence[Point]]) -> str:
    """A chart of loss by time and a table at equal time, for a page; empty text where nothing was validated twice.

    Args:
        curves: `loss_by_time` of each arm, the reference arm first.
    """
    if not any(len(curve) > 1 for curve in curves.values()):
        return ""
    limit, found = at_equal_time(curves)
    chart = line_chart(
        "Caption loss by training time",
        [Series(arm_title(arm), [(x / 60, y) for x, y in curve]) for arm, curve in curves.items()],
        "minutes",
        "nats per token, validation",
    )
    rows = [
        [safe(arm_title(each.arm)), f"{each.loss:.4f}", f"{each.final:.4f}", duration(each.seconds)] for each in found
    ]
    note = (
        f"<p>An arm that trains the tokenizer takes longer for the same steps. After {duration(limit)}, when the fastest arm "
        "was done, the arms had come this far on validation data (between two validations on the line that joins them; "
        "learning rates of the slower arms had not yet come down by then).</p>"
    )
    head = ["Arm", "Loss at equal time", "Loss at equal steps", "Time of all steps"]
    return note + f'<div class="charts">{chart}</div>' + table(head, rows, (1, 2, 3), "arms")


def _interpolated(curve: Sequence[Point], x: float) -> float:
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return curve[-1][1]

"""Understanding against reconstruction, one point for each arm: a drawing that stands alone or in a page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ett.evaluate.charts import Point, number, ticks
from ett.evaluate.html import safe
from ett.evaluate.page import DESCRIPTIONS, HIGHER
from ett.evaluate.verdict import INTERVAL, arm_title, capital, interval_of, main_metrics, value_of

ACROSS = "psnr"
UPWARD = ("drawn_text.caption_loss_per_character", "caption_loss_per_character", "caption_loss")
"""What understanding is measured by: the first of these that every arm has."""
FAR = 8
NAMESPACE = ' xmlns="http://www.w3.org/2000/svg"'
"""What a drawing needs in a file of its own, and not in a page."""
RIGHT, HEIGHT = 440, 400
"""Where the axes end; the names stand behind, as wide as the longest of them."""
_LEFT, _TOP, _BOTTOM = 58, 34, 46
_LETTER = 7.6
"""Width of a bold letter, about."""
_STYLE = (
    ".pareto{color:#1b1f24;background:#fff;max-width:720px}.pareto text{font:12px system-ui,sans-serif;fill:currentColor}"
    ".pareto .m{text-anchor:middle}.pareto .e{text-anchor:end}.pareto .b{font-weight:600}"
    ".pareto path,.pareto line,.pareto circle{stroke:currentColor;fill:none}.pareto .g{opacity:.15}"
    ".pareto .i{opacity:.45}.pareto .z{stroke-dasharray:4 4;opacity:.6}.pareto .f{stroke-dasharray:2 3;opacity:.8}"
    ".pareto .on{fill:currentColor}.pareto .off{fill:#fff}.pareto text.in{font-size:10px;font-weight:600}"
    ".pareto text.neg{fill:#fff}"
    "@media (prefers-color-scheme:dark){.pareto{color:#e6edf3;background:#0d1117}.pareto .off{fill:#0d1117}"
    ".pareto text.neg{fill:#0d1117}}"
)


@dataclass(frozen=True)
class ParetoPoint:
    """One arm against the reference arm; on both axes more is better.

    Attributes:
        arm: its name.
        reconstruction: PSNR less the reference's [dB]. understanding: the reference's loss less its own.
        intervals: of the two, 95 %, paired with the reference; None where there is none.
        best: no other arm is as good on both axes and better on one.
    """

    arm: str
    reconstruction: float
    understanding: float
    intervals: tuple[Point | None, Point | None]
    best: bool


def pareto_points(summary: Mapping[str, Any]) -> tuple[str, list[ParetoPoint]]:
    """(metric of understanding, the arms that were measured on both axes, the reference at the origin)."""
    reference = str(summary["reference"])
    found = summary["differences"]
    differences = {arm: found.get(f"{arm} - {reference}") or {} for arm in summary["arms"] if arm != reference}
    metric = next((m for m in UPWARD if all(m in each for each in differences.values())), UPWARD[-1])
    sign = 1.0 if DESCRIPTIONS[metric.rpartition(".")[2]][2] == HIGHER else -1.0
    places: dict[str, tuple[Point, tuple[Point | None, Point | None]]] = {reference: ((0.0, 0.0), (None, None))}
    for arm, each in differences.items():
        across, up = each.get(ACROSS) or {}, each.get(metric) or {}
        x, y = value_of(across), value_of(up)
        if x is not None and y is not None:
            ends = interval_of(up)
            turned = None if ends is None else (min(sign * e for e in ends), max(sign * e for e in ends))
            places[arm] = ((x, sign * y), (interval_of(across), turned))
    points = [
        ParetoPoint(arm, x, y, intervals, not any(_dominates(other, (x, y)) for other, _ in places.values()))
        for arm, ((x, y), intervals) in places.items()
    ]
    return metric, points


def pareto_svg(summary: Mapping[str, Any]) -> str:
    """The drawing as SVG, readable in grey, light and dark; empty text for fewer than two points."""
    metric, points = pareto_points(summary)
    if len(points) < 2:
        return ""
    far = _far(points)
    near = [p for p in points if p.arm not in far]
    xs = [end for p in near for end in (p.reconstruction, *(p.intervals[0] or ()))]
    ys = [end for p in near for end in (p.understanding, *(p.intervals[1] or ()))]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6), ticks(min(ys), max(ys), 6)

    # what is far away stands on the edge
    def across(x: float) -> float:
        share = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return _LEFT + min(max(share, 0.0), 1.0) * (RIGHT - _LEFT)

    def up(y: float) -> float:
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return HEIGHT - _BOTTOM - min(max(share, 0.0), 1.0) * (HEIGHT - _TOP - _BOTTOM)

    unit = DESCRIPTIONS[metric.rpartition(".")[2]][1]
    measure = main_metrics(summary).get(metric, (metric, ""))[0]
    reference = arm_title(str(summary["reference"]))
    title = f"Understanding against reconstruction, relative to {reference}"
    right, bottom = RIGHT, HEIGHT - _BOTTOM
    names = [f"{i} {arm_title(p.arm)}{_place(p) if p.arm in far else ''}" for i, p in enumerate(points, start=1)]
    width = right + 14 + math.ceil(_LETTER * max(map(len, names)))
    parts = [
        f'<svg{NAMESPACE} class="pareto" viewBox="0 0 {width} {HEIGHT}" role="img" '
        f'aria-label="{safe(title)}"><style>{_STYLE}</style>'
    ]
    parts += [f'<line class="g" x1="{across(x):.1f}" y1="{_TOP}" x2="{across(x):.1f}" y2="{bottom}"/>' for x in x_ticks]
    parts += [f'<line class="g" x1="{_LEFT}" y1="{up(y):.1f}" x2="{right}" y2="{up(y):.1f}"/>' for y in y_ticks]
    parts += [f'<text class="m" x="{across(x):.1f}" y="{bottom + 16}">{_signed(x)}</text>' for x in x_ticks]
    parts += [f'<text class="e" x="{_LEFT - 6}" y="{up(y) + 4:.1f}">{_signed(y)}</text>' for y in y_ticks]
    parts.append(f'<path class="z" d="M{across(0):.1f} {_TOP}V{bottom}M{_LEFT} {up(0):.1f}H{right}"/>')
    parts.append(f'<text class="b" x="4" y="14">{safe(capital(measure))}: better by [{safe(unit)}] ↑</text>')
    parts.append(f'<text class="b e" x="{right}" y="{HEIGHT - 8}">PSNR: better by [dB] →</text>')
    front = sorted((p for p in points if p.best), key=lambda p: p.reconstruction)
    steps = " ".join(f"{across(p.reconstruction):.1f},{up(p.understanding):.1f}" for p in front)
    parts.append(f'<path class="f" d="M{steps}"/>')
    for i, point in enumerate(points, start=1):
        parts += _mark(i, point, across, up)
    parts += _legend(points, names, right + 14)
    return "".join([*parts, "</svg>"])


def pareto_section(summary: Mapping[str, Any]) -> str:
    """The drawing with its explanation, for a page; empty text for fewer than two points."""
    drawing = pareto_svg(summary)
    if not drawing:
        return ""
    reference = safe(arm_title(str(summary["reference"])))
    return (
        f"<p>Each number is an arm, at its paired difference from {reference}, which stands at the origin; bars are "
        f"{INTERVAL}. Up and to the right of the dashed cross an arm is better than {reference} in both. Filled: no other arm "
        f"is as good in both and better in one (the dotted line). Arms far away stand on the edge, their place in brackets.</p>"
        f"<figure>{drawing.replace(NAMESPACE, '')}</figure>"
    )


def _far(points: Sequence[ParetoPoint]) -> set[str]:
    """The arms that are `FAR` times further out on an axis than half of the others are: they would leave those no room."""
    found: set[str] = set()
    for of in (lambda p: p.reconstruction, lambda p: p.understanding):
        sizes = [abs(of(p)) for p in points if of(p) != 0]
        limit = FAR * statistics.median(sizes) if sizes else math.inf
        found |= {p.arm for p in points if abs(of(p)) > limit}
    return found


def _dominates(first: Point, second: Point) -> bool:
    return first != second and first[0] >= second[0] and first[1] >= second[1]


def _mark(i: int, point: ParetoPoint, across: Any, up: Any) -> list[str]:
    x, y = across(point.reconstruction), up(point.understanding)
    bars = ""
    if point.intervals[0] is not None:
        bars += f"M{across(point.intervals[0][0]):.1f} {y:.1f}H{across(point.intervals[0][1]):.1f}"
    if point.intervals[1] is not None:
        bars += f"M{x:.1f} {up(point.intervals[1][0]):.1f}V{up(point.intervals[1][1]):.1f}"
    return [
        f'<path class="i" d="{bars}"/>' if bars else "",
        f'<circle class="{"on" if point.best else "off"}" cx="{x:.1f}" cy="{y:.1f}" r="8"/>',
        f'<text class="m in{" neg" if point.best else ""}" x="{x:.1f}" y="{y + 3.5:.1f}">{i}</text>',
    ]


def _legend(points: Sequence[ParetoPoint], names: Sequence[str], left: int) -> list[str]:
    step = min(20.0, (HEIGHT - _TOP) / len(points))
    return [
        f'<text class="{"b" if point.best else ""}" x="{left}" y="{_TOP + 8 + step * i:.1f}">{safe(name)}</text>'
        for i, (point, name) in enumerate(zip(points, names, strict=True))
    ]


def _place(point: ParetoPoint) -> str:
    return f" ({point.reconstruction:+.1f}, {point.understanding:+.2f})".replace("-", "−")


def _signed(value: float) -> str:
    assert math.isfinite(value)
    return number(value).replace("-", "−")

"""Charts as inline SVG: no scripts, no libraries, readable in grey and on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ett.evaluate.html import safe

WIDTH, HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 36
_ROW = 38
"""Height of one row of a forest plot."""
MAX_POINTS = 400
MANY = 24
"""Lines with more points than this get a few markers instead of one at every point."""
DASHES = ("", "6 3", "2 2", "9 3 2 3", "12 4", "4 2 1 2 1 2")
"""By series, with the colours ``--s0`` to ``--s5`` of the page: lines stay apart without colour."""
_MARKERS = (
    "m-2.8 0a2.8 2.8 0 1 0 5.6 0a2.8 2.8 0 1 0-5.6 0z",
    "m-2.6-2.6h5.2v5.2h-5.2z",
    "m0-3.4l3.2 5.8h-6.4z",
    "m0-3.7l3.7 3.7l-3.7 3.7l-3.7-3.7z",
    "m0 3.4l3.2-5.8h-6.4z",
    "m-3.2-1h2.2v-2.2h2v2.2h2.2v2h-2.2v2.2h-2v-2.2h-2.2z",
)
"""By series, drawn from its middle: circle, square, triangle, diamond, triangle upside down, cross."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line: its name and its (x, y) points in order of x; what is not finite is left out."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Row:
    """One row of a forest plot.

    Attributes:
        series: which colour and marker, as a line of the same number has in `line_chart`.
        name: what stands above the row, on the left; `note` on the right.
        value: where the marker stands. interval: drawn as a bar; None leaves it out.
        sure: fills the marker; not sure is hollow.
    """

    series: int
    name: str
    note: str
    value: float
    interval: Point | None
    sure: bool


def line_chart(title: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """A ``<figure>`` with axes, ticks, lines and a legend; empty text where there is nothing to draw.

    Lines get markers, long ones only a few. Lines are thinned to `MAX_POINTS` points at equal distances.
    """
    lines = [Series(each.name, thinned([p for p in each.points if all(map(math.isfinite, p))])) for each in series]
    drawn = [(i, each) for i, each in enumerate(lines) if each.points]
    if not drawn:
        return ""
    xs = [x for _, each in drawn for x, _ in each.points]
    ys = [y for _, each in drawn for _, y in each.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 4), ticks(min(ys), max(ys), 4)
    x_low, x_high = min(xs), max(*xs, min(xs) + 1e-12)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)
    y_high = max(y_high, y_low + 1e-12)

    def place(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if len(set(xs)) == 1 else (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{safe(title)}">']
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 5}" y="{y + 3.5:.1f}">{_signed(tick)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = place(tick, y_low)
            parts.append(f'<text class="mid" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 14}">{_signed(tick)}</text>')
    bottom = HEIGHT - _BOTTOM
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{WIDTH - _RIGHT}"/>')
    parts.append(f'<text class="mid" x="{(WIDTH + _LEFT) / 2:.0f}" y="{HEIGHT - 6}">{safe(x_label)}</text>')
    for i, each in drawn:
        parts += _line([place(x, y) for x, y in each.points], i)
    parts.append("</svg>")
    legend = "".join(f"<li>{_swatch(i)}{safe(each.name)}</li>" for i, each in drawn)
    return _figure(title, y_label, "".join(parts), f'<ul class="legend">{legend}</ul>')


def forest_plot(title: str, unit: str, rows: Sequence[Row], left: str, right: str) -> str:
    """A ``<figure>``: each row a value with its interval against a line at zero; empty text without rows.

    Args:
        left, right: what it means to stand on that side of zero.
    """
    rows = [row for row in rows if math.isfinite(row.value)]
    if not rows:
        return ""
    ends = [0.0, *(row.value for row in rows), *(end for row in rows for end in row.interval or ())]
    marks = ticks(min(ends), max(ends), 4)
    low, high = marks[0], marks[-1]
    margin, top = 20, 20
    bottom = top + _ROW * len(rows)

    def place(x: float) -> float:
        return margin + (x - low) / (high - low) * (WIDTH - 2 * margin)

    height, zero = bottom + 20, place(0.0)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{safe(f"{title}: {left}, {right}")}">']
    for mark in marks:
        parts.append(f'<text class="mid" x="{place(mark):.1f}" y="{bottom + 14}">{_signed(mark)}</text>')
    parts.append(f'<text x="2" y="11">← {safe(left)}</text>')
    parts.append(f'<text class="end" x="{WIDTH - 2}" y="11">{safe(right)} →</text>')
    for i, row in enumerate(rows):
        upper = top + _ROW * i
        y, style = upper + 28, f"s{row.series % len(_MARKERS)}"
        # lines stay out of the words above the bar
        grid = "".join(f"M{place(mark):.1f} {upper + 20}v16" for mark in marks)
        parts.append(f'<path class="grid" d="{grid}"/><path class="zero" d="M{zero:.1f} {upper + 19}v18"/>')
        parts.append(f'<text class="name" x="2" y="{upper + 15}">{safe(row.name)}</text>')
        parts.append(f'<text class="end" x="{WIDTH - 2}" y="{upper + 15}">{safe(row.note)}</text>')
        if row.interval is not None:
            first, last = map(place, row.interval)
            bar = f"M{first:.1f} {y}H{last:.1f}M{first:.1f} {y - 4}v8M{last:.1f} {y - 4}v8"
            parts.append(f'<path class="bar {style}" d="{bar}"/>')
        marker = _MARKERS[row.series % len(_MARKERS)]
        filled = "" if row.sure else " hollow"
        parts.append(
            f'<path class="mark{filled} {style}" transform="translate({place(row.value):.1f} {y}) scale(1.4)" '
            f'd="M0 0{marker}"/>'
        )
    parts.append("</svg>")
    return _figure(title, unit, "".join(parts), "")


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` of `points` at equal distances, first and last among them."""
    if len(points) <= MAX_POINTS:
        return list(points)
    return [points[round(i * (len(points) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round numbers, 1, 2 or 5 times a power of ten apart, that enclose `low` and `high`."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / max(1, wanted)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A short text for a tick or a cell: four significant digits."""
    text = f"{value:.4g}"
    return "0" if float(text) == 0 else text.replace("e+0", "e").replace("e-0", "e-")


def _signed(value: float) -> str:
    return number(value).replace("-", "−")


def _figure(title: str, unit: str, drawing: str, below: str) -> str:
    unit = f' <span class="unit">{safe(unit)}</span>' if unit else ""
    return f'<figure class="chart"><figcaption>{safe(title)}{unit}</figcaption>{drawing}{below}</figure>'


def _style(i: int) -> str:
    # past the last dash the colours begin again, with other dashes
    dash = DASHES[(i + i // len(DASHES)) % len(DASHES)]
    return f'class="s{i % len(DASHES)}" stroke-dasharray="{dash}"'


def _line(places: Sequence[tuple[float, float]], i: int) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline {_style(i)} points="{path}"/>'] if len(places) > 1 else []
    marked = places if len(places) <= MANY else places[len(places) // 16 :: len(places) // 8]
    return parts + [_marker(x, y, i) for x, y in marked]


def _marker(x: float, y: float, i: int) -> str:
    return f'<path class="mark s{i % len(_MARKERS)}" d="M{x:.1f} {y:.1f}{_MARKERS[i % len(_MARKERS)]}"/>'


def _swatch(i: int) -> str:
    line = f'<polyline {_style(i)} points="0,4 30,4"/>{_marker(15, 4, i)}'
    return f'<svg class="swatch" viewBox="0 0 30 8" aria-hidden="true">{line}</svg>'

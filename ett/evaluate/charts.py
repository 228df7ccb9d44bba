"""Line charts as inline SVG: no scripts, no libraries, readable in grey and on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 36
MAX_POINTS = 400
DASHES = ("", "6 3", "2 2", "8 3 2 3")
"""By series, with the colours ``--s0`` to ``--s3`` of the page: lines stay apart without colour."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line: its name and its (x, y) points in order of x; what is not finite is left out."""

    name: str
    points: Sequence[Point]


def line_chart(title: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """A ``<figure>`` with axes, ticks, lines and a legend; empty text where there is nothing to draw.

    Lines with few points get markers. Long ones are thinned to `MAX_POINTS` points at equal distances.
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

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 5}" y="{y + 3.5:.1f}">{number(tick)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = place(tick, y_low)
            parts.append(f'<text class="mid" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 14}">{number(tick)}</text>')
    bottom = HEIGHT - _BOTTOM
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{WIDTH - _RIGHT}"/>')
    parts.append(f'<text class="mid" x="{(WIDTH + _LEFT) / 2:.0f}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
    for i, each in drawn:
        parts += _line([place(x, y) for x, y in each.points], i)
    parts.append("</svg>")
    unit = f' <span class="unit">{escape(y_label)}</span>' if y_label else ""
    legend = "".join(f"<li>{_swatch(i)}{escape(each.name)}</li>" for i, each in drawn)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{unit}</figcaption>{"".join(parts)}'
        f'<ul class="legend">{legend}</ul></figure>'
    )


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` of `points` at equal distances, first and last among them."""
    if len(points) <= MAX_POINTS:
        return list(points)
    return [points[round(i * (len(points) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round numbers, 1, 2 or 5 times a power of ten apart, that enclose `low` and `high`."""
    if not high > low:
        low, high = low - max(abs(low), 1) / 2, high + max(abs(high), 1) / 2
    rough = (high - low) / max(1, wanted)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A short text for a tick or a cell: four significant digits."""
    text = f"{value:.4g}"
    return "0" if float(text) == 0 else text.replace("e+0", "e").replace("e-0", "e-")


def _line(places: Sequence[tuple[float, float]], i: int) -> list[str]:
    style = f'class="s{i % len(DASHES)}" stroke-dasharray="{DASHES[i % len(DASHES)]}"'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline {style} points="{path}"/>'] if len(places) > 1 else []
    if len(places) <= 24:
        parts += [f'<circle class="s{i % len(DASHES)}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places]
    return parts


def _swatch(i: int) -> str:
    dash = DASHES[i % len(DASHES)]
    return (
        f'<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true"><polyline class="s{i % len(DASHES)}" '
        f'stroke-dasharray="{dash}" points="0,4 26,4"/></svg>'
    )

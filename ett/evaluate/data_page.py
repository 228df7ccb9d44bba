"""The page of a data set's check: counts, problems, lengths, and a plot of the pictures' resolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ett.data.check import Summary
from ett.data.check_text import PROBLEMS, bucket_name, counts, lengths_shown, spread_of
from ett.data.histogram import STEPS
from ett.errors import DataError
from ett.evaluate.charts import HEIGHT, WIDTH
from ett.evaluate.html import safe, table
from ett.evaluate.page import page

PAGE_NAME = "data.html"
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 36


def write_data_page(summary: Summary, folder: Path) -> Path:
    """Write the page into `folder`; returns its path.

    Raises:
        DataError: it cannot be written.
    """
    path = folder / PAGE_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(render_data(summary), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}. Choose another folder with --out.") from error
    return path


def render_data(summary: Summary) -> str:
    """The page's HTML: self-contained, without scripts."""
    lengths = "".join(
        bar_chart(title, spread_of(found), [(bucket_name(low, high), n) for low, high, n in found["buckets"]])
        for title, found in lengths_shown(summary)
    )
    sizes = summary["resolutions"]
    sections = [
        ("Counts", "".join(f"<p>{safe(line)}</p>" for line in counts(summary).splitlines())),
        ("Problems", _problems(summary)),
        ("Lengths", f'<div class="charts">{lengths}</div>' if lengths else ""),
        ("Pictures", _pictures(sizes) if sizes["count"] else ""),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return page(safe(Path(summary["path"]).name), body, "what is in a data set, and what is wrong with it")


def _problems(summary: Summary) -> str:
    rows = [
        [safe(PROBLEMS[kind]), f"{found['count']:,}", "<br>".join(map(safe, found["first"]))]
        for kind, found in summary["problems"].items()
    ]
    return table(["Problem", "Count", "The first of them"], rows, [1]) if rows else "<p>Nothing is wrong.</p>"


def _pictures(sizes: Mapping[str, Any]) -> str:
    ends = [
        [name, f"{width:,} x {height:,}", safe(where)]
        for name, (width, height, where) in (("Smallest", sizes["smallest"]), ("Largest", sizes["largest"]))
    ]
    sides = [(bucket_name(low, high), n) for low, high, n in sizes["longer_side"]]
    charts = (
        resolution_plot(sizes["cells"])
        + bar_chart("Longer side", "pixels", sides)
        + bar_chart("Width : height", "", [(name, n) for name, n in sizes["aspects"].items() if n])
    )
    return f'{table(["Picture", "Width x height", "Where"], ends, [1])}<div class="charts">{charts}</div>'


def resolution_plot(cells: Sequence[tuple[float, float, int]]) -> str:
    """A ``<figure>`` of `Resolutions.values`' cells on logarithmic axes; the more pictures, the more opaque."""
    low = math.floor(min(math.log2(side) for x, y, _ in cells for side in (x, y)))
    high = max(math.ceil(max(math.log2(side) for x, y, _ in cells for side in (x, y)) + 1 / STEPS), low + 1)
    most = max(count for *_, count in cells)

    def across(power: float) -> float:
        return _LEFT + (power - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def down(power: float) -> float:
        return HEIGHT - _BOTTOM - (power - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Width and height of the pictures">']
    for power in range(low, high + 1, max(1, (high - low) // 5)):
        x, y = across(power), down(power)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}M{x:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 5}" y="{y + 3.5:.1f}">{2**power:,}</text>')
        parts.append(f'<text class="mid" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 14}">{2**power:,}</text>')
    parts.append(f'<path class="zero" d="M{across(low):.1f} {down(low):.1f}L{across(high):.1f} {down(high):.1f}"/>')
    for width, height, count in cells:
        x, y = math.log2(width), math.log2(height)
        box = across(x + 1 / STEPS) - across(x), down(y) - down(y + 1 / STEPS)
        parts.append(
            f'<rect class="s0" x="{across(x):.1f}" y="{down(y + 1 / STEPS):.1f}" width="{box[0]:.1f}" height="{box[1]:.1f}" '
            f'opacity="{0.15 + 0.85 * math.log1p(count) / math.log1p(most):.2f}"><title>from {width:.0f} x '
            f"{height:.0f}: {count:,}</title></rect>"
        )
    parts.append(f'<text class="mid" x="{(WIDTH + _LEFT) / 2:.0f}" y="{HEIGHT - 6}">width [pixels]</text></svg>')
    note = '<p class="unit">Darker: more pictures (logarithmic). On the line pictures are square.</p>'
    return _figure("Resolutions", "height [pixels]", "".join(parts) + note)


def bar_chart(title: str, unit: str, rows: Sequence[tuple[str, int]]) -> str:
    """A ``<figure>``: a bar and a count for each row of (name, count), at least one."""
    step, left, right = 18, 116, 60
    height, most = step * len(rows) + 6, max(1, *(count for _, count in rows))
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{safe(title)}">']
    for i, (name, count) in enumerate(rows):
        length = count / most * (WIDTH - left - right)
        parts.append(f'<text class="end" x="{left - 6}" y="{step * i + 15}">{safe(name)}</text>')
        parts.append(f'<rect class="s0" x="{left}" y="{step * i + 5}" width="{length:.1f}" height="{step - 6}"/>')
        parts.append(f'<text x="{left + length + 5:.1f}" y="{step * i + 15}">{count:,}</text>')
    return _figure(title, unit, "".join(parts) + "</svg>")


def _figure(title: str, unit: str, drawing: str) -> str:
    unit = f' <span class="unit">{safe(unit)}</span>' if unit else ""
    return f'<figure class="chart"><figcaption>{safe(title)}{unit}</figcaption>{drawing}</figure>'

"""One measure of several models as cells of a table: what it is called, and each model's value with its interval."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ett.evaluate.html import safe, titled
from ett.evaluate.page import DESCRIPTIONS, HIGHER
from ett.evaluate.verdict import capital, decimals, fixed, interval_of, value_of

Figure = Mapping[str, Any]
"""A metric as `Metric.to_json` writes it; {} where it was not measured."""


def metric_head(metric: str, found: Iterable[Figure], title: str = "") -> str:
    """Ready HTML: name, unit, which way is better and, where it is the same for all, the number of examples."""
    plain = metric.rpartition(".")[2]
    label, unit, way = DESCRIPTIONS.get(plain, (titled(plain), "", ""))
    sizes = {int(each.get("num_examples") or 0) for each in found} - {0}
    size = f"n\u00a0=\u00a0{max(sizes)}" if len(sizes) == 1 else ""
    notes = ", ".join(part for part in (unit, way, size) if part)
    return safe(capital(title) or label) + (f'<br><span class="unit">{safe(notes)}</span>' if notes else "")


def metric_cells(metric: str, found: Mapping[str, Figure], ranked: Collection[str], places: int = -1) -> dict[str, str]:
    """Ready HTML by model: its value, its interval below, and a star at the best of those in `ranked`.

    Args:
        places: decimal places of all figures; -1 takes as many as the narrowest interval justifies.
    """
    _, _, way = DESCRIPTIONS.get(metric.rpartition(".")[2], ("", "", ""))
    places = decimals(*map(interval_of, found.values())) if places < 0 else places
    values = {model: value_of(each) for model, each in found.items()}
    measured = [value for model, value in values.items() if model in ranked and value is not None]
    starred = ""
    if way and len({fixed(value, places) for value in measured}) > 1:
        # what reads the same is the same: no star for a digit that is not shown
        starred = fixed(max(measured) if way == HIGHER else min(measured), places)
    cells = {}
    for model, each in found.items():
        text, interval = fixed(values[model], places), interval_of(each)
        if model in ranked and text == starred:
            text = f'<span class="best" title="the best value">★ {text}</span>'
        if interval is not None and interval[0] < interval[1]:
            text += f'<br><span class="unit">{fixed(interval[0], places)} to {fixed(interval[1], places)}</span>'
        cells[model] = text
    return cells

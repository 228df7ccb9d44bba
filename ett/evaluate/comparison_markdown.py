"""A comparison as one Markdown table: every arm a row, main measures with their paired differences from the reference arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ett.evaluate.page import DESCRIPTIONS
from ett.evaluate.verdict import (
    INTERVAL,
    arm_title,
    capital,
    decimals,
    figure,
    fixed,
    interval_of,
    main_metrics,
    value_of,
)

ALSO = ("drawn_text.exact_match", "facts.text_loss", "indices_changed")
"""Measures of the table beside the main ones, where they were taken."""


def comparison_markdown(summary: Mapping[str, Any]) -> str:
    """The table with a line of explanation above it; a cell is "value (difference [low, high])"."""
    reference = str(summary["reference"])
    metrics = {metric: title for metric, (title, _) in main_metrics(summary).items()}
    for metric in ALSO:
        if any(figure(arm["metrics"], metric) for arm in summary["arms"].values()):
            metrics[metric] = DESCRIPTIONS[metric.rpartition(".")[2]][0]
    start = summary.get("start")
    columns = [_column(summary, metric) for metric in metrics]
    heads = ["", *(_head(metric, title) for metric, title in metrics.items()), "training time [s]"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    if isinstance(start, Mapping):
        lines.append("| start | " + " | ".join([*(column["start"] for column in columns), ""]) + " |")
    for arm, content in summary["arms"].items():
        name = f"**{arm_title(arm)}**" if arm == reference else arm_title(arm)
        seconds = content.get("seconds")
        cells = [*(column[arm] for column in columns), "" if seconds is None else f"{seconds:.0f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    plain = INTERVAL.replace("\u00a0", " ")
    said = f"In brackets the paired difference from {arm_title(reference)}, with its {plain} over examples and seeds."
    if left := summary.get("unfinished_seeds"):
        said += f" Not yet finished, and not in any figure: seeds {', '.join(map(str, left))}."
    return "\n".join([said, "", *lines]) + "\n"


def _head(metric: str, title: str) -> str:
    _, unit, way = DESCRIPTIONS[metric.rpartition(".")[2]]
    notes = ", ".join(part for part in (unit, way.replace(" is better", "")) if part)
    return capital(title) + (f" ({notes})" if notes else "")


def _column(summary: Mapping[str, Any], metric: str) -> dict[str, str]:
    """Arm, or "start" -> cell, all with as many decimal places."""
    reference = str(summary["reference"])
    found = {arm: figure(content["metrics"], metric) for arm, content in summary["arms"].items()}
    differences = {
        arm: (summary["differences"].get(f"{arm} - {reference}") or {}).get(metric) or {}
        for arm in found
        if arm != reference
    }
    places = decimals(*(interval_of(each) for each in differences.values()))
    cells = {arm: fixed(value_of(each), places) for arm, each in found.items()}
    for arm, difference in differences.items():
        value, ends = value_of(difference), interval_of(difference)
        if value is not None and ends is not None:
            low, high = (fixed(end, places) for end in ends)
            cells[arm] += f" ({'+' if value > 0 else ''}{fixed(value, places)} [{low}, {high}])"
    start = summary.get("start")
    metrics = start.get("metrics") if isinstance(start, Mapping) else None
    return {**cells, "start": fixed(value_of(figure(metrics, metric)), places)}

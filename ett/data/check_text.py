"""The summary of a data set's check as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ett.data.check import Summary

PROBLEMS = {
    "refused_shard": "shards refused",
    "not_utf8": "text that is not UTF-8",
    "too_long": "lines or members that are too long",
    "not_json": "lines that are no JSON object",
    "missing_field": "missing fields",
    "wrong_field": "fields that cannot be used",
    "empty_text": "empty texts",
    "unsafe_path": "paths that lead out of the data",
    "missing_picture": "missing pictures",
    "broken_picture": "broken pictures",
    "huge_picture": "pictures too large to decode",
    "duplicate_id": "duplicate ids",
    "not_encodable": "examples that the model cannot take",
}
"""Kinds of problems in words."""
_BAR = 30


def as_text(summary: Summary) -> str:
    """Counts, then every kind of problem with the first few, then the lengths and resolutions."""
    return "\n\n".join(block for block in (counts(summary), problems(summary), *_charts(summary)) if block)


def counts(summary: Summary) -> str:
    """One sentence for each count."""
    lines = [
        f"{summary['path']} ({summary['format']}): {summary['examples']:,} examples, {summary['usable']:,} usable, "
        f"{summary['pictures']:,} pictures"
    ]
    if summary["without_picture"]:
        lines.append(f"{summary['without_picture']:,} examples have no picture")
    if summary["without_answer"]:
        lines.append(f"{summary['without_answer']:,} examples have no answer to learn from")
    budget = summary["budget"]
    if budget:
        lines.append(f"a picture takes {budget['image_positions']:,} positions")
        if budget["max_length"] is not None:
            lines.append(f"{budget['over_max_length']:,} examples have more than {budget['max_length']:,} positions")
    return "\n".join(lines)


def problems(summary: Summary) -> str:
    """Every kind of problem, its count and the first few."""
    lines = []
    for kind, found in summary["problems"].items():
        lines.append(f"{PROBLEMS[kind]}: {found['count']:,}")
        lines += [f"  {message}" for message in found["first"]]
        hidden = found["count"] - len(found["first"])
        lines += [f"  and {hidden:,} more"] if hidden else []
    return "\n".join(lines) or "Nothing is wrong."


def lengths_shown(summary: Summary) -> list[tuple[str, Mapping[str, Any]]]:
    """(title, `Lengths.values`) of every length that was counted and is not empty."""
    budget = summary["budget"] or {}
    found = [
        ("Characters of the answers", summary["characters"]),
        ("Tokens of the answers", budget.get("answer_tokens")),
        ("Positions of an example", budget.get("positions")),
    ]
    return [(title, lengths) for title, lengths in found if lengths and lengths["count"]]


def spread_of(lengths: Mapping[str, Any]) -> str:
    return (
        f"{lengths['smallest']:,} to {lengths['largest']:,}, median {lengths['median']:,}, mean {lengths['mean']:,.1f}, 95% "
        f"up to {lengths['p95']:,}"
    )


def bucket_name(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _charts(summary: Summary) -> list[str]:
    blocks = [
        f"{title}: {spread_of(lengths)}\n{_bars([(bucket_name(low, high), n) for low, high, n in lengths['buckets']])}"
        for title, lengths in lengths_shown(summary)
    ]
    sizes = summary["resolutions"]
    if sizes["count"]:
        ends = "; ".join(
            f"{name} {width} x {height} ({where})"
            for name, (width, height, where) in (("smallest", sizes["smallest"]), ("largest", sizes["largest"]))
        )
        sides = _bars([(bucket_name(low, high), n) for low, high, n in sizes["longer_side"]])
        aspects = _bars([(name, n) for name, n in sizes["aspects"].items() if n])
        blocks += [f"Longer side of the pictures [pixels]: {ends}\n{sides}", f"Width : height\n{aspects}"]
    return blocks


def _bars(rows: Sequence[tuple[str, int]]) -> str:
    name_width, most = max(len(name) for name, _ in rows), max(count for _, count in rows)
    number_width = len(f"{most:,}")
    return "\n".join(
        f"  {name:>{name_width}}  {count:>{number_width},}  {'#' * -(-_BAR * count // most)}".rstrip()
        for name, count in rows
    )

"""Counts of lengths and of picture sizes, as a data set's check shows them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from typing import Any

ASPECTS = (1 / 3, 1 / 2, 3 / 4, 4 / 3, 2, 3)
"""Borders between classes of width / height; `ASPECT_NAMES` are theirs, one more."""
ASPECT_NAMES = (
    "below 1:3",
    "1:3 to 1:2",
    "1:2 to 3:4",
    "3:4 to 4:3",
    "4:3 to 2:1",
    "2:1 to 3:1",
    "3:1 and above",
)
STEPS = 4
"""Cells of the resolution plot from one power of two to the next."""


class Lengths:
    """Whole numbers >= 0, counted; buckets end before powers of two: 0, 1, 2-3, 4-7, 8-15 ..."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        self._counts[length] += 1

    def values(self) -> dict[str, Any]:
        """``count``; unless it is 0 also ``smallest``, ``median``, ``p95``, ``largest``, ``mean`` and ``buckets``, a list of
        [lowest, highest, count] without gaps."""
        total = self._counts.total()
        if not total:
            return {"count": 0}
        ordered = sorted(self._counts.items())
        return {
            "count": total,
            "smallest": ordered[0][0],
            "median": _quantile(ordered, total, 0.5),
            "p95": _quantile(ordered, total, 0.95),
            "largest": ordered[-1][0],
            "mean": sum(length * count for length, count in ordered) / total,
            "buckets": _buckets(self._counts),
        }


class Resolutions:
    """Sizes of pictures, counted in bounded memory: by longer side, by aspect, and by cell of width and height."""

    def __init__(self) -> None:
        self._count = 0
        self._sides: Counter[int] = Counter()
        self._aspects = [0] * len(ASPECT_NAMES)
        self._cells: Counter[tuple[int, int]] = Counter()
        self._smallest: tuple[int, int, str] | None = None
        self._largest: tuple[int, int, str] | None = None

    def add(self, width: int, height: int, where: str) -> None:
        """A picture of `width` x `height` [pixels], each at least 1."""
        self._count += 1
        self._sides[1 << max(width, height).bit_length() - 1] += 1
        self._aspects[bisect_right(ASPECTS, width / height)] += 1
        self._cells[math.floor(STEPS * math.log2(width)), math.floor(STEPS * math.log2(height))] += 1
        if self._smallest is None or width * height < self._smallest[0] * self._smallest[1]:
            self._smallest = (width, height, where)
        if self._largest is None or width * height > self._largest[0] * self._largest[1]:
            self._largest = (width, height, where)

    def values(self) -> dict[str, Any]:
        """``count``; unless it is 0 also ``smallest`` and ``largest`` ([width, height, where], by area), ``longer_side``
        (buckets as of `Lengths`), ``aspects`` (by name) and ``cells``: [lowest width, lowest height, count], each side of a
        cell being 2^(1/`STEPS`) times as long as its beginning."""
        if not self._count:
            return {"count": 0}
        assert self._smallest is not None
        assert self._largest is not None
        return {
            "count": self._count,
            "smallest": list(self._smallest),
            "largest": list(self._largest),
            "longer_side": _buckets(self._sides),
            "aspects": dict(zip(ASPECT_NAMES, self._aspects, strict=True)),
            "cells": [
                [round(2 ** (x / STEPS), 2), round(2 ** (y / STEPS), 2), count]
                for (x, y), count in sorted(self._cells.items())
            ],
        }


def _quantile(ordered: list[tuple[int, int]], total: int, share: float) -> int:
    """The smallest value that `share` of all values do not exceed."""
    seen = 0
    for length, count in ordered:
        seen += count
        if seen >= share * total:
            return length
    raise AssertionError("shares are at most 1")


def _buckets(counts: Counter[int]) -> list[list[int]]:
    found: Counter[int] = Counter()
    for length, count in counts.items():
        found[length.bit_length()] += count
    return [[(1 << k) >> 1, (1 << k) - 1, found[k]] for k in range(min(found), max(found) + 1)]

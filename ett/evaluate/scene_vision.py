"""What a picture of coloured shapes shows, by classic means: connected regions, colours in CIELAB, overlap with the shapes.

Nothing here was trained, so nothing can have been trained against it. GenEval's rules then say whether that is what was asked
for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from ett.data.drawn_scenes import COLOURS, POSITIONS, SHAPES, coverage

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

STANDS_OUT = 20.0
"""Least difference from the ground in CIELAB (about 2 can just be seen; the colours of the scenes differ from white by 40 to
100)."""
SMALLEST = 0.006
"""Regions of a smaller share of the picture are specks; the smallest shape that is drawn has 0.02."""
LIKENESS = 0.6
"""Least overlap (intersection over union) with the shape that a region is taken for."""
POSITION_MARGIN = 0.1
"""Share of two objects' sizes that the distance of their centres must exceed, as in GenEval."""
_NO_OFFSET = 1e-3
"""Objects that are nearer both ways, the margin taken off [pixels], lie nowhere, as in GenEval."""


@dataclass(frozen=True)
class Seen:
    """An object in a picture.

    Attributes:
        shape: one of `SHAPES`. colour: one of `COLOURS`.
        centre: (x, y), and size: (width, height) of its box [pixels].
        likeness: overlap with the shape, in [`LIKENESS`, 1].
    """

    shape: str
    colour: str
    centre: tuple[float, float]
    size: tuple[float, float]
    likeness: float


def see(picture: PIL.Image.Image) -> list[Seen]:
    """The shapes in an RGB picture with a plain ground, most alike first; what resembles none is left out."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    ground = _ground(pixels)
    distance = np.linalg.norm(lab(pixels) - lab(ground), axis=-1)
    smallest = int(np.ceil(SMALLEST * distance.size))
    found = []
    for rough in regions(distance > STANDS_OUT, smallest):
        box = _window(rough)
        colours, strength = pixels[box], distance[box]
        # blurred edges join what lies close together: half of the way to the ground is where an edge lies
        cover = _cover(colours, ground, rough[box], strength)
        for region in regions(cover > 0.5, smallest):
            ink = _ink(colours, region, strength)
            whole = np.zeros(distance.shape)
            whole[box] = np.where(_grown(region), cover, 0.0)
            seen = _shape(whole)
            if seen.likeness >= LIKENESS:
                found.append(Seen(seen.name, nearest_colour(ink), seen.centre, _size(region), seen.likeness))
    return sorted(found, key=lambda each: -each.likeness)


def shows(seen: Sequence[Seen], facts: Mapping[str, Any]) -> bool:
    """Whether objects fulfil a line of GenEval's metadata.

    Of each class in "include" there are at least so many as "count"; the most alike of them have its "color" and lie at its
    "position" (["left of", i] of those of entry i); of no class in "exclude" there are "count" or more.
    """
    chosen: list[list[Seen]] = []
    for wanted in facts["include"]:
        found = [each for each in seen if each.shape == wanted["class"]][: wanted["count"]]
        if len(found) < wanted["count"]:
            return False
        if "color" in wanted and any(each.colour != wanted["color"] for each in found):
            return False
        if "position" in wanted:
            where, entry = wanted["position"]
            if not all(_lies(one, where, other) for one in found for other in chosen[entry]):
                return False
        chosen.append(found)
    return all(
        sum(each.shape == unwanted["class"] for each in seen) < unwanted["count"]
        for unwanted in facts.get("exclude", ())
    )


def nearest_colour(rgb: Array) -> str:
    """The one of `COLOURS` that is nearest to float64[3] (sRGB in [0, 255]) in CIELAB."""
    names, values = tuple(COLOURS), lab(np.asarray(list(COLOURS.values()), dtype=np.float64))
    return names[int(np.linalg.norm(values - lab(rgb), axis=-1).argmin())]


def lab(rgb: Array) -> Array:
    """CIELAB (D65, 2 degrees) of sRGB in [0, 255], float64[..., 3] both (IEC 61966-2-1, CIE 15)."""
    scaled = rgb / 255.0
    linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
    relative = linear @ _TO_XYZ.T / _TO_XYZ.sum(axis=1)
    root = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


_TO_XYZ = np.asarray(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def regions(mask: Mask, smallest: int = 1) -> list[Mask]:
    """The connected parts of bool[H, W] (edges and corners connect) of at least so many pixels, first row first.

    The runs of each row are joined with those of the row above that they touch (union and find); the plain loop is a flood
    fill from every pixel that none has reached yet.
    """
    bounds = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(bounds == 1)
    ends = np.nonzero(bounds == -1)[1]
    numbers = _joined(rows.tolist(), starts.tolist(), ends.tolist())
    labels = np.full(mask.shape, -1)
    labels[mask] = np.repeat(numbers, ends - starts)
    sizes = np.bincount(labels[mask])
    return [labels == number for number in np.flatnonzero(sizes >= max(1, smallest))]


def _joined(rows: Sequence[int], starts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Of each run of pixels [start, end) in reading order, the number of the first run that it hangs together with."""
    parent = list(range(len(rows)))

    def first(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above = 0
    for run, row in enumerate(rows):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] < starts[run]):
            above += 1
        other = above
        while rows[other] == row - 1 and starts[other] <= ends[run]:
            one, two = first(run), first(other)
            parent[max(one, two)] = min(one, two)
            other += 1
    return [first(run) for run in range(len(rows))]


def _ground(pixels: Array) -> Array:
    """The median colour of the picture's rim, two pixels wide."""
    rim = np.ones(pixels.shape[:2], dtype=bool)
    rim[2:-2, 2:-2] = False
    return np.asarray(np.median(pixels[rim], axis=0))


def _ink(pixels: Array, region: Mask, distance: Array) -> Array:
    """The median colour of the half of a region that stands out most: its edges are mixed with the ground."""
    strong = region & (distance >= np.median(distance[region]))
    return np.asarray(np.median(pixels[strong], axis=0))


def _cover(pixels: Array, ground: Array, region: Mask, distance: Array) -> Array:
    """float64[H, W] in [0, 1]: share of the region's colour in each of its pixels, the rest being the ground."""
    towards = _ink(pixels, region, distance) - ground
    share = (pixels - ground) @ towards / max(float(towards @ towards), 1e-9)
    return np.where(region, share.clip(0, 1), 0.0)


def _grown(region: Mask) -> Mask:
    padded = np.pad(region, 1)
    height, width = region.shape
    return np.any([padded[r : r + height, c : c + width] for r in range(3) for c in range(3)], axis=0)


def _window(region: npt.NDArray[Any], margin: int = 0) -> tuple[slice, slice]:
    """The rows and columns of a region, with a margin as far as the picture goes."""
    rows, columns = np.nonzero(region)
    return (
        slice(max(0, int(rows.min()) - margin), int(rows.max()) + 1 + margin),
        slice(max(0, int(columns.min()) - margin), int(columns.max()) + 1 + margin),
    )


def _size(region: Mask) -> tuple[float, float]:
    rows, columns = np.nonzero(region)
    return float(np.ptp(columns) + 1), float(np.ptp(rows) + 1)


@dataclass(frozen=True)
class _Match:
    name: str
    likeness: float
    centre: tuple[float, float]


def _shape(cover: Array) -> _Match:
    """The shape that overlaps most, laid over `cover` with the same area and the same centroid."""
    area = cover.sum()
    # no shape of this area reaches farther from its centroid than the square of the area is wide
    window = _window(cover, margin=int(np.ceil(np.sqrt(area))) + 1)
    cover, top, left = cover[window], window[0].start, window[1].start
    ys, xs = np.indices(cover.shape) + 0.5
    centre = (float((cover * xs).sum() / area), float((cover * ys).sum() / area))
    found = _Match(SHAPES[0], 0.0, centre)
    for name in SHAPES:
        unit, (across, down) = _unit(name)
        radius = float(np.sqrt(area / unit))
        laid = coverage(name, (centre[0] - across * radius, centre[1] - down * radius), radius, max(cover.shape))
        laid = laid[: cover.shape[0], : cover.shape[1]]
        likeness = float(np.minimum(cover, laid).sum() / np.maximum(cover, laid).sum())
        if likeness > found.likeness:
            found = _Match(name, likeness, (centre[0] + left, centre[1] + top))
    return found


@lru_cache(maxsize=len(SHAPES))
def _unit(shape: str) -> tuple[float, tuple[float, float]]:
    """(area of a shape of radius 1, its centroid (x, y) from its centre)."""
    size, radius = 128, 48.0
    cover = coverage(shape, (size / 2, size / 2), radius, size).astype(np.float64)
    ys, xs = (np.indices(cover.shape) + 0.5 - size / 2) / radius
    area = cover.sum()
    return float(area / radius**2), (float((cover * xs).sum() / area), float((cover * ys).sum() / area))


def _lies(one: Seen, where: str, other: Seen) -> bool:
    """Whether one object lies left of, right of, above or below another: GenEval's rule, centroids in place of boxes' centres.

    Of the offset the margin is taken off each way, and what is left of it must be more than half of the whole offset's length.
    Two may hold at once ("left of" and "above"), or none: the margin shortens the one and not the other.
    """
    offset = np.subtract(one.centre, other.centre)
    beyond = np.maximum(np.abs(offset) - POSITION_MARGIN * np.add(one.size, other.size), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < _NO_OFFSET):
        return False
    return float(beyond @ np.asarray(POSITIONS[where])) / float(np.linalg.norm(offset)) > 0.5

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
    found = []
    for rough in regions(distance > STANDS_OUT):
        # blurred edges join what lies close together: half of the way to the ground is where an edge lies
        cover = _cover(pixels, ground, rough, distance)
        for region in regions(cover > 0.5):
            if region.sum() >= SMALLEST * region.size:
                ink = _ink(pixels, region, distance)
                seen = _shape(np.where(_grown(region), cover, 0.0))
                if seen.likeness >= LIKENESS:
                    found.append(Seen(seen.name, nearest_colour(ink), seen.centre, _box(region), seen.likeness))
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


def regions(mask: Mask) -> list[Mask]:
    """The connected parts of bool[H, W] (edges and corners connect), first row first.

    Each pixel takes the least number among its own and its neighbours' until nothing changes; the plain loop is a flood fill
    from every pixel that none has reached yet.
    """
    height, width = mask.shape
    outside = height * width
    labels = np.where(mask, np.arange(outside).reshape(height, width), outside)
    while True:
        padded = np.pad(labels, 1, constant_values=outside)
        least = np.min(
            [padded[row : row + height, column : column + width] for row in range(3) for column in range(3)], axis=0
        )
        spread = np.where(mask, least, outside)
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels[mask])]
        labels = spread


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


def _box(region: Mask) -> tuple[float, float]:
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
            found = _Match(name, likeness, centre)
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

    Both may hold at once ("left of" and "above"), and none where the centres are closer than the margin.
    """
    offset = np.subtract(one.centre, other.centre)
    beyond = np.maximum(np.abs(offset) - POSITION_MARGIN * np.add(one.size, other.size), 0) * np.sign(offset)
    length = float(np.linalg.norm(beyond))
    return length > 0 and float(beyond @ np.asarray(POSITIONS[where])) / length > 0.5

"""Scenes of coloured shapes on white, drawn from a seed, and what they show in the form of GenEval's prompts.

The six categories (`TAGS`), the wording and the metadata are those of GenEval (arXiv 2310.11513); its things are shapes here,
so that a program can tell them without a detector (``ett.evaluate.scene_vision``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw

from ett.data.drawn_text import TEXT_COLOURS, Rgb
from ett.data.sources import Source, conversation, split_by_hash
from ett.errors import DataError, unknown
from ett.images import WHITE
from ett.types import Example

SPLITS = ("train", "validation", "heldout")
"""Pictures differ by seed; of two objects, colours, positions and attributes the prompts differ too (`split_of`)."""
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's names of its categories."""
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: Mapping[str, Rgb] = {
    name: TEXT_COLOURS[name]
    for name in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black")
}
"""Name -> sRGB: GenEval's colours but for white, which is the ground."""
POSITIONS: Mapping[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""What stands in a prompt -> direction in which the first object lies, x to the right and y down."""
COUNTS: Mapping[int, str] = {2: "two", 3: "three", 4: "four"}
QUESTIONS = ("What does the picture show?", "What is in the image?", "Describe the picture.")

_RADII = {1: (0.2, 0.34), 2: (0.17, 0.22), 3: (0.15, 0.18), 4: (0.15, 0.17)}
"""Number of objects -> (least, most) radius as a share of the picture's side."""
_GAP, _MARGIN = 0.08, 0.03
"""Between two objects, and between an object and the edge, at least [share of the side]."""
_FINER = 8
"""Pictures are drawn so many times larger and averaged."""
_SMALLEST_SIZE = 32
_TRAIN_LENGTH, _HELD_OUT_LENGTH = 1_000_000, 512
_SHARES = {"train": range(70), "validation": range(70, 85), "heldout": range(85, 100)}
"""Of 100 equal shares of all prompts, by hash."""


@dataclass(frozen=True)
class Thing:
    """A shape in a picture: its colour's name, its centre (x, y) and its radius, shares of the picture's side."""

    shape: str
    colour: str
    centre: tuple[float, float]
    radius: float


class DrawnScenes(Source):
    """Pictures of one to four shapes, with GenEval's prompt as the answer, or with a question about one of them; a pure
    function of (settings, seed, index).

    Metadata: source, split, question_kind (the tag), things (as they were drawn), and what a line of GenEval's file holds: tag,
    include, prompt, for "counting" also exclude.

    Args:
        split: one of `SPLITS`.
        size: side of the square picture [pixels], at least 32.
        short_answers: ask for a shape, a number, a colour or a place, and answer with it alone (`question_about`).
        length: number of examples; by default 1,000,000 for train and 512 for the others.
        seed: another one gives other pictures; the prompts of a split stay in it.

    Raises:
        DataError: an unknown split, or a size or length out of range.
    """

    name = "drawn-scenes"
    questions = "scene-questions"
    """The name with short answers."""

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = 64,
        short_answers: bool = False,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise DataError(unknown("split of drawn scenes", split, SPLITS))
        if size < _SMALLEST_SIZE:
            raise DataError(f"Drawn scenes need a size of at least {_SMALLEST_SIZE} pixels, not {size}.")
        if length is not None and length < 1:
            raise DataError(f"Drawn scenes need a length of at least 1, not {length}.")
        self.split, self.size, self.short_answers, self.seed = split, size, short_answers, seed
        self.name = self.questions if short_answers else DrawnScenes.name
        self._length = length if length is not None else _TRAIN_LENGTH if split == "train" else _HELD_OUT_LENGTH

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        facts, rng = self._asked(index)
        things = _placed(facts, rng)
        about = question_about(facts, rng) if self.short_answers else (rng.choice(QUESTIONS), facts["prompt"])
        return Example(
            id=f"{self.name}/{self.split}/{self.seed}/{index}",
            messages=conversation(*about),
            images=(paint(things, self.size),),
            metadata={
                "source": self.name,
                "split": self.split,
                "question_kind": facts["tag"],
                "things": [[each.shape, each.colour, *each.centre, each.radius] for each in things],
                **facts,
            },
        )

    def facts(self, index: int) -> dict[str, Any]:
        """What example `index` asks for, without drawing it: a line of GenEval's file."""
        return self._asked(index)[0]

    def _asked(self, index: int) -> tuple[dict[str, Any], random.Random]:
        if not 0 <= index < self._length:
            raise IndexError(f"example {index} of {self._length}")
        # Strings seed random.Random by SHA-512: the same in every process, whatever PYTHONHASHSEED.
        rng = random.Random(f"{DrawnScenes.name}/{self.seed}/{self.split}/{index}")
        tag = rng.choice(TAGS)
        while True:
            facts = _facts(tag, rng)
            if split_of(facts) in (None, self.split):
                return facts, rng


def question_about(facts: Mapping[str, Any], rng: random.Random) -> tuple[str, str]:
    """(question, short answer) about a picture that fulfils `facts`; of two things either may be asked for. The wording is
    ours."""
    tag, include = facts["tag"], facts["include"]
    first = include[0]["class"]
    if tag == "single_object":
        return "Which shape is it?", first
    if tag == "counting":
        return f"How many {_plural(first)} are there?", COUNTS[include[0]["count"]]
    if tag == "position":
        # the object that is placed comes second
        other = include[1]["class"]
        return f"Where is the {other}?", f"{include[1]['position'][0]} the {first}"
    asked = rng.choice(include)
    if tag == "two_object":
        (beside,) = (each["class"] for each in include if each is not asked)
        return f"Which shape is there beside the {beside}?", asked["class"]
    assert tag in ("colors", "color_attr")
    return f"What colour is the {asked['class']}?", asked["color"]


def split_of(facts: Mapping[str, Any]) -> str | None:
    """The one split that a prompt belongs to; None for single objects and counts, which are too few to be divided."""
    if facts["tag"] in ("single_object", "counting"):
        return None
    return split_by_hash(f"drawn-scenes/{facts['prompt']}", _SHARES)


# -- what is asked for ---------------------------------------------------------------------------------------------------


def _facts(tag: str, rng: random.Random) -> dict[str, Any]:
    """A prompt and its conditions, any split."""
    first, second = rng.sample(SHAPES, 2)
    colours = rng.sample(tuple(COLOURS), 2)
    one, other = {"class": first, "count": 1}, {"class": second, "count": 1}
    include: list[dict[str, Any]] = [one]
    exclude = {}
    if tag == "single_object":
        what = f"a {first}"
    elif tag == "two_object":
        what, include = f"a {first} and a {second}", [one, other]
    elif tag == "counting":
        count = rng.choice(tuple(COUNTS))
        what, include = f"{COUNTS[count]} {_plural(first)}", [{"class": first, "count": count}]
        exclude = {"exclude": [{"class": first, "count": count + 1}]}
    elif tag == "colors":
        what, include = f"{_article(colours[0])} {first}", [{**one, "color": colours[0]}]
    elif tag == "position":
        where = rng.choice(tuple(POSITIONS))
        # the object that the other one is placed by comes first
        what, include = f"a {first} {where} a {second}", [other, {**one, "position": [where, 0]}]
    else:
        what = f"{_article(colours[0])} {first} and {_article(colours[1])} {second}"
        include = [{**one, "color": colours[0]}, {**other, "color": colours[1]}]
    return {"tag": tag, "include": include, **exclude, "prompt": f"a photo of {what}"}


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _plural(word: str) -> str:
    return f"{word}es" if word.endswith("s") else f"{word}s"


# -- how it is drawn -----------------------------------------------------------------------------------------------------


def _placed(facts: Mapping[str, Any], rng: random.Random) -> list[Thing]:
    """Things that fulfil `facts`, apart from each other; what the prompt leaves open is drawn at random."""
    shapes = [each["class"] for each in facts["include"] for _ in range(each["count"])]
    if facts["tag"] == "counting":
        colours = [rng.choice(tuple(COLOURS))] * len(shapes)
    else:
        colours = [each.get("color") or rng.choice(tuple(COLOURS)) for each in facts["include"]]
    direction = next((POSITIONS[each["position"][0]] for each in facts["include"] if "position" in each), None)
    while True:
        radii = [rng.uniform(*_RADII[len(shapes)]) for _ in shapes]
        centres = [
            (rng.uniform(r + _MARGIN, 1 - r - _MARGIN), rng.uniform(r + _MARGIN, 1 - r - _MARGIN)) for r in radii
        ]
        placed = list(zip(centres, radii, strict=True))
        apart = all(math.dist(a, b) >= r + s + _GAP for (a, r), (b, s) in combinations(placed, 2))
        if apart and (direction is None or _clearly(direction, *centres)):
            return [Thing(*each) for each in zip(shapes, colours, centres, radii, strict=True)]


def _clearly(direction: tuple[int, int], start: tuple[float, float], end: tuple[float, float]) -> bool:
    """Whether `end` lies in this direction from `start`, at most 27 degrees off."""
    across, down = end[0] - start[0], end[1] - start[1]
    along = across * direction[0] + down * direction[1]
    return along > 2 * abs(across * direction[1] + down * direction[0])


def paint(things: Sequence[Thing], size: int) -> PIL.Image.Image:
    """RGB[size, size] with the things on white, later ones on top."""
    pixels = np.full((size, size, 3), WHITE, dtype=np.float32)
    for thing in things:
        cover = coverage(thing.shape, (thing.centre[0] * size, thing.centre[1] * size), thing.radius * size, size)
        pixels += cover[:, :, None] * (np.asarray(COLOURS[thing.colour], dtype=np.float32) - pixels)
    return PIL.Image.fromarray(np.rint(pixels).astype(np.uint8))


def coverage(shape: str, centre: tuple[float, float], radius: float, size: int) -> npt.NDArray[np.float32]:
    """float32[size, size] in [0, 1]: how much of each pixel a shape covers.

    Args:
        shape: one of `SHAPES`. centre: (x, y), and radius [pixels]; pixel (0, 0) is centred at (0.5, 0.5).
    """
    canvas = PIL.Image.new("L", (size * _FINER, size * _FINER))
    pen = PIL.ImageDraw.Draw(canvas)
    x, y, r = centre[0] * _FINER - 0.5, centre[1] * _FINER - 0.5, radius * _FINER
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            hole = 0.55 * r
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        pen.polygon([(x + r * across, y + r * down) for across, down in _corners(shape)], fill=255)
    return np.asarray(canvas.reduce(_FINER), dtype=np.float32) / 255.0


def _corners(shape: str) -> list[tuple[float, float]]:
    """Corners (x, y) of a shape with straight sides, y down; none is farther than 1 from (0, 0)."""
    if shape == "square":
        return [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)]
    if shape == "triangle":
        return [(0.0, -1.0), (0.87, 0.5), (-0.87, 0.5)]
    if shape == "cross":
        long, wide = 0.95, 0.3
        quarter = [(-wide, -long), (wide, -long), (wide, -wide)]
        corners = []
        for _ in range(4):
            corners += quarter
            quarter = [(-down, across) for across, down in quarter]
        return corners
    assert shape == "star"
    lengths = (1.0, 0.42)
    return [
        (lengths[i % 2] * math.sin(math.pi * i / 5), -lengths[i % 2] * math.cos(math.pi * i / 5)) for i in range(10)
    ]

"""Text in images, drawn from a seed: words, numbers and letter strings in several fonts, colours and places.

Reading is the paper's own example of what a frozen tokenizer loses. Words and fonts are real (``ett/data/builtin``);
the wording of the questions is ours.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from ett.data.sources import Source, conversation, split_by_hash
from ett.errors import DataError, unknown
from ett.types import Example

BUILTIN = Path(__file__).with_name("builtin")

SPLITS = ("train", "validation", "word", "font")
"""train; validation: unseen strings; word: held-out strings; font: held-out strings in held-out fonts. The last two are
for final figures only."""

KINDS = ("word", "number", "letters", "colour")
"""What is drawn and asked for; "colour" draws a word and asks for its colour."""

DOCUMENT = "document"
"""The kind that draws several lines of words."""

# Ours, all of them.
READ_QUESTIONS = (
    "What is written?",
    "Read the text.",
    "Read this.",
    "What does the text say?",
    "What does it say?",
    "Which characters are shown?",
    "What is written in the picture?",
    "What text is in the image?",
    "Which word is this?",
    "Transcribe the text.",
)
DOCUMENT_QUESTIONS = ("What is written?", "Read the text.", "Transcribe the text.", "What does the page say?")
SPELL_QUESTIONS = ("Spell the text.", "Spell what is written, letter by letter.")
COLOUR_QUESTIONS = ("What colour is the text?", "In which colour is the text written?")
PLACE_QUESTIONS: Mapping[int, tuple[str, ...]] = {
    0: ("What is the first character?", "Which character comes first?"),
    -1: ("What is the last character?", "Which character comes last?"),
}
"""Position in the text -> how it is asked for."""

Rgb = tuple[int, int, int]
TEXT_COLOURS: Mapping[str, Rgb] = {
    "black": (10, 10, 10),
    "white": (250, 250, 250),
    "red": (215, 25, 30),
    "orange": (250, 130, 10),
    "yellow": (250, 220, 20),
    "green": (20, 140, 50),
    "blue": (25, 70, 210),
    "purple": (120, 30, 160),
    "pink": (250, 120, 180),
    "brown": (110, 65, 25),
    "grey": (125, 125, 125),
}
"""Name -> sRGB."""

BACKGROUNDS = ("flat", "gradient", "stripes", "shapes", "noise")
"""From calm to busy."""

LINE_HEIGHT = 1.3
"""Between the lines of a document, in font sizes, at most."""
WORDS_A_LINE = 2
"""At most, in a document."""
_MARGIN = 2
"""Clear pixels between the text and the edge."""
_SMALLEST_SIZE = 32
MOST_CHARACTERS = 12
_TRAIN_LENGTH, _HELD_OUT_LENGTH = 1_000_000, 512
# Of 100 equal shares of all strings, by hash.
_STRING_SHARES = {"train": range(82), "validation": range(82, 88), "word": range(88, 94), "font": range(94, 100)}


@dataclass(frozen=True)
class Look:
    """The difficulty map: every range at one difficulty, linear from EASY (0) to HARD (1).

    Attributes:
        height: (least, most) font size as a share of the picture's side, before it is shrunk to fit its width.
        smallest: font size [pixels] below which no text is shrunk; longer strings are drawn again.
        contrast: least WCAG contrast ratio between the text and each background colour.
        rotation: greatest turn either way [degrees].
        characters: (fewest, most) in a string.
        clutter: how many of `BACKGROUNDS` are in use (rounded; calm ones first).
        noise: standard deviation of the noise background [of 255].
        blend: greatest share of the background that shines through the text, in [0, 1].
    """

    height: tuple[float, float]
    smallest: float
    contrast: float
    rotation: float
    characters: tuple[float, float]
    clutter: float
    noise: float
    blend: float

    @classmethod
    def at(cls, difficulty: float) -> Look:
        """The ranges at `difficulty` in [0, 1]."""

        def between(easy: float, hard: float) -> float:
            return easy + difficulty * (hard - easy)

        return cls(
            height=(between(0.34, 0.15), between(0.52, 0.30)),
            smallest=between(17.0, 8.0),
            contrast=between(4.5, 2.2),
            rotation=between(0.0, 24.0),
            characters=(between(2, 4), between(4, 10)),
            clutter=between(1.0, len(BACKGROUNDS)),
            noise=between(0.0, 28.0),
            blend=between(0.0, 0.25),
        )


@dataclass(frozen=True)
class Font:
    """One font family of the package."""

    name: str
    path: str
    held_out: bool


@lru_cache(maxsize=1)
def fonts() -> Sequence[Font]:
    """Every font, in a fixed order."""
    folder = BUILTIN / "fonts"
    listing = json.loads((folder / "fonts.json").read_text(encoding="utf-8"))
    return tuple(Font(name, str(folder / f"{name}.ttf"), facts["held_out"]) for name, facts in sorted(listing.items()))


@lru_cache(maxsize=1)
def words() -> Sequence[str]:
    """Every word, lower case, 3 to 10 letters."""
    return tuple((BUILTIN / "words.txt").read_text(encoding="utf-8").split())


def split_of(text: str) -> str:
    """The one split that a string belongs to, whatever its kind, case, font or look."""
    return split_by_hash(f"drawn-text:{text.lower()}", _STRING_SHARES)


class DrawnText(Source):
    """Pictures of short texts with what is written as the answer; a pure function of (settings, seed, index).

    Words are drawn in lower or upper case, letter strings too; the answer has the case of the picture. Metadata:
    source, split, text, question_kind (the kind), font, colour, background, font_size [pixels], rotation [degrees],
    difficulty.

    Args:
        split: one of `SPLITS`.
        size: side of the square picture [pixels], at least 32.
        difficulty: in [0, 1], see `Look`; up to 0.5 a person reads every picture of 64 pixels.
        kinds: some of `KINDS` and `DOCUMENT`, drawn equally often.
        spelled: answers are spelled, "h e l l o" (colours and documents are not).
        characters: (fewest, most) characters of letter strings and numbers, and (at least 3, most) of words; None takes the
            difficulty's.
        lines: (fewest, most) lines of a document; no more than fit. Their words are the split's.
        short_answers: ask for the first or the last character, and answer with it alone; of words, numbers and letter strings.
        length: number of examples; by default 1,000,000 for train and 512 for the others.
        seed: another one gives other pictures; the strings of a split stay in it.

    Raises:
        DataError: an unknown split or kind, or a size, difficulty or length out of range.
    """

    name = "drawn-text"
    questions = "text-questions"
    """The name with short answers."""

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = 96,
        difficulty: float = 0.5,
        kinds: Sequence[str] = ("word", "number", "letters"),
        spelled: bool = False,
        characters: tuple[int, int] | None = None,
        lines: tuple[int, int] = (2, 4),
        short_answers: bool = False,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise DataError(unknown("split of drawn text", split, SPLITS))
        for kind in kinds:
            if kind not in (*KINDS, DOCUMENT):
                raise DataError(unknown("kind of drawn text", kind, (*KINDS, DOCUMENT)))
        if not kinds:
            raise DataError(f"Drawn text needs at least one kind. Allowed: {', '.join((*KINDS, DOCUMENT))}.")
        if size < _SMALLEST_SIZE:
            raise DataError(f"Drawn text needs a size of at least {_SMALLEST_SIZE} pixels, not {size}.")
        if not 0.0 <= difficulty <= 1.0:
            raise DataError(f"The difficulty of drawn text lies in [0, 1]; {difficulty} does not.")
        if short_answers and (spelled or not set(kinds) <= {"word", "number", "letters"}):
            raise DataError("short_answers is for words, numbers and letter strings that are not spelled.")
        if length is not None and length < 1:
            raise DataError(f"Drawn text needs a length of at least 1, not {length}.")
        self.split, self.size, self.difficulty, self.seed = split, size, difficulty, seed
        self.kinds, self.spelled, self.short_answers = tuple(kinds), spelled, short_answers
        self.name = self.questions if short_answers else DrawnText.name
        self._length = length if length is not None else _TRAIN_LENGTH if split == "train" else _HELD_OUT_LENGTH
        self._look = Look.at(difficulty)
        if characters is not None:
            fewest, most = characters
            if not 1 <= fewest <= most <= MOST_CHARACTERS or (most < 3 and {"word", "colour"} & set(kinds)):
                raise DataError(
                    f"characters = {list(characters)} must be two numbers in [1, {MOST_CHARACTERS}], the smaller first; words "
                    "have at least 3."
                )
            self._look = replace(self._look, characters=(fewest, most))
        if not 1 <= lines[0] <= lines[1]:
            raise DataError(f"lines = {list(lines)} must be two numbers of at least 1, the smaller first.")
        fitting = int((size - 2 * _MARGIN) / (LINE_HEIGHT * self._smallest))
        if DOCUMENT in kinds and fitting < lines[0]:
            raise DataError(
                f"Of lines of at least {self._smallest} pixels, {size} pixels hold {fitting}, not {lines[0]}. Choose a larger "
                "size, fewer lines or a higher difficulty, where letters may be smaller."
            )
        self._lines = (lines[0], max(lines[0], min(lines[1], fitting)))
        self._fonts = [font for font in fonts() if font.held_out == (split == "font")]
        self._words = _words_of(split, round(self._look.characters[1]))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._length:
            raise IndexError(f"example {index} of {self._length}")
        # Strings seed random.Random by SHA-512: the same in every process, whatever PYTHONHASHSEED.
        rng = random.Random(f"{DrawnText.name}/{self.seed}/{self.split}/{index}")
        kind = rng.choice(self.kinds)
        text, font, mask = self._fitting_text(kind, rng)
        colour_name, image, background = _paint(mask.image, self.size, self._look, rng)
        if kind == "colour":
            question, answer = rng.choice(COLOUR_QUESTIONS), colour_name
        elif kind == DOCUMENT:
            text = " ".join(text.split())
            question, answer = rng.choice(DOCUMENT_QUESTIONS), text
        elif self.short_answers:
            place = rng.choice(tuple(PLACE_QUESTIONS))
            question, answer = rng.choice(PLACE_QUESTIONS[place]), text[place]
        elif self.spelled:
            question, answer = rng.choice(SPELL_QUESTIONS), " ".join(text)
        else:
            question, answer = rng.choice(READ_QUESTIONS), text
        return Example(
            id=f"{self.name}/{self.split}/{self.seed}/{index}",
            messages=conversation(question, answer),
            images=(image,),
            metadata={
                "source": self.name,
                "split": self.split,
                "text": text,
                "question_kind": kind,
                "font": font.name,
                "colour": colour_name,
                "background": background,
                "font_size": mask.font_size,
                "rotation": mask.rotation,
                "difficulty": self.difficulty,
            },
        )

    def _fitting_text(self, kind: str, rng: random.Random) -> tuple[str, Font, _Mask]:
        """A string of this split that is legible inside the picture in a font of this split."""
        for _ in range(100):
            text, font = self._string(kind, rng), rng.choice(self._fonts)
            size = round(self.size * rng.uniform(*self._look.height))
            turn = rng.uniform(-self._look.rotation, self._look.rotation)
            mask = _write(text, font, size, turn, self._smallest, self.size)
            if mask is not None and mask.image.width <= self.size - 2 * _MARGIN:
                return text, font, mask
        raise AssertionError(f"nothing fits {self.size} pixels at difficulty {self.difficulty}")

    @property
    def _smallest(self) -> int:
        """The least font size [pixels]."""
        return max(1, round(min(self._look.smallest, self.size * self._look.height[0])))

    def _string(self, kind: str, rng: random.Random) -> str:
        if kind == DOCUMENT:
            counts = [rng.randint(1, WORDS_A_LINE) for _ in range(rng.randint(*self._lines))]
            return "\n".join(" ".join(rng.choice(self._words) for _ in range(count)) for count in counts)
        if kind in ("word", "colour"):
            word = rng.choice(self._words)
            return word.upper() if rng.random() < 0.25 else word
        fewest, most = (round(count) for count in self._look.characters)
        while True:
            count = rng.randint(fewest, most)
            if kind == "number":
                text = str(rng.randrange(10 ** (count - 1), 10**count))
            else:
                text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=count))
            if split_of(text) == self.split:
                return text.upper() if rng.random() < 0.5 else text


@lru_cache(maxsize=64)
def _words_of(split: str, longest: int) -> Sequence[str]:
    return tuple(word for word in words() if len(word) <= longest and split_of(word) == split)


@dataclass(frozen=True)
class _Mask:
    """Coverage of the text, cropped to it: uint8[h, w]."""

    image: PIL.Image.Image
    font_size: int
    rotation: float


@lru_cache(maxsize=1024)
def _load_font(path: str, size: int) -> PIL.ImageFont.FreeTypeFont:
    # Basic layout: the other one is missing from some builds of Pillow and places letters differently.
    return PIL.ImageFont.truetype(path, size, layout_engine=PIL.ImageFont.Layout.BASIC)


def _write(text: str, font: Font, size: int, rotation: float, smallest: int, side: int) -> _Mask | None:
    """The text at `size`, or at the largest size below it that fits a square of `side`; None if that is too small."""
    room = side - 2 * _MARGIN
    while size >= smallest:
        mask = _rotated(text, _load_font(font.path, size), rotation)
        over = max(mask.width / room, mask.height / room)
        if over <= 1.0:
            return _Mask(mask, size, round(rotation, 2))
        size = min(size - 1, int(size / over))
    return None


def _rotated(text: str, font: PIL.ImageFont.FreeTypeFont, rotation: float) -> PIL.Image.Image:
    if "\n" in text:
        left, top, right, bottom = PIL.ImageDraw.Draw(PIL.Image.new("L", (1, 1))).textbbox((0, 0), text, font=font)
    else:
        left, top, right, bottom = font.getbbox(text)
    # Two pixels around: hinting and italics reach a little outside the box.
    canvas = PIL.Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    PIL.ImageDraw.Draw(canvas).text((2 - left, 2 - top), text, fill=255, font=font)
    if abs(rotation) > 0.5:
        canvas = canvas.rotate(rotation, PIL.Image.Resampling.BICUBIC, expand=True)
    box = canvas.getbbox()
    assert box is not None, f"{text!r} has no ink"
    return canvas.crop(box)


def _paint(mask: PIL.Image.Image, side: int, look: Look, rng: random.Random) -> tuple[str, PIL.Image.Image, str]:
    """(name of the text's colour, the picture RGB[side, side], the kind of background)."""
    name = rng.choice(tuple(TEXT_COLOURS))
    # Colours of middling brightness stand out from nothing as much as easy pictures must. Draw again.
    while not _reachable(name, look.contrast):
        name = rng.choice(tuple(TEXT_COLOURS))
    ink = TEXT_COLOURS[name]
    kind = BACKGROUNDS[rng.randrange(max(1, round(look.clutter)))]
    pixels = _background(kind, side, _background_colours(ink, look.contrast, rng), look.noise, rng)
    x = rng.randint(_MARGIN, side - _MARGIN - mask.width)
    y = rng.randint(_MARGIN, side - _MARGIN - mask.height)
    opacity = 1.0 - rng.uniform(0.0, look.blend)
    cover = (np.asarray(mask, dtype=np.float32) * (opacity / 255.0))[:, :, None]
    area = pixels[y : y + mask.height, x : x + mask.width]
    area += cover * (np.asarray(ink, dtype=np.float32) - area)
    return name, PIL.Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8)), kind


def _background_colours(ink: Rgb, contrast: float, rng: random.Random) -> Sequence[Rgb]:
    """Three colours that all stand out from `ink` by at least `contrast`."""
    colours: list[Rgb] = []
    while len(colours) < 3:
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        # Even white and black stand out: pale and dark colours are drawn as often as vivid ones.
        anchor, share = rng.choice((0, 255)), rng.random()
        colour = (_mix(colour[0], anchor, share), _mix(colour[1], anchor, share), _mix(colour[2], anchor, share))
        if contrast_ratio(ink, colour) >= contrast:
            colours.append(colour)
    return colours


def _mix(value: int, anchor: int, share: float) -> int:
    return round(value + share * (anchor - value))


def _background(
    kind: str, side: int, colours: Sequence[Rgb], noise: float, rng: random.Random
) -> npt.NDArray[np.float32]:
    """float32[side, side, 3] in [0, 255], around the given colours."""
    first, second = (np.asarray(colour, dtype=np.float32) for colour in colours[:2])
    if kind == "shapes":
        return _shapes(side, colours, rng)
    if kind in ("gradient", "stripes"):
        across, down = rng.uniform(-1, 1), rng.uniform(-1, 1)
        ramp = _ramp(side, across, down)
        if kind == "stripes":
            period = rng.uniform(0.1, 0.35)
            ramp = ((ramp / period) % 1.0 > 0.5).astype(np.float32)
        return first + ramp[:, :, None] * (second - first)
    pixels = np.empty((side, side, 3), np.float32)
    pixels[:] = first
    if kind == "noise":
        generator = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
        pixels += noise * generator.standard_normal((side, side, 3), dtype=np.float32)
    return pixels


def _ramp(side: int, across: float, down: float) -> npt.NDArray[np.float32]:
    """float32[side, side] in [0, 1], linear along (across, down)."""
    steps = np.linspace(0.0, 1.0, side, dtype=np.float32)
    ramp = across * steps[None, :] + down * steps[:, None]
    low, high = ramp.min(), ramp.max()
    scaled: npt.NDArray[np.float32] = (ramp - low) / max(float(high - low), 1e-6)
    return scaled


def _shapes(side: int, colours: Sequence[Rgb], rng: random.Random) -> npt.NDArray[np.float32]:
    image = PIL.Image.new("RGB", (side, side), colours[0])
    draw = PIL.ImageDraw.Draw(image)
    for _ in range(rng.randint(3, 7)):
        x, y, width = rng.uniform(-0.2, 1) * side, rng.uniform(-0.2, 1) * side, rng.uniform(0.1, 0.5) * side
        box = (x, y, x + width, y + rng.uniform(0.5, 1.5) * width)
        colour = rng.choice(colours[1:])
        shape = rng.randrange(3)
        if shape == 0:
            draw.ellipse(box, fill=colour)
        elif shape == 1:
            draw.rectangle(box, fill=colour)
        else:
            draw.line(box, fill=colour, width=max(1, side // 32))
    return np.asarray(image).astype(np.float32)


def contrast_ratio(one: Rgb, other: Rgb) -> float:
    """WCAG 2.2 contrast ratio of two sRGB colours, in [1, 21]."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


_LINEAR = tuple(v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (n / 255 for n in range(256)))


def _luminance(colour: Rgb) -> float:
    red, green, blue = colour
    return 0.2126 * _LINEAR[red] + 0.7152 * _LINEAR[green] + 0.0722 * _LINEAR[blue]


@lru_cache(maxsize=1024)
def _reachable(colour: str, contrast: float) -> bool:
    """Whether enough backgrounds stand out from a text colour: black or white by more than the contrast."""
    ink = TEXT_COLOURS[colour]
    return max(contrast_ratio(ink, (0, 0, 0)), contrast_ratio(ink, (255, 255, 255))) >= 1.1 * contrast

"""A sheet of drawings beside what was asked for and beside what the model may have copied: its nearest training pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ett.data.artwork import ArtworkNames
from ett.errors import DataError
from ett.evaluate.drawing_judges import Judged
from ett.evaluate.frechet import pooled_features
from ett.images import WHITE, from_array
from ett.losses.perceptual import Lite0Features
from ett.model.processing import EttProcessor

CELL, MARGIN, CAPTION = 96, 8, 14
"""Side of a picture, space around it, and height of the words under it [pixels]."""
HEADINGS = ("drawn", "asked for", "nearest trained on")


@dataclass(frozen=True)
class Compared:
    """One drawing: what asked for it, the drawing, the real picture, the nearest training picture and its name."""

    prompt: str
    drawn: PIL.Image.Image
    wanted: PIL.Image.Image
    nearest: PIL.Image.Image
    nearest_name: str


def compare_drawings(found: Judged, processor: EttProcessor, network: Lite0Features, count: int) -> list[Compared]:
    """The first `count` drawings, nothing picked, with the pictures that they are to be compared with.

    The nearest training picture is the one with the largest cosine of features from which the training pictures' mean was
    taken; the search takes a minute or so, for it looks at all of them.
    """
    real, train = ArtworkNames(found.split), ArtworkNames("train")
    shown = list(found.drawn[:count])
    parts = [
        pooled_features(
            network, [_pixels(train, index, processor) for index in range(start, min(start + 64, len(train)))]
        )
        for start in range(0, len(train), 64)
    ]
    features = torch.cat(parts)
    mean = features.mean(dim=0)
    nearest = normalize(pooled_features(network, shown) - mean, dim=1) @ normalize(features - mean, dim=1).T
    compared = []
    wanted, prompts = found.wanted[: len(shown)], found.prompts[: len(shown)]
    for drawn, position, prompt, index in zip(shown, wanted, prompts, nearest.argmax(dim=1).tolist(), strict=True):
        facts = train.facts(index)
        pictures = [drawn, _pixels(real, position, processor), _pixels(train, index, processor)]
        images = [from_array(picture.numpy()) for picture in pictures]
        compared.append(Compared(prompt, images[0], images[1], images[2], f"{facts['name']}, {facts['style']}"))
    return compared


def write_sheet(compared: Sequence[Compared], path: Path, columns: int = 2) -> None:
    """A PNG with a row of three pictures for each drawing, `columns` of such rows beside each other, words under them.

    Raises:
        DataError: it cannot be written.
    """
    width, height = 3 * (CELL + MARGIN) + 2 * MARGIN, CELL + 2 * CAPTION + MARGIN
    rows = -(-len(compared) // columns)
    canvas = PIL.Image.new("RGB", (columns * width, rows * height + CAPTION + MARGIN), WHITE)
    pen, font = PIL.ImageDraw.Draw(canvas), PIL.ImageFont.load_default(11)
    for column in range(columns):
        for place, heading in enumerate(HEADINGS):
            pen.text((column * width + MARGIN + place * (CELL + MARGIN), 2), heading, "black", font)
    for number, each in enumerate(compared):
        row, column = divmod(number, columns)
        left, top = column * width + MARGIN, CAPTION + MARGIN + row * height
        for place, image in enumerate((each.drawn, each.wanted, each.nearest)):
            resized = image.resize((CELL, CELL), PIL.Image.Resampling.LANCZOS)
            canvas.paste(resized, (left + place * (CELL + MARGIN), top))
        pen.text((left, top + CELL + 1), each.prompt[:50], "black", font)
        pen.text((left + CELL + MARGIN, top + CELL + CAPTION), each.nearest_name[:36], "gray", font)
    try:
        canvas.save(path, format="PNG")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}. Choose another file.") from error


def _pixels(source: ArtworkNames, index: int, processor: EttProcessor) -> Tensor:
    return torch.from_numpy(processor.image_processor.fit(source[index].images[0])[0])

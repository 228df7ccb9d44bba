"""Pictures in several versions: smaller, elsewhere in the frame, mirrored. What is shown stays the same."""

from __future__ import annotations

import random
from dataclasses import replace

import PIL.Image
import PIL.ImageOps

from ett.data.sources import Source
from ett.errors import DataError
from ett.images import WHITE
from ett.types import Example

SMALLEST = 0.75
"""Side of the smallest version, as a share of the picture's."""
_WITH_A_SIDE = ("direction", "flag", "written", "time")
"""Metadata of pictures that would not be the same mirrored."""


class Moved(Source):
    """A source `versions` times over: its examples as they are, then each anew with its pictures smaller and moved on white,
    and half of them mirrored where neither metadata nor answer speak of a side; a pure function of (source, versions, index).
    Pictures keep their size [pixels].

    Args:
        source: RGB pictures. versions: of each example, >= 1, the one as it is among them.

    Raises:
        DataError: fewer than one version.
    """

    def __init__(self, source: Source, versions: int) -> None:
        if versions < 1:
            raise DataError(f"Pictures come in at least 1 version, not {versions}.")
        self.name, self.left_out = source.name, source.left_out
        self._source, self._versions = source, versions

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def __len__(self) -> int:
        return self._versions * len(self._source)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        version, position = divmod(index, len(self._source))
        example = self._source[position]
        if version == 0:
            return example
        # Strings seed random.Random by SHA-512: the same in every process, whatever PYTHONHASHSEED.
        rng = random.Random(f"moved/{example.id}/{version}")
        mirrored = rng.random() < 0.5 and not _has_a_side(example)
        share, place = rng.uniform(SMALLEST, 1.0), (rng.random(), rng.random())
        images = tuple(_moved(image, share, place, mirrored) for image in example.images)
        return replace(example, id=f"{example.id}/{version}", images=images)


def _moved(image: PIL.Image.Image, share: float, place: tuple[float, float], mirrored: bool) -> PIL.Image.Image:
    """The picture at `share` of its size on white, `place` of the way from the upper left corner to the lower right one."""
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    smaller = image.resize(size, PIL.Image.Resampling.LANCZOS)
    if mirrored:
        smaller = PIL.ImageOps.mirror(smaller)
    ground = PIL.Image.new("RGB", image.size, WHITE)
    ground.paste(smaller, (round((image.width - size[0]) * place[0]), round((image.height - size[1]) * place[1])))
    return ground


def _has_a_side(example: Example) -> bool:
    said = " ".join(part["text"] for turn in example.messages for part in turn["content"] if part["type"] == "text")
    return any(example.metadata.get(key) for key in _WITH_A_SIDE) or any(
        word in said.lower().split() for word in ("left", "right", "leftwards", "rightwards")
    )

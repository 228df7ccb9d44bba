"""Can text still be read? An OCR judge that no tokenizer was trained with, on pictures whose text is known.

The judge is RapidOCR: PP-OCRv4's detector and recogniser as ONNX files inside the package `rapidocr-onnxruntime`, so nothing is
fetched. It is optional: it brings its own runtime.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import math
from typing import Any

import numpy as np
import PIL.Image
import torch

from ett.errors import ModelError
from ett.images import RESAMPLING
from ett.types import Example

DISTRIBUTION, VERSION = "rapidocr-onnxruntime", "1.4.4"
INSTALL = 'pip install "ett-tuning[ocr]"'
MIN_SIDE = 256
"""Pictures whose shorter side is smaller [pixels] are enlarged to it: the detector misses letters of a few pixels."""


class Reader:
    """RapidOCR with the package's own settings (what it is less than 0.5 sure of does not count), on the CPU.

    Raises:
        ModelError: the package is not installed, of another version than figures of this name are made with, or cannot be used.
    """

    def __init__(self) -> None:
        missing = why_missing()
        if missing:
            raise ModelError(missing)
        try:
            module: Any = importlib.import_module("rapidocr_onnxruntime")
        except (ImportError, OSError) as error:
            raise ModelError(
                f"The package {DISTRIBUTION} cannot be used here ({error}). Install it again: {INSTALL}"
            ) from error
        self._engine = module.RapidOCR(intra_op_num_threads=torch.get_num_threads())
        self._read: dict[bytes, str] = {}

    def read(self, picture: PIL.Image.Image) -> str:
        """The text in an RGB picture, lines from top to bottom with a space between; "" where none is found.

        A picture that was read before is not read again: of the same originals, many tokenizers are measured.
        """
        large = upscaled(picture)
        key = hashlib.blake2b(large.tobytes(), digest_size=16, salt=f"{large.size}".encode()[:16]).digest()
        if key not in self._read:
            # the judge takes blue, green, red
            lines, _ = self._engine(np.ascontiguousarray(np.asarray(large)[:, :, ::-1]))
            ordered = sorted(lines or (), key=lambda line: min(point[1] for point in line[0]))
            self._read[key] = " ".join(str(line[1]) for line in ordered)
        return self._read[key]


def why_missing() -> str:
    """Why there is no OCR judge, and how to get it; "" where there is one."""
    try:
        found = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return (
            f"Reading is not measured: the OCR judge is the package {DISTRIBUTION}, which is not installed (it exists for "
            f"Python below 3.13). Install it, or do without: {INSTALL}"
        )
    if found != VERSION:
        return (
            f"Reading is not measured: {DISTRIBUTION} is of version {found}, and another version's figures would have the same "
            f"name and mean something else. Install {VERSION}: {INSTALL}"
        )
    return ""


def upscaled(picture: PIL.Image.Image) -> PIL.Image.Image:
    """`picture`, enlarged with its aspect kept so that its shorter side has `MIN_SIDE` pixels; larger ones as they are."""
    scale = MIN_SIDE / min(picture.size)
    if scale <= 1:
        return picture
    return picture.resize((math.ceil(picture.width * scale), math.ceil(picture.height * scale)), RESAMPLING)


def known_text(example: Example) -> str | None:
    """What stands in an example's only picture, where its metadata say so under "text"."""
    text = example.metadata.get("text")
    return text if isinstance(text, str) and text.strip() and len(example.images) == 1 else None

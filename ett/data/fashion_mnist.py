"""Fashion-MNIST from a folder of someone's own: 28 x 28 pictures of clothes with ten names, as a manifest.

Its four files (Zalando, MIT licence) are not part of this package, and nothing fetches them. The question is worded by us.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import PIL.Image

from ett.errors import DataError

CLASSES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""By label."""
QUESTION = "What kind of clothing is this?"
SPLITS = {"train": "train", "heldout": "t10k"}
"""Split -> how its files' names begin."""

_UNSIGNED_BYTES = 8


def write_fashion_mnist(
    folder: Path, out: Path, split: Literal["train", "heldout"] = "train", limit: int | None = None
) -> int:
    """Write one split as a manifest with its pictures inside; every name is among the line's "choices".

    Args:
        folder: with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` or the ``t10k`` ones, plain or ``.gz``.
        out: the JSONL file, which must not be there yet. limit: the first so many examples; None takes all.

    Returns:
        The number of examples.

    Raises:
        DataError: a file that is missing, no IDX file or of another shape, or `out` cannot be written.
    """
    images = read_idx(_find(folder, f"{SPLITS[split]}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(_find(folder, f"{SPLITS[split]}-labels-idx1-ubyte"), dimensions=1)
    if len(images) != len(labels) or (len(labels) and int(labels.max()) >= len(CLASSES)):
        raise DataError(
            f"{folder} has {len(images)} pictures and {len(labels)} labels up to {int(labels.max(initial=0))}; Fashion-MNIST "
            f"has a label below {len(CLASSES)} for each. Are all files from the same data set?"
        )
    count = len(images) if limit is None else min(limit, len(images))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("x", encoding="utf-8") as file:
            file.writelines(_lines(images[:count], labels[:count], split))
    except FileExistsError:
        raise DataError(f"{out} is there already. Choose another file, or delete it.") from None
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}.") from error
    return count


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """uint8[...] of an IDX file of unsigned bytes, gzipped or not: two zeros, the type, the number of dimensions, their sizes
    as big-endian uint32, the values.

    Raises:
        DataError: it is none, is cut off, or has another number of dimensions.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Is the file complete?") from error
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes([0, 0, _UNSIGNED_BYTES, dimensions]):
        raise DataError(f"{path} is no IDX file of unsigned bytes with {dimensions} dimensions.")
    shape = tuple(int(size) for size in np.frombuffer(data[4:head], ">u4"))
    if len(data) - head != math.prod(shape):
        raise DataError(
            f"{path} should hold {math.prod(shape)} values and has {len(data) - head}. Is the file complete?"
        )
    return np.frombuffer(data[head:], np.uint8).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DataError(f"{folder} has no {name} (or {name}.gz). Give the folder that holds Fashion-MNIST's files.")


def _lines(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], split: str) -> Iterator[str]:
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        encoded = io.BytesIO()
        PIL.Image.fromarray(image).save(encoded, "png")
        url = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
        asked = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": CLASSES[int(label)]}]
        yield json.dumps({"id": f"fashion-mnist/{split}/{i}", "messages": turns, "choices": CLASSES}) + "\n"

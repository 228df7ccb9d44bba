"""One file of a code cache: E examples of a source with P pictures, as indices.

A shard is a safetensors file, written whole or not at all:

    positions  int64[E]         numbers of the examples in their source
    pictures   int64[E + 1]     example e has the pictures [pictures[e], pictures[e + 1])
    indices    uint16[P, h, w]  where K <= 65,536, else int32
    texts      uint8[...]       id and messages of each example as JSON; `text_ends` int64[E + 1] is as `pictures`
    checksums  uint32[E]        CRC-32 of an example's text and indices

and metadata, text by name. All but `indices` and `texts` is read on opening; those are mapped into memory, and an example
touches its own pages alone.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ett.errors import DataError
from ett.files import fsync
from ett.types import Example


@dataclass(frozen=True)
class CodedExample:
    """An example as it is stored.

    Attributes:
        position: in its source.
        text: `text_of` the example.
        indices: uint16[P', h, w] or int32, of its pictures.
    """

    position: int
    text: bytes
    indices: np.ndarray


def text_of(example: Example) -> bytes:
    """Id and messages as JSON: before any text tokenizer or chat template, so that a cache serves them all."""
    return json.dumps([example.id, list(example.messages)]).encode()


def write_shard(path: Path, examples: Sequence[CodedExample], metadata: Mapping[str, str]) -> None:
    """Write at least one example to `path`.

    Raises:
        DataError: the folder cannot be written.
    """
    tensors = {
        "positions": np.array([each.position for each in examples], np.int64),
        "pictures": np.cumsum([0, *(len(each.indices) for each in examples)], dtype=np.int64),
        "indices": np.concatenate([each.indices for each in examples]),
        "texts": np.frombuffer(b"".join(each.text for each in examples), np.uint8),
        "text_ends": np.cumsum([0, *(len(each.text) for each in examples)], dtype=np.int64),
        "checksums": np.array([_checksum(each.text, each.indices) for each in examples], np.uint32),
    }
    work = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, work, dict(metadata))
        fsync(work)
        work.replace(path)
        fsync(path.parent)
    except (OSError, SafetensorError) as error:
        work.unlink(missing_ok=True)
        raise DataError(
            f"The code cache {path.parent} cannot be written: {error}. Mend it, or name another."
        ) from error


class CodeShard:
    """A shard, open for reading; it pickles as its path.

    Attributes:
        positions: int64[E]. metadata: as written.

    Raises:
        DataError: truncated, or not a shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, "numpy")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.positions: np.ndarray = self._file.get_tensor("positions")
            self._pictures, self._text_ends = self._file.get_tensor("pictures"), self._file.get_tensor("text_ends")
            self._checksums = self._file.get_tensor("checksums")
            self._indices, self._texts = self._file.get_slice("indices"), self._file.get_slice("texts")
        except (OSError, SafetensorError) as error:
            raise DataError(self._damaged(str(error))) from error

    def __reduce__(self) -> tuple[type[CodeShard], tuple[Path]]:
        return CodeShard, (self.path,)

    def example(self, row: int) -> Example:
        """Example `row` of the shard, its pictures as ``image_indices``.

        Raises:
            DataError: its bytes are not those that were written.
        """
        indices = self._indices[int(self._pictures[row]) : int(self._pictures[row + 1])]
        text = self._texts[int(self._text_ends[row]) : int(self._text_ends[row + 1])].tobytes()
        if _checksum(text, indices) != self._checksums[row]:
            raise DataError(self._damaged(f"example {self.positions[row]} is not as it was written"))
        name, messages = json.loads(text)
        return Example(name, messages, (), image_indices=list(indices))

    def _damaged(self, reason: str) -> str:
        return f"{self.path} is truncated, damaged or no code cache: {reason}. Delete it; its examples are then encoded anew."


def _checksum(text: bytes, indices: np.ndarray) -> int:
    return zlib.crc32(indices.tobytes(), zlib.crc32(text))

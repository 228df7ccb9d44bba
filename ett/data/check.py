"""What is in a data set, and what is wrong with it: every example is read, every picture decoded (`ett data check`)."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

import numpy as np
import PIL.Image

from ett.data.entries import MAX_MEMBER_BYTES, Entries, Entry, Kind, Refused, Samples, open_entries
from ett.data.far import BrokenSource
from ett.data.histogram import Lengths, Resolutions
from ett.data.parallel import mapped
from ett.data.places import Place, loadable
from ett.errors import DataError
from ett.images import load_image
from ett.model.processing import EttProcessor
from ett.types import IGNORE_INDEX, Example

NAMED = 5
"""Problems of a kind that are named; the others are counted."""
_SPAN = 32
"""Examples that a worker is given at a time."""

Summary = dict[str, Any]
"""What `check` returns, ready for JSON."""


@dataclass
class _Finding:
    """What one example turned out to be; None where that could not be found out."""

    problems: list[tuple[Kind, str]] = field(default_factory=list)
    id_digest: bytes | None = None
    pictures: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    characters: int | None = None
    answer_tokens: int | None = None
    positions: int | None = None


def check(
    path: str | Place,
    *,
    image_root: str | Path | None = None,
    processor: EttProcessor | None = None,
    max_length: int | None = None,
    workers: int = 1,
    limit: int | None = None,
) -> Summary:
    """Read every example of a manifest, a shard or a folder of shards, go on after errors, and count.

    Args:
        path, image_root: as of `ett.data.entries.open_entries`.
        processor: of the model that the data are for; counts tokens and positions too.
        max_length: positions that an example may have; None for any number. Needs `processor`.
        workers: processes that decode. limit: examples to read; None for all.

    Returns:
        ``path``, ``format`` ("manifest" or "shards"), ``examples``, ``usable`` (nothing is wrong with them), ``pictures``,
        ``without_picture``, ``without_answer``; ``problems``: by kind ``{"count", "first": [text, ...]}``; ``characters``: of
        an example's answers together, as `Lengths.values`; ``resolutions``: `Resolutions.values`; ``budget``: None without a
        processor, else ``image_positions`` a picture, ``max_length``, ``answer_tokens`` and ``positions`` of an example (both
        `Lengths.values`), ``over_max_length``.

    Raises:
        DataError: there is nothing to read.
    """
    entries = open_entries(path, image_root)
    count = len(entries) if limit is None else min(limit, len(entries))
    tally = _Tally(entries, max_length)
    for where, refused in entries.refused:
        tally.problem(refused.kind, f"{where}: {refused}")
    spans = (range(start, min(start + _SPAN, count)) for start in range(0, count, _SPAN))
    index = 0
    for findings in mapped(_Examiner(entries, processor, max_length), spans, workers):
        for finding in findings:
            tally.add(index, finding)
            index += 1
    tally.find_twins()
    return tally.summary(str(path), count, processor)


@dataclass(frozen=True)
class _Examiner:
    """Examines spans of `entries`; goes to the worker processes."""

    entries: Entries
    processor: EttProcessor | None
    max_length: int | None

    def __call__(self, span: range) -> list[_Finding]:
        return [self._examine(index) for index in span]

    def _examine(self, index: int) -> _Finding:
        finding = _Finding()
        try:
            entry = self.entries.read(index)
        except Refused as refused:
            finding.problems.append((refused.kind, str(refused)))
            return finding
        finding.id_digest = blake2b(entry.id.encode(), digest_size=16).digest()
        finding.pictures = len(entry.pictures)
        answers = [message["content"] for message in entry.messages if message["role"] == "assistant"]
        if answers:
            finding.characters = sum(len(part.get("text", "")) for content in answers for part in content)
        for number, picture in enumerate(entry.pictures, 1):
            try:
                finding.sizes.append(load_image(loadable(picture, MAX_MEMBER_BYTES)).size)
            except BrokenSource:
                raise
            except DataError as error:
                is_bomb = isinstance(
                    error.__cause__, PIL.Image.DecompressionBombError | PIL.Image.DecompressionBombWarning
                )
                kind: Kind = "huge_picture" if is_bomb else "broken_picture"
                finding.problems.append((kind, f"picture {number}: {error}"))
        if self.processor is not None:
            self._measure(entry, self.processor, finding)
        return finding

    def _measure(self, entry: Entry, processor: EttProcessor, finding: _Finding) -> None:
        # indices stand in for the pictures, which need not be fitted to be counted
        grids = [np.zeros((1, 1), np.int64) for _ in entry.pictures]
        example = Example(entry.id, entry.messages, (), image_indices=grids)
        try:
            encoded = processor.encode(example)
            finding.positions = len(encoded.input_ids)
            if finding.characters is not None:
                finding.answer_tokens = sum(label != IGNORE_INDEX for label in encoded.labels)
            if self.max_length is not None and finding.positions > self.max_length:
                processor.encode(example, self.max_length)
        except DataError as error:
            finding.problems.append(("not_encodable", str(error)))


class _Tally:
    """The findings, added up in their order."""

    def __init__(self, entries: Entries, max_length: int | None) -> None:
        self._entries, self._max_length = entries, max_length
        self._problems: dict[Kind, dict[str, Any]] = {}
        self._good = bytearray(len(entries))
        # 16 bytes an example, and 8 for its position
        self._digests, self._positions_of = bytearray(), array("Q")
        self._pictures = self._without_picture = self._without_answer = self._over = 0
        self._characters, self._answer_tokens, self._positions = Lengths(), Lengths(), Lengths()
        self._resolutions = Resolutions()

    def problem(self, kind: Kind, message: str) -> None:
        # names in strangers' files may hold what a terminal obeys or UTF-8 cannot write
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        found = self._problems.setdefault(kind, {"count": 0, "first": []})
        found["count"] += 1
        if len(found["first"]) < NAMED:
            found["first"].append(message)

    def add(self, index: int, finding: _Finding) -> None:
        where = self._entries.where(index)
        for kind, message in finding.problems:
            self.problem(kind, f"{where}: {message}")
        self._good[index] = not finding.problems
        if finding.id_digest is None:
            return
        self._digests += finding.id_digest
        self._positions_of.append(index)
        self._pictures += finding.pictures
        self._without_picture += not finding.pictures
        self._without_answer += finding.characters is None
        self._over += (
            finding.positions is not None and self._max_length is not None and finding.positions > self._max_length
        )
        for width, height in finding.sizes:
            self._resolutions.add(width, height, where)
        for lengths, length in (
            (self._characters, finding.characters),
            (self._answer_tokens, finding.answer_tokens),
            (self._positions, finding.positions),
        ):
            if length is not None:
                lengths.add(length)

    def find_twins(self) -> None:
        """Every example whose id an earlier one has is a problem."""
        if not self._digests:
            return
        for first, later in _twins(np.frombuffer(self._digests, np.uint64).reshape(-1, 2)):
            index = self._positions_of[later]
            self._good[index] = False
            where, earlier = self._entries.where(index), self._entries.where(self._positions_of[first])
            self.problem("duplicate_id", f"{where}: its id is that of {earlier} too. Make the ids unique.")

    def summary(self, path: str, count: int, processor: EttProcessor | None) -> Summary:
        budget = None
        if processor is not None:
            budget = {
                "image_positions": processor.num_image_positions,
                "max_length": self._max_length,
                "answer_tokens": self._answer_tokens.values(),
                "positions": self._positions.values(),
                "over_max_length": self._over,
            }
        return {
            "path": path,
            "format": "shards" if isinstance(self._entries, Samples) else "manifest",
            "examples": count,
            "usable": sum(self._good),
            "pictures": self._pictures,
            "without_picture": self._without_picture,
            "without_answer": self._without_answer,
            "problems": {kind: self._problems[kind] for kind in get_args(Kind) if kind in self._problems},
            "characters": self._characters.values(),
            "resolutions": self._resolutions.values(),
            "budget": budget,
        }


def _twins(digests: np.ndarray) -> list[tuple[int, int]]:
    """(first, later) rows of uint64[E, 2] that are equal, in the order of the later ones."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    same = (digests[order][1:] == digests[order][:-1]).all(1)
    later = np.flatnonzero(same) + 1
    # where in `order` each run of equal rows begins; the sort is stable, so that is the first of them
    begins = np.maximum.accumulate(np.where(np.append(True, ~same), np.arange(len(same) + 1), 0))
    pairs = zip(order[begins[later]].tolist(), order[later].tolist(), strict=True)
    return sorted(pairs, key=lambda pair: pair[1])

"""Where examples come from: a map from a position to an `Example`, pure and repeatable.

A source is map-style on purpose. The order of a run is then a pure function of its seed (``ett.data.mixture``), and
resuming at step s is arithmetic, not replay.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from ett.types import Example, Message


class Source(ABC):
    """A finite collection of examples. ``source[i]`` depends on `i` and on the source's own settings alone: the same
    process, another process or another worker gets the same example."""

    name: str
    left_out: Sequence[str] = ()
    """What was left out as a whole when the source was opened, and why: damaged shards."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples, at least 1."""

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Example number `index`.

        Raises:
            IndexError: `index` is not in [0, len).
            ett.errors.DataError: the example cannot be read; the message names the file and what is wrong with it.
        """

    def fingerprint(self) -> str:
        """What tells, beside the settings, that examples are what they were; empty for pure functions of the settings."""
        return ""

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def split_by_hash(key: str, shares: Mapping[str, range]) -> str:
    """The one split that `key` belongs to, in every process and for ever.

    Args:
        shares: split -> which of 100 equal shares of all keys are its own; together range(100).
    """
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    return next(split for split, own in shares.items() if share in own)


def conversation(question: str | None, answer: str, num_images: int = 1) -> Sequence[Message]:
    """One exchange about `num_images` pictures: the pictures, then the question if there is one, then the answer."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
    if question is not None:
        content.append({"type": "text", "text": question})
    return (
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    )

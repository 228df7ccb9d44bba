"""What is read once a process of a text at an address: a run opens its data several times, and hashes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from ett.data.far import BLOCK, Far
from ett.data.places import Place, Stamp, stamp
from ett.errors import DataError

T = TypeVar("T")

KEPT = 1000
"""Texts of which is kept what was found, and as many hashes."""

_found: dict[Hashable, Any] = {}


def once(key: Hashable, work: Callable[[], T]) -> T:
    """What `work` gave when it was first called for `key`; nobody may change it. Errors are not kept."""
    if key not in _found:
        _keep(key, work())
    return cast(T, _found[key])


def forget() -> None:
    """Begin as a process does."""
    _found.clear()


def open_text(far: Far, its_stamp: Stamp, block: int) -> BinaryIO:
    """`far` as `Far.open` opens it. Whoever reads it from its start to its end has hashed it for `content_hash`.

    Args:
        its_stamp: what it is now. block: bytes that are fetched at a time.
    """
    return far.open(block, its_stamp[0], _Hashed(far, its_stamp))


def content_hash(where: Place) -> str:
    """SHA-256 of a file, in hexadecimal; of one at an address from the pass in which it was read, where there was one.

    Raises:
        DataError: it cannot be read. BrokenSource: its address does not answer.
    """
    if isinstance(where, Far):
        its_stamp = stamp(where)
        key = _hash_key(where, its_stamp)
        if key not in _found:
            where.try_ranges(its_stamp[0])
            with open_text(where, its_stamp, BLOCK) as file:
                while file.read(BLOCK):
                    pass
        return once(key, hashlib.sha256().hexdigest)  # not there yet: a file of no bytes
    try:
        with Path(where).open("rb") as local:
            return hashlib.file_digest(local, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{where} cannot be read ({error.strerror}). Put the file back, or mend the path and your rights."
        ) from error


class _Hashed:
    """Hashes what is fetched, as long as it is fetched in order."""

    def __init__(self, far: Far, its_stamp: Stamp) -> None:
        self._key, self._size = _hash_key(far, its_stamp), its_stamp[0]
        self._digest, self._done = hashlib.sha256(), 0

    def __call__(self, at: int, content: bytes) -> None:
        if content and at == self._done:
            self._digest.update(content)
            self._done += len(content)
            if self._done == self._size:
                _keep(self._key, self._digest.hexdigest())


def _hash_key(far: Far, its_stamp: Stamp) -> Hashable:
    return "sha256", far, its_stamp


def _keep(key: Hashable, value: object) -> None:
    if key not in _found and len(_found) >= 2 * KEPT:
        _found.pop(next(iter(_found)), None)
    _found[key] = value

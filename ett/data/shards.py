"""WebDataset shards as a map: tar files of ``{key}.{extension}`` members, read by position.

A shard is scanned once, header by header; after that a member is one seek and one read, or of a shard at an address one request
for its bytes. Plain tars stay where they are.
Gzipped ones (``.tar.gz``, told by their first bytes) cannot be entered in the middle: they are unpacked once a process
and kept in memory, which suits small collections such as the built-in one.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from ett.data.far import Far, changed
from ett.data.places import Place, Stamp, Watch, place
from ett.errors import DataError

MAX_UNPACKED = 2**30
"""Largest gzipped shard that is unpacked [bytes]; a larger one is refused, whatever its header claims."""

_BLOCK = 512
_GZIP_MAGIC = b"\x1f\x8b"
_UNREADABLE = (tarfile.TarError, ValueError, IndexError, OverflowError, MemoryError, RecursionError, OSError)
"""What `tarfile` raises on damaged headers: numbers that are none, too large or cut off, and headers of headers without end."""


@dataclass(frozen=True)
class ShardSample:
    """The members of one key.

    Attributes:
        shard: where the tar lies.
        key: member name up to the first dot of its last component, folders included.
        members: extension (lower case, without the leading dot) -> (offset, size) [bytes] in the (unpacked) tar.
    """

    shard: Place
    key: str
    members: Mapping[str, tuple[int, int]]


class ShardIndex(Sequence[ShardSample]):
    """Where every sample of some shards lies, in the order of the shards and of first appearance in each.

    Holds no open file: each read opens the tar, so threads, forked and spawned workers share nothing. It pickles to
    about 100 bytes a sample; unpacked shards are not pickled.

    Args:
        shards: paths or addresses of tars, at least one.
        stamps: of shards that were just looked at.

    Raises:
        BrokenSource: an address that does not answer. Unreachable: nothing is there.
        DataError: a shard that is missing, no regular file, truncated, damaged or empty, a link, device, sparse file or
            unsafe name in it, or a member that is there twice. The message names the shard and the member.
    """

    def __init__(self, shards: Sequence[str | Place], stamps: Mapping[Place, Stamp] | None = None) -> None:
        if not shards:
            raise DataError("No shards given. Give the paths of one or more .tar or .tar.gz files.")
        self.shards: tuple[Place, ...] = tuple(map(place, shards))
        self.ignored: list[str] = []
        """``shard: member`` for files without an extension, which belong to no sample (README, LICENSE)."""
        self._extensions: list[str] = []
        self._keys: list[str] = []
        self._shard_of = array("i")
        self._first = array("q", [0])
        self._extension_of, self._offsets, self._sizes = array("i"), array("q"), array("q")
        self._unpacked: dict[Place, bytes] = {}
        self._zipped: set[Place] = set()
        self._watch = Watch()
        for shard, its_stamp in (stamps or {}).items():
            self._watch.check(shard, its_stamp)
        for number, shard in enumerate(self.shards):
            self._scan(number, shard)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> ShardSample:  # type: ignore[override]  # slices are not needed
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        members = {
            self._extensions[self._extension_of[at]]: (self._offsets[at], self._sizes[at])
            for at in range(self._first[index], self._first[index + 1])
        }
        return ShardSample(self.shards[self._shard_of[index]], self._keys[index], members)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unpacked": {}}

    def read(self, sample: ShardSample, extension: str) -> bytes:
        """The bytes of one member.

        Raises:
            DataError: the sample has no such member.
            BrokenSource: the shard has changed since it was scanned, or is out of reach.
        """
        if extension not in sample.members:
            raise DataError(
                f"{sample.shard}: {sample.key} has no .{extension} member, only "
                f"{', '.join('.' + name for name in sample.members)}. Add it, or leave the sample out."
            )
        offset, size = sample.members[extension]
        if isinstance(sample.shard, Far) and sample.shard not in self._zipped:
            return self._fetched(sample.shard, offset, size)
        with self._open(sample.shard) as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise changed(sample.shard)
        return content

    def _fetched(self, shard: Far, offset: int, size: int) -> bytes:
        """Bytes of a far shard; the header in front of them comes along, which another tar would hardly have there."""
        self._watch.check(shard)
        content = shard.read_known(offset - _BLOCK, offset + size)
        try:
            same = tarfile.TarInfo.frombuf(content[:_BLOCK], "utf-8", "surrogateescape").size == size
        except _UNREADABLE:
            same = False
        if not same:
            raise changed(shard)
        return content[_BLOCK:]

    def _open(self, shard: Place) -> BinaryIO:
        """The plain tar bytes of `shard`."""
        if shard in self._unpacked:
            return io.BytesIO(self._unpacked[shard])
        file = self._open_as_it_is(shard)
        if file.read(2) != _GZIP_MAGIC:
            file.seek(0)
            return file
        file.close()
        self._zipped.add(shard)
        # Two threads may both unpack; either result will do, so nothing is locked (a lock would not survive a fork).
        self._unpacked[shard] = _unpack(self._open_as_it_is(shard), shard)
        return io.BytesIO(self._unpacked[shard])

    def _open_as_it_is(self, shard: Place) -> BinaryIO:
        if isinstance(shard, Far):
            return shard.open(size=self._watch.check(shard)[0])
        try:
            # opening a named pipe would wait for ever
            if shard.exists() and not shard.is_file():
                raise DataError(
                    f"The shard {shard} is not a file but a folder or device. Give the path of a tar, or remove it."
                )
            return self._watch.open(shard)
        except OSError as error:
            raise DataError(
                f"Cannot read the shard {shard}: {error.strerror}. Check the path and permissions."
            ) from error

    def _scan(self, number: int, shard: Place) -> None:
        found: dict[str, dict[str, tuple[int, int]]] = {}
        with self._open(shard) as file:
            for member in _members(file, shard):
                key, extension = _split_name(member.name)
                if not extension:
                    self.ignored.append(f"{shard}: {member.name}")
                    continue
                parts = found.setdefault(key, {})
                if extension in parts:
                    raise DataError(f"{shard}: {member.name} is there twice. Write every member of a shard once.")
                parts[extension] = (member.offset_data, member.size)
        if not found:
            raise DataError(f"{shard} holds no samples. Members are named {{key}}.{{extension}}, such as 000001.jpg.")
        for key, parts in found.items():
            self._keys.append(key)
            self._shard_of.append(number)
            for extension, (offset, size) in parts.items():
                if extension not in self._extensions:
                    self._extensions.append(extension)
                self._extension_of.append(self._extensions.index(extension))
                self._offsets.append(offset)
                self._sizes.append(size)
            self._first.append(len(self._offsets))


def _unpack(file: BinaryIO, shard: Place) -> bytes:
    try:
        with file, gzip.open(file) as zipped:
            content = zipped.read(MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"The shard {shard} is truncated or damaged (gzip: {error}). Copy or download it again."
        ) from error
    if len(content) > MAX_UNPACKED:
        raise DataError(
            f"The shard {shard} unpacks to more than {MAX_UNPACKED} bytes, which is not kept in memory. "
            "Unpack it to a plain .tar (gunzip)."
        )
    return content


def _members(file: BinaryIO, shard: Place) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar, each proven to lie wholly inside it, up to its end mark."""
    last = "its start"
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                _refuse_unsafe(member, shard)
                if member.size < 0 or member.offset_data + member.size > length:
                    raise DataError(_damaged(shard, f"{member.name} runs past the end of the file"))
                # headers can give one size twice, and tarfile goes on by one and reports the other
                if member.isfile() and tar.offset != member.offset_data + -(-member.size // _BLOCK) * _BLOCK:
                    raise DataError(_damaged(shard, f"the headers of {member.name} give it different sizes"))
                last = member.name
                if member.isfile():
                    yield member
                # tarfile keeps every header for getmember(); a scan needs none of them.
                tar.members = []  # type: ignore[attr-defined]
            end = tar.offset
        # tarfile takes a damaged header for the end; a real end is a block of zeros.
        file.seek(end)
        mark = file.read(_BLOCK)
    except DataError:
        raise
    except _UNREADABLE as error:
        raise DataError(_damaged(shard, f"{type(error).__name__}: {error}, after {last}")) from error
    if mark != bytes(_BLOCK):
        raise DataError(_damaged(shard, f"no header and no end mark after {last}"))


def _damaged(shard: Place, what: str) -> str:
    return f"The shard {shard} is truncated or damaged: {what}. Copy or download it again."


def _refuse_unsafe(member: tarfile.TarInfo, shard: Place) -> None:
    path = PurePosixPath(member.name)
    if member.issparse() or any(name.startswith("GNU.sparse.") for name in member.pax_headers):
        raise DataError(
            f"{shard}: {member.name} is stored as a sparse file, whose bytes do not lie in a row. Write the shard without "
            "tar's option -S (--sparse)."
        )
    if not (member.isfile() or member.isdir()):
        raise DataError(f"{shard}: {member.name} is a link or device. Shards hold regular files only; write it anew.")
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise DataError(f"{shard}: the member name {member.name!r} is unsafe. Use relative names without '..' or '\\'.")


def _split_name(name: str) -> tuple[str, str]:
    """``a/b.c.JPG`` -> (``a/b``, ``c.jpg``), as WebDataset does."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower() if stem else ""

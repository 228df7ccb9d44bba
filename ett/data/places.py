"""Where stored data lie: on this machine, or at an address. Which files a path names, and how a change of one is noticed."""

from __future__ import annotations

import glob
import io
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import fsspec

from ett.data.far import BrokenSource, Far, Unreachable, changed, out_of_reach
from ett.errors import DataError

Place = Path | Far
"""A file here or far away; `str` gives what to call it, ``name`` and ``stem`` are as `Path`'s."""

Stamp = tuple[int, int | str]
"""A file's size [bytes], and its time of change [ns] or what an address tells of its version."""

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_NAMED = 1_000_000
"""Files that braces may name."""
LOOK_AGAIN = 300.0
"""Seconds after which a file at an address that is in use is asked for its version again."""
ASKED_AT_ONCE = 32
"""Addresses that are asked at a time."""

_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")


def is_address(path: str | Path | Far) -> bool:
    """Whether `path` is an address, ``file://`` included."""
    return isinstance(path, Far) or (isinstance(path, str) and "://" in path)


def place(path: str | Path | Far) -> Place:
    """The file at a path, an address or a ``file://`` address, which lies here."""
    if not isinstance(path, str):
        return path
    if path.startswith(("file://", "local://")) and "::" not in path:
        return Path(fsspec.core.url_to_fs(path)[1])
    return Far(path) if is_address(path) else Path(path)


def stamp(where: Place) -> Stamp:
    """What changes with the file.

    Raises:
        OSError: of a file on this machine that is not there. DataError, BrokenSource: as `Far.look`.
    """
    if isinstance(where, Far):
        look = where.look()
        return look.size, look.version
    return stamp_of_status(os.stat(where))


def stamps(files: Sequence[Place]) -> list[Stamp | None]:
    """The stamp of each file, None of one that is not there. Addresses are asked `ASKED_AT_ONCE` at a time.

    Raises:
        BrokenSource: an address does not answer.
    """
    if not any(isinstance(file, Far) for file in files):
        return [_stamp_if_there(file) for file in files]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return list(pool.map(_stamp_if_there, files))


def _stamp_if_there(where: Place) -> Stamp | None:
    try:
        return stamp(where)
    except BrokenSource:
        raise
    except (DataError, FileNotFoundError):
        return None


def stamp_of_status(status: os.stat_result) -> Stamp:
    """The stamp of a file on this machine."""
    return status.st_size, status.st_mtime_ns


class Watch:
    """Notices that files in use are not what they were. Of those at an address, each is asked again every `LOOK_AGAIN` seconds;
    those on this machine are compared each time that they are opened."""

    def __init__(self) -> None:
        self._known: dict[Place, Stamp] = {}
        self._looked: dict[Place, float] = {}

    def __getstate__(self) -> dict[str, object]:
        # another process's clock says nothing here
        return {"_known": self._known, "_looked": {}}

    def check(self, where: Place, now: Stamp | None = None) -> Stamp:
        """Compare with what the file was when it was first looked at; returns that.

        Args:
            now: its stamp; None asks an address, if its time has come.

        Raises:
            BrokenSource: the file was changed, or is out of reach now. OSError: as `stamp`.
            Unreachable: it is not there at the first look, or cannot be read in parts.
        """
        known = self._known.get(where)
        if now is None:
            if known is not None and time.monotonic() - self._looked.get(where, -LOOK_AGAIN) < LOOK_AGAIN:
                return known
            try:
                now = stamp(where)
            except Unreachable as error:
                if known is not None:
                    raise out_of_reach(where, error) from error
                raise
        if known is None and isinstance(where, Far):
            where.try_ranges(now[0])
        self._looked[where] = time.monotonic()
        known = self._known.setdefault(where, now)
        if now != known:
            raise changed(where)
        return known

    def open(self, path: Path) -> BinaryIO:
        """A file on this machine, for reading.

        Raises:
            BrokenSource: it was changed, or was there and cannot be opened now. OSError: it cannot be opened.
        """
        try:
            file = path.open("rb")
        except OSError as error:
            if path in self._known:
                raise out_of_reach(path, error) from error
            raise
        try:
            self.check(path, stamp_of_status(os.fstat(file.fileno())))
        except BrokenSource:
            file.close()
            raise
        return file


def loadable(picture: str | bytes | Far, limit: int) -> str | bytes | BinaryIO:
    """A picture as `ett.images.load_image` takes it: a far one is fetched.

    Args:
        limit: largest far picture [bytes].

    Raises:
        DataError: a far picture is not there, or too large. BrokenSource: its address does not answer, or gives no right to it.
    """
    if not isinstance(picture, Far):
        return picture
    content = picture.read(0, limit + 1)
    if len(content) > limit:
        raise DataError(f"{picture} has more than {limit} bytes. Shrink or remove it.")
    file = io.BytesIO(content)
    file.name = str(picture)  # messages name it so
    return file


def lies_in(path: str, folder: str) -> bool:
    """Whether a path lies in a folder, both of this machine and without symbolic links."""
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def leads_out(reference: str) -> bool:
    """Whether a relative path would leave the far folder that it is given for, or mean anything but a file in it."""
    path = PurePosixPath(reference)
    return path.is_absolute() or ".." in path.parts or "\\" in reference or "::" in reference


def named(path: str) -> list[Place]:
    """The files that a path or address names, sorted where a pattern does: one file, a pattern with ``*`` or ``[...]`` (here
    also ``?``) in its last part, or ``{000..039}``, each of which stands for its numbers.

    Files that braces name need not exist; a pattern may name none.

    Raises:
        DataError: more than `MAX_NAMED` files, or a far folder cannot be listed. BrokenSource: an address does not answer.
    """
    if not is_address(path) and Path(path).exists():
        return [Path(path)]
    found: list[Place] = []
    for each in _counted(path):
        where = place(each)
        if isinstance(where, Far):
            magic = any(sign in where.name for sign in "*[")
            found += [where.folder.within(name) for name in where.folder.names(where.name)] if magic else [where]
        elif glob.has_magic(where.name):
            found += [where.parent / name for name in sorted(glob.glob(where.name, root_dir=where.parent))]
        else:
            found.append(where)
    return found


def shard_paths(path: str) -> tuple[list[Place], Path | None]:
    """(the tars that `path` names, the folder that none may lead out of by a symbolic link; None for addresses).

    Args:
        path: a tar, a folder of tars, a pattern in the last part, or numbers in braces (`named`); or the address of these.

    Raises:
        DataError: it names none.
    """
    where = place(path)
    found: list[Place] = []
    folder = None
    if isinstance(where, Far):
        if any(sign in where.name for sign in "*[{") or where.name.endswith(SHARD_SUFFIXES):
            found = named(path)
        else:
            found = [where.within(name) for name in where.names() if name.endswith(SHARD_SUFFIXES)]
    elif where.is_dir():
        folder = where
        found = [each for each in sorted(where.iterdir()) if each.name.endswith(SHARD_SUFFIXES)]
    elif where.is_file():
        return [where], None
    elif glob.has_magic(where.name) or _RANGE.search(str(where)):
        folder = None if _RANGE.search(str(where.parent)) else where.parent
        found = named(str(where))
    if not found:
        example = (
            f"{path.rstrip('/')}/train-*.tar" if isinstance(where, Far) else f"{folder or where.parent}/train-*.tar"
        )
        raise DataError(
            f"{path} names no shards. Give a .tar or .tar.gz, a folder of them, or a pattern such as {example}."
        )
    return found, folder


def _counted(path: str) -> list[str]:
    """`path` once for each combination of the numbers that its braces stand for, in their order and as wide as written."""
    pieces = _RANGE.split(path)
    texts, bounds = pieces[::3], list(zip(pieces[1::3], pieces[2::3], strict=True))
    ranges = [range(int(first), int(last) + 1) for first, last in bounds]
    count = 1
    for each in ranges:
        count *= len(each)
    if not 0 < count <= MAX_NAMED:
        raise DataError(
            f"{path} names {count} files; braces may name 1 to {MAX_NAMED}, from the lower number to the higher."
        )
    names = []
    for numbers in product(*ranges):
        shown = [f"{number:0{len(first)}d}" for number, (first, _) in zip(numbers, bounds, strict=True)]
        names.append("".join(text + number for text, number in zip(texts, [*shown, ""], strict=True)))
    return names

"""Files at an address that `fsspec` knows (``https://``, ``s3://``, ``hf://``, ``memory://`` ...), read by ranges.

An address is kept as text, and every process connects by itself: what is connected does not survive a fork. Only the range that
is asked for is fetched, so memory does not grow with a file.
"""

from __future__ import annotations

import io
import os
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

import fsspec

from ett.errors import DataError

T = TypeVar("T")

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try where an address does not answer."""
PATIENCE = 40.0
"""Seconds after which no further try begins."""
SILENCE = 20.0
"""Seconds that a connection may take, and a server keep silent."""
SLOWEST = 2**18
"""Bytes a second that a call may count on beside `SILENCE`, where its file system takes a limit of time."""
BLOCK = 2**19
"""Bytes that are fetched at a time where a file is read from one end to the other."""

_WEB = ("http", "https")
_LIMITED = (*_WEB, "s3", "s3a", "gs", "gcs")
"""Whose calls take a limit of time."""
_HASHES = ("ETag", "etag", "blob_id", "generation", "md5Hash", "content_md5", "Content-MD5", "Digest", "CRC")
_TIMES = ("Last-Modified", "LastModified", "last_modified", "mtime", "modified", "updated", "created")
"""What file systems call the version of a file."""
_NETWORK_ERRORS = (
    ("aiohttp", "ClientError"),
    ("azure.core.exceptions", "AzureError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx", "HTTPError"),
    ("paramiko.ssh_exception", "SSHException"),
)
"""What implementations raise beside `OSError` where an address does not answer."""
_GONE = (404, 410)
_NO_RIGHTS = (401, 403)
_BEHIND_THE_END = 416


class BrokenSource(DataError):
    """Data that were there are out of reach, or others now; or rights are missing, and nothing tells whether they are there. No
    example of them may be passed over: the order of a run, and what it sees, would depend on the moment."""


class Unreachable(DataError):
    """A file at an address is not there, or cannot be read as it lies there."""


@dataclass(frozen=True)
class Look:
    """What an address tells of a file.

    Attributes:
        size: [bytes]. version: its hash or time of change, empty where neither is told.
    """

    size: int
    version: str


@dataclass(frozen=True)
class Far:
    """A file at an address, which may be a chain (``zip://a.tar::https://host/b.zip``)."""

    address: str

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        """Of the file, without its folders."""
        return PurePosixPath(self._parts[1]).name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def folder(self) -> Far:
        """What the file lies in."""
        before, path, after = self._parts
        return Far(before + path.rpartition("/")[0] + after)

    def within(self, name: str) -> Far:
        """What this folder lists as `name`."""
        before, path, after = self._parts
        folder = path.rstrip("/")
        return Far(f"{before}{folder}/{name}{after}" if folder else f"{before}{name}{after}")

    def beside(self, reference: str) -> Far:
        """What lies beside this file as `reference`, a relative path without ``..``."""
        name = str(PurePosixPath(reference))
        return self.folder.within(quote(name) if _is_web(self._parts[0]) else name)

    def look(self) -> Look:
        """Ask for size and version.

        Raises:
            Unreachable: there is no file, or it does not tell its size. BrokenSource: the address does not answer.
        """
        return _tried(self, self._look)

    def try_ranges(self, size: int) -> None:
        """Find out whether a file of `size` bytes can be read in parts: servers may ignore what part is asked for.

        Raises:
            Unreachable: it cannot. BrokenSource: the address does not answer.
        """
        if size > BLOCK:
            _tried(self, lambda: self._try_ranges(size))

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`, fewer where the file ends before.

        Raises:
            Unreachable: there is no file. BrokenSource: the address does not answer.
        """
        return _tried(self, lambda: self._read(start, stop))

    def read_known(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop` of a file that was there, and as large at least.

        Raises:
            BrokenSource: it is gone or shorter, or the address does not answer.
        """
        try:
            content = self.read(start, stop)
        except Unreachable as error:
            raise out_of_reach(self, error) from error
        if len(content) < stop - start:
            raise changed(self)
        return content

    def open(
        self, block: int = BLOCK, size: int | None = None, seen: Callable[[int, bytes], None] | None = None
    ) -> BinaryIO:
        """The file for reading and seeking, `block` bytes at a time.

        Args:
            size: of the file [bytes], where it is known; None asks. seen: gets each place, and what was fetched from there.

        Raises:
            Unreachable, BrokenSource: as `look`, then as `read_known`.
        """
        return io.BufferedReader(_Ranges(self, self.look().size if size is None else size, seen), block)

    def names(self, pattern: str | None = None) -> list[str]:
        """Relative to this folder, the files in it, sorted: all, or those that match a glob `pattern`.

        Raises:
            Unreachable: it cannot be listed. BrokenSource: the address does not answer.
        """
        return _tried(self, lambda: self._names(pattern))

    @property
    def _parts(self) -> tuple[str, str, str]:
        """(what stands before the path, its scheme included; the path without a query; what stands behind it)."""
        chain = self.address.split("::")
        at = next(i for i, each in enumerate(chain) if "://" in each)
        scheme, sign, path = chain[at].partition("://")
        before = "".join(f"{each}::" for each in chain[:at]) + scheme + sign
        path = path.partition("?")[0] if _is_web(before) else path
        return before, path, "".join(f"::{each}" for each in chain[at + 1 :])

    def _connected(self) -> tuple[Any, str]:
        # asked for anew each time: the library keeps connections by process
        system, path = fsspec.core.url_to_fs(self.address, **_waits(self.address))
        return system, path

    def _limit(self, size: int) -> dict[str, float]:
        """The option that ends a call for `size` bytes, where the file system has one."""
        limited = self.address.partition("://")[0] in _LIMITED
        return {"timeout": SILENCE + size / SLOWEST} if limited else {}

    def _look(self) -> Look:
        system, path = self._connected()
        system.invalidate_cache(system._parent(path))
        info = system.info(path, **self._limit(0))
        if info.get("type") == "directory":
            raise Unreachable(f"{self} is a folder. Give the address of a file.")
        if info.get("size") is None:
            raise Unreachable(f"{self} does not tell its size, so it cannot be read in parts. Copy it to this machine.")
        version = next((f"{key} {info[key]}" for key in (*_HASHES, *_TIMES) if info.get(key) is not None), "")
        return Look(int(info["size"]), version)

    def _try_ranges(self, size: int) -> None:
        system, path = self._connected()
        # this library's files notice a server that sends all without reading it
        with system.open(path, "rb", block_size=1, cache_type="none", size=size) as file:
            file.seek(1)
            file.read(1)

    def _read(self, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        system, path = self._connected()
        try:
            content = bytes(system.cat_file(path, start=start, end=stop, **self._limit(stop - start)))
        except _failures() as error:
            if _status(error) != _BEHIND_THE_END:
                raise
            return b""
        if len(content) > stop - start:
            raise Unreachable(f"{self} does not answer with the part that is asked for. Copy it to this machine.")
        return content

    def _names(self, pattern: str | None) -> list[str]:
        system, path = self._connected()
        base = path.rstrip("/")
        system.invalidate_cache(path)
        if pattern is None:
            found = [each["name"] for each in system.ls(path, detail=True) if each["type"] == "file"]
        else:
            found = list(system.glob(f"{base}/{pattern}"))
        return sorted(each.removeprefix(base).lstrip("/") for each in found)


class _Ranges(io.RawIOBase):
    """A far file as the raw side of a buffer."""

    def __init__(self, far: Far, size: int, seen: Callable[[int, bytes], None] | None) -> None:
        self._far, self._size, self._at, self._seen = far, size, 0, seen

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = self._far.read_known(self._at, max(self._at, min(self._at + len(buffer), self._size)))
        if self._seen is not None:
            self._seen(self._at, content)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def changed(where: object) -> BrokenSource:
    """The error of a file that is not what it was."""
    return BrokenSource(f"{where} was changed while in use. Leave it as it is during a run; start again.")


def out_of_reach(where: object, error: BaseException) -> BrokenSource:
    """The error of a file that was there before."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return BrokenSource(
        f"{where} was there and is out of reach now ({reason}). Put it back and continue with --resume."
    )


def _tried(far: Far, work: Callable[[], T]) -> T:
    """What `work` gives, tried again while the address does not answer."""
    begun = time.monotonic()
    for number, pause in enumerate((*PAUSES, None), 1):
        try:
            return work()
        except DataError:
            raise
        except ImportError as error:
            raise Unreachable(
                f"{far} needs a package that is not installed ({_reason(error)}). Install it with pip: s3fs for s3://, gcsfs "
                "for gs://, adlfs for az://, or what the message names. Or copy the files to this machine."
            ) from error
        except (ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise Unreachable(
                f"{far} cannot be read ({_reason(error)}). Check the address, or copy the files to this machine."
            ) from error
        except _failures() as error:
            # over http, whatever goes wrong while it looks is a file that was not found
            cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
            status = _status(error)
            if isinstance(error, PermissionError) or status in _NO_RIGHTS:
                raise BrokenSource(
                    f"You have no right to read {far} ({_reason(cause or error)}). Check your credentials, which may have run "
                    "out, and the address: some servers say so of what is not there."
                ) from error
            if status in _GONE or (isinstance(error, FileNotFoundError) and not isinstance(cause, _failures())):
                raise Unreachable(f"{far} does not exist. Check the address.") from error
            if isinstance(error, IsADirectoryError | NotADirectoryError):
                raise Unreachable(f"{far} cannot be read ({_reason(error)}). Check the address.") from error
            if pause is None or time.monotonic() - begun + pause > PATIENCE:
                raise BrokenSource(
                    f"{far} does not answer after {number} tries ({_reason(cause or error)}). Once it does, continue with "
                    "--resume; or check the address."
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _is_web(before: str) -> bool:
    """Whether what stands before a path ends in a web address's scheme."""
    return before.removesuffix("://").rpartition("::")[2] in _WEB


def _waits(address: str) -> dict[str, Any]:
    """Options of the web's file system, where a chain has one: how long it waits. Left alone, it is minutes."""
    schemes = {each.partition("://")[0] for each in address.split("::")}.intersection(_WEB)
    if not schemes:
        return {}
    try:
        from aiohttp import ClientTimeout
    except ImportError:  # said where it is needed
        return {}
    return {each: {"timeout": ClientTimeout(total=None, connect=SILENCE, sock_read=SILENCE)} for each in schemes}


def _failures() -> tuple[type[BaseException], ...]:
    """What says that an address does not answer, of the implementations in use."""
    loaded = ((sys.modules.get(module), name) for module, name in _NETWORK_ERRORS)
    return (OSError, EOFError, *(getattr(module, name) for module, name in loaded if module is not None))


def _status(error: BaseException | None) -> int | None:
    """What a server answered, by number, wherever an implementation keeps it."""
    while error is not None:
        response = getattr(error, "response", None)
        told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        named = map(vars(error).get, ("status", "status_code", "code"))
        found = (told, getattr(response, "status_code", None), *named)
        if any(isinstance(each, int) for each in found):
            return next(each for each in found if isinstance(each, int))
        error = error.__cause__
    return None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error).strip() else 'no reason given'}"

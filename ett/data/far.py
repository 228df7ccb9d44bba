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
BLOCK = 2**19
"""Bytes that are fetched at a time where a file is read from one end to the other."""

_WEB = ("http", "https")
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


class BrokenSource(DataError):
    """Data that were there are out of reach, or others now. No example of them may be passed over: the order of a run, and what
    it sees, would depend on the moment."""


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
        return Far(f"{before}{path.rstrip('/')}/{name}{after}")

    def beside(self, reference: str) -> Far:
        """What lies beside this file as `reference`, a relative path without ``..``."""
        web = self._parts[1].split("://")[0] in _WEB
        name = str(PurePosixPath(reference))
        return self.folder.within(quote(name) if web else name)

    def look(self) -> Look:
        """Ask for size and version.

        Raises:
            DataError: there is no file, or none that can be read in parts. BrokenSource: the address does not answer.
        """
        return _tried(self, self._look)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`, fewer where the file ends before.

        Raises:
            DataError: the file is gone. BrokenSource: the address does not answer.
        """
        return _tried(self, lambda: self._read(start, stop))

    def open(self, block: int = BLOCK, size: int | None = None) -> BinaryIO:
        """The file for reading and seeking, `block` bytes at a time.

        Args:
            size: of the file [bytes], where it is known; None asks.

        Raises:
            DataError, BrokenSource: as `look`, then as `read`.
        """
        return io.BufferedReader(_Ranges(self, self.look().size if size is None else size), block)

    def names(self, pattern: str | None = None) -> list[str]:
        """Relative to this folder, the files in it, sorted: all, or those that match a glob `pattern`.

        Raises:
            DataError: it cannot be listed. BrokenSource: the address does not answer.
        """
        return _tried(self, lambda: self._names(pattern))

    @property
    def _parts(self) -> tuple[str, str, str]:
        """(what stands before the URL that the path belongs to, that URL without a query, what stands behind it)."""
        chain = self.address.split("::")
        at = next(i for i, each in enumerate(chain) if "://" in each)
        path = chain[at].partition("?")[0] if chain[at].split("://")[0] in _WEB else chain[at]
        return "".join(f"{each}::" for each in chain[:at]), path, "".join(f"::{each}" for each in chain[at + 1 :])

    def _connected(self) -> tuple[Any, str]:
        # asked for anew each time: the library keeps connections by process
        system, path = fsspec.core.url_to_fs(self.address)
        return system, path

    def _look(self) -> Look:
        system, path = self._connected()
        system.invalidate_cache(system._parent(path))
        info = system.info(path)
        if info.get("type") == "directory":
            raise DataError(f"{self} is a folder. Give the address of a file.")
        if info.get("size") is None:
            raise DataError(f"{self} does not tell its size, so it cannot be read in parts. Copy it to this machine.")
        size = int(info["size"])
        if size > BLOCK:
            # servers may ignore what part is asked for; this library's files notice that without reading all
            with system.open(path, "rb", block_size=1, cache_type="none", size=size) as file:
                file.seek(1)
                file.read(1)
        version = next((f"{key} {info[key]}" for key in (*_HASHES, *_TIMES) if info.get(key) is not None), "")
        return Look(size, version)

    def _read(self, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        system, path = self._connected()
        content = bytes(system.cat_file(path, start=start, end=stop))
        if len(content) > stop - start:
            raise DataError(f"{self} does not answer with the part that is asked for. Copy it to this machine.")
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

    def __init__(self, far: Far, size: int) -> None:
        self._far, self._size, self._at = far, size, 0

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
        content = self._far.read(self._at, min(self._at + len(buffer), self._size))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _tried(far: Far, work: Callable[[], T]) -> T:
    """What `work` gives, tried again while the address does not answer."""
    for pause in (*PAUSES, None):
        try:
            return work()
        except DataError:
            raise
        except ImportError as error:
            raise DataError(
                f"{far} needs a package that is not installed ({_reason(error)}). Install it with pip: s3fs for s3://, gcsfs "
                "for gs://, adlfs for az://, or what the message names. Or copy the files to this machine."
            ) from error
        except (ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{far} cannot be read ({_reason(error)}). Check the address, or copy the files to this machine."
            ) from error
        except _failures() as error:
            # over http, whatever goes wrong while it looks is a file that was not found
            cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
            answered = not isinstance(cause, _failures()) or getattr(cause, "status", None) in _GONE
            if isinstance(error, FileNotFoundError) and answered:
                raise DataError(f"{far} does not exist. Check the address.") from error
            if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError):
                raise DataError(
                    f"{far} cannot be read ({_reason(error)}). Check the address and your rights."
                ) from error
            if pause is None:
                raise BrokenSource(
                    f"{far} does not answer after {len(PAUSES) + 1} tries ({_reason(cause or error)}). Once it does, continue "
                    "with --resume; or check the address."
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _failures() -> tuple[type[BaseException], ...]:
    """What says that an address does not answer, of the implementations in use."""
    loaded = ((sys.modules.get(module), name) for module, name in _NETWORK_ERRORS)
    return (OSError, EOFError, *(getattr(module, name) for module, name in loaded if module is not None))


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error).strip() else 'no reason given'}"

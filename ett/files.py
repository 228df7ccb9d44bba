"""Files that survive a crash: what was written is on the disk before anything counts on it. And lines of text files."""

from __future__ import annotations

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Return when `path`, a file or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Return when `path`, a file or a folder with everything in it, is on the disk."""
    for each in [*path.rglob("*"), path]:
        fsync(each)


def lines_of(path: Path) -> list[str]:
    """Lines of a UTF-8 text file that hold something, without white space around them; a line feed alone ends a line.

    What ``str.splitlines`` takes for a line's end besides (U+2028, U+0085, a form feed) may stand in a line of JSON.

    Raises:
        OSError: it cannot be read. UnicodeDecodeError: it is not UTF-8.
    """
    return [line for each in path.read_bytes().decode("utf-8").split("\n") if (line := each.strip())]

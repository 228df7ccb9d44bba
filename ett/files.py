"""Files that survive a crash: what was written is on the disk before anything counts on it."""

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

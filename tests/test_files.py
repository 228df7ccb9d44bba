"""What is said to be on the disk has been sent there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ett.files import fsync_tree


def test_a_tree_is_synced_to_its_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a" / "b" / "file"
    file.parent.mkdir(parents=True)
    file.write_text("x", encoding="utf-8")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    fsync_tree(tmp_path / "a")
    assert synced[-1] == (tmp_path / "a").stat().st_ino, "a folder after what it lists"
    assert set(synced) == {path.stat().st_ino for path in (tmp_path / "a", file.parent, file)}
    synced.clear()
    fsync_tree(file)
    assert synced == [file.stat().st_ino]

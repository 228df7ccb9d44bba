"""Conversion there and back loses nothing, survives being killed at any moment, and touches nothing foreign."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ett.cli import main
from ett.data import convert as module
from ett.data.check import check
from ett.data.convert import convert
from ett.data.entries import Entry, open_entries
from ett.data.manifest import Manifest
from ett.errors import DataError
from ett.images import FORMATS


def encoded(seed: int, kind: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (5 + seed, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eleven examples: every format, several pictures, embedded ones, none, odd ids, other fields."""
    folder = tmp_path / "source"
    folder.mkdir()
    kinds = [*FORMATS, "PNG", "PNG"]
    lines = []
    for i, kind in enumerate(kinds):
        # the name says nothing about the kind
        (folder / f"{i}.dat").write_bytes(encoded(i, kind))
        turns = [{"from": "human", "value": "<image>\nWas?"}, {"from": "gpt", "value": f"Öl \ud83d\ude00 {i}"}]
        line: dict[str, Any] = {"id": f"../a b/{i}.x", "image": f"{i}.dat", "conversations": turns, "facts": {"i": [i]}}
        if i == 3:
            line["image"] = ["3.dat", "0.dat"]
            turns[0]["value"] = "<image> or <image>?"
        if i == 4:
            del line["id"], line["image"]
            turns[0]["value"] = "No picture?"
        if i == 5:
            line["image"] = "data:image/png;base64," + base64.b64encode(encoded(40, "PNG")).decode()
            line["half"] = "\ud800"
        lines.append(json.dumps(line))
    path = folder / "some.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def contents(path: Path) -> list[tuple[Entry, list[bytes]]]:
    """Every example with its pictures' bytes."""
    entries = open_entries(path)
    found = []
    for i in range(len(entries)):
        entry = entries.read(i)
        data = [p if isinstance(p, bytes) else Path(p).read_bytes() for p in entry.pictures]
        found.append((Entry(entry.id, list(entry.messages), (), entry.metadata), data))
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_and_back_keeps_everything(source: Path, tmp_path: Path) -> None:
    given = contents(source)
    assert convert(source, tmp_path / "shards", shard_examples=4) == 11
    assert contents(tmp_path / "shards") == given
    assert convert(tmp_path / "shards", tmp_path / "back") == 11
    assert contents(tmp_path / "back") == given
    assert given[4][0].id == "5"
    assert len(given[3][1]) == 2
    back = Manifest(tmp_path / "back" / "manifest.jsonl")
    assert [np.asarray(picture).tobytes() for each in back for picture in each.images] == [
        np.asarray(picture).tobytes() for each in Manifest(source) for picture in each.images
    ]
    assert check(tmp_path / "shards")["problems"] == {}
    assert sorted(files(tmp_path / "shards")) == ["000000.tar", "000001.tar", "000002.tar", "convert.json"]
    # and there again: the shards do not depend on how the manifest was written
    convert(tmp_path / "back", tmp_path / "again", shard_examples=4)
    tars = {name: data for name, data in files(tmp_path / "shards").items() if name.endswith(".tar")}
    assert tars.items() <= files(tmp_path / "again").items()


def test_workers_change_nothing(source: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        convert(source, tmp_path / name, shard_examples=2, workers=workers)
        convert(tmp_path / name, tmp_path / f"{name}-back", workers=workers)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    back = [{k: v for k, v in files(tmp_path / f"{n}-back").items() if k != "convert.json"} for n in ("one", "two")]
    assert back[0] == back[1]
    assert len(back[0]) == 12


@pytest.mark.parametrize("to_shards", [True, False])
def test_stopped_at_any_moment_it_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to_shards: bool
) -> None:
    """A conversion that dies before or after any of its renames ends, run again, as one that was left alone."""
    if not to_shards:
        convert(source, tmp_path / "shards", shard_examples=4)
        source = tmp_path / "shards"
    convert(source, tmp_path / "whole", shard_examples=4)
    replace = Path.replace

    class Dead(BaseException):
        pass

    def dying_at(number: int, after: bool) -> Callable[[Path, Path], Path]:
        count = 0

        def dying(self: Path, target: Path) -> Path:
            nonlocal count
            count += 1
            if count == number and not after:
                raise Dead
            moved = replace(self, target)
            if count == number:
                raise Dead
            return moved

        return dying

    # the marker and three shards; or the marker, pictures and lines of three shards, and the manifest
    renames = 4 if to_shards else 8
    for number in range(1, renames + 1):
        for after in (False, True):
            out = tmp_path / f"out-{number}-{after}"
            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", dying_at(number, after))
                with pytest.raises(Dead):
                    convert(source, out, shard_examples=4)
            convert(source, out, shard_examples=4)
            assert files(out) == files(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying_at(renames + 1, False))
        convert(source, tmp_path / "no more", shard_examples=4)


def test_finished_shards_are_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, shard_examples=4)
    before = {path: path.stat().st_ino for path in out.glob("*.tar")}
    (out / "000001.tar").unlink()
    convert(source, out, shard_examples=4)
    after = {path: path.stat().st_ino for path in out.glob("*.tar")}
    assert len(after) == 3
    assert [path.name for path in after if after[path] != before[path]] in ([], ["000001.tar"])
    assert all(after[out / name] == before[out / name] for name in ("000000.tar", "000002.tar"))


def test_killed_with_its_workers(source: Path, tmp_path: Path) -> None:
    """SIGKILL leaves no worker behind, and the rest is done by the next run."""
    out, pids = tmp_path / "out", tmp_path / "pids"
    pids.mkdir()
    code = f"""
import os, pathlib, time
from ett.data import convert as module
write = module._ToShards.write
def slow(self, part):
    (pathlib.Path({str(pids)!r}) / str(os.getpid())).touch()
    if part.number:
        time.sleep(60)
    write(self, part)
module._ToShards.write = slow
module.convert({str(source)!r}, {str(out)!r}, shard_examples=4, workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(lambda: (out / "000000.tar").is_file() and len(list(pids.iterdir())) == 2, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: not any(is_alive(int(path.name)) for path in pids.iterdir()))
    kept = (out / "000000.tar").stat().st_ino
    convert(source, out, shard_examples=4)
    convert(source, tmp_path / "whole", shard_examples=4)
    assert files(out) == files(tmp_path / "whole")
    assert (out / "000000.tar").stat().st_ino == kept


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_dead_worker_is_told(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._ToShards, "write", lambda self, part: os._exit(3))
    with pytest.raises(DataError, match="worker process ended by itself"):
        convert(source, tmp_path / "out", workers=2)


def test_shards_by_bytes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", shard_bytes=20_480)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert len(shards) > 1
    assert all(shard.stat().st_size <= 20_480 for shard in shards)
    assert contents(tmp_path / "out") == contents(source)
    # none of them had room for the first example of the next
    for shard, following in pairwise(shards):
        with tarfile.open(following) as tar:
            key = tar.getmembers()[0].name.partition(".")[0]
            first = sum(512 + -(-m.size // 512) * 512 for m in tar if m.name.startswith(key))
        with tarfile.open(shard) as tar:
            used = sum(512 + -(-m.size // 512) * 512 for m in tar)
        assert used + first + 1024 > 20_480
    convert(source, tmp_path / "each", shard_bytes=1)
    assert len(list((tmp_path / "each").glob("*.tar"))) == 11


def test_what_is_foreign_stays(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="not empty and no conversion's"):
        convert(source, out)
    assert files(out) == {"mine.txt": b"mine"}
    with pytest.raises(DataError, match="not empty and no conversion's"):
        convert(source, source.parent)
    with pytest.raises(DataError, match=r"some\.jsonl failed"):
        convert(source, source)
    convert(source, tmp_path / "other", shard_examples=4)
    with pytest.raises(DataError, match="holds another conversion"):
        convert(source, tmp_path / "other", shard_examples=5)
    with pytest.raises(DataError, match="holds another conversion"):
        convert(tmp_path / "other", tmp_path / "other")
    (tmp_path / "other" / "000001.tar").unlink()
    (tmp_path / "other" / "000001.tar").symlink_to(source)
    with pytest.raises(DataError, match=r"000001\.tar is not a shard that was written here"):
        convert(source, tmp_path / "other", shard_examples=4)
    assert source.read_bytes().startswith(b"{")
    with source.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"conversations": [{"from": "human", "value": "new"}]}) + "\n")
    with pytest.raises(DataError, match="holds another conversion"):
        convert(source, tmp_path / "other", shard_examples=4)


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_foreign_shards_become_a_manifest(tmp_path: Path) -> None:
    picture = encoded(1, "PNG")
    tar(
        tmp_path / "a.tar", {"x/1.JPG": picture, "x/1.txt": b"One", "x/1.json": b'{"url": "u", "image": "/etc/passwd"}'}
    )
    convert(tmp_path / "a.tar", tmp_path / "out")
    ((entry, pictures),) = contents(tmp_path / "out")
    assert (entry.id, entry.metadata, pictures) == ("x/1", {"url": "u"}, [picture])
    assert [message["content"] for message in entry.messages] == [
        [{"type": "image"}],
        [{"type": "text", "text": "One"}],
    ]
    assert (tmp_path / "out" / "pictures" / "000000" / "00000000.png").is_file()


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"../up.png": b"x"}, "unsafe"),
        ({"a.png": b"no picture", "a.txt": b"x"}, "of no known kind"),
        ({"a.png": b"\x89PNG\r\n\x1a\n", "a.txt": b""}, "a: turn 2 is empty.*ett data check"),
        ({"a.txt": b"x"}, "hold no text or no picture"),
        ({"a.json": b'{"messages": [{"role": "user", "content": "<image>"}]}'}, "mark 1 pictures"),
    ],
)
def test_hostile_shards_are_refused(tmp_path: Path, members: dict[str, bytes], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        convert(tar(tmp_path / "bad.tar", members), tmp_path / "out")
    assert not list(tmp_path.rglob("*.png"))
    assert not list(tmp_path.rglob("manifest.jsonl"))


def test_twins_in_two_shards_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in "ab":
        tar(folder / f"{name}.tar", {"0.png": encoded(1, "PNG"), "0.txt": b"x"})
    with pytest.raises(DataError, match="the id '0' is that of line 1 too"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


def test_unusable_manifests_are_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with source.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"image": "../x.png", "conversations": [{"from": "human", "value": "x"}]}) + "\n")
    with pytest.raises(DataError, match=r"some\.jsonl:12: .* leads out"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_large_pictures_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 400)
    with pytest.raises(DataError, match=r"some\.jsonl:\d+: .*\.dat has \d+ bytes; a shard's member may have 400"):
        convert(source, tmp_path / "out")


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["data", "convert", str(source), str(out), "--shard-size", "1MB", "--workers", "1"]) == 0
    assert capsys.readouterr().out.strip() == f"{out}  11 examples"
    assert main(["data", "convert", str(out), str(tmp_path / "back")]) == 0
    assert main(["data", "convert", str(source), str(tmp_path / "x"), "--shard-size", "0"]) == 2
    assert "neither a number of examples nor bytes" in capsys.readouterr().err

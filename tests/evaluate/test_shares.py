"""An evaluation whose examples are shared among processes finds what one process finds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ett.evaluate.base import Subject
from ett.evaluate.shares import in_batches
from ett.model.loading import load_model

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "ett.cli"]


@pytest.fixture(scope="module")
def model(toy_run: Path) -> Path:
    return toy_run / "stages" / "2-semantic"


def test_slices_come_in_order(model: Path) -> None:
    loaded, processor = load_model(model)
    subject = Subject(loaded.vision_tokenizer, processor)
    seen: list[Sequence[int]] = []

    def work(part: Sequence[int]) -> list[int]:
        seen.append(part)
        return [2 * each for each in part if each % 3]

    assert in_batches(subject, range(7), 3, "numbers", work) == [2, 4, 8, 10]
    assert [list(part) for part in seen] == [[0, 1, 2], [3, 4, 5], [6]]
    assert in_batches(subject, range(0), 3, "numbers", work) == []


def evaluate(launcher: list[str], model: Path, manifest: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """`ett evaluate` of pictures, the drift from itself included, two examples at a time."""
    given = ["evaluate", str(model), "--data", str(manifest), "--initial", str(model), "--batch-size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *given, "--max-new-tokens", "4", "--json", str(out), "--device", "cpu"],
        check=False, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_three_processes_find_what_one_finds(model: Path, toy_run: Path, tmp_path: Path) -> None:
    """More processes than batches of some tasks, and a last batch that is not full."""
    manifest = toy_run.parent / "pictures" / "manifest.jsonl"
    found: list[dict[str, Any]] = []
    for name, launcher in (("one", [*LAUNCHER[:1], "-m", "ett.cli"]), ("three", LAUNCHER)):
        done = evaluate(launcher, model, manifest, tmp_path / f"{name}.json")
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")))
        assert done.stdout.count("caption_loss ") == 1, "one process writes"
    assert found[0] == found[1]
    assert len(found[0]["predictions"]) == len(manifest.read_text(encoding="utf-8").splitlines())
    assert {"caption_loss", "psnr", "codebook_usage", "indices_changed"} <= found[0]["metrics"].keys()


@pytest.mark.slow
def test_an_example_that_one_process_cannot_read_ends_them_all(model: Path, toy_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_run.parent / "pictures", tmp_path / "pictures"))
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    picture = folder / json.loads(lines[2])["image"]
    picture.write_bytes(picture.read_bytes()[:40])
    done = evaluate(LAUNCHER, model, folder / "manifest.jsonl", tmp_path / "out.json")
    assert done.returncode != 0
    assert picture.name in done.stderr
    assert not (tmp_path / "out.json").exists()

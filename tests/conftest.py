"""Toy parts shared by the tests: everything is built here, nothing is fetched."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.utils import logging

from ett.cli import main
from ett.config import from_mapping
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run
from ett.train import loop

logging.disable_progress_bar()

CommandLine = Callable[..., tuple[int, str, str]]
TOKENIZER = {
    "channels": 16,
    "channel_multipliers": [1, 2, 2],
    "num_res_blocks": 1,
    "z_channels": 16,
    "norm_groups": 8,
    "codebook_size": 64,
    "codebook_dim": 8,
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    kind: {
        "model_type": kind,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 264,
        "max_position_embeddings": 512,
        "tie_word_embeddings": kind == "qwen2",
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 257,
    }
    for kind in ("llama", "qwen2")
}


def pytest_collection_finish() -> None:
    """What was imported stays: `gc.collect`, which follows every stage, need not walk through all of it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, and what a killed process wrote is there without `os.fsync`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line in this process: its words in; exit code, standard output and standard error out."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with 12 pictures of different sizes and a manifest of questions and answers about them."""
    return _write_pictures(tmp_path / "pictures")


@pytest.fixture
def toy_recipe(pictures: Path) -> dict[str, Any]:
    """Every stage, three steps each, on the toy pictures."""
    return _recipe_on(pictures)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `toy_recipe` on pictures of its own, made once: for reading, and for copies to change."""
    folder = tmp_path_factory.mktemp("toy")
    given = _recipe_on(_write_pictures(folder / "pictures"))
    Run(from_mapping(Recipe, given), folder / "run").train()
    return folder / "run"


class Killed(Exception):
    """Ends a run where a test wants it to end."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Training dies as it begins its `step`-th step, counted over stages."""
    plain, taken = loop.Stage._train_step, 0

    def dying(self: Any, batches: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == step:
            raise Killed
        return plain(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Stage, "_train_step", dying)
        with pytest.raises(Killed):
            yield


def _write_pictures(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    lines = []
    for i in range(12):
        height, width = 24 + 3 * i, 60 - 2 * i
        array = rng.integers(0, 255, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
        PIL.Image.fromarray(array).resize((width, height)).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": f"number {i}"}]
        lines.append(json.dumps({"id": f"p{i}", "image": f"{i}.png", "conversations": turns}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _recipe_on(pictures: Path) -> dict[str, Any]:
    return {
        "name": "toy",
        "model": {
            "image_size": 32,
            "vision_tokenizer": dict(TOKENIZER),
            "language_model": {"config": dict(LANGUAGE_MODELS["llama"], attention_dropout=0.1)},
            "projector": {"merge_size": 2},
        },
        "data": [{"source": "manifest", "path": str(pictures / "manifest.jsonl")}],
        "stages": [
            {"stage": stage, "steps": 3, "batch_size": 4, "micro_batch_size": 2, "checkpoint_every": 1, "log_every": 1}
            for stage in ("tokenizer", "align", "semantic", "chat")
        ],
        "precision": "fp32",
        "num_workers": 0,
        "trackers": [],
    }

"""Several processes: one has no pictures, one is killed, all are told to stop. None waits for ever."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ett.config import from_mapping
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run
from ett.losses.joint import LossConfig
from ett.model import ett as ett_module
from ett.model.build import build_model, build_vision_tokenizer
from ett.model.processing import Encoded
from ett.train import objectives as objectives_module
from ett.train.checkpoint import STATE, list_checkpoints
from ett.train.log import read_log
from ett.train.objectives import JointObjective, Shares, run_model


@contextmanager
def started(recipe: Path, out: Path, world: int, *words: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The ranks of a run without a launcher that would end the others when one ends; none is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ett.cli", "train", str(recipe), "--out", str(out), *words]
    ranks = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        environment = {
            **os.environ,
            **{name: str(value) for name, value in place.items()},
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        yield ranks
    finally:
        for each in ranks:
            each.kill()
            # waits, and closes the pipes
            with each:
                pass


def finish(ranks: list[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str]]:
    """(exit code, stderr) of each; none may still be running after `timeout` seconds."""
    ended = [(rank, rank.communicate(timeout=timeout)[1]) for rank in ranks]
    return [(rank.returncode, errors) for rank, errors in ended]


def complete(recipe: Path, out: Path, world: int, *words: str, timeout: float = 900) -> None:
    """A run to its end."""
    with started(recipe, out, world, *words) as ranks:
        for code, errors in finish(ranks, timeout):
            assert code == 0, errors


def wait_for_step(out: Path, step: int, ranks: list[subprocess.Popen[str]], timeout: float = 900) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        log = out / "log.jsonl"
        if log.exists() and any(e["event"] == "step" and e["step"] >= step for e in read_log(log)):
            return
        assert all(rank.poll() is None for rank in ranks), "a rank ended before its time"
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come")


def write(given: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


def text_among_pictures(manifest: Path) -> None:
    """Every second example loses its picture."""
    lines = manifest.read_text(encoding="utf-8").splitlines()
    turns = [{"from": "human", "value": "Say hi"}, {"from": "gpt", "value": "hi"}]
    lines[::2] = [json.dumps({"id": f"t{i}", "conversations": turns}) for i in range(len(lines[::2]))]
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_micro_batch_of_text_goes_through_every_part_where_others_wait(
    toy_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On no pictures at all: finite losses, a gradient of zero at every weight of the tokenizer and the projector."""
    recipe = from_mapping(Recipe, toy_recipe)
    model, processor = build_model(recipe.model, build_vision_tokenizer(recipe.model))
    model.train()
    monkeypatch.setattr(ett_module, "spans_ranks", lambda module: module.training)
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Say hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "hi"}]},
    ]
    ids, labels = processor.tokenize_conversation(turns)
    batch = processor.collate([Encoded(ids, labels, [], "text")])
    output = run_model(model, batch, LossConfig(), tokenizer_share=0.0)
    assert output.loss is not None
    assert output.losses is not None
    assert {name: float(term.detach()) for name, term in output.losses.items() if name != "caption_loss"} == {
        "reconstruction_loss": 0.0,
        "quantization_loss": 0.0,
        "entropy_loss": 0.0,
    }
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        if not name.startswith("language_model"):
            assert not parameter.grad.any(), name


def test_a_rank_without_pictures_runs_the_soft_caption_loss_too(
    toy_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where layers are sharded all ranks gather them as often; and all log the same names."""
    recipe = from_mapping(Recipe, toy_recipe)
    model, processor = build_model(recipe.model, build_vision_tokenizer(recipe.model))
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Say hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "hi"}]},
    ]
    batch = processor.collate([Encoded(*processor.tokenize_conversation(turns), [], "text")])
    objective, losses = JointObjective(model), LossConfig(soft_caption_weight=1.0)
    monkeypatch.setattr(ett_module, "spans_ranks", lambda module: module.training)
    for several in (True, False):
        monkeypatch.setattr(objectives_module, "_several", lambda several=several: several)
        for objective_in_mode in (objective.train(), objective.eval()):
            output = objective_in_mode(batch, losses, Shares(2.0, 0.0))
            assert ("soft_caption_loss" in output.losses) == several
            assert not output.losses.get("soft_caption_loss", torch.zeros(())).detach().any()
            torch.testing.assert_close(output.loss.detach(), output.losses["caption_loss"].detach())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_that_hangs_ends_the_other_in_the_time_that_the_recipe_gives(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """A machine that is gone closes no connection; here a process that is stopped (SIGSTOP)."""
    toy_recipe["stages"] = [{**toy_recipe["stages"][2], "steps": 2000, "checkpoint_every": None, "log_every": 1}]
    recipe = write({**toy_recipe, "rank_timeout": 3}, tmp_path / "recipe.yaml")
    with started(recipe, tmp_path / "run", 2) as ranks:
        wait_for_step(tmp_path / "run", 2, ranks)
        ranks[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        ((code, errors),) = finish(ranks[:1], timeout=200)
        waited = time.monotonic() - began
    assert code == 2, errors
    assert "Another process of this run ended or is out of reach" in errors
    assert "rank_timeout" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert waited < 100


def test_text_on_one_rank_and_a_picture_on_the_other(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Two processes take the steps of one, whichever of them has the pictures; in every stage, with the whole L_vq."""
    text_among_pictures(Path(toy_recipe["data"][0]["path"]))
    game = {
        "losses": {"adversarial_weight": 0.1},
        "discriminator": {"channels": 4, "strided_layers": 2},
    }
    for stage in toy_recipe["stages"]:
        stage |= {"batch_size": 2, "micro_batch_size": None, "steps": 6, "optimizer": {"learning_rate": 1e-6}}
        if stage["stage"] in ("tokenizer", "semantic"):
            stage |= game
    toy_recipe["model"]["language_model"]["config"]["attention_dropout"] = 0.0
    Run(from_mapping(Recipe, toy_recipe), tmp_path / "one").train()
    complete(write(toy_recipe, tmp_path / "recipe.yaml"), tmp_path / "two", 2, timeout=500)
    one, two = (
        [(e["stage"], e["step"], e["losses"]) for e in read_log(tmp_path / name / "log.jsonl") if e["event"] == "step"]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 24
    for ours, theirs in zip(one, two, strict=True):
        assert ours[:2] == theirs[:2]
        # T = 0.01 magnifies the rounding of an update, and the discriminator's norms take each rank's own statistics
        for name, far in {
            "loss": 3e-4,
            "caption_loss": 1e-4,
            "reconstruction_loss": 2e-3,
            "entropy_loss": 1e-2,
        }.items():
            if name in ours[2]:
                assert ours[2][name] == pytest.approx(theirs[2][name], rel=far), (ours[:2], name)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_killed_rank_ends_the_other_and_one_process_goes_on(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["stages"] = [{**toy_recipe["stages"][2], "steps": 2000, "checkpoint_every": 2}]
    recipe = write(toy_recipe, tmp_path / "recipe.yaml")
    with started(recipe, tmp_path / "run", 2) as ranks:
        wait_for_step(tmp_path / "run", 5, ranks)
        ranks[1].kill()
        (code, errors), _ = finish(ranks, timeout=300)
    assert code == 2, errors
    assert "Another process of this run ended" in errors
    assert "Traceback" not in errors
    last = list_checkpoints(tmp_path / "run" / "checkpoints", "semantic")[-1]
    assert last.step >= 2
    # what two processes saved, one can go on from
    with started(recipe, tmp_path / "run", 1, "--resume") as (rank,):
        wait_for_step(tmp_path / "run", last.step + 2, [rank])
        rank.send_signal(signal.SIGTERM)
        ((code, errors),) = finish([rank], timeout=300)
    assert code == 128 + signal.SIGTERM, errors


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_ranks_stop_together_and_go_on_to_the_same_bits(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """SIGTERM to one of two ranks, within accumulation and with dropout: resumed, both are where nothing happened."""
    toy_recipe["stages"] = [
        {**toy_recipe["stages"][2], "steps": 60, "batch_size": 8, "micro_batch_size": 1, "checkpoint_every": None}
    ]
    recipe = write(toy_recipe, tmp_path / "recipe.yaml")
    complete(recipe, tmp_path / "whole", 2)
    with started(recipe, tmp_path / "run", 2) as ranks:
        wait_for_step(tmp_path / "run", 5, ranks)
        ranks[1].send_signal(signal.SIGTERM)
        for code, errors in finish(ranks, timeout=300):
            assert code == 128 + signal.SIGTERM, errors
    (saved,) = list_checkpoints(tmp_path / "run" / "checkpoints", "semantic")
    states = torch.load(saved.path / STATE, weights_only=True)["random"]
    assert len(states) == 2
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])
    complete(recipe, tmp_path / "run", 2, "--resume")
    whole, run = (
        (tmp_path / name / "stages" / "0-semantic" / "model.safetensors").read_bytes() for name in ("whole", "run")
    )
    assert whole == run

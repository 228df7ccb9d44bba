"""Validation during training: shared by processes and equal to one's, left at a signal and made up for on resume."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate import Accelerator

from ett.config import from_mapping
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run
from ett.losses.joint import TermMeans
from ett.train import validation as validation_module
from ett.train.checkpoint import list_checkpoints
from ett.train.log import read_log
from ett.train.loop import Interrupted, Stage
from ett.train.validation import Measured, mean_terms
from tests.conftest import killed_at
from tests.faults.test_ranks import complete, finish, started, text_among_pictures, wait_for_step, write


def of_rank(rank: int, world: int) -> Accelerator:
    return cast(Accelerator, SimpleNamespace(process_index=rank, num_processes=world))


class _Asked(Exception):
    pass


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_add_up_and_every_rank_is_called_as_often(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is left over where batches do not go round."""
    for count in range(1, 9):
        batches = [Measured({"caption_loss": 0.1 * k, "psnr": 1 / (k + 1)}, k % 3, 0, k % 2) for k in range(count)]
        plain = TermMeans()
        for terms, supervised, drawn, images in batches:
            plain.add(terms, supervised=supervised, drawn=drawn, images=images)
        calls: list[int] = [0] * world
        shares: list[list[Measured]] = []

        def collect(given: list[list[Measured]]) -> None:
            shares.extend(given)  # noqa: B023 - called within this turn
            raise _Asked

        def measured_by(rank: int) -> Callable[[Measured], Measured]:
            def measure(batch: Measured) -> Measured:
                calls[rank] += 1  # noqa: B023
                return batch

            return measure

        monkeypatch.setattr(validation_module, "gather_object", collect)
        for rank in range(world):
            with pytest.raises(_Asked):
                mean_terms(batches, measured_by(rank), of_rank(rank, world), lambda: False)
        assert set(calls) == {-(-count // world)}
        monkeypatch.setattr(validation_module, "gather_object", lambda _: shares)  # noqa: B023
        for rank in range(world):
            assert mean_terms(batches, measured_by(rank), of_rank(rank, world), lambda: False) == plain.means()


@pytest.fixture
def recipe(toy_recipe: dict[str, Any]) -> dict[str, Any]:
    """Six semantic steps, each second one validated on twelve pictures, one at a time; dropout, averages, the best kept."""
    toy_recipe["evaluation"] = {"data": toy_recipe["data"], "limit": 12}
    toy_recipe["model"]["language_model"]["config"]["attention_dropout"] = 0.1
    stage = toy_recipe["stages"][2] | {"steps": 6, "batch_size": 2, "micro_batch_size": 1, "validate_every": 2}
    toy_recipe["stages"] = [stage | {"log_every": 1, "checkpoint_every": 4, "ends_with": "best", "ema_decay": 0.5}]
    return toy_recipe


def told(run: Path) -> list[tuple[str, int, Any]]:
    """What a log says of losses and health, in order."""
    events = read_log(run / "log.jsonl")
    return [
        (e["event"], e["step"], e.get("losses", e.get("values")))
        for e in events
        if e["event"] not in ("warning", "resumed")
    ]


def model_of(run: Path) -> bytes:
    return (run / "stages" / "0-semantic" / "model.safetensors").read_bytes()


def stop_within_validation(call: int, patch: pytest.MonkeyPatch) -> list[int]:
    """A SIGTERM comes while validation batch number `call`, counted over all validations, is measured; returns the calls."""
    calls: list[int] = []
    plain = Stage._measured

    def measured(self: Stage, items: Any) -> Measured:
        calls.append(self.step)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, items)

    patch.setattr(Stage, "_measured", measured)
    return calls


@pytest.mark.parametrize("step", [4, 6])
def test_a_signal_ends_a_validation_and_resume_makes_up_for_it(
    step: int, recipe: dict[str, Any], tmp_path: Path
) -> None:
    given = from_mapping(Recipe, recipe)
    Run(given, tmp_path / "whole").train()
    call = 12 * (step // 2 - 1) + 3
    with pytest.MonkeyPatch.context() as patch:
        calls = stop_within_validation(call, patch)
        with pytest.raises(Interrupted) as stopped:
            Run(given, tmp_path / "run").train()
    assert stopped.value.step == step
    assert len(calls) == call, "it goes on after the signal"
    assert list_checkpoints(tmp_path / "run" / "checkpoints", "semantic")[-1].step == step
    assert ("validation", step) not in [each[:2] for each in told(tmp_path / "run")]
    if step < 6:
        # killed after it was made up for, and before the next checkpoint
        shutil.copytree(tmp_path / "run", tmp_path / "killed")
        with killed_at(1):
            Run(given, tmp_path / "killed", resume=True).train()
        Run(given, tmp_path / "killed", resume=True).train()
    with pytest.MonkeyPatch.context() as patch:
        stop_within_validation(1, patch)
        with pytest.raises(Interrupted):
            Run(given, tmp_path / "run", resume=True).train()
    Run(given, tmp_path / "run", resume=True).train()
    for name in ("run", *(["killed"] if step < 6 else [])):
        assert model_of(tmp_path / name) == model_of(tmp_path / "whole"), name
        assert told(tmp_path / name) == told(tmp_path / "whole"), name


@pytest.mark.timeout(600)
@pytest.mark.parametrize("sharding", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_find_what_one_finds(sharding: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Five batches for two, some of them text alone, every term: to 1e-6 of themselves."""
    text_among_pictures(Path(recipe["data"][0]["path"]))
    recipe["evaluation"]["limit"] = 9
    recipe["model"]["language_model"]["config"]["attention_dropout"] = 0.0
    # weights stay, so that nothing but the validation is compared
    losses = {"soft_caption_weight": 0.5, "adversarial_weight": 0.1, "distillation_weight": 0.1}
    recipe["stages"][0] |= {
        "steps": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "ends_with": "last",
        "losses": losses,
        "discriminator": {"channels": 4, "strided_layers": 2},
        "optimizer": {"learning_rate": 1e-12},
    }
    Run(from_mapping(Recipe, recipe), tmp_path / "one").train()
    complete(write({**recipe, "sharding": sharding}, tmp_path / "recipe.yaml"), tmp_path / "two", 2, timeout=400)
    (ours,), (theirs,) = (
        [losses for event, _, losses in told(tmp_path / name) if event == "validation"] for name in ("one", "two")
    )
    assert {"soft_caption_loss", "entropy_loss", "adversarial_loss", "distillation_loss"} <= ours.keys()
    # the discriminator's norms keep each rank's own statistics
    assert theirs.pop("adversarial_loss") == pytest.approx(ours.pop("adversarial_loss"), rel=0.01)
    # a tokenizer of a few steps is 1e-7 from the initial one: a square of what float32 rounds, equal to its last digits at best
    assert theirs.pop("distillation_loss") == pytest.approx(ours.pop("distillation_loss"), rel=1e-6, abs=1e-8)
    assert theirs == pytest.approx(ours, rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ranks_leave_a_validation_together_and_make_up_for_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["evaluation"] = {"data": [{"source": "drawn_text", "size": 32}], "limit": 400}
    recipe["stages"][0] |= {"steps": 4, "ema_decay": None}
    given = write(recipe, tmp_path / "recipe.yaml")
    complete(given, tmp_path / "whole", 2)
    with started(given, tmp_path / "run", 2) as ranks:
        wait_for_step(tmp_path / "run", 2, ranks)
        ranks[1].send_signal(signal.SIGTERM)
        for code, errors in finish(ranks, timeout=300):
            assert code == 128 + signal.SIGTERM, errors
    assert [each[:2] for each in told(tmp_path / "run")][-1] == ("step", 2)
    complete(given, tmp_path / "run", 2, "--resume")
    assert model_of(tmp_path / "run") == model_of(tmp_path / "whole")
    assert told(tmp_path / "run") == told(tmp_path / "whole")

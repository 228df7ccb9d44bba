"""Checkpoints that are damaged, hostile, late or do not fit on the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ett.config import from_mapping
from ett.errors import ModelError, RecipeError, UserError
from ett.experiments.recipe import Recipe, load_recipe
from ett.experiments.run import Interrupted, Run, load_model
from ett.train import checkpoint as checkpoint_module
from ett.train import loop as loop_module
from ett.train.checkpoint import META, STATE, WEIGHTS, best_of, best_whole, find_damage, list_checkpoints
from ett.train.log import read_log
from ett.train.saving import Saver
from tests.conftest import killed_at


@pytest.fixture(scope="module")
def recipe(toy_run: Path) -> Recipe:
    """One stage of four steps, a checkpoint after each."""
    given = load_recipe(toy_run / "recipe.yaml")
    return replace(given, stages=(replace(given.stages[2], steps=4),))


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run of `recipe` ends with where nothing happens."""
    out = tmp_path_factory.mktemp("whole") / "run"
    Run(recipe, out).train()
    return digest(out)


@pytest.fixture(scope="module")
def died(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `recipe` that died in its fourth step, for copies to go on."""
    out = tmp_path_factory.mktemp("died") / "run"
    with killed_at(4):
        Run(recipe, out).train()
    assert [each.step for each in checkpoints(out)] == [2, 3]
    return out


@pytest.fixture
def killed(died: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(died, tmp_path / "killed"))


def checkpoints(run: Path) -> list[checkpoint_module.Checkpoint]:
    return list_checkpoints(run / "checkpoints", "semantic")


def digest(run: Path) -> str:
    return hashlib.sha256((run / "stages" / "0-semantic" / "model.safetensors").read_bytes()).hexdigest()


def warnings_of(run: Path, kind: str) -> list[str]:
    events = read_log(run / "log.jsonl")
    return [event["message"] for event in events if event["event"] == "warning" and event["kind"] == kind]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (WEIGHTS, flip, "its hash is not the recorded one"),
        (STATE, halve, "its hash is not the recorded one"),
        (STATE, Path.unlink, r"state\.pt is missing"),
        (META, halve, r"checkpoint\.json is damaged"),
        (META, Path.unlink, r"checkpoint\.json is missing"),
    ],
)
def test_a_damaged_last_checkpoint_is_reported_and_the_one_before_it_used(
    name: str, damage: Any, reason: str, recipe: Recipe, killed: Path, whole: str
) -> None:
    last = checkpoints(killed)[-1].path
    damage(last / name)
    Run(recipe, killed, resume=True).train()
    (told,) = warnings_of(killed, "damaged_checkpoint")
    assert told.startswith(f"The checkpoint of step 3 is damaged: {last / name}" if name != META else "The checkpoint")
    assert told.endswith("the run goes on from step 2.")
    assert re.search(reason, told)
    assert digest(killed) == whole
    assert list((killed / "checkpoints").iterdir()) == []


def test_a_checkpoint_that_made_room_is_put_back(recipe: Recipe, killed: Path, whole: str) -> None:
    """Killed between two renames, as a step was saved again: neither folder has its name."""
    for each in checkpoints(killed)[:-1]:
        shutil.rmtree(each.path)
    last = checkpoints(killed)[-1].path
    shutil.copytree(last, last.with_name(f".{last.name}.tmp"))
    last.rename(last.with_name(f".{last.name}.old"))
    resumed = Run(recipe, killed, resume=True)
    with killed_at(1):
        resumed.train()
    assert [each.step for each in checkpoints(killed)] == [3]
    Run(recipe, killed, resume=True).train()
    assert digest(killed) == whole


def test_no_whole_checkpoint_is_an_error_with_every_reason(recipe: Recipe, killed: Path) -> None:
    for each in checkpoints(killed):
        flip(each.path / WEIGHTS)
    with pytest.raises(ModelError, match=r"No checkpoint of stage semantic .*0000003/weights.*0000002/weights"):
        Run(recipe, killed, resume=True).train()
    assert len(checkpoints(killed)) == 2, "nothing is deleted"


def test_clearing_up_after_a_stage_leaves_the_next_of_its_kind_alone(recipe: Recipe, tmp_path: Path) -> None:
    """Resumed in "semantic-2", a run drops what is left of "semantic" and goes on where it was."""
    twice = replace(recipe, stages=(replace(recipe.stages[0], steps=2),) * 2)
    out = tmp_path / "run"
    with killed_at(4):
        Run(twice, out).train()
    for leftover in ("semantic-0000001", "semantic-0000001.damaged", ".semantic-0000002.tmp"):
        (out / "checkpoints" / leftover).mkdir()
    plain, taken = loop_module.Stage._train_step, []

    def step(self: Any, batches: Any) -> Any:
        taken.append((self.name, self.step))
        return plain(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.Stage, "_train_step", step)
        Run(twice, out, resume=True).train()
    assert taken == [("semantic-2", 1)]
    assert list((out / "checkpoints").iterdir()) == []


class Malice:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def forge(checkpoint: Path, content: object) -> None:
    """Put `content` in the place of the training state, with hashes that agree."""
    torch.save(content, checkpoint / STATE)
    meta = json.loads((checkpoint / META).read_text(encoding="utf-8"))
    meta["sha256"][STATE] = hashlib.sha256((checkpoint / STATE).read_bytes()).hexdigest()
    (checkpoint / META).write_text(json.dumps(meta), encoding="utf-8")
    assert find_damage(checkpoint_module.Checkpoint(checkpoint, 3)) is None


def test_a_pickle_that_would_run_code_is_refused(recipe: Recipe, killed: Path, tmp_path: Path) -> None:
    forge(checkpoints(killed)[-1].path, {"optimizer": Malice(tmp_path / "trace"), "random": [], "extras": {}})
    with pytest.raises(ModelError, match="more than tensors and plain values"):
        Run(recipe, killed, resume=True).train()
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"optimizer": {}},
        {"optimizer": {"state": {}, "param_groups": []}, "random": [], "extras": {"back_offs": 1, "bad_samples": {}}},
        {"optimizer": 1, "random": [{"cpu": torch.zeros(3)}], "extras": {}},
    ],
)
def test_a_state_that_is_none_is_refused(content: object, recipe: Recipe, killed: Path) -> None:
    forge(checkpoints(killed)[-1].path, content)
    with pytest.raises(ModelError, match=r"state\.pt (is not a training state|does not hold the state of this stage)"):
        Run(recipe, killed, resume=True).train()


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process may grow above `size` bytes, as where a disk is full."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("full", [WEIGHTS, STATE])
def test_a_full_disk_ends_with_a_message_and_the_checkpoint_before(
    full: str, recipe: Recipe, killed: Path, whole: str
) -> None:
    last = checkpoints(killed)[-1].path
    weights, state = ((last / name).stat().st_size for name in (WEIGHTS, STATE))
    assert weights < state, "the limit lets one of them through"
    shutil.rmtree(last)
    with (
        files_up_to(weights // 2 if full == WEIGHTS else (weights + state) // 2),
        pytest.raises(UserError, match=r"checkpoint of step 3 could not be written .* The one of step 2 is whole"),
    ):
        Run(recipe, killed, resume=True).train()
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["semantic-0000002"]
    Run(recipe, killed, resume=True).train()
    assert digest(killed) == whole


def test_a_disk_that_is_full_for_the_model_ends_with_a_message(recipe: Recipe, whole: str, tmp_path: Path) -> None:
    plain = Run._save_stage

    def save(self: Run, *arguments: Any) -> None:
        with files_up_to(1000):
            plain(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_save_stage", save)
        with pytest.raises(UserError, match=r"cannot be written: .*File too large.* Make room there"):
            Run(recipe, tmp_path / "run").train()
    assert list((tmp_path / "run" / "stages").iterdir()) == []
    Run(recipe, tmp_path / "run", resume=True).train()
    assert digest(tmp_path / "run") == whole


@pytest.mark.parametrize("game", [False, True])
def test_sigterm_in_a_long_step_saves_at_once_and_loses_the_step_alone(
    game: bool, toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Twelve micro-batches of 0.3 s a step: the signal comes in the second one of step 3."""
    stage = {**toy_recipe["stages"][2], "steps": 3, "batch_size": 12, "micro_batch_size": 1, "checkpoint_every": None}
    if game:
        stage |= {"losses": {"adversarial_weight": 0.1}, "ema_decay": 0.9}
        stage["discriminator"] = {"channels": 4, "generator_start": 1, "strided_layers": 2}
    toy_recipe["stages"] = [stage]
    recipe = from_mapping(Recipe, toy_recipe)
    Run(recipe, tmp_path / "whole").train()
    plain = loop_module.JointObjective.forward
    calls, sent = 0, 0.0

    def slow(self: Any, *arguments: Any) -> Any:
        nonlocal calls, sent
        calls += 1
        if calls > 24:
            time.sleep(0.3)
        if calls == 26:
            sent = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.JointObjective, "forward", slow)
        with pytest.raises(Interrupted) as caught:
            Run(recipe, tmp_path / "run").train()
    assert calls == 26, "the other ten micro-batches, 3 s, are left out"
    assert caught.value.step == 2
    assert [each.step for each in checkpoints(tmp_path / "run")] == [2]
    assert sent > 0
    Run(recipe, tmp_path / "run", resume=True).train()
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_the_best_checkpoint_outlives_newer_ones_and_is_what_the_stage_ends_with(
    toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    stage = {**toy_recipe["stages"][2], "steps": 6, "validate_every": 1, "ends_with": "best", "ema_decay": 0.9}
    toy_recipe["stages"] = [stage]
    with pytest.raises(RecipeError, match="needs validation examples"):
        Run(from_mapping(Recipe, toy_recipe), tmp_path / "run")
    toy_recipe["evaluation"] = {"data": [{"source": "names"}], "limit": 2}
    recipe = from_mapping(Recipe, toy_recipe)
    losses = iter([5.0, 3.0, 1.0, 4.0, 2.0, 6.0])
    kept: dict[int, dict[str, torch.Tensor]] = {}
    plain = loop_module.Stage.validate

    def validate(self: Any) -> dict[str, float]:
        assert plain(self)["loss"] > 0
        with self.average.applied():
            kept[self.step] = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return {"loss": next(losses)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.Stage, "validate", validate)
        with killed_at(6):
            Run(recipe, tmp_path / "run").train()
        assert [each.step for each in checkpoints(tmp_path / "run")] == [3, 4, 5]
        best = best_of(checkpoints(tmp_path / "run"))
        assert best is not None
        assert best.validation_loss == 1.0
        folder = Run(recipe, tmp_path / "run", resume=True).train()
    (event,) = [each for each in read_log(tmp_path / "run" / "log.jsonl") if each["event"] == "ends_with"]
    assert event["best_step"] == 3
    model, _ = load_model(folder)
    assert all(torch.equal(tensor, kept[3][name]) for name, tensor in model.state_dict().items())
    assert not all(torch.equal(tensor, kept[6][name]) for name, tensor in model.state_dict().items())


def test_a_damaged_best_checkpoint_is_reported_and_the_next_best_taken(killed: Path) -> None:
    """As they are written for a stage that ends with its best; nothing of a damaged one is loaded."""
    folder = killed / "checkpoints"
    for each, loss in zip(checkpoints(killed), (1.0, 2.0), strict=True):
        meta = json.loads((each.path / META).read_text(encoding="utf-8"))
        (each.path / META).write_text(json.dumps(meta | {"validation_loss": loss}), encoding="utf-8")
    first, second = checkpoints(killed)
    told: list[str] = []
    assert best_whole(folder, "semantic", lambda _, message: told.append(message)) == first
    assert told == []
    flip(first.path / WEIGHTS)
    assert best_whole(folder, "semantic", lambda _, message: told.append(message)) == second
    assert re.search(r"best checkpoint, of step 2, is damaged: .*hash", told[0])
    flip(second.path / STATE)
    with pytest.raises(ModelError, match=r"No checkpoint of a validation .*0000003/state"):
        best_whole(folder, "semantic", lambda *_: None)


@pytest.mark.parametrize("moment", ["the last checkpoint", "the model"])
def test_sigterm_at_the_end_of_a_stage_is_obeyed_when_its_model_is_saved(
    moment: str, recipe: Recipe, tmp_path: Path
) -> None:
    twice = replace(recipe, stages=(replace(recipe.stages[0], steps=2, checkpoint_every=None),) * 2)
    Run(twice, tmp_path / "whole").train()
    owner, name = (Saver, "__exit__") if moment == "the last checkpoint" else (Run, "_save_stage")
    plain, calls = getattr(owner, name), 0

    def signalled(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, signalled)
        with pytest.raises(Interrupted) as caught:
            Run(twice, tmp_path / "run").train()
    assert caught.value.signal_number == signal.SIGTERM
    assert calls == 1, "the second stage has not begun"
    assert [path.name for path in (tmp_path / "run" / "stages").iterdir()] == ["0-semantic"]
    Run(twice, tmp_path / "run", resume=True).train()
    one, other = (tmp_path / run / "stages" / "1-semantic-2" / "model.safetensors" for run in ("whole", "run"))
    assert one.read_bytes() == other.read_bytes()


def test_an_old_checkpoint_that_cannot_be_deleted_ends_nothing(recipe: Recipe, whole: str, tmp_path: Path) -> None:
    plain = Path.rename

    def busy(self: Path, target: Any) -> Path:
        if self.name == "semantic-0000001":
            raise OSError(errno.EBUSY, "Device or resource busy", str(self))
        return plain(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", busy)
        Run(recipe, tmp_path / "run").train()
    assert digest(tmp_path / "run") == whole


def test_a_damaged_marker_is_told(recipe: Recipe, killed: Path) -> None:
    halve(killed / "run.json")
    with pytest.raises(RecipeError, match=r"run\.json is damaged"):
        Run(recipe, killed, resume=True)


def test_every_rank_has_a_random_state_of_its_own(recipe: Recipe, killed: Path) -> None:
    """Rank 1 of a run that had one process begins a stream of its own, the same whenever it is resumed."""
    state = torch.load(checkpoints(killed)[-1].path / STATE, weights_only=True)["random"]
    assert len(state) == 1
    drawn = []
    for rank in (0, 1, 1, 2):
        checkpoint_module.restore_random_state(checkpoint_module._state_of_rank(state, rank))
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[3])
    torch.set_rng_state(state[0]["cpu"])
    assert torch.equal(drawn[0], torch.rand(4))


def test_training_goes_on_while_a_checkpoint_is_written(recipe: Recipe, whole: str, tmp_path: Path) -> None:
    """A slow disk: what is written is the state when it was asked for, however far training has got meanwhile."""
    plain, begun = checkpoint_module.save_file, []

    def slow(tensors: dict[str, torch.Tensor], *arguments: Any, **named: Any) -> None:
        begun.append({name: tensor.clone() for name, tensor in tensors.items()})
        time.sleep(0.5)
        assert all(torch.equal(tensor, begun[-1][name]) for name, tensor in tensors.items())
        plain(tensors, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", slow)
        with killed_at(4):
            Run(recipe, tmp_path / "run").train()
    assert [each.step for each in checkpoints(tmp_path / "run")] == [2, 3]
    Run(recipe, tmp_path / "run", resume=True).train()
    assert digest(tmp_path / "run") == whole

"""The discriminator goes with its tokenizer: from stage to stage, from run to run, and out of an imported checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from ett.config import from_mapping
from ett.errors import ModelError, RecipeError
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run
from ett.losses.adversarial import DiscriminatorConfig, PatchDiscriminator
from ett.losses.joint import LossConfig
from ett.tokenizers.layout_discriminator import DISCRIMINATOR_NAME, shape_of
from ett.train import loop
from ett.train.critics import Critics
from ett.train.inheritance import find_discriminator, read_inheritance
from ett.train.log import read_log
from tests.conftest import killed_at

SMALL = {"channels": 4, "strided_layers": 2}
LATE = 100
"""A start of the generator's term that no stage here reaches."""


def playing(stage: str, steps: int = 2, **discriminator: Any) -> dict[str, Any]:
    return {
        "stage": stage,
        "steps": steps,
        "batch_size": 4,
        "micro_batch_size": 2,
        "log_every": 1,
        "checkpoint_every": 1,
        "losses": {"adversarial_weight": 0.1},
        "discriminator": {**SMALL, "generator_start": LATE, **discriminator},
        "health": {"pictures": 0},
    }


def recipe_of(toy: dict[str, Any], *stages: dict[str, Any]) -> Recipe:
    return from_mapping(Recipe, {**toy, "stages": list(stages)})


def heard(run: Path, stage: str) -> list[bool]:
    steps = [e for e in read_log(run / "log.jsonl") if e["event"] == "step" and e["stage"] == stage]
    return ["adversarial_loss" in e["losses"] for e in steps]


def first_state(monkeypatch: pytest.MonkeyPatch, stage: str) -> dict[str, Any]:
    """What the critics of `stage` hold before its first step, once it has run."""
    found: dict[str, Any] = {}
    plain = loop.Stage._train_step

    def watched(self: Any, batches: Any) -> Any:
        if self.name == stage and not found:
            state = self.critics.state_dict()
            found["discriminator"] = {name: t.clone() for name, t in state["discriminator"].items()}
            found["lecam"] = {name: t.clone() for name, t in state["lecam"].items()}
            moments = state["optimizer"]["state"]
            found["moments"] = [{k: v.clone() for k, v in moments[i].items()} for i in sorted(moments)]
            found["lr"] = self.critics.peak
        return plain(self, batches)

    monkeypatch.setattr(loop.Stage, "_train_step", watched)
    return found


def test_a_later_stage_goes_on_with_it(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a stage that plays no game in between: weights, Adam and LeCam averages are those that stage 0 ended with."""
    align = {"stage": "align", "steps": 1, "batch_size": 2}
    semantic = playing("semantic", learning_rate=3e-3)
    recipe = recipe_of(toy_recipe, playing("tokenizer", steps=3), align, semantic)
    found = first_state(monkeypatch, "semantic")
    Run(recipe, tmp_path / "run").train()
    kept = read_inheritance(tmp_path / "run" / "stages" / "0-tokenizer" / DISCRIMINATOR_NAME)
    assert all(torch.equal(found["discriminator"][name], kept.discriminator[name]) for name in kept.discriminator)
    assert all(torch.equal(found["lecam"][name], kept.lecam[name]) for name in ("real", "fake"))
    assert float(kept.lecam["real"]) != 0
    parameters = dict(PatchDiscriminator(DiscriminatorConfig(**SMALL)).named_parameters())
    assert len(found["moments"]) == len(parameters)
    for name, moments in zip(parameters, found["moments"], strict=True):
        assert float(moments["step"]) == 3
        assert torch.equal(moments["exp_avg_sq"], kept.moments[name]["exp_avg_sq"])
    assert found["lr"] == 3e-3, "rates are the recipe's"
    # it needs no warm-up: the tokenizer hears it at once
    assert (heard(tmp_path / "run", "tokenizer"), heard(tmp_path / "run", "semantic")) == ([False] * 3, [True] * 2)
    (told,) = [e for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "inherited"]
    assert (told["stage"], Path(told["discriminator"]).parent.name) == ("semantic", "0-tokenizer")
    assert not (tmp_path / "run" / "stages" / "1-align" / DISCRIMINATOR_NAME).exists()


def test_a_resumed_stage_goes_on_as_if_nothing_had_happened(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(toy_recipe, playing("tokenizer"), playing("semantic", steps=3))
    Run(recipe, tmp_path / "whole").train()
    with killed_at(5):
        Run(recipe, tmp_path / "killed").train()
    Run(recipe, tmp_path / "killed", resume=True).train()
    for name in ("model.safetensors", DISCRIMINATOR_NAME):
        one, other = (tmp_path / run / "stages" / "1-semantic" / name for run in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes()
    assert heard(tmp_path / "killed", "semantic") == [True] * 3
    # where work begins again, for the clock
    told = [(e["stage"], e["step"]) for e in read_log(tmp_path / "killed" / "log.jsonl") if e["event"] == "resumed"]
    assert told == [("semantic", 2)]
    assert "resumed" not in {e["event"] for e in read_log(tmp_path / "whole" / "log.jsonl")}


@pytest.mark.parametrize("inherit", [True, False])
def test_another_run_goes_on_with_it_unless_told_otherwise(
    inherit: bool, toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    Run(recipe_of(toy_recipe, playing("tokenizer")), tmp_path / "first").train()
    toy_recipe["model"]["vision_tokenizer"] = {"path": str(tmp_path / "first" / "stages" / "0-tokenizer")}
    Run(recipe_of(toy_recipe, playing("tokenizer", inherit=inherit)), tmp_path / "second").train()
    assert heard(tmp_path / "second", "tokenizer") == [inherit] * 2


def test_without_one_the_warm_up_stays(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    silent = {**playing("tokenizer"), "losses": None}
    Run(recipe_of(toy_recipe, silent, playing("semantic", generator_start=1)), tmp_path / "run").train()
    assert heard(tmp_path / "run", "semantic") == [False, True]
    assert not (tmp_path / "run" / "stages" / "0-tokenizer" / DISCRIMINATOR_NAME).exists()


def test_other_shapes_are_refused_before_anything_trains(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    wide = playing("semantic", channels=8)
    with pytest.raises(RecipeError, match=r"channels 4 .*asks for 8 .*stages\.semantic\.discriminator\.inherit"):
        Run(recipe_of(toy_recipe, playing("tokenizer"), wide), tmp_path / "run")
    Run(recipe_of(toy_recipe, playing("tokenizer"), playing("semantic", channels=8, inherit=False)), tmp_path / "run")
    Run(recipe_of(toy_recipe, playing("tokenizer")), tmp_path / "first").train()
    toy_recipe["model"]["vision_tokenizer"] = {"path": str(tmp_path / "first" / "stages" / "0-tokenizer")}
    align = {"stage": "align", "steps": 1, "batch_size": 2}
    with pytest.raises(RecipeError, match=r"comes with the tokenizer .* channels 4 .*discriminator\.inherit"):
        Run(recipe_of(toy_recipe, align, wide), tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_what_is_overwritten_is_not_asked(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Of the run that was here before, with a discriminator of another shape, nothing goes on."""
    Run(recipe_of(toy_recipe, playing("tokenizer", channels=8)), tmp_path / "run").train()
    silent = {**playing("tokenizer"), "losses": None}
    Run(recipe_of(toy_recipe, silent, playing("semantic")), tmp_path / "run", overwrite=True).train()
    assert heard(tmp_path / "run", "semantic") == [False, False]


def test_the_best_weights_keep_their_own_discriminator(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """The stage ends with step 1's weights, so the discriminator that goes on is step 1's, not the last one."""
    stage = {**playing("tokenizer", steps=3), "validate_every": 1, "ends_with": "best"}
    # the loss rises from step to step: weights fly off
    stage["optimizer"] = {"learning_rate": 0.5, "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": None}
    toy_recipe["evaluation"] = {"data": [dict(toy_recipe["data"][0])], "limit": 4}
    Run(recipe_of(toy_recipe, stage), tmp_path / "run").train()
    (best,) = [e["best_step"] for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "ends_with"]
    kept = read_inheritance(tmp_path / "run" / "stages" / "0-tokenizer" / DISCRIMINATOR_NAME)
    assert best < 3
    assert {float(moments["step"]) for moments in kept.moments.values()} == {best}


def test_which_stage_s_it_is(tmp_path: Path) -> None:
    stages = tmp_path / "stages"
    for name in ("0-tokenizer", "1-align", "2-semantic", "10-chat"):
        (stages / name).mkdir(parents=True)
    assert find_discriminator(stages / "10-chat") is None
    for name in ("0-tokenizer", "2-semantic"):
        (stages / name / DISCRIMINATOR_NAME).touch()
    assert find_discriminator(stages / "10-chat") == stages / "2-semantic" / DISCRIMINATOR_NAME
    assert find_discriminator(stages / "1-align") == stages / "0-tokenizer" / DISCRIMINATOR_NAME
    (tmp_path / "imported").mkdir()
    assert find_discriminator(tmp_path / "imported") is None


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / DISCRIMINATOR_NAME
    whole = {f"discriminator.{n}": t for n, t in PatchDiscriminator(DiscriminatorConfig(**SMALL)).state_dict().items()}

    def refused(tensors: dict[str, Tensor], reason: str) -> None:
        save_file(tensors, path)
        with pytest.raises(ModelError, match=reason):
            read_inheritance(path)

    save_file(whole, path)
    assert (read_inheritance(path).channels, read_inheritance(path).strided_layers) == (4, 2)
    refused({**whole, "generator.x": torch.zeros(1)}, "it holds generator.x")
    refused({n: t for n, t in whole.items() if n != "discriminator.main.3.running_var"}, "holds no patch discriminator")
    adam = {"step": torch.zeros(()), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    moments = {f"optimizer.{kind}.main.0.bias": tensor for kind, tensor in adam.items()}
    save_file({**whole, **moments}, path)
    assert set(read_inheritance(path).moments) == {"main.0.bias"}
    refused({**whole, "optimizer.exp_avg.main.7.bias": torch.zeros(4)}, "belongs to no weight")
    refused({**whole, **moments, "optimizer.exp_avg.main.0.bias": torch.zeros(5)}, "belongs to no weight")
    refused({**whole, "optimizer.step.main.0.bias": torch.zeros(())}, "main.0.bias cannot go on")
    refused({**whole, "lecam.real": torch.zeros(())}, "the LeCam averages cannot go on")
    refused({**whole, "discriminator.main.0.bias": torch.tensor([0.0, 1.0, float("nan"), 0.0])}, "not finite")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ModelError, match="Is the file complete"):
        read_inheritance(path)


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_the_shape_is_told_by_the_tensors(layers: int) -> None:
    state = PatchDiscriminator(DiscriminatorConfig(channels=2, strided_layers=layers)).state_dict()
    assert shape_of(state) == (2, layers)
    assert shape_of({**state, "main.0.bias": torch.zeros(3)}) is None
    assert shape_of({}) is None


def test_an_imported_discriminator_plays_from_the_first_step(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign file ships weights and statistics alone: Adam and LeCam averages begin."""
    Run(recipe_of(toy_recipe, {**playing("tokenizer", steps=1), "losses": None}), tmp_path / "first").train()
    folder = tmp_path / "first" / "stages" / "0-tokenizer"
    theirs = PatchDiscriminator(DiscriminatorConfig(**SMALL)).state_dict()
    save_file({f"discriminator.{name}": tensor for name, tensor in theirs.items()}, folder / DISCRIMINATOR_NAME)
    toy_recipe["model"]["vision_tokenizer"] = {"path": str(folder)}
    found = first_state(monkeypatch, "tokenizer")
    Run(recipe_of(toy_recipe, playing("tokenizer")), tmp_path / "run").train()
    assert all(torch.equal(found["discriminator"][name], tensor) for name, tensor in theirs.items())
    assert found["moments"] == []
    assert heard(tmp_path / "run", "tokenizer") == [True] * 2
    after = load_file(tmp_path / "run" / "stages" / "0-tokenizer" / DISCRIMINATOR_NAME)
    assert not torch.equal(after["discriminator.main.0.weight"], theirs["main.0.weight"])


def test_a_fresh_one_that_is_heard_at_once_is_warned_of(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Beside a tokenizer that is trained already, and without a warm-up; not at the start of stage 0."""

    def warned(name: str, **discriminator: Any) -> list[str]:
        Run(recipe_of(toy_recipe, playing("tokenizer", steps=1, **discriminator)), tmp_path / name).train()
        return [e["kind"] for e in read_log(tmp_path / name / "log.jsonl") if e["event"] == "warning"]

    assert "fresh_discriminator" not in warned("first", generator_start=0)
    folder = tmp_path / "first" / "stages" / "0-tokenizer"
    toy_recipe["model"]["vision_tokenizer"] = {"path": str(folder)}
    assert "fresh_discriminator" not in warned("inherited", generator_start=0)
    assert "fresh_discriminator" in warned("fresh", generator_start=0, inherit=False)
    assert "fresh_discriminator" not in warned("late", generator_start=1, inherit=False)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_picture_that_it_judges(layers: int, toy_recipe: dict[str, Any]) -> None:
    config = DiscriminatorConfig(channels=2, strided_layers=layers)
    judge, side = PatchDiscriminator(config).eval(), config.smallest_side
    assert judge(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="Kernel size"):
        judge(torch.zeros(1, 3, side - 1, side - 1))
    toy_recipe["model"]["image_size"] = 16
    stage = playing("tokenizer", channels=2, strided_layers=layers)
    if side <= 16:
        recipe_of(toy_recipe, stage)
    else:
        with pytest.raises(RecipeError, match=f"pictures of {side} pixels or more, these have 16"):
            recipe_of(toy_recipe, stage)


def test_states_from_before_it_was_handed_on_still_load() -> None:
    """A checkpoint that says nothing of it was written by a stage that began with a fresh one."""
    config = DiscriminatorConfig(**SMALL, generator_start=5)
    game = Critics(LossConfig(adversarial_weight=0.1), config, 1e-3, Accelerator(cpu=True))
    state = {name: value for name, value in game.state_dict().items() if name != "inherited"}
    game.load_state_dict(state)
    assert not game.hears(4)
    assert game.hears(5)

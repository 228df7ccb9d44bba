"""Plans: numbers that can be known are exact, memory is what a step takes, and what does not fit is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from ett.cli import main
from ett.config import from_mapping
from ett.errors import RecipeError
from ett.experiments.plan import HARDWARE, StagePlan, Target, find_hardware, parse_memory, plan
from ett.experiments.plan.estimate import FLEETING, KEPT_SHARE, KEPT_SHARE_OF_CACHED, LIBRARY_BYTES
from ett.experiments.plan.stand_ins import StandIns
from ett.experiments.plan.tracker import Tracker
from ett.experiments.recipe import Recipe
from ett.model.build import build_model, build_vision_tokenizer
from ett.train import loop
from ett.train.stages import train_decoder

CPU = Target("cpu-2core", HARDWARE["cpu-2core"])


@pytest.fixture
def recipe(toy_recipe: dict[str, Any]) -> Recipe:
    return from_mapping(Recipe, toy_recipe)


def of(stages: list[StagePlan], name: str) -> StagePlan:
    return next(stage for stage in stages if stage.name == name)


def test_a_linear_layer_is_counted_exactly() -> None:
    """y = x W^T and its backward: three products; x, W, y and the gradients of W and y, 4 bytes each."""
    layer = nn.Linear(64, 32, bias=False, device="meta")
    stand_ins = StandIns()
    stand_ins.fill(layer)
    tracker = Tracker(stand_ins)
    tracker.assign_module(layer)
    with stand_ins.mode, tracker:
        x = torch.randn(8, 64)
        layer(x).sum().backward()
    assert tracker.flops == 2 * (2 * 8 * 64 * 32)  # forward and the weight's gradient; x needs none
    assert tracker.live["weights"] == tracker.live["gradients"] == 4 * 64 * 32
    assert tracker.live["activations"] == 4 * 8 * 64


def test_shared_weights_stay_shared() -> None:
    first, second = nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta")
    second.weight = first.weight
    both = nn.ModuleList([first, second])
    StandIns().fill(both)
    assert first.weight is second.weight
    assert len(list(both.parameters())) == 3


def test_parameters_are_exact_and_states_follow(recipe: Recipe) -> None:
    stages = plan(recipe, CPU)
    model, _ = build_model(recipe.model, build_vision_tokenizer(recipe.model))
    everything = sum(p.numel() for p in model.parameters())
    assert [stage.name for stage in stages] == recipe.stage_names
    for stage in stages[1:]:
        assert sum(stage.parameters.values()) == everything
        # two moments of every number that trains, and a counter for each tensor
        states = 8 * sum(stage.trainable.values())
        assert states <= stage.memory["optimizer"] <= states * 1.1 + 4096
        assert stage.flops > 0
        assert stage.warning is None
    alone = of(stages, "tokenizer")
    assert alone.parameters == {"vision_tokenizer": sum(p.numel() for p in model.vision_tokenizer.parameters())}
    assert of(stages, "align").trainable["language_model"] == 0


def test_a_decoder_stage_trains_the_decoder_alone(recipe: Recipe) -> None:
    semantic = next(stage for stage in recipe.stages if stage.stage == "semantic")
    (found,) = plan(replace(recipe, stages=(replace(semantic, stage="decoder"),)), CPU)
    tokenizer = build_vision_tokenizer(recipe.model)
    train_decoder(tokenizer)
    numbers = {
        flag: sum(p.numel() for p in tokenizer.parameters() if p.requires_grad is flag) for flag in (True, False)
    }
    assert min(numbers.values()) > 0
    assert found.trainable == {"vision_tokenizer": numbers[True], "projector": 0, "language_model": 0}
    assert found.parameters["vision_tokenizer"] == sum(numbers.values())


def test_smaller_micro_batches_take_less_and_compute_the_same(recipe: Recipe) -> None:
    semantic = next(stage for stage in recipe.stages if stage.stage == "semantic")
    alone = replace(recipe, stages=(replace(semantic, micro_batch_size=None),))
    halved = replace(recipe, stages=(replace(semantic, micro_batch_size=semantic.batch_size // 2),))
    (whole,), (parts,) = plan(alone, CPU), plan(halved, CPU)
    assert parts.memory["activations"] < whole.memory["activations"]
    assert parts.micro_batches == 2
    assert parts.flops == pytest.approx(whole.flops, rel=0.2)


def test_a_recipe_that_stops_at_a_collapse_is_planned(recipe: Recipe) -> None:
    """What stands in for the pictures all takes one code."""
    strict = replace(recipe.stages[0], health=replace(recipe.stages[0].health, on_collapse="stop"))
    (stage,) = plan(replace(recipe, stages=(strict,)), CPU)
    assert stage.peak > 0


def test_what_does_not_fit_is_said_with_the_knob(recipe: Recipe) -> None:
    (stage, *_) = plan(replace(recipe, stages=recipe.stages[:1]), replace(CPU, memory=2**20))
    assert stage.warning is not None
    assert "1 MiB" in stage.warning


def test_libraries_count_against_a_machine(recipe: Recipe) -> None:
    """A plan is above what a process holds before it builds a model; whether it fits is not."""
    (stage,) = plan(replace(recipe, stages=recipe.stages[:1]), replace(CPU, memory=2**40))
    assert stage.warning is None
    (tight,) = plan(replace(recipe, stages=recipe.stages[:1]), replace(CPU, memory=stage.peak + LIBRARY_BYTES - 1))
    assert tight.warning is not None
    assert "344 MiB of it for libraries" in tight.warning


def test_each_process_measures_its_own_share(recipe: Recipe) -> None:
    """Validation and health of one of four processes see a quarter of the batch."""
    semantic = next(stage for stage in recipe.stages if stage.stage == "semantic")
    seen: list[int] = []
    plain = loop.Stage.__init__

    def watched(stage: Any, *given: Any, **named: Any) -> None:
        plain(stage, *given, **named)
        seen.append(stage.micro_batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Stage, "__init__", watched)
        alone = replace(recipe, stages=(replace(semantic, batch_size=8, micro_batch_size=None),))
        plan(alone, replace(CPU, world_size=4))
    assert seen == [2]


def test_sharding_divides(recipe: Recipe) -> None:
    semantic = next(stage for stage in recipe.stages if stage.stage == "semantic")
    alone = replace(recipe, stages=(replace(semantic, batch_size=4),))
    gpu = Target("h100-80gb", HARDWARE["h100-80gb"], world_size=2)
    (ddp,) = plan(alone, gpu)
    (fsdp,) = plan(alone, replace(gpu, sharding="fsdp"))
    assert fsdp.memory["optimizer"] == -(-ddp.memory["optimizer"] // 2)
    assert fsdp.peak < ddp.peak


def test_a_process_with_cached_codes_keeps_less(recipe: Recipe) -> None:
    """Of the same stage: the share that stays with malloc is smaller where no convolution runs in a step."""
    align = next(stage for stage in recipe.stages if stage.stage == "align")
    (encoded,) = plan(replace(recipe, stages=(align,)), CPU)
    (cached,) = plan(replace(recipe, stages=(replace(align, cached_codes=True),)), CPU)
    fleeting = {
        name: sum(each.memory.get(part, 0) for part in FLEETING) for name, each in (("e", encoded), ("c", cached))
    }
    kept = encoded.memory["process"] - cached.memory["process"]
    assert kept == int(KEPT_SHARE * fleeting["e"]) - int(KEPT_SHARE_OF_CACHED * fleeting["c"])
    assert kept > 0


def test_a_sharded_process_on_a_cpu_keeps_what_was_whole(recipe: Recipe) -> None:
    """Validation gathers all weights, in buffers as large, and malloc gives neither back."""
    semantic = next(stage for stage in recipe.stages if stage.stage == "semantic")
    alone = replace(recipe, stages=(replace(semantic, batch_size=8, micro_batch_size=1),))
    (ddp,) = plan(alone, replace(CPU, world_size=8))
    (fsdp,) = plan(alone, replace(CPU, world_size=8, sharding="fsdp"))
    assert fsdp.memory["process"] - ddp.memory["process"] == 2 * ddp.memory["weights"]
    assert fsdp.memory["optimizer"] == -(-ddp.memory["optimizer"] // 8)


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("0.5MiB", 2**19)])
def test_quantities(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "nanGB", "many GB"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="24GiB"):
        parse_memory(text)


def test_unknown_hardware_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'h100-80gb'"):
        find_hardware("h100")


def test_the_command_prints_a_table_or_json(
    toy_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_recipe["stages"] = toy_recipe["stages"][:1]
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(toy_recipe), encoding="utf-8")
    assert main(["plan", str(file), "--device-memory", "1MiB"]) == 0
    shown = capsys.readouterr().out
    assert "peak memory" in shown
    assert "WARNING" in shown
    assert "assume" in shown
    assert main(["plan", str(file), "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["peak"] == sum(stage["memory"].values())
    assert main(["plan", str(file), "--hardware", "abacus"]) == 2

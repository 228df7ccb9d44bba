"""Several processes compute what one does, each with the whole model (DDP) or with its part (FSDP2), and take over from each
other.

What is equal to what: a step of W processes that accumulate A micro-batches of m examples is a step of one process that
accumulates A micro-batches of W m. Every mean over pictures and the caption loss would be the same for any A; L_entropy would
not, because the entropy of the mean over the codes of a micro-batch is another number than that over the whole step. The ranks'
i-th micro-batches together hold the examples of the one process's i-th, and its mean runs over all of them.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from ett.config import from_mapping
from ett.errors import RecipeError
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run, load_model
from ett.model.build import build_vision_tokenizer
from ett.train.checkpoint import list_checkpoints, load_checkpoint, take_snapshot, write_checkpoint
from ett.train.log import read_log
from ett.train.objectives import TokenizerObjective
from ett.train.sharding import shard
from tests.faults.test_ranks import complete, finish, started, text_among_pictures, wait_for_step, write

RATE = 4e-5
"""The paper's, of the semantic stage."""


def semantic(recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    """The semantic stage alone, two accumulated micro-batches of four; no dropout, whose masks are each rank's own."""
    recipe["model"]["language_model"]["config"]["attention_dropout"] = 0.0
    stage = {**recipe["stages"][2], "steps": steps, "batch_size": 8, "micro_batch_size": 4, "checkpoint_every": 5}
    recipe["stages"] = [{**stage, "optimizer": {"learning_rate": RATE}}]
    return recipe


def divided(recipe: dict[str, Any], sharding: str, world: int) -> dict[str, Any]:
    """The same steps for `world` processes."""
    stages = [{**stage, "micro_batch_size": stage["micro_batch_size"] // world} for stage in recipe["stages"]]
    return {**recipe, "stages": stages, "sharding": sharding}


def measured(run: Path, event: str = "step") -> list[tuple[str, int, dict[str, float]]]:
    return [(e["stage"], e["step"], e["losses"]) for e in read_log(run / "log.jsonl") if e["event"] == event]


def assert_equal_runs(one: Path, two: Path, steps: int) -> None:
    """All terms of all steps within 1e-5 of themselves, and weights to 1e-5."""
    ours, theirs = measured(one), measured(two)
    assert len(ours) == len(theirs) == steps
    for (stage, step, losses), other in zip(ours, theirs, strict=True):
        assert (stage, step) == other[:2]
        assert losses == pytest.approx(other[2], rel=1e-5), (stage, step)
    names = [path.relative_to(one) for path in sorted(one.glob("stages/*/model.safetensors"))]
    assert names
    for name in names:
        mine, other_weights = load_file(one / name), load_file(two / name)
        assert mine.keys() == other_weights.keys()
        for key, tensor in mine.items():
            torch.testing.assert_close(other_weights[key], tensor, rtol=0, atol=1e-5, msg=f"{name}: {key}")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("sharding", "text", "world"),
    [
        pytest.param("ddp", False, 2, marks=pytest.mark.slow),
        pytest.param("fsdp", False, 2, marks=pytest.mark.slow),
        pytest.param("ddp", True, 2, marks=pytest.mark.slow),
        ("fsdp", True, 2),
        pytest.param("ddp", True, 4, marks=pytest.mark.slow),
        pytest.param("fsdp", True, 4, marks=pytest.mark.slow),
    ],
)
def test_several_processes_equal_one_within_1e5_over_ten_semantic_steps(
    sharding: str, text: bool, world: int, toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """float32, entropy on, no discriminator, the paper's learning rate; with `text`, ranks have unequal numbers of pictures."""
    if text:
        text_among_pictures(Path(toy_recipe["data"][0]["path"]))
    recipe = semantic(toy_recipe, 10)
    Run(from_mapping(Recipe, recipe), tmp_path / "one").train()
    complete(write(divided(recipe, sharding, world), tmp_path / "recipe.yaml"), tmp_path / "several", world)
    assert_equal_runs(tmp_path / "one", tmp_path / "several", 10)
    model, _ = load_model(tmp_path / "several")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_one_run_goes_from_ddp_to_fsdp_to_a_single_process(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Checkpoints hold the whole state, whoever wrote them; moving averages among it. Without accumulation every number of
    processes takes the same step."""
    # short: from step 34 on, two processes drift from one by more than 1e-5, by rounding and without any hand-over
    steps = 24
    recipe = semantic(toy_recipe, steps)
    recipe["stages"][0] |= {"ema_decay": 0.9, "micro_batch_size": None, "checkpoint_every": None}
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    Run(from_mapping(Recipe, recipe), whole).train()
    reached = 0
    for sharding, world in (("ddp", 4), ("fsdp", 2)):
        given = write({**recipe, "sharding": sharding}, tmp_path / f"{sharding}.yaml")
        with started(given, moved, world, "--resume") as ranks:
            wait_for_step(moved, reached + 3, ranks)
            ranks[1].send_signal(signal.SIGTERM)
            for code, errors in finish(ranks, timeout=300):
                assert code == 128 + signal.SIGTERM, errors
        saved = list_checkpoints(moved / "checkpoints", "semantic")[-1]
        assert saved.step > reached
        reached = saved.step
    assert reached < steps
    complete(write(recipe, tmp_path / "alone.yaml"), moved, 1, "--resume")
    assert_equal_runs(whole, moved, steps)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_stage_is_sharded(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Codes placed by k-means, averages, distillation, the best weights, packing, recomputed activations, an image head: each
    goes through shards as without them."""
    toy_recipe["model"] |= {"image_head": {"kind": "tied"}, "projector": {"grid_positions": 8}}
    toy_recipe["evaluation"] = {"data": [{"source": "names"}], "limit": 4}
    drawn = [{**toy_recipe["data"][0], "draws": True}]
    base = semantic(toy_recipe, 4)["stages"][0] | {"micro_batch_size": None, "checkpoint_every": 2}
    best = {"validate_every": 2, "ends_with": "best", "ema_decay": 0.9}
    toy_recipe["stages"] = [
        {**base, **best, "stage": "tokenizer", "quantize_after": 1},
        {**base, "stage": "align"},
        {**base, **best, "losses": {"distillation_weight": 0.1}},
        {**base, "stage": "chat", "packing": True, "gradient_checkpointing": True},
        {**base, "stage": "decoder"},
        {**base, "stage": "gen", "data": drawn},
    ]
    Run(from_mapping(Recipe, toy_recipe), tmp_path / "one").train()
    complete(write({**toy_recipe, "sharding": "fsdp"}, tmp_path / "recipe.yaml"), tmp_path / "two", 2)
    assert_equal_runs(tmp_path / "one", tmp_path / "two", 24)


def test_moments_take_the_layout_of_their_weights(tmp_path: Path) -> None:
    """A convolution's weight lies in memory channels last, and otherwise where it is sharded; a fused step asks no strides."""
    pictures = torch.randn(2, 3, 8, 8)

    def made(layout: torch.memory_format) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = torch.nn.Conv2d(3, 4, 3)
        module.weight.data = module.weight.data.contiguous(memory_format=layout)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)

    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(pictures).square().mean().backward()
        optimizer.step()

    one, optimizer = made(torch.channels_last)
    step(one, optimizer)
    saved = write_checkpoint(tmp_path, take_snapshot("semantic", 1, one, optimizer))
    step(one, optimizer)
    other, others = made(torch.contiguous_format)
    load_checkpoint(saved, other, others)
    step(other, others)
    torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=0, atol=1e-5)


def test_what_cannot_be_divided_is_refused(toy_recipe: dict[str, Any]) -> None:
    toy_recipe["model"]["vision_tokenizer"]["normalize"] = True
    tokenizer = build_vision_tokenizer(from_mapping(Recipe, toy_recipe).model)
    with pytest.raises(RecipeError, match="normalize: false"):
        shard(TokenizerObjective(tokenizer), tokenizer, Accelerator(cpu=True))


@pytest.mark.parametrize("library", ["DEEPSPEED", "FSDP"])
def test_what_a_launcher_asks_for_is_not_ignored(
    library: str, toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` hands its configuration over in the environment."""
    monkeypatch.setenv(f"ACCELERATE_USE_{library}", "true")
    with pytest.raises(RecipeError, match="sharding: fsdp"):
        Run(from_mapping(Recipe, toy_recipe), tmp_path / "run").train()
    assert not (tmp_path / "run").exists()

"""What each stage trains and what it leaves alone, checked on the weights themselves."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ett.errors import ModelError, RecipeError
from ett.losses.joint import LossConfig
from ett.train.optim import OptimizerConfig, build_optimizer, schedule_factor
from ett.train.stages import (
    StageConfig,
    caption_reach,
    check_reach,
    modules_by_part,
    part_of,
    set_trainable,
    train_mode,
)
from tests.model.test_ett import build, encoded

STAGES = {
    "align": {"projector"},
    "semantic": {"vision_tokenizer", "projector", "language_model"},
    "chat": {"projector", "language_model"},
}


@pytest.mark.parametrize("visual_input", ["embedding", "index"])
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_step_moves_exactly_the_declared_parts(stage: str, visual_input: str) -> None:
    model, processor = build(visual_input=visual_input)
    config = StageConfig(stage, steps=1, batch_size=2)  # type: ignore[arg-type]
    set_trainable(model, config.parts)
    train_mode(model, config.parts)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer({"all": model}, OptimizerConfig(learning_rate=1e-3))
    batch = encoded(processor)
    model(
        input_ids=batch.input_ids,
        pixel_values=batch.pixel_values,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        loss_config=config.loss_config,
    ).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) or part_of(name) in STAGES[stage], name
    optimizer.step()
    moved = {part_of(name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == STAGES[stage]


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_reach_of_the_caption_loss(stage: str) -> None:
    model, processor = build()
    config = StageConfig(stage, steps=1, batch_size=2)  # type: ignore[arg-type]
    set_trainable(model, config.parts)
    reach = caption_reach(model, encoded(processor), config.loss_config)
    check_reach(reach, config, "embedding")
    tokenizer_trains = stage == "semantic"
    assert (reach.norms["encoder"] > 0) == (reach.norms["codebook"] > 0) == tokenizer_trains
    assert all(p.grad is None for p in model.parameters())


def test_reach_with_fresh_adapters() -> None:
    """Adapters start as the identity, half of their weights without gradient; the check knows."""
    model, processor = build(lora={"r": 2, "target_modules": ["q_proj"]})
    config = StageConfig("semantic", steps=1, batch_size=2)
    set_trainable(model, config.parts)
    check_reach(caption_reach(model, encoded(processor), config.loss_config), config, "embedding")


def test_a_broken_freeze_is_caught() -> None:
    """The check fails when a declared part gets no gradient, and when a frozen one does."""
    model, processor = build()
    semantic = StageConfig("semantic", steps=1, batch_size=2)
    set_trainable(model, semantic.parts)
    reach = caption_reach(model, encoded(processor), replace(LossConfig(), caption_reaches_tokenizer=False))
    with pytest.raises(AssertionError, match="does not reach the encoder"):
        check_reach(reach, semantic, "embedding")
    full = caption_reach(model, encoded(processor), LossConfig())
    with pytest.raises(AssertionError, match="reaches the encoder"):
        check_reach(full, StageConfig("align", steps=1, batch_size=2), "embedding")


def test_a_saturated_softmax_is_a_clear_error() -> None:
    """All mass on one code: the way to the encoder exists and carries exactly 0, which is the user's to mend."""
    model, processor = build()
    semantic = StageConfig("semantic", steps=1, batch_size=2)
    set_trainable(model, semantic.parts)
    with torch.no_grad():
        model.vision_tokenizer.quantize.embedding.weight.mul_(1e6)
    reach = caption_reach(model, encoded(processor), LossConfig())
    assert reach.norms["encoder"] == 0
    assert "encoder" in reach.vanished
    with pytest.raises(ModelError, match=r"exactly 0.*temperature"):
        check_reach(reach, semantic, "embedding")


def test_controls_of_a_fair_comparison() -> None:
    model, processor = build()
    frozen = StageConfig("semantic", steps=1, batch_size=2, trains=("projector", "language_model"))
    set_trainable(model, frozen.parts)
    check_reach(caption_reach(model, encoded(processor), frozen.loss_config), frozen, "embedding")
    assert not any(p.requires_grad for p in model.vision_tokenizer.parameters())
    control = StageConfig("semantic", steps=1, batch_size=2, losses=LossConfig(caption_reaches_tokenizer=False))
    set_trainable(model, control.parts)
    check_reach(caption_reach(model, encoded(processor), control.loss_config), control, "embedding")
    with pytest.raises(RecipeError, match="trains the vision tokenizer and nothing else"):
        StageConfig("tokenizer", steps=1, batch_size=2, trains=("projector",))


def test_groups_hold_every_parameter_once_with_its_rate() -> None:
    model, _ = build("qwen2")
    config = OptimizerConfig(learning_rate=1e-3, learning_rates={"vision_tokenizer": 1e-4}, weight_decay=0.1)
    parts = {"vision_tokenizer": model.vision_tokenizer, "language_model": model.language_model}
    optimizer = build_optimizer(parts, config)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    wanted = {p for module in parts.values() for p in module.parameters()}
    assert len(held) == len(set(held)) == len(wanted)
    rates = {group["part"]: group["peak_lr"] for group in optimizer.param_groups}
    assert rates == {"vision_tokenizer": 1e-4, "language_model": 1e-3}
    codebook = model.vision_tokenizer.quantize.embedding.weight
    (group,) = [g for g in optimizer.param_groups if any(p is codebook for p in g["params"])]
    assert group["weight_decay"] == 0
    assert any(g["weight_decay"] == 0.1 for g in optimizer.param_groups)


def test_no_table_of_vectors_decays() -> None:
    """Neither the codebook nor the language model's own table in its place: arms differ in what they read alone."""
    model, _ = build(visual_input="index")
    optimizer = build_optimizer(modules_by_part(model), OptimizerConfig(weight_decay=0.1))
    assert model.index_embedding is not None
    for table in (model.index_embedding.weight, model.vision_tokenizer.quantize.embedding.weight):
        (group,) = [g for g in optimizer.param_groups if any(p is table for p in g["params"])]
        assert group["weight_decay"] == 0


def test_schedule() -> None:
    config = OptimizerConfig(warmup_ratio=0.03, final_ratio=0.1)
    factors = [schedule_factor(config, step, 100) for step in range(100)]
    assert factors[0] == 0.25
    assert factors[2] == 0.75
    assert factors[3] == 1.0
    assert all(a > b for a, b in pairwise(factors[3:]))
    assert schedule_factor(config, 100, 100) == pytest.approx(0.1)
    assert schedule_factor(config, 3 + 97 // 2, 100) == pytest.approx(0.55, abs=0.01)
    assert schedule_factor(OptimizerConfig(schedule="constant"), 99, 100) == 1.0
    held = OptimizerConfig(warmup_ratio=0.1, final_ratio=0.1, decay_until=0.8)
    assert schedule_factor(held, 45, 100) == pytest.approx(0.55, abs=0.01)
    assert [schedule_factor(held, step, 100) for step in (80, 90, 99)] == pytest.approx([0.1] * 3)

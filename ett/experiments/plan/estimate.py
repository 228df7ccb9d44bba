"""What each stage of a recipe takes: memory by part, operations, and a time that rests on an assumption."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from ett.config import require
from ett.experiments.plan.hardware import ASSUMED_UTILISATION, Hardware, machine_memory
from ett.experiments.plan.rehearsal import Rehearsal, rehearse
from ett.experiments.plan.skeleton import skeleton, stage_data
from ett.experiments.plan.tracker import Part
from ett.experiments.recipe import Recipe
from ett.model.ett import EttForConditionalGeneration
from ett.tokenizers import VisionTokenizer
from ett.train.feed import split_batch
from ett.train.sharding import Sharding, repeated_layers
from ett.train.stages import StageConfig, part_of, set_trainable

DIVIDED: tuple[Part, ...] = ("weights", "gradients", "optimizer", "average")
"""What FSDP divides among devices."""
PROCESS_BYTES, ARTWORK_BYTES = 52 * 2**20, 46 * 2**20
"""Resident in a process on a CPU beside its tensors, as measured: pages of libraries and fonts that training is the first to
touch, and the built-in artwork where it is read."""
LIBRARY_BYTES = 344 * 2**20
"""Resident in a process on a CPU before it builds a model: the interpreter and what it imports; not in a stage's memory."""
KEPT_SHARE, KEPT_SHARE_OF_CACHED = 0.7, 0.3
"""Of what comes and goes within a step: what malloc keeps between it, and operations within themselves, as measured
(docs/plan.md). The second where codes are cached, so that a step has no convolutions."""
FLEETING: tuple[Part, ...] = ("activations", "quantizer", "logits")
"""What comes and goes within a step."""


@dataclass(frozen=True)
class Target:
    """Where a recipe is to run.

    Attributes:
        hardware: of one device, called `name`.
        world_size: devices, >= 1.
        sharding: "ddp": each device holds everything, and gradients twice (the buckets that are exchanged); "fsdp":
            weights, gradients, optimizer and average are divided, and what a moment needs is gathered (`ett.train.sharding`).
        memory: bytes of one device; null takes the hardware's.
    """

    name: str
    hardware: Hardware
    world_size: int = 1
    sharding: Sharding = "ddp"
    memory: int | None = None

    def __post_init__(self) -> None:
        require(self.world_size >= 1, "world_size", self.world_size, "at least 1")

    @property
    def available(self) -> int:
        """Bytes that one device has."""
        return self.memory or self.hardware.memory or machine_memory() // self.world_size


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    Attributes:
        name: of the stage.
        parameters, trainable: numbers by part of the model ("vision_tokenizer", "projector", "language_model").
        memory: bytes of one device by part, at the moment when their sum is largest.
        moment: what the stage is doing then.
        flops: of one optimizer step on one device: matrix products, convolutions and attention.
        seconds: of one step, at `utilisation` of the hardware's peak rate; an estimate. hours: of all steps.
        batch: (B, T, pictures) of a micro-batch. micro_batches: of a step on one device.
        notes: what was assumed. warning: what does not fit, and what to do; null where it does.
    """

    name: str
    parameters: dict[str, int]
    trainable: dict[str, int]
    memory: dict[Part, int]
    moment: str
    flops: int
    seconds: float
    hours: float
    batch: tuple[int, int, int]
    micro_batches: int
    notes: tuple[str, ...] = ()
    warning: str | None = None

    @property
    def peak(self) -> int:
        """Bytes of one device."""
        return sum(self.memory.values())


def plan(recipe: Recipe, target: Target) -> list[StagePlan]:
    """Every stage of `recipe` on `target`.

    Raises:
        UserError: the recipe's model or data cannot be had here, or its batches do not divide among the devices.
    """
    return [_plan_stage(recipe, k, target) for k in range(len(recipe.stages))]


def _plan_stage(recipe: Recipe, k: int, target: Target) -> StagePlan:
    config, hardware = recipe.stages[k], target.hardware
    model, processor = skeleton(recipe, k)
    data, batch, notes = stage_data(recipe, k, model, processor, target.world_size)
    if isinstance(model, VisionTokenizer):
        model.requires_grad_(True)
    else:
        set_trainable(model, config.parts, words=config.stage != "gen")
    bf16 = recipe.precision == "bf16"
    found = rehearse(config, model, data, batch, hardware.device, bf16=bf16, world_size=target.world_size)
    # a stage may train less than its parts
    parameters, trainable = _numbers(model)
    memory = _on_one_device(found, target, 4 * sum(trainable.values()), 4 * _gathered(model))
    if hardware.device == "cpu":
        memory["process"] = _process_bytes(recipe, k, memory, parameters["vision_tokenizer"])
        if target.world_size > 1 and target.sharding == "fsdp":
            # what runs outside of the step (validation, health) gathers all weights; they arrive in buffers as large
            memory["process"] += 2 * found.memory.get("weights", 0)
    seconds = found.flops / (ASSUMED_UTILISATION[hardware.device] * hardware.rate(recipe.precision))
    return StagePlan(
        name=recipe.stage_names[k],
        parameters=parameters,
        trainable=trainable,
        memory=memory,
        moment=found.moment,
        flops=found.flops,
        seconds=seconds,
        hours=seconds * config.steps / 3600,
        batch=(len(batch.ids), batch.input_ids.shape[1], len(batch.pixel_values)),
        micro_batches=split_batch(config, target.world_size)[1],
        notes=tuple(notes),
        warning=_warning(config, memory, target),
    )


def _process_bytes(recipe: Recipe, k: int, memory: dict[Part, int], tokenizer_parameters: int) -> int:
    """What a process on a CPU holds beside its tensors."""
    # every stage's sources are opened before the first one trains
    sources = [*recipe.data, *(each for stage in recipe.stages for each in stage.data or ())]
    artwork = any(each.source in ("names", "questions") for each in sources)
    # the file that a tokenizer was read from stays mapped, beside its weights in another layout
    loaded = k > 0 or recipe.model.init is not None or "path" in recipe.model.vision_tokenizer
    validation = recipe.evaluation.limit * 3 * 4 * math.prod(recipe.model.size)
    share = KEPT_SHARE_OF_CACHED if recipe.stages[k].cached_codes else KEPT_SHARE
    kept = int(share * sum(memory.get(part, 0) for part in FLEETING))
    return PROCESS_BYTES + artwork * ARTWORK_BYTES + loaded * 4 * tokenizer_parameters + validation + kept


def _numbers(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """(parameters, those that train) by part of the model."""
    alone = isinstance(model, VisionTokenizer)
    everything: dict[str, int] = {}
    training: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = "vision_tokenizer" if alone else part_of(name)
        everything[part] = everything.get(part, 0) + parameter.numel()
        training[part] = training.get(part, 0) + parameter.numel() * parameter.requires_grad
    return everything, training


def _gathered(model: EttForConditionalGeneration | VisionTokenizer) -> int:
    """Numbers that a device of a sharded job holds whole: weights and gradients of what lies around the language model's
    layers, and of two layers, the one that computes and the next."""
    layers = [] if isinstance(model, VisionTokenizer) else repeated_layers(model)
    sizes = [(sum(p.numel() for p in each.parameters()), _trainable(each)) for each in layers]
    around = sum(p.numel() for p in model.parameters()) - sum(size for size, _ in sizes)
    learned = _trainable(model) - sum(size for _, size in sizes)
    return around + learned + 2 * max((sum(each) for each in sizes), default=0)


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _on_one_device(found: Rehearsal, target: Target, gradient_bytes: int, gathered: int) -> dict[Part, int]:
    """Bytes by part on each of the target's devices."""
    memory = dict(found.memory)
    if target.world_size == 1:
        return memory
    if target.sharding == "ddp":
        memory["gradients"] = memory.get("gradients", 0) + gradient_bytes
        return memory
    for part in DIVIDED:
        memory[part] = -(-memory.get(part, 0) // target.world_size)
    memory["weights"] += gathered
    return memory


def _warning(config: StageConfig, memory: dict[Part, int], target: Target) -> str | None:
    """What dominates and which knob turns it, where `memory` is more than a device has."""
    libraries = LIBRARY_BYTES if target.hardware.device == "cpu" else 0
    needed, available = sum(memory.values()) + libraries, target.available
    if needed <= available:
        return None
    part = max(memory, key=lambda each: memory[each])
    micro = split_batch(config, target.world_size)[0]
    smaller = f"set micro_batch_size below {micro}, which leaves batch_size as it is"
    fewer = "shard over more devices (--sharding fsdp --world-size N), train fewer parts (trains), or use model.lora"
    checkpointing = (
        "" if config.gradient_checkpointing or config.stage == "tokenizer" else ", set gradient_checkpointing"
    )
    merge = "" if config.stage == "tokenizer" else ", raise model.projector.merge_size"
    knobs: dict[Part, str] = {
        "activations": f"{smaller}{checkpointing}{merge}, or lower model.image_size",
        "logits": f"{smaller}, or lower max_length",
        "quantizer": f"{smaller}, or choose a smaller codebook_size",
    }
    beside = f" ({show_bytes(libraries)} of it for libraries)" if libraries else ""
    return (
        f"It needs {show_bytes(needed)}{beside}, and {target.name} has {show_bytes(available)}. The largest part is {part} "
        f"({show_bytes(memory[part])}): {knobs.get(part, fewer)}."
    )


def show_bytes(count: float) -> str:
    """ "3.4 GiB", "870 MiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

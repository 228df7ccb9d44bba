"""A stage's own loop, rehearsed on stand-ins: what its steps, a validation and a measurement of health take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from ett.experiments.plan.stand_ins import StandIns
from ett.experiments.plan.tracker import Part, Tracker
from ett.model.ett import EttForConditionalGeneration
from ett.model.processing import Encoded, EttProcessor
from ett.tokenizers import VisionTokenizer, index_backprop
from ett.tokenizers.quantizer import IndexBackpropagationQuantizer
from ett.train.feed import StageData, split_batch
from ett.train.log import RunLog
from ett.train.loop import Stage
from ett.train.placing import FEATURES_PER_CODE
from ett.train.stages import StageConfig
from ett.types import Batch


@dataclass(frozen=True)
class Rehearsal:
    """What a stage takes on a device that holds all of it.

    Attributes:
        memory: bytes by part when their sum was largest. moment: what the stage was doing then.
        flops: of one optimizer step on one rank, all its micro-batches.
    """

    memory: dict[Part, int]
    moment: str
    flops: int


def rehearse(
    config: StageConfig,
    model: EttForConditionalGeneration | VisionTokenizer,
    data: StageData,
    batch: Batch,
    device: str,
    *,
    bf16: bool,
    world_size: int = 1,
) -> Rehearsal:
    """Go through a stage with stand-ins of `model`, which comes from the meta device and is changed in place.

    Args:
        batch: a micro-batch; every one is taken to be as large. data: what the health monitor and validation look at.
        device: "cpu" or "cuda", whose chunks the quantizer takes; neither must be here.
    """
    stand_ins = StandIns()
    stand_ins.fill(model)
    tracker = Tracker(stand_ins, _vocabulary(model))
    tokenizer = model if isinstance(model, VisionTokenizer) else model.vision_tokenizer
    tracker.attribute(tokenizer.quantize, "quantizer")
    batch = replace(batch, pixel_values=stand_ins.tensor(batch.pixel_values))
    # compiled or not, a step does the same; what the compiler fuses away is not foreseen
    # stand-ins all take one code, which would count as a collapse
    config = replace(config, compile=False, health=replace(config.health, min_usage=0.0))
    data = replace(data, processor=cast(EttProcessor, _StandInProcessor(data.processor, stand_ins)))
    micro_batch, accumulation = split_batch(config, world_size)
    # of one process: the stage here believes that it is alone
    config = replace(config, micro_batch_size=micro_batch)
    with _pretended(device), stand_ins.mode, tracker:
        tracker.assign_module(model)
        accelerator, log = cast(Accelerator, _Understudy(bf16)), cast(RunLog, _SilentLog())
        tracker.moment = "the start of the stage"
        stage = Stage(config, config.stage, model, data, accelerator, log, Path())
        _attribute(stage, stand_ins, tracker)
        if config.quantize_after:
            tracker.moment = "k-means of the codebook"
            _place_codes(tokenizer, stand_ins)
            stage.step = config.quantize_after
        tracker.moment = "training"
        # the second step finds the optimizer's state, the second micro-batch the first one's gradients
        micro_batches = [batch] * min(accumulation, 2)
        for _ in range(2):
            before = tracker.flops
            stage._train_step(micro_batches)
        flops = (tracker.flops - before) * accumulation // len(micro_batches)
        tracker.moment = "validation"
        stage.validate()
        if stage.health is not None:
            tracker.moment = "the measurement of the tokenizer's health"
            stage.health.measure(config.steps)
    return Rehearsal(dict(tracker.peak), tracker.peak_moment, flops)


@contextmanager
def _pretended(device: str) -> Iterator[None]:
    """Modules stay where they are, and the quantizer works as it does on `device`."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(nn.Module, "to", lambda module, *_arguments, **_named: module))
        if device != "cpu":
            for budgets in (index_backprop.CHUNK_ELEMENTS, index_backprop.KEPT_ELEMENTS):
                stack.enter_context(patch.dict(budgets, cpu=budgets[device]))
            stack.enter_context(patch.object(index_backprop, "TILED_DEVICES", ()))
        yield


def _vocabulary(model: EttForConditionalGeneration | VisionTokenizer) -> int:
    return 0 if isinstance(model, VisionTokenizer) else int(model.config.text_config.get_text_config().vocab_size)


def _attribute(stage: Stage, stand_ins: StandIns, tracker: Tracker) -> None:
    """Say what belongs to which part of what a stage has made beside its model."""
    tracker.attribute_step(stage.optimizer.optimizer)
    if stage.average is not None:
        for tensor in stage.average.average.values():
            tracker.assign(tensor, "average")
    if stage.critics is None:
        return
    for module in (stage.critics.perceptual, stage.critics.discriminator):
        if module is not None:
            stand_ins.fill(module)
            tracker.assign_module(module)
    if stage.critics.discriminator is not None:
        stand_ins.fill(stage.critics.lecam)
        made = stage.critics.optimizer
        stage.critics.optimizer = torch.optim.Adam(stage.critics.discriminator.parameters(), **made.defaults)
        tracker.attribute_step(stage.critics.optimizer)


def _place_codes(tokenizer: VisionTokenizer, stand_ins: StandIns) -> None:
    quantizer = tokenizer.quantize
    assert isinstance(quantizer, IndexBackpropagationQuantizer)
    shape = (1, quantizer.codebook_dim, FEATURES_PER_CODE * quantizer.codebook_size, 1)
    features = stand_ins.tensor(torch.empty(shape, device="meta"))
    quantizer.place_codes(features)


class _StandInProcessor:
    """Encodes as the processor that it stands for; pictures lose their values when they are collated."""

    def __init__(self, processor: EttProcessor, stand_ins: StandIns) -> None:
        self.processor, self.stand_ins = processor, stand_ins

    def encode(self, *arguments: Any) -> Encoded:
        return self.processor.encode(*arguments)

    def collate(self, items: Sequence[Encoded], *, packing: bool = False) -> Batch:
        batch = self.processor.collate(items, packing=packing)
        return replace(batch, pixel_values=self.stand_ins.tensor(batch.pixel_values))


class _SilentLog:
    """A `RunLog` that nobody reads."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_arguments, **_named: None


class _Understudy:
    """What the loop asks of `accelerate.Accelerator`, for one process."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, bf16: bool) -> None:
        self.device, self.bf16 = torch.device("cpu"), bf16

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def no_sync(self, _module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare(self, given: Any) -> Any:
        """The objective in its type, or the optimizer as `accelerate` wraps it."""
        if isinstance(given, torch.optim.Optimizer):
            same = {name: getattr(given, name) for name in ("step", "zero_grad", "param_groups")}
            return SimpleNamespace(optimizer=given, **same)
        if self.bf16:
            inner = given.forward

            def forward(*arguments: Any, **named: Any) -> Any:
                with self.autocast():
                    return inner(*arguments, **named)

            given.forward = convert_outputs_to_fp32(forward)
        return given

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm if math.isfinite(max_norm) else 1e30)

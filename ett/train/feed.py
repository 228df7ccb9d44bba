"""What a stage reads: its examples in the order of their draws, in micro-batches, and what could not be used among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from ett.data.mixture import Drawn, DrawSampler, EncodedDraws, Mixture, Skipped, encode_draw
from ett.data.workers import begin_worker
from ett.errors import DataError, UserError
from ett.model.processing import Encoded, EttProcessor
from ett.train.log import RunLog
from ett.train.stages import StageConfig
from ett.types import Batch

NAMED = 5
"""Bad samples that an error message names."""


@dataclass(frozen=True)
class StageData:
    """What a stage reads.

    Attributes:
        mixture: training examples by draw number.
        validation: fixed examples for validation, possibly none.
        processor: turns examples into tensors.
        num_workers: processes that decode and encode; 0 does it in the loop.
        max_length: positions after which a conversation is cut; None keeps all.
        max_bad_samples: examples that may be skipped; where the mixture is not tolerant, none is.
    """

    mixture: Mixture
    validation: Sequence[Encoded]
    processor: EttProcessor
    num_workers: int
    max_length: int | None = None
    max_bad_samples: int = 0


@dataclass(frozen=True)
class Step:
    """One rank's part of an optimizer step: its micro-batches, and what was skipped on the way to them."""

    micro_batches: list[Batch]
    skipped: tuple[Skipped, ...]


def steps_of(
    data: StageData,
    config: StageConfig,
    first: int,
    accelerator: Accelerator,
    stopped: Callable[[], bool],
) -> Iterator[Step]:
    """This rank's part of each step from `first` (0-based) to the stage's last.

    Args:
        stopped: asked while a step is gathered; it then is given up, and this ends.

    Raises:
        UserError: an example that cannot be used, where none may be skipped.
    """
    micro_batch, accumulation = split_batch(config, accelerator.num_processes)
    rank, world = accelerator.process_index, accelerator.num_processes
    sampler = DrawSampler(first, config.steps, micro_batch, accumulation, rank, world)
    loader: DataLoader[Any] = DataLoader(
        EncodedDraws(data.mixture, data.processor, data.max_length, config.drop_prompt),
        batch_sampler=sampler,
        collate_fn=_Collate(data.processor, config.packing),
        num_workers=data.num_workers,
        worker_init_fn=begin_worker,
        # so that the copy to the accelerator overlaps the step before
        pin_memory=accelerator.device.type == "cuda",
        # its own generator: a loader otherwise draws its workers' seed from the state that training resumes
        generator=torch.Generator(),
    )
    gathered: list[Batch] = []
    skipped: list[Skipped] = []
    for item in loader:
        if isinstance(item, UserError):
            raise item
        if stopped():
            return
        batch, passed_over = item
        gathered.append(batch.to(accelerator.device))
        skipped += passed_over
        if len(gathered) == accumulation:
            yield Step(gathered, tuple(skipped))
            gathered, skipped = [], []


class _Collate:
    """Collates in the worker; an unusable example passes through as its error."""

    def __init__(self, processor: EttProcessor, packing: bool) -> None:
        self.processor, self.packing = processor, packing

    def __call__(self, items: list[Drawn | UserError]) -> tuple[Batch, list[Skipped]] | UserError:
        encoded: list[Encoded] = []
        skipped: list[Skipped] = []
        for drawn in items:
            if isinstance(drawn, UserError):
                return drawn
            encoded.append(drawn.item)
            skipped += drawn.skipped
        return self.processor.collate(encoded, packing=self.packing), skipped


class BadSamples:
    """The examples of a stage that could not be used: each counted once over all ranks and epochs, named, capped.

    Args:
        data: of the stage. stage: its name. log: where each is named as it turns up.
    """

    def __init__(self, data: StageData, stage: str, log: RunLog, accelerator: Accelerator) -> None:
        self.data, self.stage, self.log, self.accelerator = data, stage, log, accelerator
        self.reasons: dict[str, str] = {}

    def begin(self, step: int) -> None:
        """Count what the sources left out when they were opened.

        Raises:
            DataError: that is more than may be.
        """
        for number, source in enumerate(self.data.mixture.sources):
            self._add(step, {f"{number}: {place}": reason for place, reason in enumerate(source.left_out)})

    def note(self, step: int, skipped: Sequence[Skipped]) -> None:
        """Count what each rank skipped before step `step`; for all ranks at once.

        Raises:
            DataError: there are more than may be.
        """
        if not self.data.mixture.tolerant:
            return
        found = {f"{each.source}/{each.position}": each.reason for each in skipped}
        if self.accelerator.num_processes > 1:
            count = torch.tensor(float(len(found)), device=self.accelerator.device)
            if bool(self.accelerator.reduce(count) > 0):
                found = {key: reason for part in gather_object([found]) for key, reason in part.items()}
        self._add(step, found)

    def _add(self, step: int, found: dict[str, str]) -> None:
        for key, reason in found.items():
            if key not in self.reasons:
                self.reasons[key] = reason
                message = f"Skipped (bad sample {len(self.reasons)} of at most {self.data.max_bad_samples}): {reason}"
                self.log.warning(self.stage, step, "bad_sample", message, once=False)
        if len(self.reasons) > self.data.max_bad_samples:
            named = "\n  ".join(list(self.reasons.values())[:NAMED])
            raise DataError(
                f"Stage {self.stage}, step {step}: {len(self.reasons)} examples cannot be used; max_bad_samples = "
                f"{self.data.max_bad_samples} allows no more. Mend them (`ett data check` lists all), or raise max_bad_samples "
                f"and continue with --resume. The first:\n  {named}"
            )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.reasons = {str(key): str(reason) for key, reason in state["reasons"].items()}


def encode_all(mixture: Mixture, count: int, processor: EttProcessor, max_length: int | None) -> list[Encoded]:
    """The first `count` draws, encoded; a fixed set for validation."""
    return [encode_draw(mixture, draw, processor, max_length).item for draw in range(count)]


def split_batch(config: StageConfig, world_size: int) -> tuple[int, int]:
    """(examples per forward on one rank, forwards per step)."""
    micro = config.micro_batch_size or config.batch_size // world_size
    if micro < 1 or config.batch_size % (micro * world_size):
        raise DataError(
            f"batch_size = {config.batch_size} does not divide into micro-batches of {micro} on {world_size} processes. Choose "
            "batch_size as a multiple of micro_batch_size times the number of processes."
        )
    return micro, config.batch_size // (micro * world_size)

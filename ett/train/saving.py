"""When a checkpoint is written, and by whom: a thread of the first rank, beside training; all ranks learn whether it worked."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from ett.errors import ModelError, UserError
from ett.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    Stateful,
    best_of,
    best_whole,
    checkpoint_folders,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    newest_whole,
    put_back,
    random_state,
    take_snapshot,
    write_checkpoint,
)
from ett.train.sharding import is_sharded


class Saver:
    """The checkpoints of one stage. Every method is for all ranks at once; leaving the context waits for what is being written.

    Args:
        directory: of the run's checkpoints.
        stage: its name.
        model, optimizer, extras: what is saved and put back.
        optional: names of extras that a checkpoint may lack.
        accelerator: the processes.

    Attributes:
        best: the lowest validation loss that a checkpoint holds, infinite where none does.
    """

    def __init__(
        self,
        directory: Path,
        stage: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        extras: Mapping[str, Stateful],
        optional: tuple[str, ...],
        accelerator: Accelerator,
    ) -> None:
        self.directory, self.stage, self.accelerator = directory, stage, accelerator
        self.model, self.optimizer, self.extras, self.optional = model, optimizer, extras, optional
        self.best = math.inf
        self._saved: int | None = None
        self._with_loss = False
        self._writing: Future[Checkpoint] | None = None
        self._thread: ThreadPoolExecutor | None = None

    @property
    def saved(self) -> int:
        """Finished steps of the newest checkpoint, 0 where there is none."""
        return self._saved or 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        if kind is None:
            self.settle()

    def resume(self, tell: Callable[[int, str], None]) -> int:
        """Put the newest whole checkpoint back, if there is one; returns the steps finished.

        Args:
            tell: see `newest_whole`.

        Raises:
            ModelError: no checkpoint is whole, or it is of another stage than this.
        """

        def find() -> Checkpoint | None:
            for folder in checkpoint_folders(self.directory, self.stage):
                if folder.name.startswith(".") and not put_back(folder):
                    # half written when a run was killed
                    shutil.rmtree(folder)
            return newest_whole(self.directory, self.stage, tell)

        found = self._of_first_rank(find)
        if found is None:
            return 0
        rank = self.accelerator.process_index
        load_checkpoint(found, self.model, self.optimizer, self.extras, self.optional, rank)
        best = best_of(list_checkpoints(self.directory, self.stage))
        self.best = math.inf if best is None else best.validation_loss
        self._saved, self._with_loss = found.step, math.isfinite(found.validation_loss)
        return found.step

    def save(self, step: int, validation_loss: float | None = None) -> None:
        """Begin to write a checkpoint of `step` finished steps, once the one before is on the disk; one that is there stays.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.settle()
        # a step that was saved before its validation is saved again with the loss
        if step == self._saved and (validation_loss is None or self._with_loss):
            return
        self._with_loss = validation_loss is not None
        states = gather_object([random_state()])
        if validation_loss is not None and not math.isfinite(validation_loss):
            validation_loss = None
        self.best = min(self.best, math.inf if validation_loss is None else validation_loss)
        self._saved = step
        main = self.accelerator.is_main_process
        if main or is_sharded(self.model):
            state = self.optimizer, self.extras, states, validation_loss
            snapshot = take_snapshot(self.stage, step, self.model, *state, kept=main)
        if main:
            self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
            self._writing = self._thread.submit(write_checkpoint, self.directory, snapshot)

    def settle(self) -> None:
        """Return when what was saved is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        error = self._writing.exception() if self._writing is not None else None
        self._writing = None
        if self.accelerator.num_processes > 1:
            failed = torch.tensor(float(error is not None), device=self.accelerator.device)
            if bool(self.accelerator.reduce(failed) > 0) and error is None:
                raise CheckpointError(f"Stage {self.stage}: the first process could not write a checkpoint.")
        if error is not None:
            raise error

    def restore_best(self, tell: Callable[[int, str], None]) -> int:
        """Put the weights (and averages, and critics) of the best validation back; returns its step.

        Args:
            tell: see `best_whole`.

        Raises:
            UserError: no checkpoint of a validation, or none that is whole.
        """
        self.settle()
        best = self._of_first_rank(lambda: best_whole(self.directory, self.stage, tell))
        if best is None:
            raise UserError(f"Stage {self.stage}: there is no checkpoint of a validation to end with.")
        # the discriminator that a stage leaves is the one that these weights were trained against
        others = {name: each for name, each in self.extras.items() if name in ("average", "critics")}
        load_weights(best, self.model, others)
        return best.step

    def _of_first_rank(self, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        """What the first rank finds, or its error, on all of them: one process's view, and its to set damaged ones aside."""
        found, error = None, None
        if self.accelerator.is_main_process:
            try:
                found = find()
            except ModelError as caught:
                error = str(caught)
        found, error = broadcast_object_list([found, error])
        if error is not None:
            raise ModelError(error)
        return found

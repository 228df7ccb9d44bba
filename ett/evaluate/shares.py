"""Examples divided among the processes of a launch: each works on its share, and all have every result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import distributed
from tqdm import tqdm

from ett.errors import UserError
from ett.evaluate.base import Subject

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def launched() -> Iterator[tuple[bool, bool]]:
    """(whether torchrun or accelerate started several processes of this program, whether this one is to write); they are
    connected inside."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield False, True
        return
    state = PartialState(cpu=not torch.accelerator.is_available())
    try:
        yield True, state.is_main_process
    finally:
        state.destroy_process_group()


def in_batches(
    subject: Subject, data: Sequence[T], size: int, description: str, work: Callable[[Sequence[T]], Sequence[R]]
) -> list[R]:
    """What `work` makes of slices of `data` of up to `size` items, in order.

    Where several processes measure the subject (``subject.divided``), every slice goes to one of them, and each returns all the
    results; they must all come here. Results are pickled: plain values, tensors on the CPU.

    Raises:
        UserError: of the first slice for which `work` did, on every process.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if subject.divided else (0, 1)
    starts = range(rank * size, len(data), world * size)
    own: list[Sequence[R]] = []
    failed: UserError | None = None
    quiet = None if rank == 0 else True
    with tqdm(total=len(data), desc=description, unit="ex", disable=quiet, dynamic_ncols=True, leave=False) as bar:
        for start in starts:
            part = data[start : start + size]
            try:
                own.append(work(part))
            except UserError as error:
                if world == 1:
                    raise
                failed = error
                break
            bar.update(min(world * size, len(data) - bar.n))
    everyone: list[tuple[list[Sequence[R]], UserError | None]] = [(own, failed)]
    if world > 1:
        everyone *= world
        distributed.all_gather_object(everyone, (own, failed))
    errors = {len(done) * world + k: error for k, (done, error) in enumerate(everyone) if error is not None}
    if errors:
        raise errors[min(errors)]
    count = -(-len(data) // size)
    return [row for k in range(count) for row in everyone[k % world][0][k // world]]

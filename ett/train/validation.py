"""Validation during training: its batches are dealt to the processes, and what a signal left undone is done on resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from ett.losses.joint import TermMeans
from ett.train.objectives import Losses
from ett.types import Batch

T = TypeVar("T")


class Measured(NamedTuple):
    """A batch's loss terms by name, each a mean over the batch, and what they are means of: text tokens with a label, image
    tokens with one, pictures."""

    terms: Mapping[str, float]
    supervised: int
    drawn: int
    images: int

    @classmethod
    def of(cls, losses: Losses, batch: Batch) -> Measured:
        """An objective's terms of `batch`."""
        terms = {name: float(value) for name, value in losses.items()}
        if batch.num_images == 0:
            # computed of nothing, for the sake of other ranks
            terms.pop("soft_caption_loss", None)
        return cls(terms, batch.num_supervised, batch.num_drawn, batch.num_images)


class Undone:
    """What of the last finished step is still to be done; for a checkpoint.

    Attributes:
        validation: a signal came while the step was validated.
    """

    def __init__(self) -> None:
        self.validation = False

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"validation": self.validation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.validation = bool(state["validation"])


def mean_terms(
    batches: Sequence[T], measure: Callable[[T], Measured], accelerator: Accelerator, stopped: Callable[[], bool]
) -> dict[str, float] | None:
    """The means of all terms over all batches, the same on every process and with any number of them; None where a signal came.

    Batch k goes to process k modulo their number. Processes wait for each other within a forward pass (sharded weights are
    gathered, buffers compared), so each makes as many: where batches do not go round, the last one is measured by several and
    counts once. Sums are taken in the order of the batches: who measured which leaves no trace, not even in the rounding.

    Args:
        measure: called on every process equally often. stopped: asked before each batch; the same on every process.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    own: list[Measured] = []
    for first in range(0, len(batches), world):
        if stopped():
            return None
        measured = measure(batches[min(first + rank, len(batches) - 1)])
        if first + rank < len(batches):
            own.append(measured)
    shares = gather_object([own])
    found = TermMeans()
    for number in range(len(batches)):
        terms, supervised, drawn, images = shares[number % world][number // world]
        found.add(terms, supervised=supervised, drawn=drawn, images=images)
    return found.means()

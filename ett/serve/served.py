"""What is served: a model with its processor, or a vision tokenizer alone, and what they can do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ett.devices import device_of
from ett.errors import ModelError
from ett.evaluate.run import load_for_evaluation
from ett.experiments.run import resolve_model_folder
from ett.model.ett import EttForConditionalGeneration
from ett.model.processing import EttProcessor
from ett.serve.errors import ApiError
from ett.tokenizers import VisionTokenizer


@dataclass(frozen=True)
class Served:
    """Everything that answers, in evaluation mode.

    Attributes:
        name: the model's, for clients.
        model: None where a vision tokenizer is served alone.
        tokenizer: the model's own. processor: its.
        initial: the tokenizer before tuning, for the lens; None where there is none.
    """

    name: str
    model: EttForConditionalGeneration | None
    tokenizer: VisionTokenizer
    processor: EttProcessor
    initial: VisionTokenizer | None = None

    @property
    def can_draw(self) -> bool:
        return self.model is not None and self.model.image_head is not None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures that the model works on [pixels]."""
        return self.processor.image_processor.height, self.processor.image_processor.width

    def chatting(self) -> EttForConditionalGeneration:
        """The model, to chat with. Raises ApiError (501) where there is none."""
        if self.model is None:
            raise ApiError(
                501, f"{self.name!r} is a vision tokenizer alone: it can reconstruct pictures, not talk about them."
            )
        return self.model

    def drawing(self) -> EttForConditionalGeneration:
        """The model, to draw with. Raises ApiError (501) where it cannot."""
        if self.model is None or not self.can_draw:
            raise ApiError(
                501,
                f"{self.name!r} has no image head, so it reads pictures and cannot draw them. Serve a model that was trained "
                "in a `gen` or `joint` stage.",
            )
        return self.model

    def check_name(self, given: str | None) -> None:
        """Raise ApiError (404) for a model that is not served."""
        if given is not None and given != self.name:
            raise ApiError(
                404,
                f"The model {given[:100]!r} is not served here; {self.name!r} is.",
                param="model",
                code="model_not_found",
            )


def load_served(
    model: str | Path, initial: str | Path | None = None, name: str | None = None, device: str | None = None
) -> Served:
    """Read what is to be served.

    Args:
        model: a run's folder, a saved model's or tokenizer's, or a shipped name. initial: likewise, before tuning.
        name: for clients; by default the folder's. device: as torch names it; by default an accelerator, else "cpu".

    Raises:
        ModelError: no model there, a damaged file, an initial tokenizer of another grid, or no such device.
    """
    place = device_of(device)
    whole, tokenizer, processor = load_for_evaluation(resolve_model_folder(model))
    before = None
    if initial is not None:
        _, before, _ = load_for_evaluation(resolve_model_folder(initial))
        if before.downsample != tokenizer.downsample:
            raise ModelError(
                f"{initial} makes a token of {before.downsample} x {before.downsample} pixels, {model} of "
                f"{tokenizer.downsample} x {tokenizer.downsample}; only tokens of one size can be compared. Give the tokenizer "
                "that the tuning started from."
            )
    parts: list[nn.Module | None] = [whole, tokenizer, before]
    for part in parts:
        if part is not None:
            part.to(place)
    return Served(name or Path(model).resolve().name, whole, tokenizer, processor, before)

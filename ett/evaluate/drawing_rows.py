"""What judges of drawings share: whose pictures they see, and the figures that they give each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from ett.data.drawing import prompt_of
from ett.errors import DataError
from ett.evaluate.base import Metric
from ett.generate.draw import Request, draw
from ett.images import from_array
from ett.model.ett import EttForConditionalGeneration
from ett.model.image_sampling import ImageSampling
from ett.model.processing import EttProcessor
from ett.types import Example

DRAWN, RECONSTRUCTED, REAL = "drawn", "reconstructed", "real"
"""Rows: drawings; the pictures that were asked for after the tokenizer, its ceiling; these pictures, the judge's ceiling."""


@dataclass(frozen=True)
class JudgedSet:
    """What one judge says of drawings, and of what calibrates it.

    Attributes:
        judge: its name. split: whose pictures were asked for.
        rows: `DRAWN`, `RECONSTRUCTED`, `REAL` -> metric -> figure.
        chance: by metric, where it is known.
    """

    judge: str
    split: str
    rows: Mapping[str, Mapping[str, Metric]]
    chance: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = {who: {name: each.to_json() for name, each in row.items()} for who, row in self.rows.items()}
        return {"split": self.split, "chance": dict(self.chance), "rows": rows}


def fitted(processor: EttProcessor, example: Example) -> Tensor:
    """float32[3, H, W] in [-1, 1]: an example's picture as the model sees it."""
    return torch.from_numpy(processor.image_processor.fit(example.images[0])[0])


@torch.no_grad()
def reconstructed(model: EttForConditionalGeneration, pixels: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """What the vision tokenizer makes of pictures, float32[3, H, W] in [-1, 1] each."""
    tokenizer = model.vision_tokenizer
    device = tokenizer.encoder_output.device
    parts = torch.stack(list(pixels)).split(batch_size)
    return [each for part in parts for each in tokenizer.detokenize(tokenizer.tokenize(part.to(device))).cpu()]


def shown_pictures(
    model: EttForConditionalGeneration,
    processor: EttProcessor,
    examples: Sequence[Example],
    prompt: str,
    *,
    seed: int,
    sampling: ImageSampling,
    batch_size: int,
    on_token: Callable[[int], object] | None,
) -> dict[str, list[PIL.Image.Image]]:
    """What the judges of drawn text and scenes see: by row, an RGB picture for each example.

    Args:
        prompt: what is asked for, as ``ett.data.drawing.Drawings`` takes it.
        seed: of the first drawing; each further one has the next.

    Raises:
        DataError: no example. ModelError: as `draw`.
    """
    if not examples:
        raise DataError("The judges need at least one picture to ask for.")
    # a seed each: equal prompts would otherwise give one picture, counted several times
    asked = [Request(prompt_of(example, prompt), seed + i) for i, example in enumerate(examples)]
    drawn = draw(model, processor, asked, sampling, batch_size=batch_size, on_token=on_token)
    pixels = [fitted(processor, example) for example in examples]
    return {
        DRAWN: [picture.image for picture in drawn],
        RECONSTRUCTED: [from_array(each.float().numpy()) for each in reconstructed(model, pixels, batch_size)],
        REAL: [from_array(each.numpy()) for each in pixels],
    }

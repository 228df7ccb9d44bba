"""Pictures from words: many prompts in batches, each picture from a seed of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import PIL.Image

from ett.errors import DataError, ModelError
from ett.images import WHITE, from_array
from ett.model.ett import EttForConditionalGeneration
from ett.model.image_sampling import ImageSampling
from ett.model.processing import EttProcessor
from ett.model.text import IMAGE_TOKEN

Rewriter = Callable[[str], str]
"""Turns a prompt into the one that is drawn, for example a chat model that describes it at length."""


@dataclass(frozen=True)
class Request:
    """A picture that is asked for.

    Attributes:
        prompt: as it was given. seed: in [0, 2**63).
        rewritten: what is drawn instead; None where nothing was rewritten.
    """

    prompt: str
    seed: int
    rewritten: str | None = None

    @property
    def words(self) -> str:
        """What the model reads."""
        return self.prompt if self.rewritten is None else self.rewritten


@dataclass(frozen=True)
class Picture:
    """A drawn picture, mode RGB, and what asked for it."""

    request: Request
    image: PIL.Image.Image


def requests(prompts: Iterable[str], num: int = 1, seed: int = 0, rewrite: Rewriter | None = None) -> list[Request]:
    """`num` pictures of each prompt, prompt by prompt; picture j of a prompt has the seed `seed` + j, whatever else is drawn.

    Raises:
        DataError: nothing to draw, a prompt without words or with the picture placeholder, before or after rewriting; `num`
            below 1 or a negative seed.
    """
    if num < 1:
        raise DataError(f"num is {num}; it must be at least 1.")
    if seed < 0:
        raise DataError(f"seed is {seed}; it must be 0 or more.")
    found = []
    for prompt in prompts:
        _check(prompt, "The prompt")
        rewritten = None if rewrite is None else rewrite(prompt)
        if rewritten is not None:
            _check(rewritten, f"What became of the prompt {prompt!r}")
        found += [Request(prompt, seed + j, rewritten) for j in range(num)]
    if not found:
        raise DataError("There is no prompt to draw.")
    return found


def draw(
    model: EttForConditionalGeneration,
    processor: EttProcessor,
    asked: Sequence[Request],
    sampling: ImageSampling = ImageSampling(),
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    on_token: Callable[[int], object] | None = None,
) -> Iterator[Picture]:
    """Draw pictures, in order; no more than a batch is held.

    Args:
        asked: of `requests`.
        size: (H, W) [pixels], of whole tokens; None takes the size that the model learned.
        batch_size: pictures at a time, >= 1.
        on_token: called after each step of a batch with the number of tokens that it drew.

    Raises:
        ModelError: no image head, a size that does not divide into tokens or is larger than the model's grid, or a prompt for
            which the language model has no room.
    """
    grid = grid_of(model, processor, size)
    device = model.vision_tokenizer.encoder_output.device
    was_training = [module for module in model.modules() if module.training]
    model.train(False)
    waiting = iter(asked)
    try:
        while part := list(islice(waiting, batch_size)):
            inputs = processor.drawing_inputs([request.words for request in part], guided=sampling.guided)
            found = model.generate_images(
                **{name: tensor.to(device) for name, tensor in inputs.items()},
                grid=grid,
                seeds=[request.seed for request in part],
                sampling=sampling,
                on_token=None if on_token is None else _counting(on_token, len(part)),
            )
            pixels = found.pixel_values.float().cpu().numpy()
            for request, array in zip(part, pixels, strict=True):
                yield Picture(request, from_array(array))
    finally:
        for module in was_training:
            module.training = True


def grid_of(
    model: EttForConditionalGeneration, processor: EttProcessor, size: tuple[int, int] | None
) -> tuple[int, int]:
    """(h, w) tokens of pictures of (H, W) pixels, by default of the model's own size.

    Raises:
        ModelError: as `draw`.
    """
    side = model.vision_tokenizer.downsample
    images = processor.image_processor
    height, width = size or (images.height, images.width)
    if height % side or width % side or min(height, width) < side:
        raise ModelError(
            f"Pictures of {height} x {width} pixels do not divide into tokens of {side} x {side}. Give multiples of {side}."
        )
    grid = (height // side, width // side)
    table = model.projector.rows
    if table is not None and max(grid) > table.num_embeddings:
        raise ModelError(
            f"The model knows {table.num_embeddings} rows and columns of tokens (projector.grid_positions), but {height} x "
            f"{width} pixels are {grid[0]} x {grid[1]}. Draw at most {table.num_embeddings * side} pixels a side."
        )
    return grid


def sheet(pictures: Sequence[PIL.Image.Image], columns: int, gap: int = 2) -> PIL.Image.Image:
    """RGB pictures of one size in rows of `columns` on white, `gap` pixels apart.

    Raises:
        ValueError: no picture.
    """
    if not pictures:
        raise ValueError("A sheet needs at least one picture.")
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    across = min(columns, len(pictures))
    canvas = PIL.Image.new("RGB", (across * (width + gap) - gap, rows * (height + gap) - gap), WHITE)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        canvas.paste(picture, (column * (width + gap), row * (height + gap)))
    return canvas


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 over a saved model's configuration, processor and weights, names included.

    Raises:
        ModelError: the folder holds no weights.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder} holds no weights (*.safetensors), so there is nothing to draw with.")
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("*config.json")), *weights]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _counting(on_token: Callable[[int], object], count: int) -> Callable[[int], object]:
    """Tells `on_token` of each step that it drew `count` tokens."""
    return lambda _drawn: on_token(count)


def _check(prompt: str, what: str) -> None:
    if not prompt.strip():
        raise DataError(f"{what} has no words. Say what to draw.")
    if IMAGE_TOKEN in prompt:
        raise DataError(f"{what} contains {IMAGE_TOKEN}, which is reserved for pictures. Take it out.")

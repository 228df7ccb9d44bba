"""Pictures from words: many prompts in batches, each picture from a seed of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

_LONGEST_SHOWN = 80
"""Letters of a prompt in an error."""


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
        DataError: nothing to draw, a prompt without words or with the picture placeholder, before or after rewriting, or a
            rewriter that returns no text; `num` below 1, or seeds outside of [0, 2**63).
    """
    if num < 1:
        raise DataError(f"num is {num}; it must be at least 1.")
    if seed < 0:
        raise DataError(f"seed is {seed}; it must be 0 or more.")
    if seed + num > 2**63:
        raise DataError(f"seed is {seed}; with {num} pictures of a prompt it must be at most 2**63 - {num}.")
    found = []
    for prompt in prompts:
        _check(prompt, "The prompt")
        rewritten = None if rewrite is None else rewritten_by(rewrite, prompt)
        found += [Request(prompt, seed + j, rewritten) for j in range(num)]
    if not found:
        raise DataError("There is no prompt to draw.")
    return found


def rewritten_by(rewrite: Rewriter, prompt: str) -> str:
    """What a rewriter makes of a prompt.

    Raises:
        DataError: no text, one without words, or one with the picture placeholder.
    """
    text: object = rewrite(prompt)
    if not isinstance(text, str):
        raise DataError(
            f"The rewriter returned {text!r} for the prompt {prompt!r}. Let it return a text; the prompt itself where there is "
            "nothing to rewrite."
        )
    _check(text, f"What became of the prompt {prompt!r}")
    return text


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
    """Draw pictures, in order; no more than a batch is held. What is wrong is said before the first is drawn.

    Args:
        asked: of `requests`.
        size: (H, W) [pixels], of whole tokens; None takes the size that the model learned.
        batch_size: pictures at a time, >= 1.
        on_token: called after each step of a batch with the number of tokens that it drew.

    Raises:
        ModelError: no image head, a size that does not divide into tokens or is larger than the model's grid, or a prompt for
            which the language model has no room.
        ValueError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    grid = grid_of(model, processor, size)
    check_room(model, processor, {request.words: "" for request in asked}, grid)
    return _drawn(model, processor, asked, sampling, grid, batch_size, on_token)


def check_room(
    model: EttForConditionalGeneration, processor: EttProcessor, words: Mapping[str, str], grid: tuple[int, int]
) -> None:
    """The language model has room for every prompt and a picture behind it.

    Args:
        words: what is to be read -> where it comes from, "" where nobody knows. grid: (h, w) tokens of the pictures.

    Raises:
        ModelError: it has not; the message has the prompt and its origin.
    """
    room = getattr(model.config.text_config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(room, int):
        return
    positions = grid[0] * grid[1] + (grid[0] if model.projector.row_end is not None else 0)
    for text, where in words.items():
        length = processor.drawing_inputs([text], guided=False)["input_ids"].shape[1]
        if length + positions > room:
            shown = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
            raise ModelError(
                f"{f'{where}: the' if where else 'The'} prompt {shown!r} takes {length} positions and the picture {positions}, "
                f"but the language model has {room}. Shorten the prompt, or draw a smaller picture."
            )


def _drawn(
    model: EttForConditionalGeneration,
    processor: EttProcessor,
    asked: Sequence[Request],
    sampling: ImageSampling,
    grid: tuple[int, int],
    batch_size: int,
    on_token: Callable[[int], object] | None,
) -> Iterator[Picture]:
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

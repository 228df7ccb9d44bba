"""The models and batches of a recipe's stages without weights: configurations alone are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image

from ett.data.mixture import Mixture, build_mixture
from ett.data.sources import Source
from ett.errors import DataError, RecipeError
from ett.experiments.recipe import Recipe, load_recipe, read_values
from ett.experiments.run import resolve_model_folder, validation_mixture, with_tokenizer_folder
from ett.model.build import build_model, build_processor, build_vision_tokenizer, start_from
from ett.model.ett import EttForConditionalGeneration
from ett.model.loading import find_weights
from ett.model.processing import Encoded, EttProcessor
from ett.model.text import byte_tokenizer
from ett.tokenizers import VisionTokenizer
from ett.train.feed import StageData, encode_all, split_batch
from ett.types import Batch, Example, Message

PROBED_DRAWS = 64
"""Examples, about, among which the longest micro-batch is looked for."""
IMAGINED_WORDS = 64


def recipes_of(path: str | Path, overrides: Sequence[str] = ()) -> list[Recipe]:
    """The recipe, or each arm of one that compares arms (unless `overrides` choose one).

    An arm that starts from another's result is planned from what that one starts from: its shapes are the same.

    Raises:
        RecipeError: as `load_recipe`.
    """
    values = read_values(path, overrides)
    arms = values.get("arms")
    if not isinstance(arms, Mapping):
        return [load_recipe(path, overrides)]
    common = [override for override in overrides if not override.startswith("arm=")]
    chosen = [values["arm"]] if "arm" in values else list(arms)
    return [_rooted(load_recipe(path, [*common, f"arm={name}"]), path, common) for name in chosen]


def _rooted(recipe: Recipe, path: str | Path, overrides: Sequence[str]) -> Recipe:
    """`recipe` with what the first in its chain of arms starts from in place of the arm's result."""
    if recipe.starts_from is None:
        return recipe
    before = _rooted(load_recipe(path, [*overrides, f"arm={recipe.starts_from}"]), path, overrides)
    start = before.model.init or before.model.vision_tokenizer.get("path")
    if start is None:
        raise RecipeError(
            f"The arm {recipe.name!r} starts from {recipe.starts_from!r}, which starts from fresh weights: plan that one alone."
        )
    return recipe.started_from(str(start))


def skeleton(recipe: Recipe, k: int) -> tuple[EttForConditionalGeneration | VisionTokenizer, EttProcessor]:
    """The model that stage `k` trains, on the meta device, and its processor.

    Raises:
        UserError: it cannot be built.
    """
    spec = recipe.model
    if spec.init is not None:
        return start_from(resolve_model_folder(find_weights(spec.init)), spec, weights=False)
    tokenizer = build_vision_tokenizer(with_tokenizer_folder(spec), weights=False)
    if recipe.stages[k].stage == "tokenizer":
        return tokenizer, build_processor(spec, byte_tokenizer(), tokenizer)
    return build_model(spec, tokenizer, weights=False)


def stage_data(
    recipe: Recipe,
    k: int,
    model: EttForConditionalGeneration | VisionTokenizer,
    processor: EttProcessor,
    world_size: int,
) -> tuple[StageData, Batch, list[str]]:
    """What stage `k` reads, the longest of its first micro-batches, and what was assumed about them.

    Where the recipe's sources cannot be read on this machine, every example is taken to be `Imagined`.
    """
    config, evaluation = recipe.stages[k], recipe.evaluation
    sources = config.data or recipe.data
    max_length = config.max_length
    if isinstance(model, EttForConditionalGeneration) and max_length is None:
        max_length = getattr(model.config.text_config, "max_position_embeddings", None)
    try:
        mixture = build_mixture(sources, recipe.seed)
        held = validation_mixture(evaluation, sources, recipe.seed)
        notes = []
    except DataError as error:
        mixture, held = Mixture([Imagined()], [1.0], recipe.seed), None
        notes = [f"assumed one picture and {IMAGINED_WORDS} words an example, for the data cannot be read: {error}"]
    micro, _ = split_batch(config, world_size)
    encoded = encode_all(mixture, micro * max(2, PROBED_DRAWS // micro), processor, max_length)
    validation = [] if held is None else encode_all(held, min(evaluation.limit, max(micro, 16)), processor, max_length)
    if config.cached_codes and isinstance(model, EttForConditionalGeneration):
        side = model.vision_tokenizer.downsample
        encoded, validation = ([_coded(item, side) for item in items] for items in (encoded, validation))
    parts = (encoded[start : start + micro] for start in range(0, len(encoded), micro))
    batches = [processor.collate(part, packing=config.packing) for part in parts]
    batch = max(batches, key=lambda each: (each.input_ids.numel(), each.num_supervised))
    if config.stage != "tokenizer":
        notes.append(f"sequences are as long as the longest among {len(encoded)} examples")
    return StageData(mixture, validation, processor, 0, max_length), batch, notes


def _coded(item: Encoded, downsample: int) -> Encoded:
    """`item` as a code cache gives it: indices, whatever they are, for pictures."""
    grids = [
        np.zeros((p.shape[-2] // downsample, p.shape[-1] // downsample), dtype=np.int64) for p in item.pixel_values
    ]
    return replace(item, pixel_values=[], image_indices=grids)


class Imagined(Source):
    """A blank picture and `IMAGINED_WORDS` words about it, as often as one likes."""

    name = "imagined"

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        answer = [{"type": "text", "text": "word " * IMAGINED_WORDS}]
        messages: list[Message] = [
            {"role": "user", "content": [{"type": "image"}]},
            {"role": "assistant", "content": answer},
        ]
        return Example("imagined", messages, [PIL.Image.new("RGB", (64, 64))])

"""Conversations -> the arguments of the model's forward, for trainers other than our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ett.errors import DataError
from ett.images import load_image
from ett.model.processing import EttProcessor
from ett.types import Example


class EttCollator:
    """A list of conversations as keyword arguments of `EttForConditionalGeneration.forward`, labels included.

    Fits ``data_collator`` of transformers' and TRL's trainers and ``collate_fn`` of a `torch.utils.data.DataLoader`. A batch
    holds what our own loop trains on: labels lie on the assistant's words and the token that ends them.

    Args:
        processor: of the model that is trained.
        max_length: positions after which text is cut; None cuts nothing.
    """

    def __init__(self, processor: EttProcessor, max_length: int | None = None) -> None:
        self.processor, self.max_length = processor, max_length

    def __call__(self, items: Sequence[Example | Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` int64[B, T], ``pixel_values`` float32[I, 3, H, W].

        Args:
            items: `Example`s, as every source of `ett.data` gives them, or mappings with ``messages`` and ``images`` (or
                ``image``): pictures in the order of the image parts, opened or as anything that `load_image` takes.

        Raises:
            DataError: an item without messages, one whose pictures are not as many as its image parts, or one that cannot be
                cut to `max_length`.
        """
        examples = [item if isinstance(item, Example) else _example(item, i) for i, item in enumerate(items)]
        batch = self.processor.collate([self.processor.encode(example, self.max_length) for example in examples])
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.labels,
            "pixel_values": batch.pixel_values,
        }


def _example(item: Mapping[str, Any], position: int) -> Example:
    if not item.get("messages"):
        raise DataError(
            f"Item {position} of the batch has no messages, only {', '.join(map(str, item)) or 'nothing'}. Give examples of "
            "ett.data, or mappings with messages and images (trainers of transformers drop them without "
            "remove_unused_columns=False)."
        )
    pictures = item.get("images", item.get("image"))
    pictures = [] if pictures is None else pictures if isinstance(pictures, list | tuple) else [pictures]
    name = str(item.get("id", f"item {position} of the batch"))
    messages = item["messages"]
    if messages and all(isinstance(message["content"], str) for message in messages) and pictures:
        messages = _with_pictures_first(messages, len(pictures))
    return Example(name, messages, [load_image(picture) for picture in pictures])


def _with_pictures_first(messages: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """Plain texts name no place for pictures: they come before the first user turn's words."""
    parts: list[dict[str, str]] = [{"type": "image"} for _ in range(count)]
    flat = [dict(message) for message in messages]
    for message in flat:
        text = [{"type": "text", "text": message["content"]}]
        message["content"] = parts + text if message["role"] == "user" else text
        parts = [] if message["role"] == "user" else parts
    return flat

"""Answers about pictures: one at a time for people, in batches for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from ett.errors import DataError, ModelError
from ett.images import load_image
from ett.model.ett import EttForConditionalGeneration
from ett.model.processing import EttProcessor
from ett.types import IGNORE_INDEX, Batch, Example, Message

Picture = str | Path | bytes | PIL.Image.Image

DESCRIBE_PROMPT: str | None = None
"""What is asked where there is no question, our choice: nothing. A picture without words is the paper's captioning
format: the alignment and semantic stages train it, and a part of the built-in names is asked like that."""


def answer(
    model: EttForConditionalGeneration,
    processor: EttProcessor,
    images: Picture | Sequence[Picture],
    question: str | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's answer to a question about pictures, or its description of them.

    Args:
        images: a picture or several, of any mode and size, as `ett.images.load_image` takes them.
        question: None, or only white space, asks `DESCRIBE_PROMPT`.
        max_new_tokens: where to stop at the latest, >= 1.
        temperature: 0 takes the likeliest token each time; above 0 draws from torch's global random state.
        on_text: called with each piece of text once it is certain; the pieces together, stripped, are the answer.

    Raises:
        DataError: a picture that cannot be read, or a question that contains the picture placeholder.
        ModelError: more positions than the language model has.
        ValueError: an impossible `max_new_tokens` or `temperature`.
    """
    pictures = [images] if isinstance(images, str | Path | bytes | PIL.Image.Image) else list(images)
    opened = [load_image(picture) for picture in pictures]
    asked = question.strip() if question is not None and question.strip() else DESCRIBE_PROMPT
    content: list[dict[str, str]] = [{"type": "image"} for _ in opened]
    if asked is not None:
        content.append({"type": "text", "text": asked})
    example = Example("question", [{"role": "user", "content": content}], opened)
    streamer = None if on_text is None else _Callback(processor.tokenizer, on_text)
    return _generate(
        model, processor, [example], max_new_tokens=max_new_tokens, temperature=temperature, streamer=streamer
    )[0]


def answers(
    model: EttForConditionalGeneration, processor: EttProcessor, examples: Sequence[Example], max_new_tokens: int = 128
) -> list[str]:
    """The likeliest answer, token by token, to each example's turns before its first answer, all in one batch.

    Raises:
        DataError: an example that starts with an answer, or that cannot be prepared. ModelError: as in `answer`.
    """
    return _generate(model, processor, examples, max_new_tokens=max_new_tokens)


def prompts(processor: EttProcessor, examples: Sequence[Example]) -> Batch:
    """`EttProcessor.prompt`, refusing examples with nothing to answer to.

    Raises:
        DataError: naming the first such example.
    """
    batch = processor.prompt(examples)
    for example, positions in zip(examples, batch.attention_mask.sum(dim=1).tolist(), strict=True):
        if positions == 0:
            raise DataError(
                f"Example {example.id!r} has no turn before its first answer, so there is nothing to ask. Let it start "
                "with a human turn (the picture alone is enough)."
            )
    return batch


def stop_ids(model: EttForConditionalGeneration, processor: EttProcessor) -> list[int]:
    """Tokens that end an answer: the language model's, the text tokenizer's, and the special token that the chat
    template puts behind an answer. (Base models are often taught to chat with one that is not their own end.)"""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = configured if isinstance(configured, list) else [configured]
    found = [*found, processor.tokenizer.eos_token_id]
    turns: list[Message] = [
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "."}]},
    ]
    _, labels = processor.tokenize_conversation(turns)
    supervised = [label for label in labels if label != IGNORE_INDEX]
    if supervised and supervised[-1] in processor.tokenizer.all_special_ids:
        found.append(supervised[-1])
    return sorted({token_id for token_id in found if isinstance(token_id, int)})


def _generate(
    model: EttForConditionalGeneration,
    processor: EttProcessor,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
) -> list[str]:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (likeliest token) or above.")
    if not examples:
        return []
    batch = prompts(processor, examples).to(model.vision_tokenizer.encoder_output.device)
    length = batch.input_ids.shape[1]
    room = getattr(model.config.text_config, "max_position_embeddings", None)
    if isinstance(room, int) and length >= room:
        raise ModelError(
            f"The prompt takes {length} positions, but the language model has {room}. Use fewer pictures or a "
            "shorter question."
        )
    # what decides the text is said here, so that settings saved with a language model cannot change it
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens if not isinstance(room, int) else min(max_new_tokens, room - length),
        do_sample=temperature > 0,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=stop_ids(model, processor) or None,
        pad_token_id=processor.pad_token_id,
        # a placeholder among the words would ask for a picture that is not there
        suppress_tokens=[processor.image_token_id],
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
    )
    generator: Any = model  # transformers types `generate` for its own protocol only
    pixels = {"pixel_values": batch.pixel_values} if len(batch.pixel_values) else {}
    was_training = [module for module in model.modules() if module.training]
    model.train(False)
    try:
        with torch.inference_mode():
            ids = generator.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                generation_config=settings,
                streamer=streamer,
                **pixels,
            )
    finally:
        for module in was_training:
            module.training = True
    texts: list[str] = processor.tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
    return [text.strip() for text in texts]


class _Callback(TextStreamer):
    """Hands text over as transformers finalises it, word by word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)

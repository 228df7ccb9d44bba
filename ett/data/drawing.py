"""Examples the other way round: the words ask, the picture answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from string import Formatter
from typing import Any

import numpy as np

from ett.data.sources import Source
from ett.errors import DataError, RecipeError
from ett.types import Example, Message

PROMPT = "{answer}"
"""What is asked for where a source says nothing else: what would have been the answer about the picture."""


class Drawings(Source):
    """A source's pictures as answers.

    An example in which the assistant already answers with a picture stays as it is.

    Args:
        source: one picture and at least one answer an example.
        prompt: of what is asked; ``{answer}`` stands for the first answer, other names for the example's metadata.

    Raises:
        RecipeError: `prompt` is no such text.
    """

    def __init__(self, source: Source, prompt: str = PROMPT) -> None:
        try:
            names = [name for _, name, _, _ in Formatter().parse(prompt) if name is not None]
        except ValueError as error:
            raise RecipeError(f"prompt = {prompt!r} is not a text with names in braces: {error}.") from error
        if not all(name.isidentifier() for name in names):
            raise RecipeError(f"prompt = {prompt!r} must name what it uses, for example {PROMPT!r}.")
        self.name, self.left_out = source.name, source.left_out
        self._source, self._prompt = source, prompt

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        """Raises DataError for an example without exactly one picture, without an answer or without what the prompt names."""
        example = self._source[index]
        return example if is_drawing(example) else replace(example, messages=drawing(prompt_of(example, self._prompt)))

    def fingerprint(self) -> str:
        return self._source.fingerprint()


def prompt_of(example: Example, prompt: str = PROMPT) -> str:
    """What asks for the picture of `example`, as `Drawings` makes it.

    Raises:
        DataError: not exactly one picture, no answer, or nothing of a name in `prompt`.
    """
    answers = [message for message in example.messages if message["role"] == "assistant"]
    if len(example.images) != 1 or not answers:
        raise DataError(
            f"Example {example.id!r} has {len(example.images)} pictures and {len(answers)} answers; to be drawn it needs "
            "one picture and an answer that says what it shows."
        )
    facts = {**example.metadata, "answer": _text(answers[0])}
    try:
        return prompt.format_map({name: _shown(value) for name, value in facts.items()})
    except KeyError as error:
        raise DataError(
            f"Example {example.id!r} has no {error} for the prompt {prompt!r}. It has: {', '.join(sorted(facts))}."
        ) from error


def drawing(prompt: str) -> tuple[Message, Message]:
    """The conversation in which `prompt` is answered by one picture."""
    return (
        {"role": "user", "content": [{"type": "text", "text": prompt}]},
        {"role": "assistant", "content": [{"type": "image"}]},
    )


def is_drawing(example: Example) -> bool:
    """Whether the assistant answers with a picture."""
    return any(
        part["type"] == "image"
        for message in example.messages
        if message["role"] == "assistant"
        for part in message["content"]
    )


def without_prompt(example: Example, share: float, seed: int, draw: int) -> Example:
    """`example`, or if its turn has come, its pictures without the words that asked for them.

    Args:
        share: of the draws that lose their words, in [0, 1]; conversations without a drawn picture keep them.
        seed, draw: decide, and nothing else does.
    """
    if share == 0 or np.random.default_rng([seed, 3, draw]).random() >= share or not is_drawing(example):
        return example
    kept = [
        {**message, "content": [part for part in message["content"] if part["type"] != "text"]}
        if message["role"] != "assistant"
        else message
        for message in example.messages
    ]
    return replace(example, messages=kept)


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

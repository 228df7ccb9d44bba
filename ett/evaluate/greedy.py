"""What a model says by itself, asked once however many tasks want to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ett.evaluate.base import Selection, Subject, batches
from ett.generate.chat import answers
from ett.types import Example

T = TypeVar("T")


def greedy(
    subject: Subject, data: Selection, description: str, wanted: Callable[[Example], T | None]
) -> list[tuple[T, str]]:
    """(`wanted` of an example, the model's greedy answer to it) of each example for which that is not None, in order.

    Raises:
        DataError: an example that cannot be read or prepared; the message names it.
    """
    found: list[tuple[int, T]] = []
    waiting: dict[int, Example] = {}

    def ask() -> None:
        texts = answers(
            subject.language_model, subject.processor, [*waiting.values()], max_new_tokens=subject.max_new_tokens
        )
        subject.said.update({(data, position): text for position, text in zip(waiting, texts, strict=True)})
        waiting.clear()

    for positions in batches(range(len(data)), subject.batch_size, description):
        for position in positions:
            example = data[position]
            value = wanted(example)
            if value is None:
                continue
            found.append((position, value))
            if (data, position) not in subject.said:
                waiting[position] = example
            if len(waiting) == subject.batch_size:
                ask()
    ask()
    return [(value, subject.said[data, position]) for position, value in found]

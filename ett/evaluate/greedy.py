"""What a model says by itself, asked once however many tasks want to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ett.evaluate.base import Selection, Subject
from ett.evaluate.shares import in_batches
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

    def look(positions: Sequence[int]) -> list[tuple[int, T]]:
        values = [(position, wanted(data[position])) for position in positions]
        return [(position, value) for position, value in values if value is not None]

    def ask(positions: Sequence[int]) -> list[str]:
        examples = [data[position] for position in positions]
        limit = subject.max_new_tokens
        return list(answers(subject.language_model, subject.processor, examples, max_new_tokens=limit))

    found = in_batches(subject, range(len(data)), subject.batch_size, description, look)
    new = [position for position, _ in found if (data, position) not in subject.said]
    texts = in_batches(subject, new, subject.batch_size, description, ask)
    subject.said.update({(data, position): text for position, text in zip(new, texts, strict=True)})
    return [(value, subject.said[data, position]) for position, value in found]

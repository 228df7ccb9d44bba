"""Multiple choice by letter: the choices are shown with letters, and the model says one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from ett.data.manifest import question_and_reference
from ett.data.sources import Source
from ett.evaluate.answer_measures import chosen, letters
from ett.evaluate.base import Metric, Selection, Subject, Task, TaskResult
from ett.evaluate.references import CHOICES, choices_and_right, manifest_states
from ett.evaluate.shares import in_batches
from ett.evaluate.tasks.choices import choice_metrics
from ett.generate.chat import answers
from ett.types import Example, Message

INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""LLaVA's words (arXiv:2310.03744, table 7), which many models were taught."""


class LettersTask(Task):
    """Greedy answers to the question with its lettered choices, which are added unless the question lists them already.

    Metrics, means over the examples with "choices" in their metadata:
        letter_accuracy: share answered with the right letter, or the right choice's words.
        letter_answered: share answered with any of them. choice_chance: what guessing gives, the mean of 1 / choices.
    """

    name: ClassVar[str] = "letters"
    needs_language_model: ClassVar[bool] = True

    def suits(self, source: Source) -> bool:
        return manifest_states(source, CHOICES)

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        answered: list[float] = []
        hits: list[float] = []
        sizes: list[int] = []

        def choose(part: Sequence[Example]) -> list[tuple[float, float, int]]:
            posed = [(example, *found) for example in part if (found := choices_and_right(example)) is not None]
            asked = [with_choices(example, choices) for example, choices, _ in posed]
            said = answers(subject.language_model, subject.processor, asked, max_new_tokens=subject.max_new_tokens)
            rows = []
            for (_, choices, right), text in zip(posed, said, strict=True):
                named = chosen(text, choices)
                rows.append((float(named is not None), float(named == right), len(choices)))
            return rows

        for named, hit, size in in_batches(subject, data, subject.batch_size, f"{data.name} {self.name}", choose):
            answered.append(named)
            hits.append(hit)
            sizes.append(size)
        metrics = choice_metrics("letter_accuracy", hits, sizes)
        if metrics:
            metrics["letter_answered"] = Metric.mean(answered)
        return TaskResult(metrics)


def with_choices(example: Example, choices: Sequence[str]) -> Example:
    """`example` with its choices, each behind its letter, and the `INSTRUCTION` after the question; as it is where the question
    has every choice behind its letter already."""
    question = question_and_reference(example)[0] or ""
    named = list(zip(letters(choices), choices, strict=True))
    if all(re.search(rf"(?<!\w){letter}\W{{1,2}}\s*{re.escape(choice)}", question) for letter, choice in named):
        return example
    lines = [*(f"{letter}. {choice}" for letter, choice in named), INSTRUCTION]
    messages: list[Message] = []
    for message in example.messages:
        if message["role"] == "user" and lines:
            content = list(message["content"])
            before = [content.pop()["text"]] if content and content[-1]["type"] == "text" else []
            message = {**message, "content": [*content, {"type": "text", "text": "\n".join([*before, *lines])}]}
            lines = []
        messages.append(message)
    return Example(example.id, messages, example.images, example.metadata)

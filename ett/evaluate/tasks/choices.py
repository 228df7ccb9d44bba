"""Multiple choice by likelihood: which of the choices the model expects most as the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ett.data.sources import Source
from ett.evaluate.base import Metric, Selection, Subject, Task, TaskResult, first_exchange
from ett.evaluate.references import CHOICES, choices_and_right, manifest_states
from ett.evaluate.shares import in_batches
from ett.evaluate.tasks.naming import score_answers
from ett.types import Example


class ChoicesTask(Task):
    """Each choice scored as the answer to the question as it stands, by its mean log-likelihood per token.

    Metrics, means over the examples with "choices" in their metadata:
        choice_accuracy: share whose right choice alone scores best.
        choice_chance: what guessing gives, the mean of 1 / choices.
    """

    name: ClassVar[str] = "choices"
    needs_language_model: ClassVar[bool] = True

    def suits(self, source: Source) -> bool:
        return manifest_states(source, CHOICES)

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        hits: list[float] = []
        sizes: list[int] = []

        def choose(part: Sequence[Example]) -> list[tuple[float, int]]:
            (example,) = part
            found = choices_and_right(example)
            if found is None:
                return []
            asked = first_exchange(example)
            assert asked is not None, "the right choice comes from the answer"
            choices, right = found
            scores = score_answers(subject, asked, choices)
            return [(float((scores >= scores[right]).sum() == 1), len(choices))]

        for hit, size in in_batches(subject, data, 1, f"{data.name} {self.name}", choose):
            hits.append(hit)
            sizes.append(size)
        return TaskResult(choice_metrics("choice_accuracy", hits, sizes))


def choice_metrics(name: str, hits: list[float], sizes: list[int]) -> dict[str, Metric]:
    """The share of `hits`, and what guessing among so many choices each gives; nothing for no examples."""
    if not hits:
        return {}
    return {name: Metric.mean(hits), "choice_chance": Metric(sum(1 / size for size in sizes) / len(sizes), len(sizes))}

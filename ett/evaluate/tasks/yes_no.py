"""Questions for yes or no, as POPE asks whether things are in a picture (arXiv:2305.10355)."""

from __future__ import annotations

from typing import ClassVar

from ett.data.manifest import question_and_reference
from ett.data.sources import Source
from ett.evaluate.answer_measures import yes_or_no
from ett.evaluate.base import Metric, Selection, Subject, Task, TaskResult
from ett.evaluate.greedy import greedy
from ett.evaluate.metrics import bootstrap_interval, normalized
from ett.evaluate.references import first_of_manifest
from ett.types import Example


class YesNoTask(Task):
    """Greedy answers to the examples whose reference is "yes" or "no"; what says neither is wrong.

    Metrics:
        yes_no_accuracy: share answered right.
        yes_no_recall: share of those to affirm that were affirmed. yes_no_f1: 2 TP / (2 TP + FP + FN).
        yes_no_precision: share of the affirmed that are to be affirmed; left out where nothing was. Over which examples it
            is taken is the model's doing, so that it has no parts to compare in pairs.
        yes_no_yes_ratio: share affirmed. yes_no_answered: share answered with yes or no at all.
    """

    name: ClassVar[str] = "yes_no"
    needs_language_model: ClassVar[bool] = True

    def suits(self, source: Source) -> bool:
        first = first_of_manifest(source)
        return first is not None and truth(first) is not None

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        said = [
            (right, yes_or_no(text)) for right, text in greedy(subject, data, f"{data.name} {self.name}", truth)
        ]  # fmt: skip
        if not said:
            return TaskResult()
        affirmed = [float(answer is True) for _, answer in said]
        hits = [float(right and answer is True) for right, answer in said]
        metrics = {
            "yes_no_accuracy": Metric.mean([float(right == answer) for right, answer in said]),
            "yes_no_yes_ratio": Metric.mean(affirmed),
            "yes_no_answered": Metric.mean([float(answer is not None) for _, answer in said]),
        }
        if sum(affirmed):
            interval = bootstrap_interval(hits, affirmed)
            metrics["yes_no_precision"] = Metric(sum(hits) / sum(affirmed), len(said), interval)
        if any(right for right, _ in said):
            counted = [float(right) + yes for (right, _), yes in zip(said, affirmed, strict=True)]
            metrics["yes_no_recall"] = Metric.mean([hit for hit, (right, _) in zip(hits, said, strict=True) if right])
            # TP counts twice in both, FP and FN once in the weight
            metrics["yes_no_f1"] = Metric.mean([2 * hit for hit in hits], counted)
        return TaskResult(metrics)


def truth(example: Example) -> bool | None:
    """The reference of a question for yes or no; None of others."""
    reference = question_and_reference(example)[1]
    return None if reference is None else {"yes": True, "no": False}.get(normalized(reference))

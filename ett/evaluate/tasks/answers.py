"""What the model answers by itself, compared with the reference."""

from __future__ import annotations

from typing import ClassVar

from ett.data.manifest import question_and_reference
from ett.data.sources import Source
from ett.evaluate.base import Metric, Prediction, Selection, Subject, Task, TaskResult
from ett.evaluate.greedy import greedy
from ett.evaluate.metrics import character_errors, exact_match
from ett.evaluate.references import text_only
from ett.types import Example


class AnswersTask(Task):
    """Greedy answers to every example; those without a reference are answered and not counted.

    Metrics:
        exact_match: share of answers equal to the reference but for case, white space and a final period.
        character_error_rate: edits by characters of the references, over all examples together.
    """

    name: ClassVar[str] = "answers"
    needs_language_model: ClassVar[bool] = True

    def suits(self, source: Source) -> bool:
        return not text_only(source)

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        said = greedy(subject, data, f"{data.name} {self.name}", _id_and_reference)
        predictions = [Prediction(example_id, text, reference) for (example_id, reference), text in said]
        pairs = [(p.prediction, p.reference) for p in predictions if p.reference is not None]
        if not pairs:
            return TaskResult(predictions=predictions)
        errors = [character_errors(prediction, reference) for prediction, reference in pairs]
        metrics = {
            "exact_match": Metric.mean([float(exact_match(*pair)) for pair in pairs]),
            "character_error_rate": Metric.mean([edits for edits, _ in errors], [length for _, length in errors]),
        }
        return TaskResult(metrics, predictions)


def _id_and_reference(example: Example) -> tuple[str, str | None]:
    return example.id, question_and_reference(example)[1]

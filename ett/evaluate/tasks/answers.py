"""What the model answers by itself, compared with the reference."""

from __future__ import annotations

from typing import ClassVar

from ett.data.manifest import question_and_reference
from ett.evaluate.base import Metric, Prediction, Selection, Subject, Task, TaskResult, batches
from ett.evaluate.metrics import character_errors, exact_match
from ett.generate.chat import answers


class AnswersTask(Task):
    """Greedy answers to every example; those without a reference are answered and not counted.

    Metrics:
        exact_match: share of answers equal to the reference but for case, white space and a final period.
        character_error_rate: edits by characters of the references, over all examples together.
    """

    name: ClassVar[str] = "answers"
    needs_language_model: ClassVar[bool] = True

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        predictions: list[Prediction] = []
        for part in batches(data, subject.batch_size, f"{data.name} {self.name}"):
            texts = answers(subject.language_model, subject.processor, part, max_new_tokens=subject.max_new_tokens)
            predictions.extend(
                Prediction(example.id, text, question_and_reference(example)[1])
                for example, text in zip(part, texts, strict=True)
            )
        pairs = [(p.prediction, p.reference) for p in predictions if p.reference is not None]
        if not pairs:
            return TaskResult(predictions=predictions)
        errors = [character_errors(prediction, reference) for prediction, reference in pairs]
        metrics = {
            "exact_match": Metric.mean([float(exact_match(*pair)) for pair in pairs]),
            "character_error_rate": Metric.mean([edits for edits, _ in errors], [length for _, length in errors]),
        }
        return TaskResult(metrics, predictions)

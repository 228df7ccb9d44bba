"""What a language model expects without any picture: whether tuning on pictures has cost it its words."""

from __future__ import annotations

from typing import ClassVar

from ett.data.manifest import question_and_reference
from ett.data.sources import Source
from ett.evaluate.base import Metric, Selection, Subject, Task, TaskResult, batches, first_exchange
from ett.evaluate.references import text_only
from ett.evaluate.tasks.loss import teacher_forced


class TextTask(Task):
    """Loss of the first answer of each example that shows no picture, apart from the caption loss of those that do.

    Metrics:
        text_loss: nats per supervised token, the token that ends the answer included.
        text_loss_per_character: nats per character of the answer.
    """

    name: ClassVar[str] = "text"
    needs_language_model: ClassVar[bool] = True

    def suits(self, source: Source) -> bool:
        return text_only(source)

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        losses: list[float] = []
        tokens: list[int] = []
        characters: list[int] = []
        for part in batches(data, subject.batch_size, f"{data.name} {self.name}"):
            found = [cut for cut in map(first_exchange, part) if cut is not None and not cut.images]
            if not found:
                continue
            for nats, _, count in teacher_forced(subject, found):
                losses.append(nats)
                tokens.append(count)
            characters.extend(len(question_and_reference(example)[1] or "") for example in found)
        if not losses:
            return TaskResult()
        return TaskResult(
            {
                "text_loss": Metric.mean(losses, tokens),
                "text_loss_per_character": Metric.mean(losses, characters),
            }
        )

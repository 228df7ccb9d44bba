"""What a language model expects without any picture: whether tuning on pictures has cost it its words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ett.data.manifest import question_and_reference
from ett.data.sources import Source
from ett.evaluate.base import Metric, Selection, Subject, Task, TaskResult, first_exchange
from ett.evaluate.references import text_only
from ett.evaluate.shares import in_batches
from ett.evaluate.tasks.loss import teacher_forced
from ett.types import Example


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

        def read(part: Sequence[Example]) -> list[tuple[float, int, int]]:
            found = [cut for cut in map(first_exchange, part) if cut is not None and not cut.images]
            lengths = [len(question_and_reference(example)[1] or "") for example in found]
            rows = zip(teacher_forced(subject, found), lengths, strict=True)
            return [(nats, count, size) for (nats, _, count), size in rows]

        for nats, count, size in in_batches(subject, data, subject.batch_size, f"{data.name} {self.name}", read):
            losses.append(nats)
            tokens.append(count)
            characters.append(size)
        if not losses:
            return TaskResult()
        return TaskResult(
            {
                "text_loss": Metric.mean(losses, tokens),
                "text_loss_per_character": Metric.mean(losses, characters),
            }
        )

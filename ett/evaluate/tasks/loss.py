"""How well the model expects the reference, word by word (teacher forcing)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from ett.data.manifest import question_and_reference
from ett.data.sources import Source
from ett.evaluate.base import Metric, Selection, Subject, Task, TaskResult, first_exchange
from ett.evaluate.references import text_only
from ett.evaluate.shares import in_batches
from ett.losses.caption import next_token_labels, supervised_columns, text_labels
from ett.types import IGNORE_INDEX, Example


class LossTask(Task):
    """Loss of the first answer of each example.

    Metrics:
        caption_loss: nats per supervised token, the token that ends the answer included; what `forward` returns.
        caption_loss_per_character: nats per character of the answer, comparable between text tokenizers.
        caption_token_accuracy: share of supervised tokens that the model would have chosen itself.
    """

    name: ClassVar[str] = "loss"
    needs_language_model: ClassVar[bool] = True

    def suits(self, source: Source) -> bool:
        return not text_only(source)

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        losses: list[float] = []
        tokens: list[int] = []
        hits: list[int] = []
        characters: list[int] = []

        def read(part: Sequence[Example]) -> list[tuple[float, int, int, int]]:
            answered = [cut for cut in map(first_exchange, part) if cut is not None]
            lengths = [len(question_and_reference(example)[1] or "") for example in answered]
            return [(*row, size) for row, size in zip(teacher_forced(subject, answered), lengths, strict=True)]

        for loss, hit, count, size in in_batches(subject, data, subject.batch_size, f"{data.name} {self.name}", read):
            losses.append(loss)
            hits.append(hit)
            tokens.append(count)
            characters.append(size)
        if not losses:
            return TaskResult()
        return TaskResult(
            {
                "caption_loss": Metric.mean(losses, tokens),
                "caption_loss_per_character": Metric.mean(losses, characters),
                "caption_token_accuracy": Metric.mean(hits, tokens),
            }
        )


def teacher_forced(subject: Subject, examples: Sequence[Example]) -> list[tuple[float, int, int]]:
    """For each example: (nats summed over supervised tokens, tokens predicted right, supervised tokens)."""
    if not examples:
        return []
    processor = subject.processor
    batch = processor.collate([processor.encode(example) for example in examples]).to(subject.device)
    columns = supervised_columns(batch.labels)
    output = subject.language_model(
        input_ids=batch.input_ids,
        pixel_values=batch.pixel_values,
        attention_mask=batch.attention_mask,
        logits_to_keep=columns,
        use_cache=False,
    )
    targets = next_token_labels(text_labels(batch.labels))[:, columns]
    logits = output.logits.float()
    nats = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    hits = (logits.argmax(dim=-1) == targets).sum(dim=1)
    supervised = (targets != IGNORE_INDEX).sum(dim=1)
    rows = torch.stack([nats.double().sum(dim=1), hits.double(), supervised.double()], dim=1).tolist()
    return [(loss, int(hit), int(count)) for loss, hit, count in rows]

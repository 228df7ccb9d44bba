"""Short answers to questions, scored as the VQA and DocVQA challenges do."""

from __future__ import annotations

from typing import ClassVar

from ett.data.drawn_scenes import DrawnScenes
from ett.data.drawn_text import DrawnText
from ett.data.sources import Source
from ett.evaluate.answer_measures import anls, vqa_accuracy
from ett.evaluate.base import Metric, Selection, Subject, Task, TaskResult
from ett.evaluate.greedy import greedy
from ett.evaluate.references import ANSWERS, manifest_states, references


class VqaTask(Task):
    """Greedy answers against one or several right ones: "answers" of the metadata, or else the reference.

    Metrics, means over questions:
        vqa_accuracy: min(n / 3, 1) where ten people answered and n agree, otherwise whether one of the answers is equal;
            after the VQA normalization.
        anls: normalized Levenshtein similarity to the nearest answer, 0 below a half.
    """

    name: ClassVar[str] = "vqa"
    needs_language_model: ClassVar[bool] = True

    def suits(self, source: Source) -> bool:
        return source.name in (DrawnScenes.questions, DrawnText.questions) or manifest_states(source, ANSWERS)

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        said = greedy(subject, data, f"{data.name} {self.name}", lambda example: references(example, ANSWERS))
        if not said:
            return TaskResult()
        return TaskResult(
            {
                "vqa_accuracy": Metric.mean([vqa_accuracy(text, right) for right, text in said]),
                "anls": Metric.mean([anls(text, right) for right, text in said]),
            }
        )

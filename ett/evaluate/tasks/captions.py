"""Captions against what people wrote about the pictures."""

from __future__ import annotations

from typing import ClassVar

from ett.data.sources import Source
from ett.errors import ModelError
from ett.evaluate.base import Metric, Selection, Subject, Task, TaskResult
from ett.evaluate.caption_measures import bleu_4, cider_d, rouge_l, why_missing
from ett.evaluate.greedy import greedy
from ett.evaluate.references import CAPTIONS, manifest_states, references


class CaptionsTask(Task):
    """Greedy answers against one or several captions: "captions" of the metadata, or else the reference.

    Metrics; CIDEr and BLEU belong to the set, for they weigh n-grams by all its references or count them over all captions:
        caption_cider_d: mean over pictures, in [0, 10]; left out for a single picture.
        caption_rouge_l: mean over pictures of the F1 with the nearest reference.
        caption_bleu_4: of all captions together, in [0, 1]; no mean over pictures, so that it has no parts to compare in pairs.
    """

    name: ClassVar[str] = "captions"
    needs_language_model: ClassVar[bool] = True

    def suits(self, source: Source) -> bool:
        return not why_missing() and manifest_states(source, CAPTIONS)

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        if missing := why_missing():
            raise ModelError(missing)  # now rather than after an hour of captions
        said = greedy(subject, data, f"{data.name} {self.name}", lambda example: references(example, CAPTIONS))
        if not said:
            return TaskResult()
        told, captions = [each for each, _ in said], [text for _, text in said]
        metrics = {} if len(said) < 2 else {"caption_cider_d": Metric.mean(cider_d(captions, told))}
        bleu, interval = bleu_4(captions, told)
        metrics |= {
            "caption_rouge_l": Metric.mean(rouge_l(captions, told)),
            "caption_bleu_4": Metric(bleu, len(said), interval),
        }
        return TaskResult(metrics)

"""How far a tuned tokenizer has moved from the one it started as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ett.errors import ModelError
from ett.evaluate.base import Metric, Selection, Subject, Task, TaskResult
from ett.evaluate.metrics import l1
from ett.evaluate.shares import in_batches
from ett.images import load_image
from ett.tokenizers import VisionTokenizer
from ett.types import Example


class DriftTask(Task):
    """Tokens and reconstructions of pictures against those of the initial tokenizer.

    Metrics, means over pictures:
        indices_changed: share of tokens whose index is another one; padding counts.
        reconstruction_drift: mean absolute difference of the two reconstructions, pictures in [-1, 1], without padding.
    """

    name: ClassVar[str] = "drift"
    needs_language_model: ClassVar[bool] = False
    needs_initial_tokenizer: ClassVar[bool] = True

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        tuned, initial = subject.vision_tokenizer, subject.initial_tokenizer
        assert initial is not None, "a task without initial tokenizer asked for one"
        if (initial.downsample, initial.codebook_size) != (tuned.downsample, tuned.codebook_size):
            raise ModelError(
                f"The initial tokenizer has {initial.codebook_size} codes at downsampling {initial.downsample}, the tuned one "
                f"{tuned.codebook_size} at {tuned.downsample}: one did not become the other. Leave the drift task out."
            )
        frozen = _equal(tuned, initial)
        changed: list[float] = []
        drift: list[float] = []

        def compare(part: Sequence[Example]) -> list[tuple[float, float]]:
            images = [load_image(image) for example in part for image in example.images]
            if frozen:  # the same function twice: nothing to compute
                return [(0.0, 0.0)] * len(images)
            if not images:
                return []
            fitted = [subject.processor.image_processor.fit(image) for image in images]
            pixels = torch.stack([torch.from_numpy(array) for array, _ in fitted]).to(subject.device)
            before, now = initial.tokenize(pixels), tuned.tokenize(pixels)
            moved = (before != now).double().mean(dim=(1, 2)).tolist()
            pairs = zip(initial.detokenize(before), tuned.detokenize(now), fitted, strict=True)
            return list(zip(moved, [l1(first, second, box) for first, second, (_, box) in pairs], strict=True))

        for share, difference in in_batches(subject, data, subject.batch_size, f"{data.name} {self.name}", compare):
            changed.append(share)
            drift.append(difference)
        if not changed:
            return TaskResult()
        return TaskResult({"indices_changed": Metric.mean(changed), "reconstruction_drift": Metric.mean(drift)})


def _equal(first: VisionTokenizer, second: VisionTokenizer) -> bool:
    """Whether two tokenizers compute the same: equal configurations and weights."""
    if first.config_mapping() != second.config_mapping():
        return False
    weights = second.state_dict()
    return all(torch.equal(tensor, weights[name].to(tensor.device)) for name, tensor in first.state_dict().items())

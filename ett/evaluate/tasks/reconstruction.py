"""What is left of a picture that went through the tokenizer's indices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from ett.evaluate.base import Metric, Selection, Subject, Task, TaskResult, batches
from ett.evaluate.metrics import codebook_usage, index_counts, index_perplexity, l1, psnr, ssim
from ett.evaluate.shares import in_batches
from ett.generate.fidelity import inside
from ett.images import Box, load_image
from ett.losses.perceptual import PerceptualDistance, lite0_is_installed, load_lite0
from ett.types import Example


@dataclass(frozen=True)
class Reconstructed:
    """Some examples' pictures before and after.

    Attributes:
        examples: that hold pictures; the I pictures below are theirs, in order.
        boxes: where each picture lies on its canvas.
        pixels, decoded: float[I, 3, H, W] in [-1, 1], padding included.
        indices: int64[I, h, w].
    """

    examples: Sequence[Example]
    boxes: Sequence[Box]
    pixels: Tensor
    decoded: Tensor
    indices: Tensor


Measure = Callable[[Reconstructed], list[float]]
"""A number for each of the I pictures, of what is inside their boxes."""


class ReconstructionTask(Task):
    """Pictures at the size the model works at, against their reconstruction from indices; padding does not count.

    Metrics, means over pictures:
        psnr [dB], ssim, l1 (mean absolute difference, pictures in [-1, 1]).
        lite0_distance: EfficientNet-Lite0 distance, in [0, 4]; only where the package of its weights is installed.
    and of the indices of all pictures together, padding included:
        codebook_usage: share of the K codes in use. index_perplexity: in [1, K].
    """

    name: ClassVar[str] = "reconstruction"
    needs_language_model: ClassVar[bool] = False

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        def work(part: Sequence[Example]) -> list[Measured]:
            return [measured(subject, found) for found in _through(subject, part)]

        return summary(subject, in_batches(subject, data, subject.batch_size, f"{data.name} {self.name}", work))


def reconstructed(subject: Subject, data: Selection, description: str) -> Iterator[Reconstructed]:
    """The examples of `data` through the tokenizer's indices and back, a batch at a time; those without pictures left out.

    Raises:
        DataError: an example that cannot be read.
    """
    for part in batches(data, subject.batch_size, description):
        yield from _through(subject, part)


def _through(subject: Subject, part: Sequence[Example]) -> Iterator[Reconstructed]:
    """The pictures of some examples there and back at once; nothing where there are none."""
    tokenizer, image_processor = subject.vision_tokenizer, subject.processor.image_processor
    shown = [example for example in part if example.images]
    if shown:
        fitted = [image_processor.fit(load_image(image)) for example in shown for image in example.images]
        pixels = torch.stack([torch.from_numpy(array) for array, _ in fitted]).to(subject.device)
        indices = tokenizer.tokenize(pixels)
        yield Reconstructed(shown, [box for _, box in fitted], pixels, tokenizer.detokenize(indices), indices)


@dataclass(frozen=True)
class Measured:
    """Figures of some examples' pictures.

    Attributes:
        sums: of each measure, a sum over the pictures of each example. pictures: of each example, how many.
        counts: int64[K], how often each code occurred.
    """

    sums: Mapping[str, Sequence[float]]
    pictures: Sequence[int]
    counts: Tensor


def measured(subject: Subject, part: Reconstructed, more: Mapping[str, Measure] | None = None) -> Measured:
    """What `ReconstructionTask` counts of pictures that `subject` reconstructed, and `more` by name."""
    measures: dict[str, Measure] = {"psnr": _each(psnr), "ssim": _each(ssim), "l1": _each(l1)}
    if lite0_is_installed():
        measures["lite0_distance"] = distances(perceptual_distance(subject.device))
    measures |= more or {}
    sums = {}
    for name, of in measures.items():
        each = iter(of(part))
        sums[name] = [sum(next(each) for _ in example.images) for example in part.examples]
    counts = index_counts(part.indices, subject.vision_tokenizer.codebook_size)
    return Measured(sums, [len(example.images) for example in part.examples], counts)


def summary(subject: Subject, found: Iterable[Measured]) -> TaskResult:
    """`ReconstructionTask`'s metrics; none where there are no pictures."""
    counts = torch.zeros(subject.vision_tokenizer.codebook_size, dtype=torch.int64)
    sums: dict[str, list[float]] = {}
    pictures: list[int] = []
    for part in found:
        counts += part.counts
        for name, values in part.sums.items():
            sums.setdefault(name, []).extend(values)
        pictures.extend(part.pictures)
    if not pictures:
        return TaskResult()
    metrics = {name: Metric.mean(values, pictures) for name, values in sums.items()}
    metrics["codebook_usage"] = Metric(codebook_usage(counts), len(pictures))
    metrics["index_perplexity"] = Metric(index_perplexity(counts), len(pictures))
    return TaskResult(metrics, index_counts=counts)


def _each(of: Callable[[Tensor, Tensor, Box | None], float]) -> Measure:
    """`of` a picture and its reconstruction, float[3, H, W] in [-1, 1], one pair at a time."""

    def each(part: Reconstructed) -> list[float]:
        return [of(part.pixels[i], part.decoded[i], box) for i, box in enumerate(part.boxes)]

    return each


def distances(network: nn.Module) -> Measure:
    """`network`'s (pictures, reconstructions) -> float[n]; pictures of equal size go through it together."""

    def of(part: Reconstructed) -> list[float]:
        pairs = [
            torch.stack([inside(part.pixels[i], box), inside(part.decoded[i], box)]) for i, box in enumerate(part.boxes)
        ]
        by_shape: dict[torch.Size, list[int]] = {}
        for i, pair in enumerate(pairs):
            by_shape.setdefault(pair.shape, []).append(i)
        found = [0.0] * len(pairs)
        for group in by_shape.values():
            first, second = torch.stack([pairs[i] for i in group]).unbind(1)
            for i, value in zip(group, network(first, second).tolist(), strict=True):
                found[i] = value
        return found

    return of


@lru_cache(maxsize=1)
def perceptual_distance(device: torch.device) -> PerceptualDistance:
    """The distance on `device`, its weights read once; ModelError where they are not there."""
    return PerceptualDistance(load_lite0()).to(device)

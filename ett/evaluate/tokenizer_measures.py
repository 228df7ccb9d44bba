"""What one tokenizer keeps of pictures: likeness, statistics, readable text, and how it uses its codes.

K codes. Every tokenizer is measured with its own preprocessing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ett.errors import DataError
from ett.evaluate.base import Metric, Selection, Subject, spread
from ett.evaluate.comparison import pooled
from ett.evaluate.frechet import FEATURES, Moments, frechet_distance, pooled_features
from ett.evaluate.metrics import character_errors, codebook_usage, index_perplexity
from ett.evaluate.reading import Reader, known_text
from ett.evaluate.run import describe, evaluating
from ett.evaluate.tasks.reconstruction import (
    Reconstructed,
    distances,
    measured,
    perceptual_distance,
    reconstructed,
    summary,
)
from ett.generate.fidelity import inside
from ett.generate.reconstruct import Reconstruction, reconstruct
from ett.images import from_array
from ett.losses.perceptual import lite0_is_installed
from ett.model.processing import EttProcessor
from ett.tokenizers import VisionTokenizer

READ_LIMIT = 128
"""Texts of each source that the OCR judge reads, at equal distances: each takes it about a third of a second."""
SHEET_PICTURES = 8
"""Of each source, on the contact sheet."""
CURVE_POINTS = 101

FRECHET, LPIPS = "lite0_frechet_distance", "lpips_vgg"
READ, READ_BEFORE = "ocr_character_error_rate", "ocr_character_error_rate_of_originals"


@dataclass(frozen=True)
class Measured:
    """What was found of one tokenizer.

    Attributes:
        about: kind and sizes, as in an evaluation.
        metrics: "<source>.<metric>", and "<metric>" of all sources together.
        index_counts: int64[K], of all sources together.
        sheet: by source, (caption, what became of it) of some pictures, the same ones for every tokenizer.
    """

    about: Mapping[str, Any]
    metrics: Mapping[str, Metric]
    index_counts: Tensor
    sheet: Mapping[str, Sequence[tuple[str, Reconstruction]]]

    @property
    def canvas(self) -> tuple[Any, ...]:
        """(height, width [pixels], way of fitting) of the pictures as the tokenizer sees them."""
        return (*self.about["image_size"], self.about["image_mode"])

    def to_json(self) -> dict[str, Any]:
        """Plain values without NaN or infinity; "metrics" as in an evaluation."""
        counts = self.index_counts
        return {
            **self.about,
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "codebook": {
                "size": len(counts),
                "in_use": int((counts > 0).sum()),
                "usage": codebook_usage(counts),
                "perplexity": index_perplexity(counts),
                "num_indices": int(counts.sum()),
                "curve": usage_curve(counts),
            },
        }


def measure_tokenizer(
    tokenizer: VisionTokenizer,
    processor: EttProcessor,
    selections: Sequence[Selection],
    *,
    batch_size: int = 16,
    reader: Reader | None = None,
    lpips: nn.Module | None = None,
) -> Measured:
    """Everything about one tokenizer: `ReconstructionTask`'s metrics, and of each source and all together

        lpips_vgg: LPIPS with VGG, of a picture and its reconstruction, where `lpips` is given;
        lite0_frechet_distance: of originals and reconstructions, where the network is installed and there are two pictures;
        ocr_character_error_rate, ocr_character_error_rate_of_originals: of up to `READ_LIMIT` pictures whose text is known.

    Args:
        processor: fits the pictures.
        reader: the OCR judge; None does without.
        lpips: (pictures, reconstructions) -> float[n]; None does without.

    Raises:
        DataError: an example that cannot be read, or no picture in any source.
    """
    subject = Subject(tokenizer, processor, batch_size=batch_size)
    metrics: dict[str, Metric] = {}
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    before, after = Moments(FEATURES), Moments(FEATURES)
    sheet: dict[str, Sequence[tuple[str, Reconstruction]]] = {}
    more = {} if lpips is None else {LPIPS: distances(lpips)}
    with evaluating(tokenizer), torch.inference_mode():
        for data in selections:
            watch = _Watch(subject, reader, stride=math.ceil(len(data) / READ_LIMIT))
            shown = watch.through(reconstructed(subject, data, data.name))
            result = summary(subject, (measured(subject, part, more) for part in shown))
            if result.index_counts is None:
                continue
            counts += result.index_counts
            before.merge(watch.before)
            after.merge(watch.after)
            metrics |= {f"{data.name}.{name}": each for name, each in {**result.metrics, **watch.metrics()}.items()}
            sheet[data.name] = _pictures(subject, data)
    if not sheet:
        raise DataError("None of the sources holds a picture, so there is nothing to measure. Give other data.")
    parts = pooled({name: metric.parts for name, metric in metrics.items() if metric.parts})
    metrics |= {name: Metric.mean(rows[:, 0], rows[:, 1]) for name, rows in parts.items() if "." not in name}
    pictures = metrics["psnr"].num_examples
    metrics["codebook_usage"] = Metric(codebook_usage(counts), pictures)
    metrics["index_perplexity"] = Metric(index_perplexity(counts), pictures)
    metrics |= _frechet(before, after)
    return Measured(describe(tokenizer, processor), metrics, counts, sheet)


class _Watch:
    """Looks at the pictures of one source as they pass on their way to the other measures."""

    def __init__(self, subject: Subject, reader: Reader | None, stride: int) -> None:
        self.reader, self.stride, self.texts = reader, stride, 0
        self.network = perceptual_distance(subject.device).features if lite0_is_installed() else None
        self.before, self.after = Moments(FEATURES), Moments(FEATURES)
        self.errors: dict[str, list[tuple[int, int]]] = {READ: [], READ_BEFORE: []}

    def through(self, parts: Iterable[Reconstructed]) -> Iterator[Reconstructed]:
        for part in parts:
            if self.network is not None:
                for moments, pictures in ((self.before, part.pixels), (self.after, part.decoded)):
                    cut = [inside(picture, box) for picture, box in zip(pictures, part.boxes, strict=True)]
                    moments.add(pooled_features(self.network, cut))
            if self.reader is not None:
                self._read(part, self.reader)
            yield part

    def _read(self, part: Reconstructed, reader: Reader) -> None:
        first = 0
        for example in part.examples:
            position, text = first, known_text(example)
            first += len(example.images)
            if text is None:
                continue
            self.texts += 1
            if (self.texts - 1) % self.stride == 0:
                box = part.boxes[position]
                for metric, pictures in ((READ, part.decoded), (READ_BEFORE, part.pixels)):
                    picture = box.cut(from_array(pictures[position].float().cpu().numpy()))
                    self.errors[metric].append(character_errors(reader.read(picture), text))

    def metrics(self) -> dict[str, Metric]:
        found = _frechet(self.before, self.after)
        for name, errors in self.errors.items():
            if errors:
                found[name] = Metric.mean([edits for edits, _ in errors], [length for _, length in errors])
        return found


def _frechet(before: Moments, after: Moments) -> dict[str, Metric]:
    return {FRECHET: Metric(frechet_distance(before, after), before.count)} if before.count > 1 else {}


def _pictures(subject: Subject, data: Selection) -> Sequence[tuple[str, Reconstruction]]:
    examples = [data[position] for position in spread(len(data), min(SHEET_PICTURES, len(data)))]
    shown = [(known_text(each) or each.id, each.images[0]) for each in examples if each.images]
    found = reconstruct(
        subject.vision_tokenizer, subject.processor.image_processor, [image for _, image in shown], subject.batch_size
    )
    return [(caption, each) for (caption, _), each in zip(shown, found, strict=True)]


def usage_curve(counts: Tensor) -> list[tuple[float, float]]:
    """How much the most frequent codes cover: (share of the K codes, share of the indices), up to `CURVE_POINTS` points.

    Args:
        counts: int64[K], not all zero.
    """
    covered = counts.sort(descending=True).values.cumsum(0).double() / counts.sum()
    last = min(CURVE_POINTS, len(counts) + 1) - 1
    places = [i * len(counts) // last for i in range(last + 1)]
    return [(place / len(counts), float(f"{covered[place - 1]:.6g}") if place else 0.0) for place in places]

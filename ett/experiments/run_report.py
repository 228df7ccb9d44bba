"""The report of a finished run: its model on samples of the run's own data, kept in its folder, and the page that shows them.

OUT/evaluation_of_validation_data.json    answers and figures on what is held back (ett.evaluate.sources.held_back)
OUT/evaluation_of_training_data.json      the same on the stored data that the run was trained on
OUT/samples.json, OUT/samples/            pictures of both, and what the tokenizer makes of them, before tuning and after
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import PIL.Image

from ett.data.manifest import question_and_reference
from ett.data.mixture import STORED
from ett.devices import place
from ett.errors import DataError, ModelError, UserError
from ett.evaluate.base import Selection
from ett.evaluate.report import write_report
from ett.evaluate.run import evaluate, load_for_evaluation
from ett.evaluate.run_folder import PICTURES_NAME, TRAINING_DATA, Shown
from ett.evaluate.sources import NamedSources, configured_sources, held_back, stored_sources
from ett.experiments.comparison import initial_tokenizer
from ett.experiments.recipe import Recipe
from ett.experiments.run import recipe_of, resolve_model_folder
from ett.generate.reconstruct import reconstruct, sized
from ett.model.processing import EttProcessor
from ett.tokenizers import VisionTokenizer
from ett.types import Example

VALIDATION_DATA = "evaluation_of_validation_data"
SAMPLES = 32
"""Examples of each source that are measured where nothing else is said."""
SHOWN_PICTURES = 12
READING, DRAWING = ("loss", "answers", "reconstruction"), ("reconstruction",)
"""What is measured of a model that answers, and of one that draws or of a tokenizer alone: what takes seconds."""


def write_run_report(folder: Path, limit: int | None = None, *, measure: bool = True) -> tuple[Path, str]:
    """Measure what was not measured yet, and write ``report.html`` and ``report.json`` (`ett.evaluate.report.write_report`).

    Args:
        folder: of a run.
        limit: examples of each source; those that were measured are measured anew. None keeps them, and takes `SAMPLES`.
        measure: otherwise no model is loaded, and what lies in the folder is shown.

    Returns:
        (path of ``report.html``, why nothing was measured that should have been, or "").

    Raises:
        UserError: no run's folder, or a file in it that cannot be read or written.
    """
    pictures, why = None, ""
    if measure and (limit is not None or not _measured(folder)):
        try:
            pictures = _measure(folder, SAMPLES if limit is None else limit, anew=limit is not None)
        except (DataError, ModelError) as error:
            why = str(error)
    return write_report(folder, pictures), why


def _measured(folder: Path) -> bool:
    return (folder / PICTURES_NAME).is_file() and any(folder.glob("evaluation*.json"))


def _measure(folder: Path, limit: int, *, anew: bool) -> list[Shown] | None:
    """Write the evaluations that are missing; returns the pictures to show, None where the folder's are kept."""
    recipe = recipe_of(folder)
    if recipe is None:
        return None
    last = len(recipe.stages) - 1
    model_folder = folder / "stages" / f"{last}-{recipe.stage_names[last]}"
    if not model_folder.is_dir():
        raise ModelError(f"{folder} has not finished its last stage.")
    model, tokenizer, processor = load_for_evaluation(resolve_model_folder(model_folder))
    place(model if model is not None else tokenizer)
    groups = _sources(recipe)
    said: dict[tuple[str, str], str] = {}
    if anew or not any(folder.glob("evaluation*.json")):
        reads = model is not None and recipe.stages[last].stage != "gen"
        for name, sources in groups.items():
            found = evaluate(
                model if model is not None else tokenizer,
                processor,
                sources,
                READING if reads else DRAWING,
                limit=limit,
            )
            found.save(folder / f"{name}.json")
            said |= {(name, each.id): each.prediction for each in found.predictions}
    if not anew and (folder / PICTURES_NAME).is_file():
        return None
    return _pictures(groups, limit, said, processor, tokenizer, _before(recipe))


def _sources(recipe: Recipe) -> dict[str, NamedSources]:
    """Evaluation -> its sources: what is held back, and what is stored among the data of any stage."""
    groups: dict[str, NamedSources] = {}
    held = held_back(recipe.evaluation.data, recipe.data)
    if held:
        groups[VALIDATION_DATA] = configured_sources(held, recipe.evaluation.split)
    trained = [
        config
        for stage in recipe.stages
        for config in stage.data or recipe.data
        if config.source in STORED and not config.draws
    ]
    if trained:
        groups[TRAINING_DATA] = stored_sources([c for i, c in enumerate(trained) if c not in trained[:i]])
    return groups


def _before(recipe: Recipe) -> VisionTokenizer | None:
    """What the tokenizer was; None where it was made by the run itself, or is there no more."""
    try:
        return initial_tokenizer(recipe)
    except UserError:
        return None


def _pictures(
    groups: Mapping[str, NamedSources],
    limit: int,
    said: Mapping[tuple[str, str], str],
    processor: EttProcessor,
    tokenizer: VisionTokenizer,
    before: VisionTokenizer | None,
) -> list[Shown]:
    """Some pictures of every source, reconstructed at the model's size."""
    selections = [
        (name, Selection(source_name, source, limit), len(sources) > 1)
        for name, sources in groups.items()
        for source_name, source in sources
    ]
    captions, originals = list[str](), list[PIL.Image.Image]()
    for name, selection, several in selections:
        for example in _some(selection, max(1, SHOWN_PICTURES // len(selections))):
            full = f"{selection.name}/{example.id}" if several else example.id
            captions.append(_caption(f"{selection.name}: {example.id}", example, said.get((name, full))))
            originals.append(example.images[0])
    size = processor.image_processor
    after = reconstruct(tokenizer, sized(tokenizer, size), originals)
    earlier = None if before is None else list(reconstruct(before, sized(before, size), originals))
    return [
        Shown(caption, found.original, found.image, None if earlier is None else earlier[i].image)
        for i, (caption, found) in enumerate(zip(captions, after, strict=True))
    ]


def _some(selection: Sequence[Example], count: int) -> Iterator[Example]:
    """Up to `count` examples with a picture, at equal distances."""
    places = dict.fromkeys(i * len(selection) // count for i in range(count))
    return (example for example in (selection[place] for place in places) if example.images)


def _caption(name: str, example: Example, answer: str | None) -> str:
    """Plain text: whose picture it is, what is right and what was said."""
    parts = [name]
    reference = question_and_reference(example)[1]
    if reference is not None:
        parts.append(f"right: {reference}")
    if answer is not None:
        parts.append(f"said: {answer.strip() or '(nothing)'}")
    return ", ".join(parts)

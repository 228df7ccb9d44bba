"""`ett demo`: the quickstart recipe from its first stage to the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ett.evaluate.report import write_report
from ett.evaluate.run import evaluate, load_for_evaluation
from ett.evaluate.run_folder import Pictures
from ett.evaluate.sources import NamedSources, builtin_sources
from ett.experiments.folder import RECIPE_NAME
from ett.experiments.recipe import Recipe, load_recipe
from ett.experiments.run import Run
from ett.generate.reconstruct import reconstruct, sized
from ett.model.processing import EttProcessor
from ett.tokenizers import VisionTokenizer

RECIPE = "quickstart"
EVALUATION = "evaluation.json"
SHOWN_PICTURES = 4
"""Pictures of each source in the report."""


def run_demo(out: Path, overrides: Sequence[str] = (), *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train the quickstart recipe in `out`, measure it on validation data and write the report.

    What is finished is kept: a demo that was interrupted, or that is run again with `resume`, does only the rest.

    Returns:
        The path of ``report.html``.
    """
    recipe = load_recipe(RECIPE, overrides)
    run = Run(recipe, out, resume=resume, overwrite=overwrite)
    folder = run.train()
    if (out / EVALUATION).is_file():
        return write_report(out)
    model, tokenizer, processor = load_for_evaluation(folder)
    sources = evaluation_sources(recipe)
    result = evaluate(model if model is not None else tokenizer, processor, sources, limit=recipe.evaluation.limit)
    result.save(out / EVALUATION)
    return write_report(out, _pictures(tokenizer, processor, sources))


def evaluation_sources(recipe: Recipe, split: str | None = None) -> NamedSources:
    """The built-in sources that `recipe` is measured on, drawn as it trains on them; `split` replaces the recipe's."""
    return builtin_sources(split or recipe.evaluation.split, recipe.evaluation.data or recipe.data)


def recipe_of(path: Path) -> Recipe | None:
    """The recipe of the run in folder `path`, or None where `path` is a model's own folder."""
    return load_recipe(path / RECIPE_NAME) if (path / RECIPE_NAME).is_file() else None


def _pictures(tokenizer: VisionTokenizer, processor: EttProcessor, sources: NamedSources) -> Pictures:
    """A few validation pictures of each source, before and after the tuned tokenizer."""
    captions, images = [], []
    for name, source in sources:
        for i in range(SHOWN_PICTURES):
            example = source[i * len(source) // SHOWN_PICTURES]
            answer = example.messages[-1]["content"][0]["text"]
            captions.append(f"{name}: {answer}")
            images.append(example.images[0])
    found = reconstruct(tokenizer, sized(tokenizer, processor.image_processor), images)
    return [(caption, each.original, each.image) for caption, each in zip(captions, found, strict=True)]

"""`ett demo`: the quickstart recipe from its first stage to the report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from ett.evaluate.report import write_report
from ett.evaluate.run import evaluate, load_for_evaluation
from ett.evaluate.sources import builtin_sources
from ett.experiments.recipe import Recipe, load_recipe
from ett.experiments.run import Run

RECIPE = "quickstart"
EVALUATION = "evaluation.json"


def run_demo(out: Path, overrides: Sequence[str] = (), *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train the quickstart recipe in `out`, measure it on validation data and write the report.

    What is finished is kept: a demo that was interrupted, or that is run again with `resume`, does only the rest.

    Returns:
        The path of ``report.html``.
    """
    recipe = load_recipe(RECIPE, overrides)
    run = Run(recipe, out, resume=resume, overwrite=overwrite)
    folder = run.train()
    if not (out / EVALUATION).is_file():
        _evaluate(recipe, folder, out / EVALUATION)
    return write_report(out)


def _evaluate(recipe: Recipe, folder: Path, target: Path) -> None:
    started = time.monotonic()
    model, tokenizer, processor = load_for_evaluation(folder)
    sources = builtin_sources(recipe.evaluation.split)
    result = evaluate(model or tokenizer, processor, sources, None, limit=recipe.evaluation.limit)
    payload = {**result.to_json(), "seconds": round(time.monotonic() - started, 1)}
    work = target.with_suffix(".tmp")
    work.write_text(json.dumps(payload, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    work.replace(target)

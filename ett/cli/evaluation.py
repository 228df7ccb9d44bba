"""Commands that measure what was trained and write it up."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ett.cli.common import Add, add_device, add_model, add_source_options, positive, quiet_libraries
from ett.errors import UserError


def register(add: Add) -> None:
    """These commands, in the order that the help shows them in."""
    sub = add(
        "evaluate",
        _evaluate,
        "measure a model on built-in data or a manifest",
        "ett evaluate runs/demo/ett --json figures.json",
    )
    add_model(sub)
    sub.add_argument(
        "--tasks", metavar="NAMES", help="comma-separated (docs/evaluation.md); what suits the data by default"
    )
    sub.add_argument(
        "--initial", metavar="MODEL", type=Path, help="model or tokenizer before tuning, to measure the drift from"
    )
    sub.add_argument("--data", metavar="MANIFEST.jsonl", type=Path, help="your own pictures (docs/data.md)")
    add_source_options(sub)
    sub.add_argument("--limit", type=positive, help="examples of each source")
    sub.add_argument("--batch-size", type=positive, default=16)
    sub.add_argument("--max-new-tokens", type=positive, default=64, help="where answers stop at the latest")
    add_device(sub)
    sub.add_argument("--json", metavar="FILE", type=Path, help="write metrics and predictions")
    sub.add_argument("--markdown", metavar="FILE", type=Path, help="write a table of the metrics")
    sub.add_argument("--html", metavar="FILE", type=Path, help="write a page with metrics and answers")

    sub = add(
        "lmms-tasks",
        _lmms_tasks,
        "write built-in splits as tasks for lmms-eval (docs/lmms_eval.md)",
        "ett lmms-tasks tasks/heldout --limit 100",
    )
    sub.add_argument("out", metavar="DIR", type=Path, help="a new folder, for lmms-eval's --include_path")
    sub.add_argument(
        "--recipe", help="a run's folder, a YAML file or a shipped recipe: its data, drawn as it draws them"
    )
    sub.add_argument(
        "--data", metavar="NAME", nargs="+", help="names, questions, drawn_text, drawn_scenes, or a manifest's path"
    )
    add_source_options(sub, "heldout")
    sub.add_argument("--limit", type=positive, help="examples of each source")

    sub = add(
        "report",
        _report,
        "write report.html: curves, answers, and pictures before and after tuning (docs/evaluation.md)",
        "ett report runs/demo",
    )
    sub.add_argument("run", metavar="RUN", type=Path, help="a folder written by ett train, ett ablate or ett demo")
    sub.add_argument(
        "--limit", type=positive, help="of a run: examples of each source, measured anew (default: 32, once)"
    )
    sub.add_argument("--kept", action="store_true", help="show what the run's folder holds; load no model")


def _evaluate(arguments: argparse.Namespace) -> int:
    from ett.devices import place
    from ett.evaluate.base import NAMING_LIMIT
    from ett.evaluate.markdown import markdown
    from ett.evaluate.report import evaluation_page
    from ett.evaluate.run import evaluate, load_for_evaluation, save_text
    from ett.evaluate.shares import launched
    from ett.evaluate.sources import builtin_sources, held_back, manifest_source
    from ett.experiments.run import evaluation_sources, recipe_of, resolve_model_folder

    quiet_libraries()
    if arguments.data and arguments.split:
        raise UserError("A manifest has no splits: give --data or --split, not both.")
    folder = resolve_model_folder(arguments.model)
    split = arguments.split or "validation"
    recipe = None if arguments.data else recipe_of(arguments.model)
    if arguments.data:
        sources = manifest_source(arguments.data, arguments.image_root)
    else:
        # a run that holds nothing back can still be measured on built-in data, where one asks for it
        own = recipe is not None and (not arguments.split or held_back(recipe.evaluation.data, recipe.data))
        sources = evaluation_sources(recipe, split) if recipe is not None and own else builtin_sources(split)
    tasks = [name.strip() for name in arguments.tasks.split(",")] if arguments.tasks else None
    model, tokenizer, processor = load_for_evaluation(folder)
    initial = None
    if arguments.initial:
        _, initial, _ = load_for_evaluation(resolve_model_folder(arguments.initial))
    subject = model if model is not None else tokenizer
    place(subject, arguments.device)
    with launched() as (divided, writes):
        result = evaluate(
            subject,
            processor,
            sources,
            tasks,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
            naming_limit=NAMING_LIMIT if recipe is None else recipe.evaluation.naming_limit,
            max_new_tokens=arguments.max_new_tokens,
            initial_tokenizer=initial,
            divided=divided,
        )
    if not writes:
        return 0
    if arguments.json:
        result.save(arguments.json)
    if arguments.markdown:
        save_text(arguments.markdown, markdown(result.to_json()))
    if arguments.html:
        save_text(arguments.html, evaluation_page(str(arguments.model), result.to_json()))
    width = max((len(name) for name in result.metrics), default=0)
    for name, metric in result.metrics.items():
        interval = f"  [{metric.interval[0]:.4f}, {metric.interval[1]:.4f}]" if metric.interval else ""
        print(f"{name:<{width}}  {metric.value:.4f}{interval}  n={metric.num_examples}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from ett.experiments.comparison import is_comparison
    from ett.experiments.comparison_report import write_comparison_report
    from ett.experiments.run_report import write_run_report

    quiet_libraries()
    if is_comparison(arguments.run):
        print(write_comparison_report(arguments.run))
        return 0
    path, why = write_run_report(arguments.run, arguments.limit, measure=not arguments.kept)
    if why:
        print(f"Curves alone, no pictures and answers: {why}", file=sys.stderr)
    print(path)
    return 0


def _lmms_tasks(arguments: argparse.Namespace) -> int:
    from ett.evaluate.lmms.tasks import write_tasks
    from ett.evaluate.sources import builtin_sources, named_sources
    from ett.experiments.recipe import load_recipe
    from ett.experiments.run import evaluation_sources, recipe_of

    quiet_libraries()
    if arguments.recipe and arguments.data:
        raise UserError("Give --recipe for its data, or --data, not both.")
    split = arguments.split or "heldout"
    if arguments.recipe:
        recipe = recipe_of(Path(arguments.recipe)) or load_recipe(arguments.recipe)
        sources = evaluation_sources(recipe, split)
    elif arguments.data:
        sources = named_sources(arguments.data, arguments.split, arguments.image_root)
    else:
        sources = builtin_sources(split)
    for task in write_tasks(sources, arguments.out, limit=arguments.limit):
        print(f"{task.name}  {task.num_examples} examples of {task.source}  {task.data}")
    return 0

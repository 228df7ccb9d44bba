"""Commands that train: one recipe, or the arms of a comparison."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ett.cli.common import Add, add_comparison_options, add_run_options, quiet_libraries
from ett.errors import UserError


def register(add: Add) -> None:
    """These commands, in the order that the help shows them in."""
    sub = add(
        "train", _train, "train the stages of a recipe", "ett train quickstart stages.semantic.steps=50 --out runs/mine"
    )
    sub.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    sub.add_argument(
        "overrides", metavar="key=value", nargs="*", help="dotted override, for example model.image_size=96"
    )
    add_run_options(sub)

    sub = add(
        "demo",
        _demo,
        "frozen against tuned tokenizers: quickstart's four arms, measured and reported",
        "ett demo --out runs/demo",
    )
    sub.add_argument("overrides", metavar="key=value", nargs="*", help="dotted override of the quickstart recipe")
    add_comparison_options(sub)

    sub = add(
        "ablate",
        _ablate,
        "train, measure and compare the arms of a recipe",
        "ett ablate quickstart 'seeds=[0, 1, 2]' --out runs/three --jobs 2",
    )
    sub.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="a YAML file with `arms`, or the name of a shipped one"
    )
    sub.add_argument("overrides", metavar="key=value", nargs="*", help="dotted override, for example seeds=[0,1,2]")
    add_comparison_options(sub)
    sub.add_argument(
        "--search",
        metavar="key=v1,v2",
        action="append",
        default=[],
        help="choose this value for every arm on validation first; again for further keys",
    )
    sub.add_argument(
        "--search-with",
        metavar="key=value",
        action="append",
        default=[],
        help="an override of the search's runs alone, for example stages.semantic.steps=200",
    )
    sub.add_argument(
        "--only", metavar="ARM:SEED", help="run one arm of the comparison that was started in --out, and report nothing"
    )


def _train(arguments: argparse.Namespace) -> int:
    from ett.experiments.recipe import load_recipe
    from ett.experiments.run import Interrupted, Run, report_interruption

    quiet_libraries()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    out = arguments.out or Path("runs") / recipe.name
    if arguments.resume and not out.exists():
        print(f"ett: there is nothing to resume in {out}; starting anew.", file=sys.stderr)
    run = Run(recipe, out, resume=arguments.resume, overwrite=arguments.overwrite)
    try:
        folder = run.train()
    except Interrupted as interruption:
        report_interruption(interruption, [arguments.recipe, *arguments.overrides], out)
        return _left(128 + interruption.signal_number)
    if os.environ.get("RANK", "0") == "0":
        print(folder)
    return _left(0)


def _left(code: int) -> int:
    """`code`; but a process of several ends with it here. All is on the disk by now, and the interpreter's own way out takes
    threads and connections down that other processes share."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _demo(arguments: argparse.Namespace) -> int:
    from ett.experiments.ablate import DEMO

    arguments.recipe, arguments.only = DEMO, None
    arguments.search, arguments.search_with = [], []
    arguments.out = arguments.out or Path("runs") / "demo"
    return _ablate(arguments, command="demo")


def _ablate(arguments: argparse.Namespace, command: str = "ablate") -> int:
    from ett.experiments.ablate import ablate, run_only
    from ett.experiments.run import Interrupted, report_interruption
    from ett.experiments.search import Search

    quiet_libraries()
    if arguments.only:
        if arguments.recipe or arguments.overrides or not arguments.out:
            raise UserError("--only goes with --out alone: the recipe is the one that the comparison was started with.")
        try:
            run_only(arguments.out, arguments.only)
        except Interrupted as interruption:
            return 128 + interruption.signal_number
        return 0
    if not arguments.recipe:
        raise UserError("ett ablate needs a recipe that compares arms, for example quickstart.")
    if arguments.search_with and not arguments.search:
        raise UserError("--search-with says what the runs of --search have; give --search too.")
    search = Search.from_words(arguments.search, arguments.search_with) if arguments.search else None
    out = arguments.out or Path("runs") / Path(arguments.recipe).stem
    try:
        report = ablate(
            arguments.recipe,
            out,
            arguments.overrides,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            jobs=arguments.jobs,
            search=search,
        )
    except Interrupted as interruption:
        words = arguments.overrides if command == "demo" else [arguments.recipe, *arguments.overrides]
        for option, given in (("--search", arguments.search), ("--search-with", arguments.search_with)):
            words += [word for each in given for word in (option, each)]
        report_interruption(interruption, words, out, command=command)
        return 128 + interruption.signal_number
    print(report)
    return 0

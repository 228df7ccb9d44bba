"""What commands share: options, and how they speak."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[[argparse.Namespace], int]
"""Carries out what was parsed and returns the exit code."""

Add = Callable[[str, Command, str, str], argparse.ArgumentParser]
"""Adds a command by name, function, summary and example; returns its parser, for its options."""


def add_quiet(sub: argparse.ArgumentParser, *, within: bool = False) -> None:
    """``--quiet``; `within` a group of commands it may also stand before the command's name."""
    sub.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        default=argparse.SUPPRESS if within else False,
        help="print results and errors alone: no progress, no warnings",
    )


def add_run_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", metavar="DIR", type=Path, help="output folder (default: runs/<recipe name>)")
    choice = sub.add_mutually_exclusive_group()
    choice.add_argument("--resume", action="store_true", help="continue what is in the output folder")
    choice.add_argument("--overwrite", action="store_true", help="delete what is in the output folder first")


def add_comparison_options(sub: argparse.ArgumentParser) -> None:
    add_run_options(sub)
    sub.add_argument(
        "--jobs", type=positive, help="arms at a time (default: one for each CPU core; one with an accelerator)"
    )


def add_model(sub: argparse.ArgumentParser, text: str = "a run or saved model, or a shipped name: reader_64px") -> None:
    sub.add_argument("model", metavar="MODEL", type=Path, help=text)


def add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--device", help="where the model runs, for example cuda (default: an accelerator where there is one, else cpu)"
    )


def add_source_options(sub: argparse.ArgumentParser, split: str = "validation") -> None:
    sub.add_argument(
        "--image-root", metavar="DIR", type=Path, help="a folder outside the manifest's whose pictures may be read"
    )
    sub.add_argument(
        "--split", help=f"of the built-in data: validation, or heldout for all final ones (default: {split})"
    )


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def quiet_libraries() -> None:
    """Keep libraries' progress bars and load reports out of our output: what went wrong is said once, by us."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, ensure_ascii=False)
    print()

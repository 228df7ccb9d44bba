"""The command line: parses, calls, prints. Everything it does is also a function.

A command is a function in the module of its group and its registration with options above it. What is slow to import is
imported inside that function: help must be immediate.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr

from ett import __version__
from ett.cli import data, drawing, evaluation, preparation, serving, sharing, tokenizers, training, use
from ett.cli.common import Command, add_quiet
from ett.errors import UserError

EXIT_USER_ERROR = 2

# A second OpenMP thread that spins at a barrier starves a loader worker, and the worker it: on two cores a training step
# was measured 40 times slower beside one busy process. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nothing here needs the hub's progress bars or its advice on tokenizers and forks.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

GROUPS = (training, evaluation, use, drawing, serving, tokenizers, data, sharing, preparation)
"""Modules of commands, in the order that the help shows them in."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the input is at fault, 130 or 143 stopped by a signal."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    _place_late_words(parser, arguments, rest)
    command: Command | None = getattr(arguments, "command", None)
    if command is None:
        parser.print_help()
        return EXIT_USER_ERROR
    try:
        with _silence() if arguments.quiet else nullcontext():
            return command(arguments)
    except UserError as error:
        print(f"{_coloured('ett:')} {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        # the reader of our output went away: nothing left to say, and Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nett: stopped.", file=sys.stderr)
        return 130


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on stderr: no progress, no lines, no warnings (a run's log.jsonl has them)."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        yield


def _coloured(word: str) -> str:
    """`word` in bold red where someone sees it: on a terminal, unless NO_COLOR is set (no-color.org)."""
    plain = not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return word if plain else f"\033[1;31m{word}\033[0m"


def _place_late_words(parser: argparse.ArgumentParser, arguments: argparse.Namespace, rest: list[str]) -> None:
    """Give words that follow an option to the optional positionals that argparse has closed by then."""
    if rest and not any(word.startswith("-") for word in rest):
        if hasattr(arguments, "overrides"):
            arguments.overrides += rest
            return
        if getattr(arguments, "question", "") is None and len(rest) == 1:
            arguments.question = rest[0]
            return
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")


def build_parser() -> argparse.ArgumentParser:
    """Every command with its help and an example."""
    parser = argparse.ArgumentParser(
        prog="ett", description="End-to-end vision tokenizer tuning: train a vision tokenizer through a language model."
    )
    parser.add_argument("--version", action="version", version=f"ett {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, command: Command, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_quiet(sub)
        sub.set_defaults(command=command)
        return sub

    for group in GROUPS:
        group.register(add)
    return parser

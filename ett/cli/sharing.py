"""Commands that hand a model on, and what a bug report should say."""

from __future__ import annotations

import argparse
from pathlib import Path

from ett.cli.common import Add, add_model, print_json, quiet_libraries
from ett.errors import UserError


def register(add: Add) -> None:
    """These commands, in the order that the help shows them in."""
    sub = add(
        "export",
        _export,
        "write a model with its own code and a card, to be loaded where ett is not installed (docs/share.md)",
        "ett export runs/mine exported/mine --license apache-2.0 --push me/mine",
    )
    add_model(sub)
    sub.add_argument("destination", metavar="DIR", type=Path, help="a new folder")
    sub.add_argument("--license", metavar="NAME", help="licence that the card states, for example apache-2.0")
    sub.add_argument("--metrics", metavar="FILE", type=Path, help="what `ett evaluate --json` wrote, for the card")
    sub.add_argument("--push", metavar="ID", help="upload the folder to this repository of the Hugging Face hub")
    sub.add_argument("--private", action="store_true", help="if --push makes the repository, make it private")

    sub = add("env", _env, "versions and devices, for bug reports", "ett env --json")
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    sub = add(
        "completion",
        _completion,
        "print a script that completes commands, options and files in a shell; needs the package shtab",
        "ett completion bash > ~/.local/share/bash-completion/completions/ett",
    )
    sub.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def _export(arguments: argparse.Namespace) -> int:
    from ett.experiments.run import resolve_model_folder
    from ett.export.hub import push_folder
    from ett.export.portable import export_model

    quiet_libraries()
    folder = export_model(
        resolve_model_folder(arguments.model),
        arguments.destination,
        license_name=arguments.license,
        metrics=arguments.metrics,
    )
    print(push_folder(folder, arguments.push, private=arguments.private) if arguments.push else folder)
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from ett.environment import describe

    found = describe()
    if arguments.json:
        print_json(found)
        return 0
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {'-' if value is None else value}")
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    from ett.cli import build_parser

    try:
        import shtab
    except ImportError as error:
        raise UserError("Shell completion needs the package shtab: pip install 'ett-tuning[completion]'.") from error
    parser = build_parser()
    _complete_files(parser, shtab.FILE)
    print(shtab.complete(parser, arguments.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser, files: object) -> None:
    """Mark every argument that is a path, subcommands included."""
    for action in parser._actions:
        if action.type is Path:
            action.complete = files  # type: ignore[attr-defined]  # shtab's convention
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _complete_files(sub, files)

"""Commands for data sets: check them, and convert them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ett.cli.common import Add, Command, add_quiet, positive, print_json, quiet_libraries
from ett.errors import RecipeError, UserError


def register(add: Add) -> None:
    """These commands, in the order that the help shows them in."""
    group = add("data", _neither, "check a data set, or convert it (docs/data.md)", "ett data check mine.jsonl")
    commands = group.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def sub_command(name: str, command: Command, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_quiet(sub, within=True)
        sub.set_defaults(command=command)
        return sub

    sub = sub_command(
        "check",
        _check,
        "read every example, decode every picture, and tell what is there and what is wrong; exit code 2 if anything is",
        "ett data check mine.jsonl --model runs/mine --workers 4 --out checks/mine",
    )
    sub.add_argument(
        "path", metavar="PATH", help="a manifest, a shard (.tar), or a folder of shards; or the address of one"
    )
    _add_common(sub)
    sub.add_argument("--limit", metavar="N", type=positive, help="read the first N examples alone")
    sub.add_argument(
        "--model", metavar="MODEL", help="a model, run, recipe or shipped name: count its tokens and positions"
    )
    sub.add_argument(
        "--max-length", metavar="N", type=positive, help="positions that an example may have (default: the model's)"
    )
    sub.add_argument("--out", metavar="DIR", type=Path, help="write data.html, with the resolutions plotted")
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    sub = sub_command(
        "fashion-mnist",
        _fashion_mnist,
        "write the files of Fashion-MNIST as a manifest with its ten names as choices",
        "ett data fashion-mnist downloads/fashion data/fashion.jsonl",
    )
    sub.add_argument("folder", metavar="DIR", type=Path, help="holds the four files, plain or .gz")
    sub.add_argument("out", metavar="MANIFEST.jsonl", type=Path, help="a new file")
    sub.add_argument("--split", choices=("train", "heldout"), default="train")
    sub.add_argument("--limit", metavar="N", type=positive, help="the first N examples alone")

    sub = sub_command(
        "convert",
        _convert,
        "write a manifest as tar shards, or shards as a manifest; run again, it goes on where it was stopped",
        "ett data convert mine.jsonl shards/mine --shard-size 500MB --workers 4",
    )
    sub.add_argument("source", metavar="SRC", help="a manifest, a shard, or a folder of shards; or the address of one")
    sub.add_argument("destination", metavar="DST", type=Path, help="a folder: new, or of this conversion")
    _add_common(sub)
    sub.add_argument(
        "--shard-size",
        metavar="SIZE",
        help="of the shards written: examples, or bytes such as 500MB (default: 1000 examples)",
    )


def _add_common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--workers", metavar="N", type=positive, default=1, help="processes (default: %(default)s)")
    sub.add_argument(
        "--image-root", metavar="DIR", type=Path, help="a folder outside the manifest's whose pictures may be read"
    )


def _fashion_mnist(arguments: argparse.Namespace) -> int:
    from ett.data.fashion_mnist import write_fashion_mnist

    count = write_fashion_mnist(arguments.folder, arguments.out, arguments.split, arguments.limit)
    print(f"{count} examples in {arguments.out}")
    return 0


def _neither(arguments: argparse.Namespace) -> int:
    raise AssertionError("argparse asks for one of the commands")


def _check(arguments: argparse.Namespace) -> int:
    from ett.data.check import check
    from ett.data.check_text import as_text
    from ett.evaluate.data_page import write_data_page
    from ett.experiments.processors import find_processor

    quiet_libraries()
    if arguments.max_length and not arguments.model:
        raise UserError("--max-length counts a model's positions: give --model too.")
    processor, own_length = find_processor(arguments.model) if arguments.model else (None, None)
    summary = check(
        arguments.path,
        image_root=arguments.image_root,
        processor=processor,
        max_length=arguments.max_length or own_length,
        workers=arguments.workers,
        limit=arguments.limit,
    )
    page = write_data_page(summary, arguments.out) if arguments.out else None
    if arguments.json:
        print_json(summary)
    else:
        print(as_text(summary))
        if page:
            print(f"\n{page}")
    return 2 if summary["problems"] else 0


def _convert(arguments: argparse.Namespace) -> int:
    from ett.data.convert import DEFAULT_SHARD_EXAMPLES, convert
    from ett.experiments.plan.hardware import parse_memory

    size = arguments.shard_size or str(DEFAULT_SHARD_EXAMPLES)
    in_examples = size.isdecimal() and int(size) > 0
    try:
        shard_bytes = None if in_examples else parse_memory(size)
    except RecipeError as error:
        raise UserError(
            f"--shard-size {size} is neither a number of examples nor bytes such as 500MB or 1GiB."
        ) from error
    converted = convert(
        arguments.source,
        arguments.destination,
        shard_examples=int(size) if in_examples else DEFAULT_SHARD_EXAMPLES,
        shard_bytes=shard_bytes,
        workers=arguments.workers,
        image_root=arguments.image_root,
    )
    print(f"{arguments.destination}  {converted:,} examples")
    return 0

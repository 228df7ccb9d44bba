"""Commands for vision tokenizers: compare them, and exchange them with other projects."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ett.cli.common import Add, add_source_options, positive, quiet_libraries


def register(add: Add) -> None:
    """These commands, in the order that the help shows them in."""
    sub = add(
        "tokenizer-report",
        _tokenizer_report,
        "compare vision tokenizers on the same pictures (docs/tokenizer_report.md)",
        "ett tokenizer-report reader_64px runs/mine --data mine.jsonl --out reports/tokenizers",
    )
    sub.add_argument(
        "tokenizers", metavar="TOKENIZER", nargs="+", help="saved tokenizers or models, runs, shipped names"
    )
    sub.add_argument(
        "--data",
        metavar="NAMES|MANIFEST",
        help="names, questions, drawn_text, drawn_scenes, manifests (docs/data.md), by commas (default: names,drawn_text)",
    )
    add_source_options(sub)
    sub.add_argument("--limit", type=positive, help="examples of each source (default: 400; of a manifest, all)")
    sub.add_argument("--batch-size", type=positive, default=16)
    sub.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/tokenizers"), help="default: %(default)s")
    sub.add_argument("--overwrite", action="store_true", help="replace the tokenizer report in --out")

    sub = add(
        "import-tokenizer",
        _import_tokenizer,
        "read another project's vision tokenizer: SEED-Voken, Emu3.5, diffusers (docs/checkpoints.md)",
        "ett import-tokenizer Emu3.5-VisionTokenizer tokenizers/emu",
    )
    sub.add_argument("source", metavar="SRC", type=Path, help="a checkpoint's file or folder; its layout is detected")
    sub.add_argument("destination", metavar="DST", type=Path, help="a folder for the imported tokenizer")
    sub.add_argument(
        "--raw", action="store_true", help="the raw weights (default: their average, EMA, where there is one)"
    )
    sub.add_argument("--config", metavar="FILE", type=Path, help="its configuration, if not beside the weights")
    sub.add_argument(
        "--norm-groups",
        type=positive,
        help="groups of every GroupNorm, which no tensor shows (default: the reference's 32)",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace the tokenizer in DST")

    sub = add(
        "export-tokenizer",
        _export_tokenizer,
        "write a vision tokenizer for another project to read",
        "ett export-tokenizer runs/mine tuned --layout emu3.5",
    )
    sub.add_argument("source", metavar="SRC", type=Path, help="a saved tokenizer, a saved model or a run's folder")
    sub.add_argument("destination", metavar="DST", type=Path, help="a folder, or a .ckpt file for seed-voken")
    sub.add_argument("--layout", required=True, help="seed-voken, emu3.5 or diffusers")
    sub.add_argument(
        "--dtype", default="float32", help="float32 (default), bfloat16 or float16, where it rounds nothing"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace the tokenizer in DST")


def _tokenizer_report(arguments: argparse.Namespace) -> int:
    from ett.evaluate.sources import named_sources
    from ett.evaluate.tokenizer_report import labels, write_tokenizer_report
    from ett.experiments.run import resolve_model_folder

    quiet_libraries()
    given = [name.strip() for name in arguments.data.split(",")] if arguments.data else []
    folders = [resolve_model_folder(name) for name in arguments.tokenizers]
    path, notes = write_tokenizer_report(
        dict(zip(labels(arguments.tokenizers), folders, strict=True)),
        named_sources(given, arguments.split, arguments.image_root),
        arguments.out,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        overwrite=arguments.overwrite,
    )
    for note in notes:
        print(f"ett: {note}", file=sys.stderr)
    print(path)
    return 0


def _import_tokenizer(arguments: argparse.Namespace) -> int:
    from ett.tokenizers.layouts import import_tokenizer

    report = import_tokenizer(
        arguments.source,
        arguments.destination,
        raw=arguments.raw,
        config=arguments.config,
        norm_groups=arguments.norm_groups,
        overwrite=arguments.overwrite,
    )
    print(report)
    return 0


def _export_tokenizer(arguments: argparse.Namespace) -> int:
    from ett.experiments.run import resolve_model_folder
    from ett.model.loading import load_vision_tokenizer
    from ett.tokenizers.layouts import export_tokenizer

    quiet_libraries()
    folder = resolve_model_folder(arguments.source)
    report = export_tokenizer(
        load_vision_tokenizer(folder),
        arguments.destination,
        arguments.layout,
        dtype=arguments.dtype,
        source=folder,
        overwrite=arguments.overwrite,
    )
    print(report)
    return 0

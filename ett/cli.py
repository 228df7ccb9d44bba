"""The command line: parses, calls, prints. Everything it does is also a function."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ett import __version__
from ett.errors import UserError

EXIT_USER_ERROR = 2

# A second OpenMP thread that spins at a barrier starves a loader worker, and the worker it: on two cores a training step
# was measured 40 times slower beside one busy process. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nothing here needs the hub's progress bars or its advice on tokenizers and forks.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Command = Callable[[argparse.Namespace], int]


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
        return command(arguments)
    except UserError as error:
        print(f"ett: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        # the reader of our output went away: nothing left to say, and Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nett: stopped.", file=sys.stderr)
        return 130


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
        sub.set_defaults(command=command)
        return sub

    sub = add(
        "train", _train, "train the stages of a recipe", "ett train quickstart stages.semantic.steps=50 --out runs/mine"
    )
    sub.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    sub.add_argument(
        "overrides", metavar="key=value", nargs="*", help="dotted override, for example model.image_size=96"
    )
    _add_run_options(sub)

    sub = add(
        "demo",
        _demo,
        "frozen against tuned tokenizers: quickstart's four arms, measured and reported",
        "ett demo --out runs/demo",
    )
    sub.add_argument("overrides", metavar="key=value", nargs="*", help="dotted override of the quickstart recipe")
    _add_comparison_options(sub)

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
    _add_comparison_options(sub)
    sub.add_argument(
        "--only", metavar="ARM:SEED", help="run one arm of the comparison that was started in --out, and report nothing"
    )

    sub = add(
        "evaluate",
        _evaluate,
        "measure a model on built-in data or a manifest",
        "ett evaluate runs/demo --json figures.json",
    )
    _add_model(sub)
    sub.add_argument("--tasks", metavar="NAMES", help="comma-separated: loss, answers, naming, reconstruction, drift")
    sub.add_argument(
        "--initial", metavar="MODEL", type=Path, help="model or tokenizer before tuning, to measure the drift from"
    )
    sub.add_argument("--data", metavar="MANIFEST.jsonl", type=Path, help="your own pictures (docs/data.md)")
    _add_source_options(sub)
    sub.add_argument("--limit", type=_positive, help="examples of each source")
    sub.add_argument("--batch-size", type=_positive, default=16)
    sub.add_argument("--max-new-tokens", type=_positive, default=64, help="where answers stop at the latest")
    sub.add_argument("--json", metavar="FILE", type=Path, help="write metrics and predictions")

    sub = add("chat", _chat, "ask a model about a picture", 'ett chat runs/demo cat.png "What is this?"')
    _add_model(sub)
    sub.add_argument("image", metavar="IMAGE", type=Path)
    sub.add_argument("question", nargs="?", help="left out: the model describes the picture")
    sub.add_argument("--max-new-tokens", type=_positive, default=128)

    sub = add(
        "reconstruct",
        _reconstruct,
        "pictures through the tokenizer and back",
        "ett reconstruct runs/demo a.png b.jpg --out reconstructions",
    )
    _add_model(sub)
    sub.add_argument("images", metavar="IMAGE", type=Path, nargs="+")
    sub.add_argument("--out", metavar="DIR", type=Path, required=True)
    sub.add_argument(
        "--size", type=_positive, help="side that pictures are fitted to [pixels]; default: the model's own"
    )
    sub.add_argument("--compare", action="store_true", help="also write original and reconstruction side by side")

    sub = add("tokenize", _tokenize, "a picture's codebook indices", "ett tokenize runs/demo cat.png --json")
    _add_model(sub)
    sub.add_argument("image", metavar="IMAGE", type=Path)
    sub.add_argument(
        "--size", type=_positive, help="side that the picture is fitted to [pixels]; default: the model's own"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of a grid")

    sub = add("report", _report, "write a run's report.html", "ett report runs/demo")
    sub.add_argument("run", metavar="RUN", type=Path, help="a folder written by ett train, ett ablate or ett demo")

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
        help="names, questions, drawn_text, manifests (docs/data.md), comma-separated (default: names,drawn_text)",
    )
    _add_source_options(sub)
    sub.add_argument("--limit", type=_positive, help="examples of each source (default: 400; of a manifest, all)")
    sub.add_argument("--batch-size", type=_positive, default=16)
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
        type=_positive,
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

    sub = add("prepare", _prepare, "fetch a language model into the cache ahead of time", "ett prepare smollm2")
    sub.add_argument("name", choices=["smollm2"])
    return parser


def _add_run_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", metavar="DIR", type=Path, help="output folder (default: runs/<recipe name>)")
    choice = sub.add_mutually_exclusive_group()
    choice.add_argument("--resume", action="store_true", help="continue what is in the output folder")
    choice.add_argument("--overwrite", action="store_true", help="delete what is in the output folder first")


def _add_comparison_options(sub: argparse.ArgumentParser) -> None:
    _add_run_options(sub)
    sub.add_argument(
        "--jobs", type=_positive, help="arms at a time (default: one for each CPU core; one with an accelerator)"
    )


def _add_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", type=Path, help="a folder written by ett train or save_pretrained")


def _add_source_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--image-root", metavar="DIR", type=Path, help="a folder outside the manifest's whose pictures may be read"
    )
    sub.add_argument("--split", help="of the built-in data: validation (default), or heldout for all final ones")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _quiet_libraries() -> None:
    """Keep libraries' progress bars and load reports out of our output: what went wrong is said once, by us."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _train(arguments: argparse.Namespace) -> int:
    from ett.experiments.recipe import load_recipe
    from ett.experiments.run import Interrupted, Run, report_interruption

    _quiet_libraries()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    out = arguments.out or Path("runs") / recipe.name
    if arguments.resume and not out.exists():
        print(f"ett: there is nothing to resume in {out}; starting anew.", file=sys.stderr)
    run = Run(recipe, out, resume=arguments.resume, overwrite=arguments.overwrite)
    try:
        folder = run.train()
    except Interrupted as interruption:
        report_interruption(interruption, [arguments.recipe, *arguments.overrides], out)
        return 128 + interruption.signal_number
    if os.environ.get("RANK", "0") == "0":
        print(folder)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from ett.experiments.ablate import DEMO

    arguments.recipe, arguments.only = DEMO, None
    arguments.out = arguments.out or Path("runs") / "demo"
    return _ablate(arguments, command="demo")


def _ablate(arguments: argparse.Namespace, command: str = "ablate") -> int:
    from ett.experiments.ablate import ablate, run_only
    from ett.experiments.run import Interrupted, report_interruption

    _quiet_libraries()
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
    out = arguments.out or Path("runs") / Path(arguments.recipe).stem
    try:
        report = ablate(
            arguments.recipe,
            out,
            arguments.overrides,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            jobs=arguments.jobs,
        )
    except Interrupted as interruption:
        words = arguments.overrides if command == "demo" else [arguments.recipe, *arguments.overrides]
        report_interruption(interruption, words, out, command=command)
        return 128 + interruption.signal_number
    print(report)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from ett.evaluate.run import evaluate, load_for_evaluation
    from ett.evaluate.sources import builtin_sources, manifest_source
    from ett.experiments.run import evaluation_sources, recipe_of, resolve_model_folder

    _quiet_libraries()
    if arguments.data and arguments.split:
        raise UserError("A manifest has no splits: give --data or --split, not both.")
    split = arguments.split or "validation"
    if arguments.data:
        sources = manifest_source(arguments.data, arguments.image_root)
    elif (recipe := recipe_of(arguments.model)) is not None:
        sources = evaluation_sources(recipe, split)
    else:
        sources = builtin_sources(split)
    tasks = [name.strip() for name in arguments.tasks.split(",")] if arguments.tasks else None
    model, tokenizer, processor = load_for_evaluation(resolve_model_folder(arguments.model))
    initial = None
    if arguments.initial:
        _, initial, _ = load_for_evaluation(resolve_model_folder(arguments.initial))
    result = evaluate(
        model if model is not None else tokenizer,
        processor,
        sources,
        tasks,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
        initial_tokenizer=initial,
    )
    if arguments.json:
        result.save(arguments.json)
    width = max((len(name) for name in result.metrics), default=0)
    for name, metric in result.metrics.items():
        interval = f"  [{metric.interval[0]:.4f}, {metric.interval[1]:.4f}]" if metric.interval else ""
        print(f"{name:<{width}}  {metric.value:.4f}{interval}  n={metric.num_examples}")
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from ett.errors import ModelError
    from ett.evaluate.run import load_for_evaluation
    from ett.experiments.run import resolve_model_folder
    from ett.generate.chat import answer
    from ett.images import load_image

    _quiet_libraries()
    image = load_image(arguments.image)
    model, _, processor = load_for_evaluation(resolve_model_folder(arguments.model))
    if model is None:
        raise ModelError(
            f"{arguments.model} holds a vision tokenizer alone; chatting needs a model with a language model."
        )
    live = sys.stdout.isatty()
    show: Callable[[str], None] | None = (lambda piece: print(piece, end="", flush=True)) if live else None
    text = answer(model, processor, [image], arguments.question, max_new_tokens=arguments.max_new_tokens, on_text=show)
    print("" if live else text)
    return 0


def _reconstruct(arguments: argparse.Namespace) -> int:
    from ett.evaluate.run import load_for_evaluation
    from ett.experiments.run import resolve_model_folder
    from ett.generate.reconstruct import write_reconstructions

    _quiet_libraries()
    _, tokenizer, processor = load_for_evaluation(resolve_model_folder(arguments.model))
    size = arguments.size if arguments.size is not None else processor.image_processor
    written = write_reconstructions(tokenizer, size, arguments.images, arguments.out, compare=arguments.compare)
    for path, found in written:
        print(f"{path}  {found.image.width} x {found.image.height}  PSNR {found.psnr:.2f} dB  SSIM {found.ssim:.4f}")
    return 0


def _tokenize(arguments: argparse.Namespace) -> int:
    from ett.evaluate.run import load_for_evaluation
    from ett.experiments.run import resolve_model_folder
    from ett.generate.reconstruct import tokenize_picture

    _quiet_libraries()
    _, tokenizer, processor = load_for_evaluation(resolve_model_folder(arguments.model))
    size = arguments.size if arguments.size is not None else processor.image_processor
    found = tokenize_picture(tokenizer, size, arguments.image)
    if arguments.json:
        _print_json(found)
    else:
        width = len(str(found["codebook_size"] - 1))
        for row in found["indices"]:
            print(" ".join(f"{index:>{width}}" for index in row))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from ett.evaluate.report import write_report
    from ett.experiments.comparison import is_comparison
    from ett.experiments.comparison_report import write_comparison_report

    _quiet_libraries()
    print(write_comparison_report(arguments.run) if is_comparison(arguments.run) else write_report(arguments.run))
    return 0


def _tokenizer_report(arguments: argparse.Namespace) -> int:
    from ett.evaluate.sources import named_sources
    from ett.evaluate.tokenizer_report import labels, write_tokenizer_report
    from ett.experiments.run import resolve_model_folder
    from ett.model.loading import find_weights

    _quiet_libraries()
    given = [name.strip() for name in arguments.data.split(",")] if arguments.data else []
    folders = [resolve_model_folder(find_weights(name)) for name in arguments.tokenizers]
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

    _quiet_libraries()
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


def _prepare(arguments: argparse.Namespace) -> int:
    from ett.model.smollm2 import prepare_smollm2

    assert arguments.name == "smollm2"
    _quiet_libraries()
    print(prepare_smollm2())
    return 0


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, ensure_ascii=False)
    print()


if __name__ == "__main__":
    sys.exit(main())

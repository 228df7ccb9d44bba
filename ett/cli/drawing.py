"""Commands that draw: pictures from prompts, and what the scorers of public benchmarks read."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ett.cli.common import Add, Command, add_model, add_quiet, positive, quiet_libraries
from ett.errors import ModelError, UserError

if TYPE_CHECKING:
    from ett.evaluate.base import Metric
    from ett.model import EttForConditionalGeneration, EttProcessor
    from ett.model.image_sampling import ImageSampling

KINDS = ("geneval", "dpg", "t2i-compbench")
JUDGES = ("names", "words", "scenes")
DRAWS = "a run or saved model that learned to draw (stage gen or joint); none is shipped"


def register(add: Add) -> None:
    """These commands, in the order that the help shows them in."""
    sub = add(
        "draw", _draw, "draw pictures from prompts", 'ett draw runs/draw_64px "red apple, noto" --out apples --num 4'
    )
    add_model(sub, DRAWS)
    sub.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to draw")
    sub.add_argument("--prompts", dest="file", metavar="FILE", type=Path, help="further prompts, one a line")
    sub.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new folder")
    sub.add_argument("--overwrite", action="store_true", help="replace the drawings that are in the folder")
    sub.add_argument("--num", metavar="N", type=positive, default=1, help="pictures of each prompt (default: 1)")
    sub.add_argument("--size", metavar="HxW", help="pixels, for example 64x96; default: the model's own")
    _add_sampling(sub)

    group = add(
        "t2i",
        _neither,
        "what text-to-image benchmarks score (docs/text_to_image.md)",
        "ett t2i geneval runs/draw_64px --prompts evaluation_metadata.jsonl --out geneval/mine",
    )
    commands = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for kind in KINDS:
        sub = _sub_command(
            commands,
            kind,
            _benchmark,
            f"draw everything that the scorer of {kind} reads; run again, it goes on where it was stopped",
            f"ett t2i {kind} runs/draw_64px --prompts PROMPTS --out {kind}/mine",
        )
        sub.set_defaults(kind=kind)
        add_model(sub, DRAWS)
        _add_prompts(sub)
        sub.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder that the scorer reads")
        _add_sampling(sub)
    sub = _sub_command(
        commands,
        "judge",
        _judge,
        "draw built-in pictures, words and scenes from their names, and have the drawings judged offline",
        "ett t2i judge runs/draw_64px --split pair --json figures.json",
    )
    add_model(sub, DRAWS)
    sub.add_argument(
        "--judges",
        metavar="JUDGE",
        nargs="+",
        choices=JUDGES,
        default=JUDGES,
        help=f"some of {', '.join(JUDGES)} (default: all that are installed)",
    )
    sub.add_argument(
        "--split",
        default="validation",
        help="of the built-in pictures; of words and scenes validation, or with any other the held-out ones "
        "(default: %(default)s)",
    )
    sub.add_argument("--prompt", default="{answer}, {style}", help="made of a picture's facts (default: %(default)s)")
    sub.add_argument(
        "--limit", metavar="N", type=positive, help="pictures of each judge (default: all names, 128 words, 240 scenes)"
    )
    sub.add_argument("--json", metavar="FILE", type=Path, help="write the figures")
    sub.add_argument(
        "--sheet", metavar="FILE.png", type=Path, help="write the first drawings beside their nearest training pictures"
    )
    sub.add_argument("--shown", metavar="N", type=positive, default=20, help="drawings on the sheet (default: 20)")
    _add_sampling(sub, rewrites=False)
    sub = _sub_command(
        commands,
        "scenes",
        _scenes,
        "write prompts of scenes of shapes in GenEval's format, or judge the folder that `ett t2i geneval` drew from them",
        "ett t2i scenes scenes.jsonl --split heldout",
    )
    sub.add_argument("path", metavar="FILE|DIR", type=Path, help="a new file for prompts, or a folder of drawings")
    sub.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    sub.add_argument("--split", default="heldout", help="train, validation or heldout (default: %(default)s)")
    sub.add_argument("--num", metavar="N", type=positive, default=120, help="different prompts (default: %(default)s)")
    sub = _sub_command(
        commands,
        "check",
        _check,
        "name every missing or malformed file of a benchmark's folder; exit code 2 if there is any",
        "ett t2i check geneval geneval/mine --prompts evaluation_metadata.jsonl",
    )
    sub.add_argument("kind", metavar="KIND", choices=KINDS, help=", ".join(KINDS))
    sub.add_argument("out", metavar="DIR", type=Path)
    _add_prompts(sub)


def _sub_command(commands: Any, name: str, command: Command, summary: str, example: str) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_quiet(sub, within=True)
    sub.set_defaults(command=command)
    return sub


def _add_prompts(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        required=True,
        help="the benchmark's own: geneval's JSONL, dpg's folder of text files, one category's text file of t2i-compbench",
    )


def _add_sampling(sub: argparse.ArgumentParser, rewrites: bool = True) -> None:
    sub.add_argument("--seed", type=int, default=0, help="of each prompt's first picture; the next ones count on")
    sub.add_argument("--guidance", type=float, default=3.0, help="of the prompt; 1 is none (default: %(default)s)")
    sub.add_argument("--guidance-schedule", choices=("constant", "linear", "cosine"), default="constant")
    sub.add_argument(
        "--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: %(default)s)"
    )
    sub.add_argument("--top-k", type=positive, help="draw among so many tokens (default: all)")
    sub.add_argument("--top-p", type=float, default=1.0, help="draw among tokens of this mass (default: %(default)s)")
    sub.add_argument("--batch-size", type=positive, default=8, help="pictures at a time (default: %(default)s)")
    if rewrites:
        hook = sub.add_mutually_exclusive_group()
        hook.add_argument(
            "--rewrite", metavar="MODULE:FUNCTION", help="a Python function from the prompt to the one that is drawn"
        )
        hook.add_argument("--rewrite-with", metavar="MODEL", help="a chat model that describes each prompt at length")


def _neither(arguments: argparse.Namespace) -> int:
    raise AssertionError("argparse asks for one of the commands")


def _draw(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ett.generate.draw import check_room, draw, grid_of, requests
    from ett.generate.drawings import manifest_facts, open_folder, read_prompts, write_drawings

    quiet_libraries()
    prompts = [*arguments.prompts, *(read_prompts(arguments.file) if arguments.file else [])]
    if not prompts:
        raise UserError("Say what to draw: prompts in quotation marks, or --prompts FILE.")
    sampling = _sampling(arguments)
    asked = requests(prompts, arguments.num, arguments.seed, _rewriter(arguments))
    checkpoint, model, processor = _load(arguments.model)
    grid = grid_of(model, processor, _size(arguments.size))
    size = (grid[0] * model.vision_tokenizer.downsample, grid[1] * model.vision_tokenizer.downsample)
    check_room(model, processor, {request.words: "" for request in asked}, grid)
    open_folder(arguments.out, arguments.overwrite)
    rewriter = arguments.rewrite or arguments.rewrite_with
    facts = manifest_facts(str(arguments.model), checkpoint, sampling, size, rewriter)
    with tqdm(total=len(asked) * grid[0] * grid[1], desc="draw", unit="token", disable=None, dynamic_ncols=True) as bar:
        pictures = draw(
            model, processor, asked, sampling, size=size, batch_size=arguments.batch_size, on_token=bar.update
        )
        columns = arguments.num if arguments.num > 1 else min(8, len(asked))
        for path, request in write_drawings(pictures, arguments.out, facts, columns):
            bar.write(f"{path}  {request.words!r}  seed {request.seed}", file=sys.stdout)
    return 0


def _benchmark(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ett.evaluate.t2i.layouts import layout
    from ett.evaluate.t2i.write import ranks, write_benchmark
    from ett.generate.drawings import manifest_facts

    quiet_libraries()
    found = layout(arguments.kind, arguments.prompts)
    sampling, rewrite = _sampling(arguments), _rewriter(arguments)
    checkpoint, model, processor = _load(arguments.model)
    images = processor.image_processor
    facts = manifest_facts(
        str(arguments.model),
        checkpoint,
        sampling,
        (images.height, images.width),
        arguments.rewrite or arguments.rewrite_with,
    )
    rank, world_size = ranks()
    with tqdm(desc=arguments.kind, unit="file", disable=None if rank == 0 else True, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        drawn = write_benchmark(
            model,
            processor,
            found,
            arguments.out,
            facts,
            sampling,
            seed=arguments.seed,
            rewrite=rewrite,
            batch_size=arguments.batch_size,
            rank=rank,
            world_size=world_size,
            on_progress=progress,
        )
    print(f"{arguments.out}: {drawn} files drawn" + (f" by rank {rank} of {world_size}" if world_size > 1 else ""))
    return 0


def _judge(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ett.evaluate.drawing_report import DrawingsConfig, judge_all
    from ett.evaluate.drawing_sheet import compare_drawings, write_sheet
    from ett.evaluate.run import save_text
    from ett.losses.perceptual import load_lite0

    quiet_libraries()
    sampling = _sampling(arguments)
    if arguments.sheet and "names" not in arguments.judges:
        raise UserError("--sheet shows drawings of names: leave --judges out, or name that judge too.")
    judges = tuple(arguments.judges)
    try:
        config = DrawingsConfig(judges, arguments.split, arguments.limit, arguments.prompt, arguments.seed, sampling)
    except ValueError as error:
        raise UserError(str(error)) from error
    checkpoint, model, processor = _load(arguments.model)
    with tqdm(desc="draw", unit="token", disable=None, dynamic_ncols=True) as bar:
        found = judge_all(model, processor, config, batch_size=arguments.batch_size, on_token=bar.update)
    for note in found.notes:
        print(note, file=sys.stderr)
    if found.names is not None:
        gallery, names = found.names.gallery, found.names.names
        print(f"{gallery} real pictures of split {arguments.split!r} are searched, with {names} names.")
        if found.names.heldout_gallery:
            print(
                f"All {found.names.heldout_gallery} held-out pictures are searched as well (heldout_top1, heldout_top5)."
            )
        _print_rows(found.names.rows, found.names.chance)
    for each in found.sets:
        print(f"{each.judge}, split {each.split!r}")
        _print_rows(each.rows, each.chance)
    if arguments.json:
        settings = {"checkpoint_sha256": checkpoint, "prompt": arguments.prompt, "sampling": asdict(sampling)}
        content = {**settings, "seed": arguments.seed, **found.to_json()}
        save_text(arguments.json, json.dumps(content, indent=2) + "\n")
    if arguments.sheet and found.names is not None:
        network = load_lite0().to(model.vision_tokenizer.encoder_output.device)
        write_sheet(compare_drawings(found.names, processor, network, arguments.shown), arguments.sheet)
    return 0


def _print_rows(rows: Mapping[str, Mapping[str, Metric]], chance: Mapping[str, float]) -> None:
    """Each metric with a line for each row, calibration among them."""
    width = max(map(len, rows))
    for name in next(iter(rows.values())):
        by_chance = f"  (chance {chance[name]:.4f})" if name in chance else ""
        print(f"{name}{by_chance}")
        for who, row in rows.items():
            metric = row[name]
            interval = f"  [{metric.interval[0]:.4f}, {metric.interval[1]:.4f}]" if metric.interval else ""
            print(f"  {who:<{width}}  {metric.value:.4f}{interval}  n={metric.num_examples}")


def _scenes(arguments: argparse.Namespace) -> int:
    from ett.evaluate.drawing_scenes import judge_scene_folder, write_prompts

    if arguments.path.is_dir():
        _print_rows({"drawn": judge_scene_folder(arguments.path)}, {})
    else:
        written = write_prompts(arguments.path, arguments.split, arguments.num, overwrite=arguments.overwrite)
        print(f"{arguments.path}: {written} prompts of split {arguments.split!r}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from ett.evaluate.t2i.check import check_benchmark
    from ett.evaluate.t2i.layouts import layout

    problems = check_benchmark(layout(arguments.kind, arguments.prompts), arguments.out)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{arguments.out} cannot be scored yet: {len(problems)} problems, named above.")
    print(f"{arguments.out} holds everything that the scorer of {arguments.kind} reads.")
    return 0


def _sampling(arguments: argparse.Namespace) -> ImageSampling:
    from ett.model.image_sampling import ImageSampling

    names = ("temperature", "top_k", "top_p", "guidance", "guidance_schedule")
    try:
        return ImageSampling(**{name: getattr(arguments, name) for name in names})
    except ValueError as error:
        raise UserError(str(error)) from error


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdecimal() for side in sides):
        raise UserError(f"--size {text} is not a size in pixels. Write height x width, for example 64x96.")
    return int(sides[0]), int(sides[-1])


def _rewriter(arguments: argparse.Namespace) -> Callable[[str], str] | None:
    if arguments.rewrite_with is not None:
        from ett.generate.rewrite import ChatRewriter

        return ChatRewriter(arguments.rewrite_with)
    name = arguments.rewrite
    if name is None:
        return None
    module, separator, function = name.partition(":")
    try:
        with _working_folder_importable():
            found = getattr(importlib.import_module(module), function) if separator else None
    except (ImportError, AttributeError) as error:
        raise UserError(f"--rewrite {name} cannot be had: {error}.") from error
    if not callable(found):
        raise UserError(f"--rewrite {name} is no function. Write MODULE:FUNCTION, for example my_prompts:longer.")
    rewrite: Callable[[str], str] = found
    return rewrite


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    """A console script looks for modules where it is installed, and not, as ``python -m`` does, where it is called."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _load(path: Path) -> tuple[str, EttForConditionalGeneration, EttProcessor]:
    """(hash of the weights, the model on the best device, its processor)."""
    from ett.devices import place
    from ett.evaluate.run import load_for_evaluation
    from ett.experiments.run import resolve_model_folder
    from ett.generate.draw import checkpoint_hash

    folder = resolve_model_folder(path)
    model, _, processor = load_for_evaluation(folder)
    if model is None or model.image_head is None:
        what = "holds a vision tokenizer alone" if model is None else "has no image head"
        raise ModelError(f"{path} {what}; drawing needs a model that was trained with a `gen` or `joint` stage.")
    place(model)
    return checkpoint_hash(folder), model, processor

"""Draws what a benchmark asks for: several ranks beside each other, and what is there already is not drawn again."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ett.errors import DataError, ModelError
from ett.evaluate.t2i.check import picture_problem
from ett.evaluate.t2i.layouts import Layout, Unit
from ett.generate.draw import Request, Rewriter, check_room, draw, grid_of, requests, rewritten_by, sheet
from ett.generate.drawings import entry, write_manifest
from ett.model.ett import EttForConditionalGeneration
from ett.model.image_sampling import ImageSampling
from ett.model.processing import EttProcessor

WAIT_SECONDS, POLL_SECONDS = 3600.0, 0.5
"""How long a rank waits for the first one to have rewritten the prompts, and how often it looks."""


def manifest_path(out: Path) -> Path:
    """Where the manifest of the benchmark folder `out` lies: beside it, for scorers read everything inside."""
    return out.with_name(f"{out.name}.manifest.json")


def planned(layout: Layout, seed: int, rewritten: Mapping[str, str] | None) -> list[tuple[Unit, list[Request]]]:
    """Each file with the pictures that it shows; sample j of a prompt has the seed `seed` + j.

    Args:
        rewritten: prompt -> what is drawn in its place; None where nothing is rewritten.

    Raises:
        DataError: a prompt that cannot be drawn.
    """
    hook: Rewriter | None = None if rewritten is None else rewritten.__getitem__
    found = []
    for unit in layout.units:
        drawn = requests([unit.prompt], max(unit.samples) + 1, seed, hook)
        found.append((unit, [drawn[sample] for sample in unit.samples]))
    return found


def write_benchmark(
    model: EttForConditionalGeneration,
    processor: EttProcessor,
    layout: Layout,
    out: Path,
    facts: Mapping[str, Any],
    sampling: ImageSampling,
    *,
    seed: int = 0,
    rewrite: Rewriter | None = None,
    batch_size: int = 8,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Draw this rank's share of what `out` lacks; returns the number of files drawn.

    A file appears whole under its name or not at all, and is drawn by one rank alone, whoever was interrupted before. Prompts
    are rewritten once, by the first rank; the others, and all that go on later, draw what the manifest says became of them.

    Args:
        facts: `manifest_facts`; a folder that was begun with others is refused.
        batch_size: pictures at a time. on_progress: called with (files of this rank that are there, all of its files).

    Raises:
        DataError: the folder was begun with other settings, holds a damaged picture, or cannot be written; a prompt that cannot
            be drawn. ModelError: a prompt without room, or pictures of another shape than the benchmark has.
    """
    facts = {**facts, "benchmark": layout.kind}
    grid, images = grid_of(model, processor, None), processor.image_processor
    if layout.kind == "dpg" and images.height != images.width:
        raise ModelError(
            f"The model draws {images.height} x {images.width} pixels, and the scorer of {layout.kind} cuts its grids into "
            "squares. Take a model of square pictures."
        )
    work = out.with_name(f".{out.name}.partial-{rank}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        manifest = manifest_path(out)
        if rewrite is not None and rank > 0:
            _await(manifest)
        before = _read(manifest) if manifest.exists() else None
        if before is not None:
            _check_same(manifest, before, facts, planned(layout, seed, None), rewrite is not None)
        plan = planned(layout, seed, _rewritten(layout, rewrite, before))
        check_room(model, processor, {asked[0].words: str(unit.file) for unit, asked in reversed(plan)}, grid)
        if before is None:
            write_manifest(manifest, {**facts, "images": [entry(str(unit.file), asked) for unit, asked in plan]})
        own = plan[rank::world_size]
        for file, text in layout.texts:
            if not (out / file).exists():
                (_ready(work) / "text").write_text(text + "\n", encoding="utf-8")
                _publish(work / "text", out / file)
        missing = [(unit, asked) for unit, asked in own if not _is_there(out / unit.file)]
        done = len(own) - len(missing)
        asked_for = [request for _, asked in missing for request in asked]
        pictures = draw(model, processor, asked_for, sampling, batch_size=batch_size)
        for unit, asked in missing:
            shown = [next(pictures).image for _ in asked]
            whole = shown[0] if len(shown) == 1 else sheet(shown, 2, gap=0)
            whole.save(_ready(work) / "picture.png")
            _publish(work / "picture.png", out / unit.file)
            done += 1
            if on_progress is not None:
                on_progress(done, len(own))
        shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}. Choose another --out folder.") from error
    return len(missing)


def ranks() -> tuple[int, int]:
    """(this process, all processes) of a job under torchrun or a scheduler that sets the same variables."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _is_there(path: Path) -> bool:
    if not path.exists():
        return False
    problem = picture_problem(path)
    if problem is not None:
        raise DataError(f"{path} {problem}. Delete it, and it is drawn anew.")
    return True


def _await(manifest: Path) -> None:
    """Return when the first rank has written the manifest."""
    end = time.monotonic() + WAIT_SECONDS
    while not manifest.exists():
        if time.monotonic() > end:
            raise DataError(
                f"There is no {manifest} after {WAIT_SECONDS:.0f} seconds: the first rank, which rewrites the prompts, has not "
                "come so far. Look at what it says, and start all ranks again."
            )
        time.sleep(POLL_SECONDS)


def _read(manifest: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        images = [(each["file"], each["prompt"], each["rewritten_prompt"], each["seeds"]) for each in content["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{manifest} is no manifest of a benchmark: {error}. Delete it with the folder that it belongs to."
        ) from error
    return {**content, "images": images}


def _check_same(
    manifest: Path,
    before: Mapping[str, Any],
    facts: Mapping[str, Any],
    plan: Sequence[tuple[Unit, Sequence[Request]]],
    rewrites: bool,
) -> None:
    """Raise DataError where the folder was begun with something else; how prompts were rewritten is for the manifest to say."""
    now = [(str(unit.file), unit.prompt, rewrites, [request.seed for request in asked]) for unit, asked in plan]
    changed = [name for name in facts if name not in before or before[name] != facts[name]]
    if [(file, prompt, text is not None, seeds) for file, prompt, text, seeds in before["images"]] != now:
        changed.append("images")
    if changed:
        raise DataError(
            f"{manifest.name} says that the folder beside it was begun with another {', another '.join(changed)}. Finish it as "
            "it was begun, or choose another --out folder."
        )


def _rewritten(layout: Layout, rewrite: Rewriter | None, before: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Prompt -> what is drawn in its place: what the manifest says, else what the rewriter makes of each, asked once."""
    if rewrite is None:
        return None
    if before is not None:
        return {prompt: text for _, prompt, text, _ in before["images"]}
    return {prompt: rewritten_by(rewrite, prompt) for prompt in dict.fromkeys(unit.prompt for unit in layout.units)}


def _ready(work: Path) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    return work


def _publish(part: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)

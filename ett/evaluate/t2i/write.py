"""Draws what a benchmark asks for: several ranks beside each other, and what is there already is not drawn again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ett.errors import DataError
from ett.evaluate.t2i.check import picture_problem
from ett.evaluate.t2i.layouts import Layout, Unit
from ett.generate.draw import Request, Rewriter, draw, requests, sheet
from ett.generate.drawings import entry, write_manifest
from ett.model.ett import EttForConditionalGeneration
from ett.model.image_sampling import ImageSampling
from ett.model.processing import EttProcessor


def manifest_path(out: Path) -> Path:
    """Where the manifest of the benchmark folder `out` lies: beside it, for scorers read everything inside."""
    return out.with_name(f"{out.name}.manifest.json")


def planned(layout: Layout, seed: int, rewrite: Rewriter | None) -> list[tuple[Unit, list[Request]]]:
    """Each file with the pictures that it shows; sample j of a prompt has the seed `seed` + j.

    Raises:
        DataError: a prompt that cannot be drawn.
    """
    rewritten: dict[str, str | None] = {}
    found = []
    for unit in layout.units:
        if unit.prompt not in rewritten:
            rewritten[unit.prompt] = None if rewrite is None else rewrite(unit.prompt)
        text = rewritten[unit.prompt]
        hook: Rewriter | None = None if text is None else (lambda _, text=text: text)
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

    A file appears whole under its name or not at all, and is drawn by one rank alone, whoever was interrupted before.

    Args:
        facts: `manifest_facts`; a folder that was begun with others is refused.
        batch_size: pictures at a time. on_progress: called with (files of this rank that are there, all of its files).

    Raises:
        DataError: the folder was begun with other settings, holds a damaged picture, or cannot be written.
    """
    plan = planned(layout, seed, rewrite)
    images = [entry(str(unit.file), asked) for unit, asked in plan]
    content = {**facts, "benchmark": layout.kind, "images": images}
    work = out.with_name(f".{out.name}.partial-{rank}")
    own = plan[rank::world_size]
    try:
        out.mkdir(parents=True, exist_ok=True)
        _same_or_new(manifest_path(out), content)
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


def _same_or_new(path: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest, or raise DataError where another is there. Ranks all write the same."""
    if not path.exists():
        write_manifest(path, content)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}. Delete it with the folder that it belongs to.") from error
    changed = [name for name in content if not isinstance(before, dict) or before.get(name) != content[name]]
    if changed:
        raise DataError(
            f"{path.name} says that the folder beside it was begun with another {', another '.join(changed)}. Finish it as it "
            "was begun, or choose another --out folder."
        )


def _ready(work: Path) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    return work


def _publish(part: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)

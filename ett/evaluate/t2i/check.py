"""Looks through a benchmark's folder as its scorer would, and names everything that the scorer would trip over."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from ett.errors import DataError
from ett.evaluate.t2i.layouts import Layout
from ett.files import lines_of


def check_benchmark(layout: Layout, out: Path) -> list[str]:
    """Every problem of the folder `out`, one line each that begins with the file; none for a folder that can be scored.

    Raises:
        DataError: there is no such folder.
    """
    if not out.is_dir():
        raise DataError(
            f"There is no folder {out}. Draw it first: ett t2i {layout.kind} MODEL --prompts FILE --out {out}"
        )
    common = _common_size([out / unit.file for unit in layout.units]) if layout.kind == "dpg" else None
    wanted = {str(unit.file) for unit in layout.units} | {str(file) for file, _ in layout.texts}
    problems = []
    for unit in layout.units:
        problem = picture_problem(out / unit.file, grid=len(unit.samples) > 1, common=common)
        if problem is not None:
            problems.append(f"{unit.file} {problem}")
    for file, text in layout.texts:
        problem = _text_problem(out / file, text)
        if problem is not None:
            problems.append(f"{file} {problem}")
    return sorted(problems) + [f"{file} does not belong here" for file in _strangers(layout, out, wanted)]


def picture_problem(path: Path, grid: bool = False, common: tuple[int, int] | None = None) -> str | None:
    """What is wrong with a picture file, or None.

    Args:
        grid: it must hold 2 x 2 square pictures of equal size. common: (width, height) that it must have.
    """
    if not path.is_file():
        return "is missing"
    try:
        with PIL.Image.open(path, formats=("PNG",)) as image:
            image.load()
            size, mode = image.size, image.mode
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        return f"is not a whole PNG ({error})"
    if mode != "RGB":
        return f"has mode {mode} instead of RGB"
    if grid and (size[0] % 2 or size[1] % 2):
        return f"is {size[0]} x {size[1]} pixels, which does not divide into a 2 x 2 grid"
    if grid and size[0] != size[1]:
        return f"is {size[0]} x {size[1]} pixels, which is no grid of squares"
    if common is not None and size != common:
        return f"is {size[0]} x {size[1]} pixels, but most files here are {common[0]} x {common[1]}"
    return None


def _common_size(paths: Sequence[Path]) -> tuple[int, int] | None:
    """The most frequent (width, height) among those files that are pictures: a scorer that crops knows one."""
    sizes = Counter[tuple[int, int]]()
    for path in paths:
        try:
            with PIL.Image.open(path, formats=("PNG",)) as image:
                sizes[image.size] += 1
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
            continue  # named by `picture_problem`
    return sizes.most_common(1)[0][0] if sizes else None


def _text_problem(path: Path, wanted: str) -> str | None:
    if not path.is_file():
        return "is missing"
    try:
        lines = lines_of(path)
        same = len(lines) == 1 and json.loads(lines[0]) == json.loads(wanted)
    except ValueError as error:
        return f"is not JSON ({error})"
    return None if same else "is not its line of the prompt file"


def _strangers(layout: Layout, out: Path, wanted: set[str]) -> list[str]:
    """Files that the scorer would take for pictures, or fall over."""
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    if layout.kind == "geneval":
        # it walks through all folders of digits, and takes every picture among the samples
        found = [file for file in found if file.split("/")[0].isdigit() or "/" not in file]
    elif layout.kind == "t2i-compbench":
        found = [file for file in found if file.startswith("samples/")]
    return [file for file in found if file not in wanted]

"""What the scorers of public text-to-image benchmarks read: which files, with which names and contents.

geneval         OUT/00000/metadata.jsonl     line N of the prompt file, one JSON object
                OUT/00000/samples/0000.png   four samples a prompt; digits only
dpg             OUT/<stem>.png               one 2 x 2 grid for each prompt file <stem>.txt, and nothing else
t2i-compbench   OUT/samples/<prompt>_000000.png   ten consecutive ids a prompt, in the order of the category's file
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from ett.errors import DataError, unknown
from ett.files import lines_of

Kind = Literal["geneval", "dpg", "t2i-compbench"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SAMPLES = {"geneval": 4, "dpg": 4, "t2i-compbench": 10}
"""Pictures of each prompt."""
LONGEST_NAME = 255
"""Bytes that a file's name may have on usual file systems."""


@dataclass(frozen=True)
class Unit:
    """A picture file: what a scorer opens, and what is drawn at once or not at all.

    Attributes:
        file: relative to the folder that the scorer reads.
        prompt: as it stands in the prompt file.
        samples: which of the prompt's pictures (0-based) it shows: one, or four as a 2 x 2 grid in reading order.
    """

    file: PurePosixPath
    prompt: str
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Everything that belongs into a benchmark's folder.

    Attributes:
        units: in the order of the prompts. texts: further files and their content, relative to the folder.
    """

    kind: Kind
    units: Sequence[Unit]
    texts: Sequence[tuple[PurePosixPath, str]]


def layout(kind: str, prompts: Path) -> Layout:
    """What belongs into the folder of benchmark `kind` for its published prompts.

    Args:
        prompts: geneval: ``evaluation_metadata.jsonl``; dpg: the folder of ``*.txt``, one prompt each; t2i-compbench: one
            category's text file, a prompt a line.

    Raises:
        DataError: an unknown kind, or prompts that cannot be read or whose files the scorer would take for others'.
    """
    if kind == "geneval":
        return _geneval(prompts)
    if kind == "dpg":
        return _dpg(prompts)
    if kind == "t2i-compbench":
        return _compbench(prompts)
    raise DataError(unknown("text-to-image benchmark", kind, KINDS))


def _geneval(prompts: Path) -> Layout:
    units, texts = [], []
    lines = _lines(prompts)
    for number, line in enumerate(lines):
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{prompts}, line {number + 1} is not JSON: {error}.") from error
        prompt = values.get("prompt") if isinstance(values, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{prompts}, line {number + 1} is not an object with a text under 'prompt'.")
        folder = PurePosixPath(f"{number:05d}")
        texts.append((folder / "metadata.jsonl", line))
        units += [
            Unit(folder / "samples" / f"{sample:04d}.png", prompt, (sample,)) for sample in range(SAMPLES["geneval"])
        ]
    return Layout("geneval", units, texts)


def _dpg(prompts: Path) -> Layout:
    if not prompts.is_dir():
        raise DataError(f"{prompts} is not a folder. Give DPG-Bench's folder of prompts, one text file each.")
    files = sorted(path for path in prompts.iterdir() if path.suffix == ".txt")
    if not files:
        raise DataError(f"{prompts} holds no *.txt. Give DPG-Bench's folder of prompts, one text file each.")
    units = []
    for path in files:
        if "." in path.stem:
            raise DataError(
                f"{path} has a dot in its name, and this benchmark's scorer takes what stands before the first one for the "
                "prompt's. Rename the file."
            )
        text = " ".join(_lines(path))
        units.append(Unit(PurePosixPath(f"{path.stem}.png"), text, tuple(range(SAMPLES["dpg"]))))
    return Layout("dpg", units, ())


def _compbench(prompts: Path) -> Layout:
    units: list[Unit] = []
    for number, prompt in enumerate(_lines(prompts)):
        if "/" in prompt or "\0" in prompt:
            raise DataError(
                f"{prompts}, line {number + 1} contains a slash, and this benchmark names its files by their prompts. Take "
                "the line out."
            )
        if "_" in prompt:
            raise DataError(
                f"{prompts}, line {number + 1} contains an underscore, and this benchmark's scorer takes what stands before "
                "the first one in a file's name for the prompt. Take the line out."
            )
        for sample in range(SAMPLES["t2i-compbench"]):
            name = f"{prompt}_{len(units):06d}.png"
            if len(name.encode()) > LONGEST_NAME:
                raise DataError(f"{prompts}, line {number + 1} is too long for a file's name ({LONGEST_NAME} bytes).")
            units.append(Unit(PurePosixPath("samples") / name, prompt, (sample,)))
    return Layout("t2i-compbench", units, ())


def _lines(path: Path) -> list[str]:
    """Lines that hold something, without white space around them."""
    try:
        lines = lines_of(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Give the benchmark's own prompts.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    if not lines:
        raise DataError(f"{path} holds no prompt.")
    return lines

"""A folder of tasks for lmms-eval's ``--include_path``, made of the built-in splits or of anyone's sources.

OUT/<task>/<task>.yaml     the task; OUT/<task>/utils.py its functions
OUT/<task>/data.jsonl      one example a line: a manifest of ours and lmms-eval's data at once, so that both read the same
OUT/<task>/images/*.png    its pictures, lossless
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ett.data.artwork import ArtworkNames
from ett.data.manifest import question_and_reference
from ett.data.sources import Source
from ett.errors import DataError
from ett.evaluate.base import Selection
from ett.evaluate.metrics import normalized
from ett.types import Example

PREFIX = "ett"
"""Of every task's name, so that none hides one of lmms-eval's own."""
NUM_CHOICES = 4
MAX_NEW_TOKENS = 64
"""As `ett evaluate` stops answers."""
UTILS_NAME, DATA_NAME = "utils.py", "data.jsonl"


@dataclass(frozen=True)
class WrittenTask:
    """A task as `write_tasks` wrote it.

    Attributes:
        name: as ``--tasks`` takes it. source: what it was made of.
        kind: "answers" (generation, exact match and character error rate) or "choices" (likelihood, accuracy).
        data: its JSONL file. num_examples: lines in it.
    """

    name: str
    source: str
    kind: str
    data: Path
    num_examples: int


def write_tasks(
    sources: Sequence[tuple[str, Source]], out: Path, *, limit: int | None = None, seed: int = 0
) -> list[WrittenTask]:
    """Write a task of generated answers for every source, and one of choices for named artwork.

    Args:
        sources: (name, source), with answers. out: a new or empty folder; it is not to be moved, for the tasks name it.
        limit: examples of each source, taken as an evaluation takes them. seed: of the choices.

    Raises:
        DataError: `out` is occupied or cannot be written, or a source has no answers.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not an empty folder. Choose another one for the tasks.")
    found = []
    try:
        for name, source in sources:
            selection = Selection(name, source, limit)
            found.append(_write(out, name, "answers", _answers(selection)))
            if source.name == ArtworkNames.name and (choices := _choices(selection, seed)):
                found.append(_write(out, name, "choices", choices))
    except DataError:
        shutil.rmtree(out, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)
        raise DataError(f"{out} cannot be written: {error.strerror or error}. Choose another folder.") from error
    return found


def _answers(selection: Selection) -> list[tuple[Example, dict[str, Any]]]:
    return [(example, {}) for example in selection if question_and_reference(example)[1] is not None]


def _choices(selection: Selection, seed: int) -> list[tuple[Example, dict[str, Any]]]:
    """Each example with `NUM_CHOICES` names to choose from: its own, and others of the selection, in an order drawn from the
    seed."""
    answered = _answers(selection)
    names = list({normalized(text): text for e, _ in answered if (text := question_and_reference(e)[1])}.values())
    if len(names) < NUM_CHOICES:
        return []
    found = []
    for position, (example, _) in enumerate(answered):
        right = question_and_reference(example)[1]
        assert right is not None
        rng = np.random.default_rng([seed, position])
        others = [name for name in names if normalized(name) != normalized(right)]
        drawn = rng.choice(len(others), NUM_CHOICES - 1, replace=False)
        choices = [right, *(others[i] for i in drawn)]
        found.append((example, {"choices": [choices[i] for i in rng.permutation(NUM_CHOICES)]}))
    return found


def _write(out: Path, source: str, kind: str, examples: Sequence[tuple[Example, dict[str, Any]]]) -> WrittenTask:
    if not examples:
        raise DataError(f"The source {source!r} has no answers to compare with. Leave it out.")
    name = f"{PREFIX}_{re.sub(r'[^a-z0-9]+', '_', source.lower())}_{kind}"
    folder = out / name
    (folder / "images").mkdir(parents=True)
    lines = [_line(folder, position, example, more) for position, (example, more) in enumerate(examples)]
    data = folder / DATA_NAME
    data.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    shutil.copyfile(str(files(__package__).joinpath("task_utils.py")), folder / UTILS_NAME)
    (folder / f"{name}.yaml").write_text(_yaml(name, kind, data), encoding="utf-8")
    return WrittenTask(name, source, kind, data, len(lines))


def _line(folder: Path, position: int, example: Example, more: dict[str, Any]) -> dict[str, Any]:
    pictures = []
    for i, image in enumerate(example.images):
        pictures.append(f"images/{position:05d}-{i}.png")
        image.convert("RGB").save(folder / pictures[-1])
    question, reference = question_and_reference(example)
    turns = [
        {"from": "human", "value": "<image>\n" * len(pictures) + (question or "")},
        {"from": "gpt", "value": reference},
    ]
    line = {
        "id": example.id,
        "image": pictures,
        "conversations": turns,
        "question": question or "",
        "answer": reference,
    }
    return line | more


def _yaml(name: str, kind: str, data: Path) -> str:
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "question",
    }
    functions = "doc_to_visual: !function utils.pictures\n"
    if kind == "choices":
        rest: dict[str, Any] = {
            "output_type": "multiple_choice",
            "target_delimiter": "",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        functions += "doc_to_target: !function utils.right\nprocess_results: !function utils.likeliest\n"
    else:
        rest = {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "temperature": 0, "until": []},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
        functions += "process_results: !function utils.compared\n"
    return yaml.safe_dump({**common, **rest}, sort_keys=False, allow_unicode=True) + functions

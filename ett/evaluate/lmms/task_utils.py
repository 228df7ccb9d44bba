"""Functions of a task that `ett lmms-tasks` wrote; lmms-eval reads this file beside the task's YAML."""

import ast
from pathlib import Path
from typing import Any

import PIL.Image

from ett.evaluate.metrics import exact_match


def pictures(doc: dict[str, Any]) -> list[PIL.Image.Image]:
    """The pictures of a line of ``data.jsonl``, mode RGB, in reading order."""
    return [PIL.Image.open(Path(__file__).parent / path).convert("RGB") for path in doc["image"]]


def right(doc: dict[str, Any]) -> int:
    """Which of the line's choices is the answer."""
    return int(doc["choices"].index(doc["answer"]))


def likeliest(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """Whether the right choice alone has the least loss.

    Each result is (mean of -log p, whether greedy decoding says it), or the text of that: lmms-eval 0.7.3 makes text of it on
    the way here, which is why its own accuracy cannot be asked for.
    """
    losses = [(ast.literal_eval(each) if isinstance(each, str) else each)[0] for each in results]
    least = min(losses)
    return {"acc": float(losses[right(doc)] == least and losses.count(least) == 1)}


def compared(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is the line's, but for case, white space and a final period."""
    return {"exact_match": float(exact_match(results[0], doc["answer"]))}

"""Switches of speed and memory: a stage with them takes the steps of one without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ett.config import from_mapping
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run
from ett.train.log import read_log


def mixed_lengths(folder: Path) -> Path:
    """A manifest next to the pictures: conversations about them, and others without, of many lengths."""
    lines = []
    for i in range(12):
        question = "Which?" if i % 2 else f"Say {i} words, " + "and more words, " * (2 * i)
        head = {"image": f"{i}.png"} if i % 2 else {}
        turns = [
            {"from": "human", "value": ("<image>\n" if head else "") + question},
            {"from": "gpt", "value": f"number {i}"},
        ]
        lines.append(json.dumps({"id": f"p{i}", **head, "conversations": turns}))
    path = folder / "mixed.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def losses(given: dict[str, Any], pictures: Path, out: Path, **switches: Any) -> list[dict[str, float]]:
    """Terms of every step of a semantic stage."""
    recipe = json.loads(json.dumps(given))
    recipe["model"]["language_model"]["config"]["attention_dropout"] = 0.0
    recipe["data"] = [{"source": "manifest", "path": str(mixed_lengths(pictures))}]
    stage = {"stage": "semantic", "steps": 2, "batch_size": 8, "log_every": 1, "health": {"pictures": 0}, **switches}
    recipe["stages"] = [stage]
    Run(from_mapping(Recipe, recipe), out).train()
    return [event["losses"] for event in read_log(out / "log.jsonl") if event["event"] == "step"]


@pytest.mark.parametrize(
    "switches",
    [
        {"packing": True},
        {"packing": True, "gradient_checkpointing": True},
        # the compiler's warnings are torch's to mend
        pytest.param({"compile": True}, marks=[pytest.mark.slow, pytest.mark.filterwarnings("default")]),
    ],
    ids=["packing", "checkpointing", "compile"],
)
def test_steps_are_the_same(
    switches: dict[str, Any], toy_recipe: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    plain = losses(toy_recipe, pictures, tmp_path / "plain")
    switched = losses(toy_recipe, pictures, tmp_path / "switched", **switches)
    assert len(plain) == len(switched) == 2
    assert switched[0] == pytest.approx(plain[0], abs=1e-5)
    # after a step of Adam, whose direction follows the sign of gradients that are nearly 0
    assert switched[1] == pytest.approx(plain[1], abs=1e-3)

"""Settings searched for every arm of a comparison on validation data, before the arms themselves are run.

    OUT/search/<arm>/<n>/trial.json   the values of trial n and the caption loss that they ended with
    OUT/search.json                   every arm's trials and the values chosen: what the arms are then run with

Each trial is a run with the comparison's first seed. What a trial trained is dropped when its figure is known.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ett.errors import RecipeError, UserError
from ett.evaluate.run_folder import write_whole
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run
from ett.train.log import LOG_NAME, read_log

SEARCH_NAME, TRIAL_NAME = "search.json", "trial.json"
SEARCH_FOLDER = "search"
"""Folder of the trials, and the first word of their keys; no arm can be called so."""
MEASURE = "caption_loss"
"""Of the last validation: what is made small."""

Choices = Mapping[str, Mapping[str, Any]]
"""Arm -> dotted key -> value."""


@dataclass(frozen=True)
class Search:
    """What is searched.

    Attributes:
        grid: dotted key -> values; every combination is tried.
        changes: dotted key -> value, of the trials alone (fewer steps, say).
    """

    grid: Mapping[str, Sequence[Any]]
    changes: Mapping[str, Any]

    @staticmethod
    def of(given: Any) -> Search | None:
        """From a recipe's ``search``.

        Raises:
            RecipeError: it is not of the form that it must have.
        """
        if given is None:
            return None
        shape = isinstance(given, Mapping) and set(given) <= {"grid", "changes"}
        grid, changes = (given.get("grid"), given.get("changes") or {}) if shape else (None, {})
        good = isinstance(grid, Mapping) and grid and all(isinstance(each, list) and each for each in grid.values())
        if not good or not isinstance(changes, Mapping):
            raise RecipeError(
                "search needs `grid`, dotted keys to lists of values, and may have `changes`, dotted keys to values. Got "
                f"{given!r}."
            )
        assert isinstance(grid, Mapping)
        return Search(dict(grid), dict(changes))

    @staticmethod
    def from_words(grid: Sequence[str], changes: Sequence[str]) -> dict[str, Any]:
        """A recipe's ``search`` from ``key=v1,v2`` and ``key=value``.

        Raises:
            RecipeError: a word of another form.
        """
        return {
            "grid": {key: yaml.safe_load(f"[{text}]") for key, text in map(_pair, grid)},
            "changes": {key: yaml.safe_load(text) for key, text in map(_pair, changes)},
        }

    def combinations(self, recipe: Recipe) -> list[dict[str, Any]]:
        """What is tried for an arm: every combination of the values of the keys that mean something to it.

        A part's own learning rate means nothing to an arm that does not train the part.
        """
        keys = [key for key in self.grid if _matters(key, recipe)]
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(self.grid[key] for key in keys))]


@dataclass(frozen=True)
class Trial:
    """One combination for one arm.

    Attributes:
        arm: its name. number: of the combination.
        values: dotted key -> value. recipe: what is run.
    """

    arm: str
    number: int
    values: Mapping[str, Any]
    recipe: Recipe

    @property
    def key(self) -> str:
        """How the command line calls it: "search:ett:0"."""
        return f"{SEARCH_FOLDER}:{self.arm}:{self.number}"

    @property
    def folder(self) -> Path:
        """Of its run, relative to the comparison's."""
        return Path(SEARCH_FOLDER) / self.arm / str(self.number)


def run_trial(trial: Trial, out: Path) -> Path:
    """Train one trial in its folder under `out`, or what is left of it; returns the path of its ``trial.json``.

    Raises:
        Interrupted: stopped by a signal, after saving. UserError: it cannot be run, or its recipe validates on nothing.
    """
    folder = out / trial.folder
    target = folder / TRIAL_NAME
    if target.is_file():
        return target
    Run(trial.recipe, folder, resume=folder.is_dir() and any(folder.iterdir())).train()
    validations = [event for event in read_log(folder / LOG_NAME) if event["event"] == "validation"]
    losses = validations[-1]["losses"] if validations else {}
    if MEASURE not in losses:
        raise UserError(
            f"{trial.key} has no {MEASURE} on validation data, so there is nothing to choose by. Give the recipe sources with "
            "such a split."
        )
    found = {"values": dict(trial.values), MEASURE: losses[MEASURE]}
    write_whole(target, json.dumps(found, indent=1) + "\n")
    for name in ("stages", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return target


def choose(trials: Sequence[Trial], out: Path) -> dict[str, Any]:
    """Write ``search.json`` from finished trials, and return its content: for each arm its trials and the best one's values."""
    found: dict[str, Any] = {}
    for trial in trials:
        ended = json.loads((out / trial.folder / TRIAL_NAME).read_text(encoding="utf-8"))
        found.setdefault(trial.arm, {"trials": []})["trials"].append(ended)
    for each in found.values():
        # NaN compares as nothing: such a trial is the worst
        each["chosen"] = min(each["trials"], key=lambda t: t[MEASURE] if t[MEASURE] == t[MEASURE] else float("inf"))[
            "values"
        ]
    write_whole(out / SEARCH_NAME, json.dumps(found, indent=1) + "\n")
    return found


def read_choices(out: Path) -> Choices:
    """Every arm's chosen values of the comparison in `out`; {} where nothing was searched, or not to the end."""
    path = out / SEARCH_NAME
    if not path.is_file():
        return {}
    return {arm: each["chosen"] for arm, each in json.loads(path.read_text(encoding="utf-8")).items()}


def _pair(word: str) -> tuple[str, str]:
    key, separator, text = word.partition("=")
    if not separator or not key or not text:
        raise RecipeError(
            f"{word!r} is not of the form key=values, for example stages.semantic.optimizer.learning_rate=1e-4,3e-4."
        )
    return key, text


def _matters(key: str, recipe: Recipe) -> bool:
    steps = key.split(".")
    if "learning_rates" not in steps[:-1]:
        return True
    return any(steps[-1] in stage.parts for stage in recipe.stages)

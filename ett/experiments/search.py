"""Settings searched for every arm of a comparison on validation data, before the arms themselves are run.

    OUT/search/<arm>/<n>/trial.json   the values of trial n and the loss that they ended with (`MEASURES`)
    OUT/search.json                   every arm's trials and the values chosen: what the arms are then run with

Each trial is a run with the comparison's first seed. What a trial trained is dropped when its figure is known.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ett.config import to_mapping
from ett.errors import RecipeError, UserError
from ett.evaluate.run_folder import write_whole
from ett.experiments.recipe import Recipe, position
from ett.experiments.run import Run
from ett.train.log import LOG_NAME, read_log

SEARCH_NAME, TRIAL_NAME = "search.json", "trial.json"
SEARCH_FOLDER = "search"
"""Folder of the trials, and the first word of their keys; no arm can be called so."""
MEASURES = ("caption_loss", "image_loss", "reconstruction_loss")
"""Of the last validation: what is made small is the first of these that an arm has, whether it reads, draws or does neither."""

Choices = Mapping[str, Mapping[str, Any]]
"""Arm -> dotted key -> value."""
Place = tuple[str, ...]
"""The steps of a dotted key."""


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

    def combinations(self, recipe: Recipe, base: Mapping[str, Any], own: Iterable[str]) -> list[dict[str, Any]]:
        """What is tried for an arm: every combination of the values of the keys that mean something to it; [] where none does.

        Means nothing: a setting of a stage or source that the arm has not, a part's own learning rate where the part is not
        trained, and what makes the arm what it is: a key that it sets itself, or that holds or lies in one. What a stage has
        that only the arm brings along is no difference from the others and is searched.

        Args:
            recipe: the arm's. base: the plain values of the comparison's recipe. own: dotted keys that the arm changes.
        """
        values = to_mapping(recipe)
        places = [place for key in own if (place := _place(key, values)) is not None]
        keys = [
            key
            for key in self.grid
            if _matters(key, recipe, values) and not any(_defines(place, key, values, base) for place in places)
        ]
        if not keys:
            return []
        return [dict(zip(keys, tried, strict=True)) for tried in itertools.product(*(self.grid[key] for key in keys))]

    def changes_of(self, recipe: Recipe) -> dict[str, Any]:
        """The `changes` of an arm's trials: those of stages and sources that it has."""
        values = to_mapping(recipe)
        return {key: value for key, value in self.changes.items() if _place(key, values) is not None}

    def check(self, trials: Sequence[Trial]) -> None:
        """Raise RecipeError where a key of the grid is tried for no arm at all, or a change is made to no trial."""
        for key in self.grid:
            if not any(key in trial.values for trial in trials):
                raise RecipeError(
                    f"search: {key} is searched for no arm. It names a stage or part that none trains, every arm sets it "
                    "itself, or those that have it start from another arm, which are run as they are."
                )
        for key in self.changes:
            if not any(_place(key, to_mapping(trial.recipe)) is not None for trial in trials):
                raise RecipeError(f"search: no arm that is searched has the stage or source of {key}.")


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
    measure = next((name for name in MEASURES if name in losses), None)
    if measure is None:
        raise UserError(
            f"{trial.key} has none of {', '.join(MEASURES)} on validation data, so there is nothing to choose by. Give the "
            "recipe sources with such a split."
        )
    found = {"values": dict(trial.values), measure: losses[measure]}
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
        each["chosen"] = min(each["trials"], key=_loss)["values"]
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


def _loss(trial: Mapping[str, Any]) -> float:
    """What is made small; a loss that is no number (null or NaN) is the worst."""
    value = next(trial[name] for name in MEASURES if name in trial)
    return float(value) if value is not None and value == value else float("inf")


def _matters(key: str, recipe: Recipe, values: Mapping[str, Any]) -> bool:
    """Whether a setting can make a difference to an arm."""
    place = _place(key, values)
    if place is None:
        return False
    if "learning_rates" not in place[:-1] or place[0] != "stages":
        return True
    return place[-1] in recipe.stages[int(place[1])].parts


def _defines(own: Place, key: str, values: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether what an arm sets at `own` is the setting `key`, holds it or lies in it."""
    searched = _place(key, values)
    assert searched is not None
    shared = min(len(own), len(searched))
    if own[:shared] != searched[:shared]:
        return False
    # a list in place of the recipe's: an entry that the recipe lacks has nothing there that this could differ from
    return not (len(own) == 1 and own != searched and _place(key, base) is None)


def _place(key: str, values: Mapping[str, Any]) -> Place | None:
    """The steps of a dotted key, entries of lists by their number; None where it names no entry of a list."""
    node: Any = values
    steps = key.split(".")
    for i, step in enumerate(steps):
        if isinstance(node, list):
            try:
                steps[i] = str(position(node, step, key))
            except RecipeError:
                return None
            node = node[int(steps[i])]
        else:
            node = node.get(step) if isinstance(node, Mapping) else None
    return tuple(steps)

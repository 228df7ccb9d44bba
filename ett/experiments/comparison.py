"""Arms of one recipe, side by side: the same start, data, order and steps; trained, measured and reported together.

    OUT/comparison.json, OUT/recipe.yaml    that this is a comparison's folder; the recipe with its arms
    OUT/<arm>/ or OUT/<arm>/seed-<n>/       a run's folder (ett.experiments.run) with its ``evaluation.json``
    OUT/<arm>-<seed>.output.txt             what its process printed
    OUT/start/evaluation.json               the model that every arm starts from, before any training
    OUT/report.html, OUT/report.json        what came out

Every arm is a process of its own, so that arms can share a machine's cores, a crash takes down one of them, and a cluster
can run them one by one (``--only``). What is finished is kept: a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ett import __version__
from ett.errors import RecipeError, UserError, unknown
from ett.evaluate.run import evaluate, load_for_evaluation
from ett.evaluate.sources import NamedSources
from ett.experiments.folder import RECIPE_NAME, RunFolder
from ett.experiments.recipe import Recipe, read_values, recipe_of_arm
from ett.experiments.run import Run, evaluation_sources, resolve_model_folder
from ett.model.loading import find_weights, load_vision_tokenizer
from ett.tokenizers import VisionTokenizer

MARKER_NAME = "comparison.json"
EVALUATION_NAME = "evaluation.json"
OUTPUT_SUFFIX = ".output.txt"
"""OUT/<arm>-<seed>.output.txt holds what that arm's process printed."""
START = "start"
"""Folder of what the arms start from; no arm can be called so."""


@dataclass(frozen=True)
class Arm:
    """One arm with one seed.

    Attributes:
        name: of the arm. seed: of data order and weights.
        recipe: what is run.
        folder: of its run, relative to the comparison's.
    """

    name: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def key(self) -> str:
        """How the command line calls it: "ett:0"."""
        return f"{self.name}:{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """A recipe with arms.

    Attributes:
        name: the recipe's.
        values: the recipe's file with overrides applied; `arms` and `seeds` are among them.
        arms: every arm with every seed, seeds of an arm together.
    """

    name: str
    values: Mapping[str, Any]
    arms: Sequence[Arm]

    @property
    def names(self) -> list[str]:
        """The arms' names in the order of the recipe."""
        return list(dict.fromkeys(arm.name for arm in self.arms))

    @property
    def seeds(self) -> list[int]:
        """The seeds in the order of the recipe."""
        return list(dict.fromkeys(arm.seed for arm in self.arms))

    def of(self, name: str) -> list[Arm]:
        """One arm with each seed."""
        return [arm for arm in self.arms if arm.name == name]

    def find(self, key: str) -> Arm:
        """The arm called "NAME:SEED".

        Raises:
            RecipeError: there is none.
        """
        for arm in self.arms:
            if arm.key == key:
                return arm
        raise RecipeError(unknown("arm", key, [arm.key for arm in self.arms]))

    @property
    def dump(self) -> str:
        """The recipe as YAML; reading it back gives the same comparison."""
        return yaml.safe_dump(dict(self.values), sort_keys=False, allow_unicode=True)


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read a recipe that compares arms.

    ``arms`` maps each arm's name to its changes, dotted keys to values ({} for none); ``seeds`` lists seeds, default the
    recipe's own. All other keys are a recipe's.

    Args:
        path: a YAML file, or the name of a shipped recipe. overrides: as `load_recipe` takes them.

    Raises:
        RecipeError: no arms, or an arm whose recipe is not usable (the message names it).
    """
    values = read_values(path, overrides)
    rest = {key: value for key, value in values.items() if key not in ("arms", "seeds")}
    given, seeds = values.get("arms"), values.get("seeds", [values.get("seed", 0)])
    if not isinstance(given, Mapping) or len(given) < 2:
        raise RecipeError(
            f"{path} compares nothing: it needs `arms`, a mapping of at least two names to their changes."
        )
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) != len(seeds):
        raise RecipeError(f"seeds = {seeds!r} must be a list of different numbers, for example [0, 1, 2].")
    arms: list[Arm] = []
    for name in map(str, given):
        if name == START or Path(name).name != name or name.startswith("."):
            raise RecipeError(
                f"arms.{name}: the arm's name becomes a folder's; choose a plain word other than {START!r}."
            )
        for seed in seeds:
            try:
                recipe = recipe_of_arm({**rest, "seed": seed}, name, given[name])
            except RecipeError as error:
                raise RecipeError(f"arms.{name}: {error}") from error
            folder = Path(name) if len(seeds) == 1 else Path(name) / f"seed-{seed}"
            arms.append(Arm(name, recipe.seed, recipe, folder))
    return Comparison(str(values.get("name")), values, arms)


class ComparisonFolder:
    """The output folder of one comparison. Nothing in it changes before `open`.

    Raises:
        RecipeError: the folder is occupied, by another comparison, or by something else.
    """

    def __init__(self, path: Path, comparison: Comparison, *, resume: bool, overwrite: bool) -> None:
        self.path, self.comparison, self.overwrite = path, comparison, overwrite
        if path.exists() and not path.is_dir():
            raise RecipeError(f"{path} is a file; give a folder with --out.")
        occupied = path.is_dir() and any(path.iterdir())
        if not occupied:
            return
        if not is_comparison(path):
            raise RecipeError(
                f"{path} is not a comparison's folder (it has no {MARKER_NAME}), so it is neither continued nor deleted. "
                "Choose another with --out."
            )
        if not (resume or overwrite):
            raise RecipeError(
                f"The output folder {path} already exists. Continue it with --resume, replace it with --overwrite, or "
                "choose another with --out."
            )
        if resume and (path / RECIPE_NAME).read_text(encoding="utf-8") != comparison.dump:
            raise RecipeError(
                f"{path} was started with another recipe or other overrides. Resume it with its own: ett ablate "
                f"{path / RECIPE_NAME} --out {path} --resume. Or start anew with --overwrite."
            )

    def open(self) -> None:
        """Make the folder, or empty it of the comparison that is to be overwritten, and write the recipe."""
        path = self.path
        try:
            if self.overwrite and path.is_dir():
                self._delete()
            path.mkdir(parents=True, exist_ok=True)
            if not is_comparison(path):
                (path / RECIPE_NAME).write_text(self.comparison.dump, encoding="utf-8")
                marker = {"ett": __version__, "arms": self.comparison.names, "seeds": self.comparison.seeds}
                (path / MARKER_NAME).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise RecipeError(
                f"{path} cannot be written: {error.strerror}. Choose another folder with --out."
            ) from error

    def _delete(self) -> None:
        """Only what a comparison writes; the folders of its arms only as far as they are runs' folders."""
        before = load_comparison(self.path / RECIPE_NAME)
        for arm in before.arms:
            folder = self.path / arm.folder
            if folder.is_dir():
                RunFolder(folder, arm.recipe, resume=False, overwrite=True).clear()
        for name in (f"{START}/{EVALUATION_NAME}", "report.html", "report.json", RECIPE_NAME, MARKER_NAME):
            (self.path / name).unlink(missing_ok=True)
        for output in self.path.glob(f"*{OUTPUT_SUFFIX}"):
            output.unlink()


def is_comparison(path: Path) -> bool:
    """Whether `path` is the folder of a comparison."""
    return (path / MARKER_NAME).is_file() and (path / RECIPE_NAME).is_file()


def run_arm(arm: Arm, out: Path) -> Path:
    """Train and measure one arm in its folder under `out`, or what is left of it to do; returns the evaluation's path.

    Raises:
        Interrupted: stopped by a signal, after saving. UserError: the arm cannot be run.
    """
    folder = out / arm.folder
    target = folder / EVALUATION_NAME
    if target.is_file():
        return target
    model_folder = Run(arm.recipe, folder, resume=folder.is_dir() and any(folder.iterdir())).train()
    _measure(arm.recipe, model_folder, target)
    return target


def measure_start(comparison: Comparison, out: Path) -> Path | None:
    """Measure what the arms start from; None where they do not start from a saved model."""
    recipe, target = comparison.arms[0].recipe, out / START / EVALUATION_NAME
    if recipe.model.init is None:
        return None
    if not target.is_file():
        _measure(recipe, resolve_model_folder(find_weights(recipe.model.init)), target)
    return target


def _measure(recipe: Recipe, folder: Path, target: Path) -> None:
    model, tokenizer, processor = load_for_evaluation(folder)
    subject = model if model is not None else tokenizer
    config = recipe.evaluation
    limit = config.report_limit or config.limit
    found = evaluate(
        subject,
        processor,
        report_sources(recipe),
        limit=limit,
        picture_limit=min(limit, config.report_pictures or limit),
        initial_tokenizer=initial_tokenizer(recipe),
    )
    found.save(target)


def initial_tokenizer(recipe: Recipe) -> VisionTokenizer | None:
    """The vision tokenizer that a run of `recipe` starts from, or None where it starts from fresh weights."""
    path = recipe.model.init or recipe.model.vision_tokenizer.get("path")
    return None if path is None else load_vision_tokenizer(resolve_model_folder(find_weights(path)))


def report_sources(recipe: Recipe) -> NamedSources:
    """The built-in sources that the report's figures come from, drawn as the recipe trains on them."""
    return evaluation_sources(recipe, recipe.evaluation.report_split or recipe.evaluation.split)


def read_evaluation(path: Path) -> Mapping[str, Any]:
    """What `Evaluation.save` wrote.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Delete it and run the arm again with --resume.") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("metrics", "parts")):
        raise UserError(f"{path} is not an arm's evaluation. Delete it and run the arm again with --resume.")
    return content


def steps_of(recipe: Recipe) -> int:
    """Optimizer steps of all stages."""
    return sum(stage.steps for stage in recipe.stages)

"""Arms of one recipe, side by side: the same start, data, order and steps; trained, measured and reported together.

    OUT/comparison.json, OUT/recipe.yaml    that this is a comparison's folder; the recipe with its arms
    OUT/<arm>/ or OUT/<arm>/seed-<n>/       a run's folder (ett.experiments.run) with its ``evaluation.json``
    OUT/<arm>-<seed>.output.txt             what its process printed
    OUT/search.json, OUT/search/            what was searched for the arms, where the recipe says so (ett.experiments.search)
    OUT/start/evaluation.json               the model that every arm starts from, before any training
    OUT/report.html, OUT/report.json        what came out

Every arm is a process of its own, so that arms can share a machine's cores, a crash takes down one of them, and a cluster
can run them one by one (``--only``). What is finished is kept: a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ett import __version__
from ett.data.mixture import SourceConfig
from ett.devices import place
from ett.errors import RecipeError, UserError, unknown
from ett.evaluate.drawing_report import judge_all
from ett.evaluate.reading import DISTRIBUTION
from ett.evaluate.run import evaluate, load_for_evaluation, versions
from ett.evaluate.run_folder import COMPARISON_NAME
from ett.evaluate.sources import NamedSources, configured_sources
from ett.experiments.folder import RECIPE_NAME, RunFolder
from ett.experiments.recipe import EvaluationConfig, Recipe, read_values, recipe_of_arm
from ett.experiments.run import Run, evaluation_sources, resolve_model_folder
from ett.experiments.search import (
    SEARCH_FOLDER,
    SEARCH_NAME,
    TRIAL_NAME,
    Choices,
    Search,
    Trial,
    read_choices,
)
from ett.model.loading import find_weights, load_vision_tokenizer
from ett.tokenizers import VisionTokenizer

EVALUATION_NAME = "evaluation.json"
OUTPUT_SUFFIX = ".output.txt"
"""OUT/<arm>-<seed>.output.txt holds what that arm's process printed."""
REPORTS = ("report.html", "report.json", "table.md", "pareto.svg")
"""What `write_comparison_report` leaves."""
OWN_KEYS = ("arms", "seeds", "reference", "search")
"""Keys of a comparison's recipe that are no recipe's."""
START = "start"
"""Folder of what the arms start from; no arm can be called so."""
TOKENIZER_TASKS = ("reconstruction", "drift")
"""What is measured of an arm that learned to draw and not to read, beside its drawings."""


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

    @property
    def needs(self) -> str | None:
        """The key of the arm whose result this one starts from, or None."""
        return None if self.recipe.starts_from is None else f"{self.recipe.starts_from}:{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """A recipe with arms.

    Attributes:
        name: the recipe's.
        values: the recipe's file with overrides applied; `arms` and `seeds` are among them.
        arms: every arm with every seed, seeds of an arm together.
        trials: of the search, where the recipe has one, for every arm that starts from no other.
    """

    name: str
    values: Mapping[str, Any]
    arms: Sequence[Arm]
    trials: Sequence[Trial] = ()

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

    def finished(self, out: Path) -> Comparison:
        """This comparison with those seeds alone of which every arm was measured in folder `out`; it may have none."""
        missing = {arm.seed for arm in self.arms if not (out / arm.folder / EVALUATION_NAME).is_file()}
        return replace(self, arms=[arm for arm in self.arms if arm.seed not in missing])

    def root(self, arm: Arm) -> Arm:
        """The first in the chain of arms that `arm` starts from; `arm` itself where it starts from none."""
        while arm.needs is not None:
            arm = self.find(arm.needs)
        return arm

    @property
    def dump(self) -> str:
        """The recipe as YAML; reading it back gives the same comparison."""
        return yaml.safe_dump(dict(self.values), sort_keys=False, allow_unicode=True)


def load_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    search: Mapping[str, Any] | None = None,
    chosen: Choices | None = None,
) -> Comparison:
    """Read a recipe that compares arms.

    ``arms`` maps each arm's name to its changes, dotted keys to values ({} for none, false for no such arm); ``seeds`` lists
    seeds, default the recipe's own; ``reference`` names the arm that the others are compared with; ``search`` is what is
    searched for each arm first (`Search`). All other keys are a recipe's.

    Args:
        path: a YAML file, or the name of a shipped recipe. overrides: as `load_recipe` takes them.
        search: in place of the recipe's. chosen: values that a search found, which the arms then have.

    Raises:
        RecipeError: no arms, or an arm whose recipe is not usable (the message names it).
    """
    values = read_values(path, overrides)
    if search is not None:
        values["search"] = dict(search)
    rest = {key: value for key, value in values.items() if key not in OWN_KEYS}
    given, seeds = values.get("arms"), values.get("seeds", [values.get("seed", 0)])
    if isinstance(given, Mapping):
        given = values["arms"] = {name: changes for name, changes in given.items() if changes is not False}
    if not isinstance(given, Mapping) or len(given) < 2:
        raise RecipeError(
            f"{path} compares nothing: it needs `arms`, a mapping of at least two names to their changes."
        )
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) != len(seeds):
        raise RecipeError(f"seeds = {seeds!r} must be a list of different numbers, for example [0, 1, 2].")
    reference = values.get("reference")
    if reference is not None and reference not in given:
        raise RecipeError(unknown("arm as reference", reference, [str(name) for name in given]))
    searched, trials = Search.of(values.get("search")), list[Trial]()
    arms: list[Arm] = []
    for name in map(str, given):
        if name in (START, SEARCH_FOLDER) or Path(name).name != name or name.startswith("."):
            raise RecipeError(
                f"arms.{name}: the arm's name becomes a folder's; choose a plain word other than {START!r} and "
                f"{SEARCH_FOLDER!r}."
            )
        for seed in seeds:
            try:
                own = given[name] if given[name] is not None else {}
                if not isinstance(own, Mapping):
                    raise RecipeError(f"it must be a mapping of dotted keys to values, or {{}}; got {own!r}.")
                changes = {**own, **(chosen or {}).get(name, {})}
                recipe = recipe_of_arm({**rest, "seed": seed}, name, changes)
                if searched is not None and seed == seeds[0] and recipe.starts_from is None:
                    for number, tried in enumerate(searched.combinations(recipe, rest, own)):
                        fewer = searched.changes_of(recipe)
                        trial = recipe_of_arm({**rest, "seed": seed}, name, {**changes, **tried, **fewer})
                        trials.append(Trial(name, number, tried, trial))
            except RecipeError as error:
                raise RecipeError(f"arms.{name}: {error}") from error
            if recipe.starts_from is not None and recipe.starts_from not in {arm.name for arm in arms} - {name}:
                raise RecipeError(
                    f"arms.{name} starts from the arm {recipe.starts_from!r}, which must be one of those above it."
                )
            folder = Path(name) if len(seeds) == 1 else Path(name) / f"seed-{seed}"
            arms.append(Arm(name, recipe.seed, recipe, folder))
    if searched is not None:
        searched.check(trials)
    return Comparison(str(values.get("name")), values, arms, trials)


def open_comparison(out: Path) -> Comparison:
    """The comparison in folder `out`, with what its search chose.

    Raises:
        UserError: there is none.
    """
    if not (out / RECIPE_NAME).is_file():
        raise UserError(f"There is no comparison in {out}. Start one with `ett ablate RECIPE --out {out}`.")
    return load_comparison(out / RECIPE_NAME, chosen=read_choices(out))


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
                f"{path} is not a comparison's folder (it has no {COMPARISON_NAME}), so it is neither continued nor deleted. "
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
        """Make the folder, or empty it of the comparison that is to be overwritten, and write the recipe.

        Raises:
            DataError: what the arms are to be measured on is missing or cannot be used.
            RecipeError: the folder cannot be written.
        """
        path = self.path
        _check_measured(self.comparison)
        try:
            if self.overwrite and path.is_dir():
                self._delete()
            path.mkdir(parents=True, exist_ok=True)
            if not is_comparison(path):
                (path / RECIPE_NAME).write_text(self.comparison.dump, encoding="utf-8")
                marker = {"ett": __version__, "arms": self.comparison.names, "seeds": self.comparison.seeds}
                (path / COMPARISON_NAME).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
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
        for trial in before.trials:
            folder = self.path / trial.folder
            if folder.is_dir():
                RunFolder(folder, trial.recipe, resume=False, overwrite=True).clear()
                (folder / TRIAL_NAME).unlink(missing_ok=True)
        for name in (f"{START}/{EVALUATION_NAME}", SEARCH_NAME, *REPORTS, RECIPE_NAME, COMPARISON_NAME):
            (self.path / name).unlink(missing_ok=True)
        for output in self.path.glob(f"*{OUTPUT_SUFFIX}"):
            output.unlink()


def _check_measured(comparison: Comparison) -> None:
    """Find out now, not after training, that there is nothing to measure the arms on."""
    checked: list[tuple[EvaluationConfig, tuple[SourceConfig, ...]]] = []
    for recipe in (arm.recipe for arm in comparison.arms):
        if (recipe.evaluation, recipe.data) not in checked:
            report_sources(recipe)
            checked.append((recipe.evaluation, recipe.data))


def is_comparison(path: Path) -> bool:
    """Whether `path` is the folder of a comparison."""
    return (path / COMPARISON_NAME).is_file() and (path / RECIPE_NAME).is_file()


def run_arm(comparison: Comparison, arm: Arm, out: Path) -> Path:
    """Train and measure one arm in its folder under `out`, or what is left of it to do; returns the evaluation's path.

    Raises:
        Interrupted: stopped by a signal, after saving. UserError: the arm cannot be run, or the one that it starts from is not
            finished.
    """
    folder = out / arm.folder
    target = folder / EVALUATION_NAME
    if target.is_file():
        return target
    recipe = arm.recipe
    if arm.needs is not None:
        before = comparison.find(arm.needs)
        if not (out / before.folder / EVALUATION_NAME).is_file():
            raise UserError(f"{arm.key} starts from {before.key}, which is not finished. Run that one first.")
        recipe = recipe.started_from(str(resolve_model_folder(out / before.folder).resolve()))
    model_folder = Run(recipe, folder, resume=folder.is_dir() and any(folder.iterdir())).train()
    # drift is from the common start, however many arms lie between
    _measure(comparison.root(arm).recipe, model_folder, target, reads=recipe.stages[-1].stage != "gen")
    return target


def measure_start(comparison: Comparison, out: Path) -> Path | None:
    """Measure what the arms start from; None where they do not start from a saved model."""
    recipe, target = comparison.arms[0].recipe, out / START / EVALUATION_NAME
    if recipe.model.init is None:
        return None
    if not target.is_file():
        _measure(recipe, resolve_model_folder(find_weights(recipe.model.init)), target)
    return target


def _measure(recipe: Recipe, folder: Path, target: Path, *, reads: bool = True) -> None:
    model, tokenizer, processor = load_for_evaluation(folder)
    subject = model if model is not None else tokenizer
    place(subject)
    config = recipe.evaluation
    limit = config.report_limit or config.limit
    initial = initial_tokenizer(recipe)
    found = evaluate(
        subject,
        processor,
        report_sources(recipe),
        None if reads else TOKENIZER_TASKS[: 1 if initial is None else 2],
        limit=limit,
        picture_limit=min(limit, config.report_pictures or limit),
        naming_limit=config.naming_limit,
        initial_tokenizer=initial,
    )
    if config.drawings is not None and model is not None and model.image_head is not None:
        judged = judge_all(model, processor, config.drawings)
        for note in judged.notes:
            print(note, file=sys.stderr)
        found = replace(found, metrics={**found.metrics, **judged.metrics()}, versions=versions(DISTRIBUTION))
    found.save(target)


def initial_tokenizer(recipe: Recipe) -> VisionTokenizer | None:
    """The vision tokenizer that a run of `recipe` starts from, or None where it starts from fresh weights."""
    path = recipe.model.init or recipe.model.vision_tokenizer.get("path")
    return None if path is None else load_vision_tokenizer(resolve_model_folder(find_weights(path)))


def report_sources(recipe: Recipe) -> NamedSources:
    """The sources that the report's figures come from: built-in ones drawn as the recipe trains on them, stored ones whole.

    Raises:
        DataError: nothing is held back, or it cannot be used.
    """
    split = recipe.evaluation.report_split or recipe.evaluation.split
    if recipe.evaluation.report_data:
        return configured_sources(recipe.evaluation.report_data, split)
    return evaluation_sources(recipe, split)


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

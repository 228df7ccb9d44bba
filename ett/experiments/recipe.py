"""Recipes: one YAML file says what a run is. Strict keys, dotted overrides, a resolved copy beside the results."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ett.config import from_mapping, require, to_mapping
from ett.data.mixture import SourceConfig
from ett.errors import RecipeError
from ett.model.build import ModelSpec
from ett.train.stages import StageConfig

_PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"
"""Recipes that come with the package (inside the wheel, or beside the package in a clone)."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What a run measures.

    Attributes:
        data: sources; null takes the recipe's.
        split: of built-in sources, during training.
        limit: examples of each source, >= 1; validation during training draws this many in all.
        report_split: of built-in sources, for the figures of the report ("heldout": all that nothing is tuned on); null takes
            `split`.
        report_limit: examples of each source in the report, >= 1; null takes `limit`.
        report_pictures: of those, how many are reconstructed as well, >= 1; null takes all. Reconstruction varies little
            between pictures and costs more than an answer.
    """

    data: tuple[SourceConfig, ...] | None = None
    split: str = "validation"
    limit: int = 64
    report_split: str | None = None
    report_limit: int | None = None
    report_pictures: int | None = None

    def __post_init__(self) -> None:
        require(self.limit >= 1, "limit", self.limit, "at least 1")
        for name in ("report_limit", "report_pictures"):
            limit = getattr(self, name)
            require(limit is None or limit >= 1, name, limit, "at least 1, or null")


@dataclass(frozen=True)
class Recipe:
    """A run: a model, its data and the stages it goes through, in order.

    Attributes:
        name: used for the default output folder, ``runs/<name>``.
        model: parts and shapes.
        stages: at least one; stages of a kind are told apart by their position.
        data: the mixture of every stage that names none of its own.
        evaluation: validation during training, and the figures of the report.
        seed: of weights, order of data and dropout.
        precision: "bf16" computes the language model in bfloat16 over float32 master weights; "fp32" in float32.
        num_workers: loader processes per rank.
        trackers: names that Accelerate knows ("tensorboard", "wandb", ...); empty for none.
    """

    name: str
    model: ModelSpec
    stages: tuple[StageConfig, ...]
    data: tuple[SourceConfig, ...]
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    num_workers: int = 1
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "name", self.name, "a name that can be a folder's")
        require(len(self.stages) >= 1, "stages", self.stages, "a non-empty list")
        require(len(self.data) >= 1, "data", self.data, "a non-empty list of sources")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        kinds = [stage.stage for stage in self.stages]
        if self.model.init is not None and kinds[0] == "tokenizer":
            raise RecipeError(
                "The tokenizer stage trains a tokenizer alone, but model.init is a whole model. Start the stage from "
                "model.vision_tokenizer.path instead."
            )
        if "tokenizer" in kinds[1:]:
            raise RecipeError("The tokenizer stage trains the vision tokenizer alone, so it can only come first.")
        if any(kind != "tokenizer" for kind in kinds) and self.model.language_model is None and self.model.init is None:
            raise RecipeError(
                f"The stages {', '.join(kinds)} train through a language model: set model.language_model (or model.init)."
            )

    @property
    def stage_names(self) -> list[str]:
        """A unique name for each stage: its kind, numbered where a kind comes again ("chat", "chat-2")."""
        names: list[str] = []
        for stage in self.stages:
            earlier = sum(name.split("-")[0] == stage.stage for name in names)
            names.append(stage.stage if earlier == 0 else f"{stage.stage}-{earlier + 1}")
        return names


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe ("quickstart").
        overrides: ``key=value`` with a dotted key; list entries by number or, for stages, by name
            (``stages.semantic.steps=10``). Values are YAML. Of a recipe that compares arms, ``arm=NAME`` chooses one.

    Raises:
        RecipeError: no such file, not YAML, an unknown key (nearest match named) or an impossible value.
    """
    values = read_values(path, overrides)
    arms, chosen = values.pop("arms", None), values.pop("arm", None)
    if arms is not None:
        values.pop("seeds", None)
        if not isinstance(arms, Mapping) or chosen not in arms:
            names = ", ".join(map(str, arms)) if isinstance(arms, Mapping) else "none"
            raise RecipeError(
                f"{path} compares arms. Run them all with `ett ablate {path}`, or one: add arm=NAME. Its arms: {names}."
            )
        return recipe_of_arm(values, str(chosen), arms[chosen])
    if chosen is not None:
        raise RecipeError(f"{path} compares no arms, so there is no arm {chosen!r} to choose.")
    return from_mapping(Recipe, values)


def recipe_of_arm(values: Mapping[str, Any], arm: str, changes: object) -> Recipe:
    """The recipe that `values` describe, named `arm`, with the arm's dotted changes.

    Raises:
        RecipeError: `changes` is no mapping, or the recipe is not usable.
    """
    if changes is not None and not isinstance(changes, Mapping):
        raise RecipeError(
            f"arms.{arm} must be a mapping of dotted keys to values, for example model.visual_input: index."
        )
    own = _without_aliases(values, ())
    for key, value in (changes or {}).items():
        _set(own, str(key), _without_aliases(value, ()))
    return from_mapping(Recipe, {**own, "name": arm})


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe's file as plain values, overrides applied, nothing checked.

    Raises:
        RecipeError: no such file, not YAML, or an override that leads nowhere.
    """
    file = find_recipe(path)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise RecipeError(f"{file}{line} is not valid YAML: {getattr(error, 'problem', None) or error}.") from error
    if not isinstance(given, Mapping):
        raise RecipeError(f"{file} must hold a mapping of names to values; it holds {type(given).__name__}.")
    values = _without_aliases(given, ())
    for override in overrides:
        _override(values, override)
    return values


def find_recipe(path: str | Path) -> Path:
    """The file at `path`, or the shipped recipe of that name."""
    file = Path(path)
    if file.is_file():
        return file
    shipped = SHIPPED / f"{file.stem}.yaml"
    if str(path) == file.stem and shipped.is_file():
        return shipped
    known = sorted(recipe.stem for recipe in SHIPPED.glob("*.yaml"))
    close = difflib.get_close_matches(file.stem, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise RecipeError(f"There is no recipe {str(path)!r}.{hint} Give a YAML file or a shipped one: {', '.join(known)}.")


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every value, defaults included. Reading it back gives an equal recipe."""
    return yaml.safe_dump(to_mapping(recipe), sort_keys=False, allow_unicode=True)


def _without_aliases(value: Any, above: tuple[int, ...]) -> Any:
    """A copy in which nothing is shared, so that an override of one place changes that place alone."""
    if id(value) in above:
        raise RecipeError("The recipe contains itself through a YAML alias.")
    inside = (*above, id(value))
    if isinstance(value, Mapping):
        return {key: _without_aliases(item, inside) for key, item in value.items()}
    return [_without_aliases(item, inside) for item in value] if isinstance(value, list) else value


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"The override {override!r} is not of the form key=value, for example model.image_size=128.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"The value in {override!r} is not valid YAML.") from error
    _set(values, key, value)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Put `value` at the dotted `key`."""
    node: Any = values
    steps = key.split(".")
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        path = ".".join(steps[: i + 1])
        if isinstance(node, list):
            position = _position(node, step, path)
            if last:
                node[position] = value
            else:
                node = node[position]
        elif isinstance(node, dict):
            if last:
                node[step] = value
            else:
                # a section that the recipe leaves out entirely starts empty; its keys are checked with the rest
                if node.get(step) is None:
                    node[step] = {}
                node = node[step]
        else:
            raise RecipeError(f"The override {key!r} leads into {'.'.join(steps[:i])}, which is a plain value.")


def _position(entries: list[Any], step: str, path: str) -> int:
    if step.isdigit() and int(step) < len(entries):
        return int(step)
    names = [entry.get("stage", entry.get("source")) if isinstance(entry, dict) else None for entry in entries]
    if names.count(step) == 1:
        return names.index(step)
    allowed = ", ".join([f"0 to {len(entries) - 1}", *(str(name) for name in names if name)])
    raise RecipeError(f"{path} names no entry of that list. Allowed: {allowed}.")

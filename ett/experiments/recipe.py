"""Recipes: one YAML file says what a run is. Strict keys, dotted overrides, a resolved copy beside the results."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from ett.config import from_mapping, require, to_mapping
from ett.data.mixture import SourceConfig
from ett.errors import RecipeError
from ett.evaluate.base import NAMING_LIMIT
from ett.evaluate.drawing_report import DrawingsConfig
from ett.experiments.strict_yaml import read_yaml, without_aliases
from ett.model.build import ModelSpec
from ett.train.sharding import Sharding
from ett.train.stages import DRAWING, StageConfig

_PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"
"""Recipes that come with the package (inside the wheel, or beside the package in a clone)."""


MAX_TIMEOUT = 1e6
"""Seconds; eleven days."""

ARM_PREFIX = "arm:"
"""``arm:NAME`` in place of a path starts from what that arm of the same comparison ended with, with the same seed."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What a run measures.

    Attributes:
        data: sources. Built-in ones are read of `split`; stored ones (manifests, shards, tables) whole, so name such as nothing
            is trained on. null takes the built-in ones among the recipe's data; where there are none, nothing is measured.
        split: of built-in sources, during training.
        report_data: sources of the report's figures, read as `data` are; null takes `data`. "facts" measures the language model
            without pictures.
        limit: examples of each source, >= 1; validation during training draws this many in all, or as many as there are.
        report_split: of built-in sources, for the figures of the report ("heldout": all that nothing is tuned on); null takes
            `split`.
        report_limit: examples of each source in the report, >= 1; null takes `limit`.
        report_pictures: of those, how many are reconstructed as well, >= 1; null takes all. Reconstruction varies little
            between pictures and costs more than an answer.
        naming_limit: of those, of how many the right name is ranked among a hundred, >= 1; each costs as much as a hundred
            answers.
        drawings: of a comparison's arms that can draw, what is drawn and judged for the report; null draws nothing.
    """

    data: tuple[SourceConfig, ...] | None = None
    report_data: tuple[SourceConfig, ...] | None = None
    split: str = "validation"
    limit: int = 64
    report_split: str | None = None
    report_limit: int | None = None
    report_pictures: int | None = None
    naming_limit: int = NAMING_LIMIT
    drawings: DrawingsConfig | None = None

    def __post_init__(self) -> None:
        require(self.limit >= 1, "limit", self.limit, "at least 1")
        require(self.naming_limit >= 1, "naming_limit", self.naming_limit, "at least 1")
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
        sharding: what several processes hold: "ddp", each the whole model; "fsdp", each its part of weights, gradients and
            optimizer (FSDP2). The numbers are the same, so a run may be continued with the other.
        rank_timeout: seconds, >= 1, that a process of several waits for the others before it takes them for lost and the run
            ends: longer than the first process ever writes or checks a checkpoint.
        max_bad_samples: examples of a stage that cannot be used (a broken picture, an empty caption, a damaged shard as one)
            and are skipped: each is counted once and named, and another of its source stands in. 0 ends at the first, and looks
            through manifests before anything trains.
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
    sharding: Sharding = "ddp"
    rank_timeout: float = 600.0
    max_bad_samples: int = 0
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "name", self.name, "a name that can be a folder's")
        require(len(self.stages) >= 1, "stages", self.stages, "a non-empty list")
        require(len(self.data) >= 1, "data", self.data, "a non-empty list of sources")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")
        require(1 <= self.rank_timeout <= MAX_TIMEOUT, "rank_timeout", self.rank_timeout, f"in [1, {MAX_TIMEOUT:g}]")
        require(self.max_bad_samples >= 0, "max_bad_samples", self.max_bad_samples, "0 or more")
        if self.max_bad_samples and any(stage.cached_codes for stage in self.stages):
            raise RecipeError("cached_codes needs data in which nothing is wrong; leave it out, or max_bad_samples.")
        require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2^32)")
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

        for stage in self.stages:
            self._check_drawing(stage)
            self._check_judging(stage)

    def _check_drawing(self, stage: StageConfig) -> None:
        """What a stage reads and what it learns belong together."""
        draws = [source.draws for source in stage.data or self.data]
        if stage.stage in DRAWING and self.model.image_head is None and self.model.init is None:
            raise RecipeError(
                f"The {stage.stage} stage trains an image head: set model.image_head, say to {{kind: tied}}."
            )
        if stage.stage == "gen" and not all(draws):
            raise RecipeError(
                "The gen stage learns to draw and nothing else: set `draws: true` on each of its sources, or use the stage "
                '"joint".'
            )
        if stage.stage == "joint" and (all(draws) or not any(draws)):
            raise RecipeError(
                "The joint stage learns to read and to draw: some of its sources need `draws: true`, and some must do "
                "without."
            )
        if stage.stage not in ("tokenizer", "decoder", *DRAWING) and any(draws):
            raise RecipeError(
                f"The {stage.stage} stage learns answers in words, but a source has `draws: true`. Take it out, or use the "
                f"stages {' and '.join(DRAWING)}."
            )

    def _check_judging(self, stage: StageConfig) -> None:
        """What judges pictures can see pictures of this size."""
        side = min(self.model.size)
        if stage.plays and side < stage.discriminator.smallest_side:
            raise RecipeError(
                f"The {stage.stage} stage: a discriminator with strided_layers: {stage.discriminator.strided_layers} "
                f"needs pictures of {stage.discriminator.smallest_side} pixels or more, these have {side}. Lower "
                "discriminator.strided_layers, raise model.image_size, or leave losses.adversarial_weight out."
            )

    @property
    def starts_from(self) -> str | None:
        """The arm whose result this recipe starts from (`ARM_PREFIX`), or None."""
        given = self.model.init or self.model.vision_tokenizer.get("path")
        return str(given).removeprefix(ARM_PREFIX) if str(given or "").startswith(ARM_PREFIX) else None

    def started_from(self, path: str) -> Recipe:
        """This recipe with `path` in place of the arm that it starts from."""
        assert self.starts_from is not None
        if self.model.init is not None:
            return replace(self, model=replace(self.model, init=path))
        return replace(self, model=replace(self.model, vision_tokenizer={**self.model.vision_tokenizer, "path": path}))

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
        for key in ("seeds", "reference", "search"):
            values.pop(key, None)
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
    own = without_aliases(values)
    for key, value in (changes or {}).items():
        _set(own, str(key), without_aliases(value))
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
    given = read_yaml(text, str(file))
    if not isinstance(given, Mapping):
        raise RecipeError(f"{file} must hold a mapping of names to values; it holds {type(given).__name__}.")
    values: dict[str, Any] = {str(key): value for key, value in given.items()}
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


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"The override {override!r} is not of the form key=value, for example model.image_size=128.")
    _set(values, key, read_yaml(text, f"The value in {override!r}"))


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Put `value` at the dotted `key`."""
    node: Any = values
    steps = key.split(".")
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        path = ".".join(steps[: i + 1])
        if isinstance(node, list):
            entry = position(node, step, path)
            if last:
                node[entry] = value
            else:
                node = node[entry]
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


def position(entries: list[Any], step: str, path: str) -> int:
    """Which entry of a list the `step` of the dotted key `path` means: by number, or a stage or source by its name.

    Raises:
        RecipeError: none, or several.
    """
    if step.isdigit() and int(step) < len(entries):
        return int(step)
    names = [entry.get("stage", entry.get("source")) if isinstance(entry, dict) else None for entry in entries]
    if names.count(step) == 1:
        return names.index(step)
    allowed = ", ".join([f"0 to {len(entries) - 1}", *(str(name) for name in names if name)])
    raise RecipeError(f"{path} names no entry of that list. Allowed: {allowed}.")

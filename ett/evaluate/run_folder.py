"""A run's folder as an evaluation finds it: recipe, log, figures, and the pictures that a report keeps there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import yaml

from ett.errors import DataError, ModelError, UserError
from ett.images import load_image
from ett.model.loading import find_weights, is_saved_model

LOG_NAME, RECIPE_NAME = "log.jsonl", "recipe.yaml"
COMPARISON_NAME = "comparison.json"
"""Marks the folder of a comparison, whose arms are runs."""
PICTURES_NAME, PICTURES_FOLDER = "samples.json", "samples"
TRAINING_DATA = "evaluation_of_training_data"
"""Name of an evaluation (without its suffix) on what the run learned from."""


class Shown(NamedTuple):
    """A picture of a report, mode RGB: original, reconstruction, and where it is known the one from before tuning."""

    caption: str
    original: PIL.Image.Image
    reconstruction: PIL.Image.Image
    before: PIL.Image.Image | None = None


Pictures = Sequence[Shown]


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder says.

    Attributes:
        name: the recipe's, or the folder's.
        recipe: the recipe's text, and its values ({} where there is none).
        events: of the log, in order.
        evaluations: file name without suffix -> its content.
    """

    name: str
    recipe_text: str
    recipe: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Mapping[str, Any]]

    @property
    def stage_names(self) -> list[str]:
        """Stages in the order in which the log first mentions them."""
        return list(dict.fromkeys(str(event["stage"]) for event in self.events))

    def of(self, stage: str, kind: str) -> list[Mapping[str, Any]]:
        """The events of a stage that are of one kind ("step", "validation", "reach")."""
        return [event for event in self.events if event["stage"] == stage and event.get("event") == kind]


def resolve_model_folder(given: str | Path) -> Path:
    """The folder that holds weights: `given` itself, the last finished stage of the run in it, or the shipped one of that name.

    Raises:
        ModelError: there is none of these, or `given` holds several arms.
    """
    path = find_weights(given)
    if is_saved_model(path) or not (path / RECIPE_NAME).is_file():
        return path
    if (path / COMPARISON_NAME).is_file():
        arms = sorted({str(stages.parent) for stages in (*path.glob("*/stages"), *path.glob("*/seed-*/stages"))})
        raise ModelError(f"{path} is a comparison. Give one of its arms: {', '.join(arms) or 'none is there yet'}.")
    stages = sorted(path.glob("stages/[0-9]*-*"), key=lambda p: int(p.name.split("-")[0]))
    if not stages:
        raise ModelError(
            f"The run in {path} has not finished a stage yet. Continue it with `ett train {path / RECIPE_NAME} --out {path} "
            "--resume`."
        )
    return stages[-1]


def _place(evaluation: Path) -> tuple[bool, str]:
    """What the run was trained on comes last: it says the least."""
    return evaluation.stem == TRAINING_DATA, evaluation.stem


def read_run(folder: Path) -> RunFacts:
    """Read a run's folder.

    Raises:
        UserError: it has neither recipe nor log nor evaluation, or one of them is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Give one written by `ett train` or `ett demo`.")
    text = _read(folder / RECIPE_NAME) if (folder / RECIPE_NAME).is_file() else ""
    try:
        recipe = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        raise UserError(f"{folder / RECIPE_NAME} is not valid YAML. Restore it from the run's recipe.") from error
    evaluations = {path.stem: _evaluation(path) for path in sorted(folder.glob("evaluation*.json"), key=_place)}
    events = _events(folder / LOG_NAME) if (folder / LOG_NAME).is_file() else []
    if not text and not evaluations and not events:
        raise UserError(f"{folder} is not a run's folder: it has no {RECIPE_NAME}, {LOG_NAME} or evaluation*.json.")
    values = recipe if isinstance(recipe, Mapping) else {}
    return RunFacts(str(values.get("name") or folder.resolve().name), text, values, events, evaluations)


def keep_pictures(folder: Path, pictures: Pictures) -> None:
    """Write pictures as PNG with their captions, for `kept_pictures`."""
    (folder / PICTURES_FOLDER).mkdir(parents=True, exist_ok=True)
    entries = []
    for i, shown in enumerate(pictures):
        images = {"original": shown.original, "reconstruction": shown.reconstruction, "before": shown.before}
        names = {}
        for kind, image in images.items():
            if image is not None:
                names[kind] = f"{i:03d}.png" if kind == "original" else f"{i:03d}.{kind}.png"
                image.save(folder / PICTURES_FOLDER / names[kind])
        entries.append({"caption": shown.caption, **names})
    write_whole(folder / PICTURES_NAME, json.dumps(entries, indent=1) + "\n")


def kept_pictures(folder: Path) -> Pictures:
    """What `keep_pictures` wrote; nothing where there is none.

    Raises:
        DataError: the list is damaged, or one of its pictures.
    """
    path = folder / PICTURES_NAME
    if not path.is_file():
        return []
    entries = _json(path)
    try:
        # only the last part of a name counts: a list from elsewhere must not reach outside the folder
        return [
            Shown(
                str(entry["caption"]),
                load_image(folder / PICTURES_FOLDER / Path(entry["original"]).name),
                load_image(folder / PICTURES_FOLDER / Path(entry["reconstruction"]).name),
                load_image(folder / PICTURES_FOLDER / Path(entry["before"]).name) if "before" in entry else None,
            )
            for entry in entries
        ]
    except (TypeError, KeyError) as error:
        raise DataError(f"{path} is not a list of pictures with caption, original and reconstruction.") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    work = path.with_name(f".{path.name}.tmp")
    work.write_text(text, encoding="utf-8")
    work.replace(path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Write it again, or remove it.") from error


def _evaluation(path: Path) -> Mapping[str, Any]:
    content = _json(path)
    metrics = content.get("metrics") if isinstance(content, dict) else None
    predictions = content.get("predictions", []) if isinstance(content, dict) else None
    good = isinstance(metrics, dict) and all(isinstance(metric, dict) for metric in metrics.values())
    if not good or not isinstance(predictions, list):
        raise UserError(
            f"{path} is not an evaluation as `ett evaluate --json` writes it. Write it again, or remove it."
        )
    return {"metrics": metrics, "predictions": predictions}


def _events(path: Path) -> list[Mapping[str, Any]]:
    """Events that name their stage and step; a line cut short by a crash is left out, as the run itself does."""
    found: list[Mapping[str, Any]] = []
    for line in _read(path).splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "stage" in event and isinstance(event.get("step"), int):
            found.append(event)
    return found

"""A run's folder: whose it is, what may be continued, what may be deleted."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ett import __version__
from ett.data.once import content_hash
from ett.data.places import Place, place, shard_paths, stamps
from ett.data.table import files_of
from ett.errors import ModelError, RecipeError
from ett.experiments.recipe import Recipe, dump_recipe, load_recipe
from ett.files import fsync
from ett.train.health import HealthConfig

RECIPE_NAME = "recipe.yaml"
MARKER_NAME = "run.json"
OWN = (
    "checkpoints",
    "codes",
    "stages",
    "tensorboard",
    "samples",
    RECIPE_NAME,
    MARKER_NAME,
    "log.jsonl",
    "samples.json",
)
OWN_PATTERNS = ("evaluation*.json", "report.html", "report.json")


class RunFolder:
    """The output folder of one recipe. Nothing in it changes before `open`.

    Args:
        path: may exist or not.
        recipe: what the run is.
        resume: continue what is there. overwrite: delete the run that is there, and nothing but the run.

    Raises:
        RecipeError: the folder is occupied, or by another recipe's run, or by no run at all.
    """

    def __init__(self, path: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        self.path, self.recipe, self.overwrite = path, recipe, overwrite
        if path.exists() and not path.is_dir():
            raise RecipeError(f"{path} is a file; give a folder with --out.")
        occupied = path.is_dir() and any(path.iterdir())
        if occupied and not (resume or overwrite):
            raise RecipeError(
                f"The output folder {path} already exists. Continue it with --resume, replace it with --overwrite, or "
                "choose another with --out."
            )
        if occupied and not (path / MARKER_NAME).is_file():
            raise RecipeError(
                f"{path} is not a run's folder (it has no {MARKER_NAME}), so it is neither continued nor deleted. Choose "
                "another with --out."
            )
        if occupied and resume:
            self._check_same()

    def open(self) -> None:
        """Make the folder, or empty it of the run that is to be overwritten, and write the recipe.

        Raises:
            RecipeError: it cannot be made.
        """
        try:
            if self.overwrite and self.path.is_dir():
                self.clear()
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / MARKER_NAME).is_file():
                marker = {"ett": __version__, "manifests": _manifest_hashes(self.recipe)}
                _write(self.path / MARKER_NAME, json.dumps(marker, indent=2) + "\n")
            _write(self.path / RECIPE_NAME, dump_recipe(self.recipe))
        except OSError as error:
            raise RecipeError(
                f"{self.path} cannot be written: {error.strerror}. Choose another folder with --out."
            ) from error

    def stage(self, k: int) -> Path:
        """Where stage `k` leaves its model."""
        return self.path / "stages" / f"{k}-{self.recipe.stage_names[k]}"

    @property
    def checkpoints(self) -> Path:
        """Where the stage under way keeps its training state."""
        return self.path / "checkpoints"

    def codes(self, k: int) -> Path:
        """Where stage `k` keeps its code cache, unless the recipe says where."""
        cached = self.recipe.stages[k].cached_codes
        return Path(cached) if isinstance(cached, str) else self.path / "codes" / self.stage(k).name

    @property
    def finished(self) -> int:
        """Number of finished stages in the folder as it is now."""
        done = 0
        while done < len(self.recipe.stages) and _holds_weights(self.stage(done)):
            done += 1
        return done

    @property
    def model(self) -> Path:
        """The last finished stage's model."""
        if self.finished == 0:
            raise ModelError(f"{self.path} has not finished a stage yet. Continue it with --resume.")
        return self.stage(self.finished - 1)

    def clear(self) -> None:
        """Delete the run that is there, and nothing but what a run writes: whatever else someone keeps in the folder stays."""
        for entry in [*(self.path / name for name in OWN), *(p for o in OWN_PATTERNS for p in self.path.glob(o))]:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    def _check_same(self) -> None:
        """A resumed run continues the same recipe on the same data; anything else would not be what an uninterrupted run gives.
        How many processes load data, how they share the weights, how long they wait for each other, who tracks the run, what
        watches its health and how many examples may be skipped may change: up to a fault, and to the order of sums, no weight
        depends on them."""
        written = self.path / RECIPE_NAME
        before, now = (_comparable(recipe) for recipe in (load_recipe(written), self.recipe))
        if before != now:
            changed = [line.strip() for line in now.splitlines() if line not in before.splitlines()]
            shown = "; ".join(changed[:3]) or "a key was removed"
            raise RecipeError(
                f"{self.path} was started with another recipe (now: {shown}). Resume it with its own: "
                f"ett train {written} --out {self.path} --resume. Or start anew with --overwrite."
            )
        try:
            manifests = dict(json.loads((self.path / MARKER_NAME).read_text(encoding="utf-8"))["manifests"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f"{self.path / MARKER_NAME} is damaged ({type(error).__name__}), so nothing tells whether the data are "
                "still those of the run. Put back a copy, or start anew with --overwrite."
            ) from error
        hashes = _manifest_hashes(self.recipe)
        for name, expected in manifests.items():
            if hashes.get(name) != expected:
                raise RecipeError(
                    f"{name} has changed since {self.path} was started, so the run cannot be continued exactly. Restore the "
                    "file, or start anew with --overwrite."
                )


def _comparable(recipe: Recipe) -> str:
    stages = tuple(replace(stage, health=HealthConfig()) for stage in recipe.stages)
    free = replace(recipe, num_workers=0, sharding="ddp", rank_timeout=1.0, max_bad_samples=0, trackers=())
    return dump_recipe(replace(free, stages=stages))


def _manifest_hashes(recipe: Recipe) -> dict[str, str]:
    """Of every manifest a hash of its content, of other files one of their names, sizes and times of change (or versions)."""
    stages = (source for stage in recipe.stages for source in stage.data or ())
    sources = [*recipe.data, *stages, *(recipe.evaluation.data or ())]
    stored = {(source.path, source.source) for source in sources if source.path is not None}
    found = {}
    for path, kind in sorted(stored):
        files = shard_paths(path)[0] if kind == "shards" else files_of(path)
        found[path] = content_hash(place(path)) if kind == "manifest" else _hash_of_stats(files)
    return found


def _hash_of_stats(files: Sequence[Place]) -> str:
    found = [(file.name, *(its_stamp or ())) for file, its_stamp in zip(files, stamps(files), strict=True)]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _holds_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _write(path: Path, text: str) -> None:
    work = path.with_suffix(".tmp")
    work.write_text(text, encoding="utf-8")
    fsync(work)
    work.replace(path)

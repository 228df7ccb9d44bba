"""A run: the stages of a recipe one after another, in one folder, resumable at any moment.

    OUT/recipe.yaml                 the resolved recipe
    OUT/log.jsonl, tensorboard/     what happened
    OUT/checkpoints/<stage>-<step>  training state of the stage under way
    OUT/stages/<k>-<name>/          the finished model (or tokenizer) of stage k, as save_pretrained writes it

A stage starts from the previous stage's folder on disk, always, so a resumed run and an uninterrupted one take the same
path. The folder appears whole or not at all.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from ett.data.mixture import Mixture, SourceConfig, build_mixture
from ett.errors import ModelError, RecipeError
from ett.experiments.recipe import Recipe, dump_recipe, load_recipe
from ett.model.build import (
    ModelSpec,
    build_model,
    build_processor,
    build_vision_tokenizer,
    find_weights,
)
from ett.model.build import load_model as load_saved
from ett.model.ett import EttForConditionalGeneration
from ett.model.processing import EttProcessor
from ett.model.text import byte_tokenizer
from ett.tokenizers import VisionTokenizer
from ett.train.checkpoint import publish
from ett.train.log import RunLog
from ett.train.loop import Interrupted, Stage, StageData, encode_all, split_batch
from ett.train.stages import StageConfig

RECIPE_NAME = "recipe.yaml"


class Run:
    """One output folder.

    Args:
        recipe: what to run.
        out: the folder.
        resume: continue what is there. overwrite: delete what is there and start anew.

    Raises:
        UserError: everything that can be known to be wrong before training starts.
    """

    def __init__(self, recipe: Recipe, out: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.recipe, self.out = recipe, out
        self._check_recipe()
        self._open_folder(resume, overwrite)

    def stage_folder(self, k: int) -> Path:
        """Where stage `k` leaves its model."""
        return self.out / "stages" / f"{k}-{self.recipe.stage_names[k]}"

    @property
    def finished(self) -> int:
        """Number of finished stages."""
        done = 0
        while done < len(self.recipe.stages) and self.stage_folder(done).is_dir():
            done += 1
        return done

    @property
    def model_folder(self) -> Path:
        """The last finished stage's model."""
        if self.finished == 0:
            raise ModelError(f"{self.out} has not finished a stage yet. Continue it with --resume.")
        return self.stage_folder(self.finished - 1)

    def train(self) -> Path:
        """Run every stage that is not finished; returns the final model's folder.

        Raises:
            Interrupted: stopped by a signal, after saving.
        """
        recipe = self.recipe
        # a process may train several recipes; the library keeps the first one's precision for good
        AcceleratorState._reset_state(reset_partial_state=False)
        accelerator = Accelerator(
            mixed_precision="bf16" if recipe.precision == "bf16" else "no",
            log_with=list(recipe.trackers) or None,
            project_dir=str(self.out),
        )
        if recipe.trackers:
            accelerator.init_trackers("tensorboard" if recipe.trackers == ("tensorboard",) else recipe.name)
        log = RunLog(self.out, accelerator, main=accelerator.is_main_process)
        try:
            for k in range(self.finished, len(recipe.stages)):
                self._train_stage(k, accelerator, log)
        finally:
            accelerator.end_training()
        return self.model_folder

    # -- one stage -----------------------------------------------------------------------------------------------------

    def _train_stage(self, k: int, accelerator: Accelerator, log: RunLog) -> None:
        config, name = self.recipe.stages[k], self.recipe.stage_names[k]
        # weights and dropout of a stage do not depend on what ran before it
        torch.manual_seed(_stage_seed(self.recipe.seed, k))
        model, processor = self._start_of(k)
        torch.manual_seed(_stage_seed(self.recipe.seed, k) + 1)
        data = self._stage_data(config, processor)
        stage = Stage(config, name, model, data, accelerator, log, self.out / "checkpoints")
        stage.resume()
        order = {each: i for i, each in enumerate(self.recipe.stage_names)}
        log.forget_after(order, name, stage.step)
        log.start_stage(sum(earlier.steps for earlier in self.recipe.stages[:k]))
        stage.run()
        if accelerator.is_main_process:
            self._save_stage(k, model, processor)
            for leftover in (self.out / "checkpoints").glob(f"{name}-*"):
                shutil.rmtree(leftover)
        accelerator.wait_for_everyone()
        accelerator.free_memory()

    def _start_of(self, k: int) -> tuple[EttForConditionalGeneration | VisionTokenizer, EttProcessor]:
        """The model that stage `k` trains, from the stage before it or from the recipe."""
        spec = self.recipe.model
        is_tokenizer_stage = self.recipe.stages[k].stage == "tokenizer"
        if k == 0 and spec.init is not None:
            return start_from(find_weights(spec.init), spec, tokenizer_only=is_tokenizer_stage)
        if k > 0 and self.recipe.stages[k - 1].stage != "tokenizer":
            return load_saved(self.stage_folder(k - 1))
        if k > 0:
            tokenizer = VisionTokenizer.from_pretrained(self.stage_folder(k - 1))
        else:
            tokenizer = build_vision_tokenizer(spec)
        if is_tokenizer_stage:
            # text plays no part in this stage, so any text tokenizer prepares its batches
            return tokenizer, build_processor(spec, byte_tokenizer(), tokenizer)
        return build_model(spec, tokenizer)

    def _stage_data(self, config: StageConfig, processor: EttProcessor) -> StageData:
        mixture = build_mixture(config.data or self.recipe.data, self.recipe.seed)
        evaluation = self.recipe.evaluation
        held = validation_mixture(
            evaluation.data or config.data or self.recipe.data, evaluation.split, self.recipe.seed
        )
        validation = encode_all(held, evaluation.limit, processor, config.max_length) if held is not None else []
        return StageData(mixture, validation, processor, self.recipe.num_workers)

    def _save_stage(self, k: int, model: nn.Module, processor: EttProcessor) -> None:
        target = self.stage_folder(k)
        work = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        if isinstance(model, VisionTokenizer):
            model.save_pretrained(work)
            # the size it was trained at, for whoever uses the tokenizer alone
            processor.image_processor.save_pretrained(work)
        else:
            assert isinstance(model, EttForConditionalGeneration)
            model.save_pretrained(work)
            processor.save_pretrained(work)
        publish(work, target)

    # -- before anything starts ----------------------------------------------------------------------------------------

    def _check_recipe(self) -> None:
        """Find out now what would fail later: data that cannot be opened, paths without a model, sizes that do not divide."""
        for stage in self.recipe.stages:
            build_mixture(stage.data or self.recipe.data, self.recipe.seed)
            split_batch(stage, int(os.environ.get("WORLD_SIZE", "1")))
        spec = self.recipe.model
        for path in (spec.init, spec.vision_tokenizer.get("path")):
            if path is not None:
                find_weights(path)
        if spec.init is None and "path" not in spec.vision_tokenizer:
            with torch.device("meta"):
                build_vision_tokenizer(spec)

    def _open_folder(self, resume: bool, overwrite: bool) -> None:
        exists = self.out.exists()
        if exists and not self.out.is_dir():
            raise RecipeError(f"{self.out} is a file; give a folder with --out.")
        occupied = exists and any(self.out.iterdir())
        if occupied and not (resume or overwrite):
            raise RecipeError(
                f"The output folder {self.out} already exists. Continue it with --resume, replace it with --overwrite, or "
                "choose another with --out."
            )
        if occupied and overwrite:
            if not (self.out / RECIPE_NAME).is_file():
                raise RecipeError(
                    f"{self.out} is not a run's folder (no {RECIPE_NAME}), so it is not deleted. Empty it yourself."
                )
            shutil.rmtree(self.out)
        written = self.out / RECIPE_NAME
        if written.is_file():
            self._check_same(written)
        self.out.mkdir(parents=True, exist_ok=True)
        work = written.with_suffix(".tmp")
        work.write_text(dump_recipe(self.recipe), encoding="utf-8")
        work.replace(written)

    def _check_same(self, written: Path) -> None:
        """A resumed run continues the same recipe; anything else would not be what an uninterrupted run gives."""
        before, now = dump_recipe(load_recipe(written)).splitlines(), dump_recipe(self.recipe).splitlines()
        changed = [line.strip() for line in now if line not in before]
        if before != now:
            shown = "; ".join(changed[:3]) or "a key was removed"
            raise RecipeError(
                f"{self.out} was started with another recipe (now: {shown}). Resume it with its own: "
                f"ett train {written} --out {self.out} --resume. Or start anew with --overwrite."
            )


def validation_mixture(configs: Sequence[SourceConfig], split: str, seed: int) -> Mixture | None:
    """The same sources for `split`; None where none of them has such a split (manifests have no splits of their own)."""
    built_in = [config for config in configs if config.source != "manifest"]
    if not built_in:
        return None
    return Mixture([config.with_split(split) for config in built_in], [config.weight for config in built_in], seed)


def start_from(
    directory: Path, spec: ModelSpec, tokenizer_only: bool = False
) -> tuple[EttForConditionalGeneration | VisionTokenizer, EttProcessor]:
    """A saved model as the start of a run, with the recipe's visual input and adapters."""
    model, processor = load_saved(directory)
    if tokenizer_only:
        tokenizer: VisionTokenizer = model.vision_tokenizer
        return tokenizer, processor
    if spec.visual_input == "index" and model.index_embedding is None:
        model.config.visual_input = "index"
        codes = model.vision_tokenizer.quantize.codebook.detach().clone()
        model.index_embedding = nn.Embedding.from_pretrained(codes, freeze=False)
        if spec.index_init == "random":
            nn.init.normal_(model.index_embedding.weight)
    if spec.visual_input == "embedding" and model.index_embedding is not None:
        raise ModelError(f"The model in {directory} reads indices; set model.visual_input: index in the recipe.")
    return model, processor


def resolve_model_folder(path: Path) -> Path:
    """The folder that holds weights: `path` itself, or the last finished stage of the run in it.

    Raises:
        ModelError: there is neither.
    """
    if not path.exists():
        raise ModelError(f"There is no {path}. Give a folder written by `ett train` or save_pretrained.")
    if not (path / RECIPE_NAME).is_file():
        return path
    stages = sorted((p for p in (path / "stages").glob("[0-9]*-*")), key=lambda p: int(p.name.split("-")[0]))
    if not stages:
        raise ModelError(
            f"The run in {path} has not finished a stage yet. Continue it with `ett train {path / RECIPE_NAME} --out {path} "
            "--resume`."
        )
    return stages[-1]


def report_interruption(error: Interrupted, words: Sequence[str], out: Path, command: str = "train") -> None:
    """Tell how to go on: the same command, with ``--resume``."""
    line = " ".join(
        ["ett", command, *(shlex.quote(word) for word in words), "--out", shlex.quote(str(out)), "--resume"]
    )
    print(
        f"\nStopped after step {error.step}; everything up to there is saved. Continue with:\n  {line}", file=sys.stderr
    )


def train_recipe(recipe: Recipe, out: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Run a recipe into the folder `out`; returns the final model's folder (see `Run`)."""
    return Run(recipe, Path(out), resume=resume, overwrite=overwrite).train()


def load_model(path: str | Path) -> tuple[EttForConditionalGeneration, EttProcessor]:
    """(model in evaluation mode, processor) from a run's folder or a saved model's.

    Raises:
        ModelError: no model there, a damaged file, or weights of another architecture.
    """
    return load_saved(resolve_model_folder(Path(path)))


def _stage_seed(seed: int, k: int) -> int:
    return seed * 1_000_003 + k * 1_009


__all__ = ["Interrupted", "Run", "load_model", "report_interruption", "resolve_model_folder", "train_recipe"]

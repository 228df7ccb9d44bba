"""A run: the stages of a recipe one after another, in one folder, resumable at any moment.

    OUT/run.json, OUT/recipe.yaml   that this is a run's folder; the resolved recipe
    OUT/log.jsonl, tensorboard/     what happened
    OUT/checkpoints/<stage>-<step>  training state of the stage under way
    OUT/codes/<k>-<name>/           code cache of the stage under way, where it reads one
    OUT/stages/<k>-<name>/          the finished model (or tokenizer) of stage k, as save_pretrained writes it

A stage starts from the previous stage's folder on disk, always, so a resumed run and an uninterrupted one take the same
path. The folder appears whole or not at all.
"""

from __future__ import annotations

import gc
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, gather_object

from ett.allocator import keep_freed_memory
from ett.config import to_mapping
from ett.data.mixture import STORED, Mixture, SourceConfig, build_mixture
from ett.errors import DataError, RecipeError
from ett.evaluate.run_folder import resolve_model_folder
from ett.evaluate.sources import NamedSources, configured_sources, held_back
from ett.experiments.folder import RECIPE_NAME, RunFolder
from ett.experiments.recipe import EvaluationConfig, Recipe, load_recipe
from ett.model.build import (
    ModelSpec,
    build_model,
    build_processor,
    build_vision_tokenizer,
    check_model,
    start_from,
)
from ett.model.ett import EttForConditionalGeneration
from ett.model.loading import find_weights
from ett.model.loading import load_model as load_saved
from ett.model.processing import EttProcessor
from ett.model.text import byte_tokenizer
from ett.signals import noted_signals
from ett.tokenizers import VisionTokenizer
from ett.train.cached import cached_data
from ett.train.checkpoint import checkpoint_folders, publish
from ett.train.critics import Critics
from ett.train.failures import explained
from ett.train.feed import StageData, encode_all, split_batch
from ett.train.inheritance import Inheritance, find_discriminator, read_inheritance
from ett.train.log import RunLog
from ett.train.loop import Interrupted, Stage
from ett.train.stages import StageConfig, check_parts
from ett.types import IGNORE_INDEX

PROBED_DRAWS = 16
"""Examples of each stage that are looked at before anything trains."""
RANK_SEEDS = 15_485_863
"""Between the seeds of two ranks."""

FRESH_DISCRIMINATOR = (
    "A trained tokenizer hears a fresh discriminator from the first step, whose judgement is noise yet. Let it learn first: "
    "discriminator.generator_start, say 500."
)

Start = tuple[EttForConditionalGeneration | VisionTokenizer, EttProcessor, StageData]


class Run:
    """A recipe in an output folder.

    Args:
        recipe: what to run.
        out: the folder; nothing in it changes before the first stage is ready to train.
        resume: continue what is there. overwrite: delete the run that is there and start anew.

    Raises:
        UserError: everything that can be known to be wrong before training starts.
    """

    def __init__(self, recipe: Recipe, out: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.recipe = recipe
        self.folder = RunFolder(out, recipe, resume=resume, overwrite=overwrite)
        self._check_recipe()

    def train(self) -> Path:
        """Run every stage that is not finished; returns the final model's folder.

        Raises:
            Interrupted: stopped by a signal, after saving.
            UserError: what the user can mend, a full disk or a lost process included.
        """
        accelerator = self._accelerator()
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        with explained(self.folder.path, accelerator.num_processes):
            return self._train(accelerator)

    def _train(self, accelerator: Accelerator) -> Path:
        recipe, folder = self.recipe, self.folder
        first = 0 if folder.overwrite else folder.finished
        start = self._start(first) if first < len(recipe.stages) else None
        if accelerator.is_main_process:
            folder.open()
            # a run that was killed between a stage's end and here
            for finished in range(first):
                self._clear_up(finished)
        accelerator.wait_for_everyone()
        if recipe.trackers:
            accelerator.init_trackers("tensorboard" if recipe.trackers == ("tensorboard",) else recipe.name)
        log = RunLog(folder.path, accelerator, main=accelerator.is_main_process)
        try:
            for k in range(first, len(recipe.stages)):
                self._train_stage(k, start if start is not None else self._start(k), accelerator, log)
                start = None
        finally:
            accelerator.end_training()
        return folder.model

    # -- one stage -----------------------------------------------------------------------------------------------------

    def _start(self, k: int) -> Start:
        """What stage `k` trains and reads, before its first step."""
        # weights and dropout of a stage do not depend on what ran before it
        torch.manual_seed(_stage_seed(self.recipe.seed, k))
        model, processor = self._model_of(k)
        if isinstance(model, EttForConditionalGeneration):
            check_parts(model, self.recipe.stages[k])
        data = self._stage_data(self.recipe.stages[k], model, processor)
        return model, processor, data

    def _train_stage(self, k: int, start: Start, accelerator: Accelerator, log: RunLog) -> None:
        config, name = self.recipe.stages[k], self.recipe.stage_names[k]
        model, processor, data = start
        if config.cached_codes and isinstance(model, EttForConditionalGeneration):
            sources, codes = config.data or self.recipe.data, self.folder.codes(k)
            data = cached_data(data, sources, config, name, model.vision_tokenizer, codes, accelerator, log)
        # every rank drops out units of its own
        torch.manual_seed(_stage_seed(self.recipe.seed, k) + 1 + RANK_SEEDS * accelerator.process_index)
        inherited = self._inheritance(k)
        checkpoints, sharding = self.folder.checkpoints, self.recipe.sharding
        stage = Stage(config, name, model, data, accelerator, log, checkpoints, sharding, inherited)
        stage.resume()
        order = {each: i for i, each in enumerate(self.recipe.stage_names)}
        log.forget_after(order, name, stage.step, stage.undone.validation)
        if stage.step == 0 and stage.critics is not None and inherited is not None:
            log.inherited(name, inherited.source)
        spec = self.recipe.model
        trained = k > 0 or spec.init is not None or "path" in spec.vision_tokenizer
        if (
            stage.step == 0
            and config.plays
            and trained
            and inherited is None
            and not config.discriminator.generator_start
        ):
            log.warning(name, 0, "fresh_discriminator", FRESH_DISCRIMINATOR)
        if stage.step > 0:
            log.resumed(name, stage.step)
        log.start_stage(sum(earlier.steps for earlier in self.recipe.stages[:k]))
        # a signal that comes when the last step is done waits until the stage's model is saved
        with noted_signals(second_one_stops=True) as received:
            stage.run(received)
            if accelerator.is_main_process:
                self._save_stage(k, model, processor, stage.critics)
                self._clear_up(k)
            accelerator.wait_for_everyone()
        accelerator.free_memory()
        # the stage and its optimizer hold on to each other, and would be held while the next stage's model is built
        del stage
        gc.collect()
        # together: a rank that had none would wait for the others in the next stage
        number = max(gather_object([received[0] if received else 0]))
        if number:
            raise Interrupted(config.steps, number)

    def _inheritance(self, k: int, *, own: bool = True) -> Inheritance | None:
        """The discriminator that stage `k` goes on with: its run's `own`, of an earlier stage, else one that came with the
        recipe's model.

        Raises:
            ModelError: its file is damaged. RecipeError: it has another shape than the stage's.
        """
        config = self.recipe.stages[k]
        if not config.plays or not config.discriminator.inherit:
            return None
        spec = self.recipe.model
        given = spec.init or spec.vision_tokenizer.get("path")
        found = find_discriminator(self.folder.stage(k - 1)) if own and k > 0 else None
        if found is None and given is not None:
            found = find_discriminator(resolve_model_folder(find_weights(given)))
        if found is None:
            return None
        inherited = read_inheritance(found)
        inherited.check(config.discriminator)
        return inherited

    def _clear_up(self, k: int) -> None:
        """Drop what only the training of stage `k` needed."""
        for leftover in checkpoint_folders(self.folder.checkpoints, self.recipe.stage_names[k]):
            shutil.rmtree(leftover)
        if self.recipe.stages[k].cached_codes is True:
            shutil.rmtree(self.folder.codes(k), ignore_errors=True)

    def _model_of(self, k: int) -> tuple[EttForConditionalGeneration | VisionTokenizer, EttProcessor]:
        """The model that stage `k` trains, from the stage before it or from the recipe."""
        spec = self.recipe.model
        if k == 0 and spec.init is not None:
            return start_from(resolve_model_folder(find_weights(spec.init)), spec)
        if k > 0 and self.recipe.stages[k - 1].stage != "tokenizer":
            return load_saved(self.folder.stage(k - 1))
        tokenizer = (
            build_vision_tokenizer(with_tokenizer_folder(spec))
            if k == 0
            else VisionTokenizer.from_pretrained(self.folder.stage(k - 1))
        )
        if self.recipe.stages[k].stage == "tokenizer":
            # text plays no part in this stage, so any text tokenizer prepares its batches
            return tokenizer, build_processor(spec, byte_tokenizer(), tokenizer)
        return build_model(spec, tokenizer)

    def _stage_data(
        self, config: StageConfig, model: EttForConditionalGeneration | VisionTokenizer, processor: EttProcessor
    ) -> StageData:
        bad = self.recipe.max_bad_samples
        mixture = build_mixture(config.data or self.recipe.data, self.recipe.seed, tolerant=bad > 0)
        max_length = config.max_length
        if isinstance(model, EttForConditionalGeneration) and max_length is None:
            max_length = getattr(model.config.text_config, "max_position_embeddings", None)
        _check_examples(mixture, config, processor, max_length)
        evaluation = self.recipe.evaluation
        held = validation_mixture(evaluation, config.data or self.recipe.data, self.recipe.seed)
        validation = []
        if held is not None:
            count = min(evaluation.limit, sum(map(len, held.sources)))
            validation = encode_all(held, count, processor, max_length)
        return StageData(mixture, validation, processor, self.recipe.num_workers, max_length, bad)

    def _save_stage(
        self,
        k: int,
        model: EttForConditionalGeneration | VisionTokenizer,
        processor: EttProcessor,
        critics: Critics | None,
    ) -> None:
        target = self.folder.stage(k)
        work = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            if isinstance(model, VisionTokenizer):
                model.save_pretrained(work)
                # the size it was trained at, for whoever uses the tokenizer alone
                processor.image_processor.save_pretrained(work)
            else:
                # another trainer that loads the model sees the objective that it was trained on
                if self.recipe.stages[k].stage != "decoder":
                    model.config.losses = to_mapping(self.recipe.stages[k].loss_config)
                model.save_pretrained(work)
                processor.save_pretrained(work)
            if critics is not None:
                critics.save(work)
            publish(work, target)
        finally:
            # published, it is gone; left half done by a full disk, it takes room
            shutil.rmtree(work, ignore_errors=True)

    # -- before anything starts ----------------------------------------------------------------------------------------

    def _accelerator(self) -> Accelerator:
        for library in ("DEEPSPEED", "FSDP"):
            if os.environ.get(f"ACCELERATE_USE_{library}", "").lower() == "true":
                raise RecipeError(
                    f"The launcher's configuration asks for {library}, and the loop of this package divides weights by itself. "
                    "Set sharding: fsdp in the recipe, and start it with torchrun, or with accelerate and neither of the two; "
                    "or train with DeepSpeed as examples/deepspeed_zero.py does."
                )
        # a process may train several recipes; the library keeps the first one's precision for good
        AcceleratorState._reset_state(reset_partial_state=False)
        try:
            limit = InitProcessGroupKwargs(timeout=timedelta(seconds=self.recipe.rank_timeout))
            return Accelerator(
                # without a word, several processes on CPUs would each take themselves for the only one
                cpu=not torch.accelerator.is_available(),
                mixed_precision="bf16" if self.recipe.precision == "bf16" else "no",
                log_with=list(self.recipe.trackers) or None,
                project_dir=str(self.folder.path),
                kwargs_handlers=[limit],
            )
        except ValueError as error:
            raise RecipeError(f"This machine cannot run the recipe's trackers or precision: {error}") from error

    def _check_recipe(self) -> None:
        """Find out now what would fail after hours: data that cannot be opened, parts that do not exist or fit."""
        if self.recipe.starts_from is not None:
            raise RecipeError(
                f"This arm starts from what the arm {self.recipe.starts_from!r} ended with, so it runs in a comparison alone: "
                "`ett ablate`. Or set model.init or model.vision_tokenizer.path to that arm's folder."
            )
        for stage in self.recipe.stages:
            build_mixture(stage.data or self.recipe.data, self.recipe.seed, tolerant=self.recipe.max_bad_samples > 0)
            split_batch(stage, int(os.environ.get("WORLD_SIZE", "1")))
            measured = held_back(self.recipe.evaluation.data, stage.data or self.recipe.data)
            if stage.ends_with == "best" and not measured:
                raise RecipeError(
                    'ends_with "best" needs validation examples; name some that are held back in evaluation.data: a manifest, '
                    "or a built-in source."
                )
        validation_mixture(self.recipe.evaluation, self.recipe.data, self.recipe.seed)
        check_model(with_tokenizer_folder(self.recipe.model))
        self._check_discriminators()

    def _check_discriminators(self) -> None:
        """Each stage that plays the game must be able to go on with the discriminator of the one before."""
        playing = [k for k, stage in enumerate(self.recipe.stages) if stage.plays]
        for before, k in pairwise(playing):
            one, other = (self.recipe.stages[i].discriminator for i in (before, k))
            if other.inherit and (one.channels, one.strided_layers) != (other.channels, other.strided_layers):
                names = self.recipe.stage_names
                raise RecipeError(
                    f"Stage {names[k]} goes on with the discriminator of stage {names[before]}, which has channels "
                    f"{one.channels} and strided_layers {one.strided_layers}, and asks for {other.channels} and "
                    f"{other.strided_layers}. Give both the same, or set stages.{names[k]}.discriminator.inherit to false."
                )
        if playing and (self.folder.overwrite or self.folder.finished <= playing[0]):
            # what an earlier run left here is overwritten
            self._inheritance(playing[0], own=not self.folder.overwrite)


def validation_mixture(evaluation: EvaluationConfig, trained: Sequence[SourceConfig], seed: int) -> Mixture | None:
    """What is measured during training on `trained` (`ett.evaluate.sources.held_back`), stored sources whole; None where there
    is nothing."""
    configs = held_back(evaluation.data, trained)
    if not configs:
        return None
    sources = [config.build() if config.source in STORED else config.with_split(evaluation.split) for config in configs]
    return Mixture(sources, [config.weight for config in configs], seed)


def with_tokenizer_folder(spec: ModelSpec) -> ModelSpec:
    """`spec`, whose vision tokenizer's path may be a run's folder or a shipped name, with the folder that holds its weights.

    Raises:
        ModelError: there is none.
    """
    if spec.init is not None or "path" not in spec.vision_tokenizer:
        return spec
    folder = resolve_model_folder(find_weights(spec.vision_tokenizer["path"]))
    return replace(spec, vision_tokenizer={**spec.vision_tokenizer, "path": str(folder)})


def recipe_of(path: Path) -> Recipe | None:
    """The recipe of the run in folder `path`, or None where `path` is a model's own folder."""
    return load_recipe(path / RECIPE_NAME) if (path / RECIPE_NAME).is_file() else None


def evaluation_sources(recipe: Recipe, split: str) -> NamedSources:
    """What `recipe` is measured on (`ett.evaluate.sources.held_back`): built-in sources of `split`, stored ones whole.

    Raises:
        DataError: nothing is held back, a split that no built-in source has, or data that cannot be used.
    """
    configs = held_back(recipe.evaluation.data, recipe.data)
    if not configs:
        raise DataError(
            "The recipe trains on stored data alone, which have no held-out split, so there is nothing to measure on. Name "
            "what is held back: evaluation.data=[{source: manifest, path: held.jsonl}] in the recipe, or of `ett evaluate` "
            "--data held.jsonl (or --split validation, for the package's own data)."
        )
    return configured_sources(configs, split)


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


def _check_examples(mixture: Mixture, config: StageConfig, processor: EttProcessor, max_length: int | None) -> None:
    """The first draws can be encoded, and hold what the stage learns from.

    Raises:
        DataError: an example that cannot be used, or no pictures or no answers among them.
    """
    encoded = encode_all(mixture, PROBED_DRAWS, processor, max_length)
    if not any(item.num_images for item in encoded):
        raise DataError(
            f"Stage {config.stage}: none of the first {PROBED_DRAWS} examples has a picture. Check the data."
        )
    if config.stage != "tokenizer" and all(label == IGNORE_INDEX for item in encoded for label in item.labels):
        raise DataError(
            f"Stage {config.stage}: none of the first {PROBED_DRAWS} examples has an answer (an assistant or gpt turn), so "
            "there is nothing to learn. Check the data."
        )


def _stage_seed(seed: int, k: int) -> int:
    return seed * 1_000_003 + k * 1_009


__all__ = ["Interrupted", "Run", "load_model", "report_interruption", "resolve_model_folder", "train_recipe"]

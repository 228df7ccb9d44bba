"""The training loop, the only one: every stage, every loss, from one process to many."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from ett.losses.joint import whole_loss
from ett.model.ett import EttForConditionalGeneration
from ett.model.packing import check_packable
from ett.model.processing import Encoded
from ett.signals import noted_signals
from ett.tokenizers import VisionTokenizer
from ett.train.average import WeightAverage
from ett.train.balance import GradientBalance
from ett.train.checkpoint import Stateful, random_state, restore_random_state
from ett.train.compilation import compile_parts
from ett.train.critics import Critics
from ett.train.feed import BadSamples, StageData, split_batch, steps_of
from ett.train.health import BackOffs, CodebookCollapse, HealthMonitor, fixed_batches
from ett.train.inheritance import Inheritance
from ett.train.log import RunLog, progress
from ett.train.measures import undisturbed
from ett.train.objectives import (
    DecoderObjective,
    JointObjective,
    Losses,
    ObjectiveOutput,
    Shares,
    TokenizerObjective,
    caption_part,
)
from ett.train.optim import build_optimizer, schedule_factor, set_learning_rates
from ett.train.placing import check_placeable, place_codes
from ett.train.saving import Saver
from ett.train.sharding import Sharding, gathered, merge, release, shard, whole
from ett.train.stages import (
    StageConfig,
    caption_reach,
    check_reach,
    checkpoint_activations,
    modules_by_part,
    set_trainable,
    train_decoder,
    train_mode,
)
from ett.train.validation import Measured, Undone, mean_terms
from ett.types import Batch

WHOLE = ("loss", "caption_loss", "soft_caption_loss", "image_loss", "alpha")
"""Terms of a micro-batch that are its part of the step's already; the others count by its share of the pictures."""


class Interrupted(Exception):
    """The stage was stopped by a signal, after saving.

    Attributes:
        step: finished steps that are saved. signal_number: what stopped it.
    """

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step, self.signal_number = step, signal_number


class Stage:
    """One stage from its first step, or from its last checkpoint, to its end."""

    def __init__(
        self,
        config: StageConfig,
        name: str,
        model: EttForConditionalGeneration | VisionTokenizer,
        data: StageData,
        accelerator: Accelerator,
        log: RunLog,
        checkpoints: Path,
        sharding: Sharding = "ddp",
        inherited: Inheritance | None = None,
    ) -> None:
        if config.quantize_after:
            check_placeable(model)
        self.config, self.name, self.data, self.log = config, name, data, log
        self.accelerator, self.checkpoints = accelerator, checkpoints
        self.model = model.to(accelerator.device)
        self.losses = config.loss_config
        objective: nn.Module
        if isinstance(model, VisionTokenizer):
            model.requires_grad_(True).train()
            objective = TokenizerObjective(model)
            parts: dict[str, nn.Module] = {"vision_tokenizer": model}
        elif config.stage == "decoder":
            model.requires_grad_(False).eval()
            train_decoder(model.vision_tokenizer)
            objective = DecoderObjective(model.vision_tokenizer)
            parts = {"vision_tokenizer": model.vision_tokenizer}
        else:
            set_trainable(model, config.parts, words=config.stage != "gen")
            train_mode(model, config.parts)
            if config.packing:
                check_packable(model.language_model)
            if config.gradient_checkpointing:
                checkpoint_activations(model.language_model)
            objective = JointObjective(model)
            parts = modules_by_part(model)
        if config.compile:
            compile_parts(self.model)
        self.micro_batch, self.accumulation = split_batch(config, accelerator.num_processes)
        self.step = 0
        self.critics: Critics | None = None
        if Critics.wanted(self.losses):
            rates = config.optimizer.learning_rates
            peak = rates.get("vision_tokenizer", config.optimizer.learning_rate)
            self.critics = Critics(self.losses, config.discriminator, peak, accelerator, self._tokenizer, inherited)
        # before a checkpoint is loaded: drift is measured from the weights that the stage began with
        self.health = self._health_monitor()
        sharded = sharding == "fsdp" and accelerator.num_processes > 1
        self.objective: nn.Module
        self.objective = shard(objective, model, accelerator) if sharded else accelerator.prepare(objective)
        self.optimizer = accelerator.prepare(build_optimizer(parts, config.optimizer))
        self.balance: GradientBalance | None = None
        if config.balance is not None:
            self.balance = GradientBalance(config.balance, self.losses.tokenizer_weight)
        self.average = None if config.ema_decay is None else WeightAverage(self.model, config.ema_decay)
        self.back_offs = BackOffs(config.health, name, log)
        self.bad_samples = BadSamples(data, name, log, accelerator)
        self.undone = Undone()
        optional = ("back_offs", "bad_samples", "undone")
        optimizer = self.optimizer.optimizer
        self.saver = Saver(checkpoints, name, self.model, optimizer, self._extras, optional, accelerator)
        self._received: list[int] = []

    @property
    def _tokenizer(self) -> VisionTokenizer:
        return self.model if isinstance(self.model, VisionTokenizer) else self.model.vision_tokenizer

    @property
    def _extras(self) -> dict[str, Stateful]:
        """What a checkpoint holds beside weights, optimizer and random states."""
        extras: dict[str, Stateful] = {"back_offs": self.back_offs, "bad_samples": self.bad_samples}
        extras["undone"] = self.undone
        if self.critics is not None:
            extras["critics"] = self.critics
        if self.balance is not None:
            extras["balance"] = self.balance
        if self.average is not None:
            extras["average"] = self.average
        return extras

    def resume(self) -> None:
        """Continue from this stage's newest whole checkpoint, if there is one.

        Raises:
            ModelError: there are checkpoints, but none is whole.
        """
        self.step = self.saver.resume(self._tell_damage)

    def save(self, validation_loss: float | None = None) -> None:
        """Begin to write a checkpoint of the steps finished so far.

        Raises:
            CodebookCollapse: there is nothing good to save, and the recipe stops on that.
            CheckpointError: the checkpoint before could not be written.
        """
        if self.health is not None:
            with gathered(self.objective):
                self.health.before_saving(self.step)
        self.saver.save(self.step, validation_loss)

    def run(self, received: list[int] | None = None) -> None:
        """Train to the last step; of a sharded model, the first rank then has the whole.

        Args:
            received: where the caller notes signals (`noted_signals`), until the stage's model is saved; None notes them here.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the last finished step was saved, unless it was left out.
            NonFiniteLoss, CodebookCollapse: as the recipe's `health` says.
            CheckpointError: a checkpoint could not be written.
            DataError: an example that cannot be used, or more of them than the recipe allows.
        """
        config = self.config
        bar = tqdm(total=config.steps, initial=self.step, desc=self.name, unit="step", disable=None, dynamic_ncols=True)
        signals = noted_signals(second_one_stops=True) if received is None else nullcontext(received)
        with signals as self._received, bar, self.saver:
            while True:
                try:
                    stopped, validation_loss = self._take_steps(bar)
                    break
                except CodebookCollapse as collapse:
                    self._turn_back(collapse)
                    bar.update(self.step - bar.n)
            if stopped or self.step < config.steps:
                if not self.back_offs.in_doubt:
                    self.save(validation_loss)
                self.saver.settle()
                raise Interrupted(self.saver.saved, self._received[0] if self._received else signal.SIGTERM)
            if config.ends_with == "best":
                self.log.ends_with(self.name, self.step, self.saver.restore_best(self._tell_damage))
        if self.average is not None:
            self.average.apply()
        merge(self.model, self.accelerator.is_main_process)

    def _take_steps(self, bar: tqdm[Any]) -> tuple[bool, float | None]:
        """Train from the step that is reached to the last one, or until a signal comes; returns what `_look_back` does."""
        config = self.config
        self.bad_samples.begin(self.step)
        started, seen = time.monotonic(), 0
        stopped, validation_loss = False, None
        if self.undone.validation:
            stopped, validation_loss = self._look_back()
            self._keep(validation_loss)
        for fed in () if stopped else steps_of(self.data, config, self.step, self.accelerator, self._stopped_alone):
            self.bad_samples.note(self.step, fed.skipped)
            if self.step == 0 and config.stage != "decoder" and isinstance(self.model, EttForConditionalGeneration):
                self._check_freezing(fed.micro_batches)
            if config.quantize_after and self.step == config.quantize_after:
                self._place_codes()
            taken = self._train_step(fed.micro_batches)
            if taken is None:
                return True, validation_loss
            losses, norm = taken
            self.step += 1
            seen += config.batch_size
            bar.update()
            last = self.step == config.steps
            if self.step % config.log_every == 0 or last or self.step == 1:
                values = {name: float(value) for name, value in losses.items()}
                rate = seen / (time.monotonic() - started)
                self.log.step(self.name, self.step, config.steps, values, norm, self._rates(), rate)
                bar.set_postfix_str(progress(values, rate, self.log.health_now))
            stopped, validation_loss = self._look_back()
            if stopped:
                break
            self._keep(validation_loss)
        return stopped, validation_loss

    def _turn_back(self, collapse: CodebookCollapse) -> None:
        """Go on from the last checkpoint, which holds none, at lower rates; where the recipe says so and there is one."""
        if self.config.health.on_collapse != "back_off" or self.back_offs.spent or not self.saver.saved:
            raise collapse
        at, lowered = self.step, self.back_offs.state_dict()
        self.saver.settle()
        self.resume()
        self.back_offs.load_state_dict(lowered)
        self.log.forget_after({self.name: 0}, self.name, self.step)
        self.back_offs.turn_back(at, self.step)
        assert self.health is not None
        self.health.turned_back()

    def _look_back(self) -> tuple[bool, float | None]:
        """Validate the last step and measure the tokenizer's health, where they are due.

        Returns:
            (whether a signal came, the loss that weights are chosen by, None where there is none).
        """
        config = self.config
        every = config.validate_every
        validates = self.step == config.steps or (every is not None and self.step % every == 0)
        measured = self.validate() if validates else {}
        self.undone.validation = measured is None
        if measured is None:
            return True, None
        self.log.validation(self.name, self.step, measured)
        if self.health is not None and self.health.due(self.step, config.steps, validates):
            with gathered(self.objective):
                self.health.measure(self.step)
        # without codes it is another loss, and weights that no stage may end with
        return self._stop_requested(), measured.get("loss") if self._codes_are_placed else None

    def _keep(self, validation_loss: float | None) -> None:
        """Save the last step, where a checkpoint is due or the stage may end with it."""
        every = self.config.checkpoint_every
        due = every is not None and self.step % every == 0 and self.step < self.config.steps
        if (due or self._is_best(validation_loss)) and not self.back_offs.in_doubt:
            self.save(validation_loss)

    @torch.no_grad()
    def validate(self) -> dict[str, float] | None:
        """Every loss term on the validation examples, by the names used in training; modes and random states are left alone.
        None where a signal came meanwhile.

        Processes share the work, a micro-batch at a time. Each term is a mean over all of its tokens or pictures, and ``loss``
        their weighted sum. The adversarial term is not in that sum: what it says changes with the discriminator. Where weights
        are averaged, the average is measured: it is what the stage ends with.
        """
        if not self.data.validation:
            return {}
        starts = range(0, len(self.data.validation), self.micro_batch)
        batches = [self.data.validation[start : start + self.micro_batch] for start in starts]
        with undisturbed(self.objective), nullcontext() if self.average is None else self.average.applied():
            means = mean_terms(batches, self._measured, self.accelerator, self._stop_requested)
            release(self.objective)
        if means is None:
            return None
        return {"loss": whole_loss(means, replace(self.losses, adversarial_weight=0.0), self._alpha), **means}

    def _measured(self, items: Sequence[Encoded]) -> Measured:
        batch = self._collate(items)
        supervised, drawn = batch.num_supervised, batch.num_drawn
        shares = Shares(float(max(1, supervised)), 1.0, float(max(1, drawn)))
        _, losses, reconstruction = self._objective(batch, shares, quantized=self._codes_are_placed)
        if self.critics is not None and reconstruction is not None and len(reconstruction) > 0:
            losses |= self.critics.measure(reconstruction, batch.pixel_values[: len(reconstruction)], self.step)
        return Measured.of(losses, batch)

    # -- one step ------------------------------------------------------------------------------------------------------

    def _train_step(self, micro_batches: list[Batch]) -> tuple[Losses, float] | None:
        """(terms averaged over the step, gradient norm before clipping); None where a signal came between two micro-batches:
        everything is then as it was before the step, which may be long."""
        world = self.accelerator.num_processes
        before = random_state() if len(micro_batches) > 1 else None
        counts = [
            sum(batch.num_supervised for batch in micro_batches),
            sum(batch.num_images for batch in micro_batches),
            sum(batch.num_drawn for batch in micro_batches),
        ]
        if world > 1:
            counts = self.accelerator.reduce(torch.tensor(counts, device=self.accelerator.device)).tolist()
        tokens, images, drawn = (max(1, count) / world for count in counts)
        totals: Losses = {}
        if self.balance is not None:
            self.losses = replace(self.losses, tokenizer_weight=self.balance.alpha)
        revocable = self.back_offs.allowed or before is not None
        statistics = self.critics.statistics() if self.critics is not None and revocable else []
        for i, batch in enumerate(micro_batches):
            if i > 0 and before is not None and self._stop_requested():
                self._drop_step(statistics)
                restore_random_state(before)
                return None
            shares = Shares(tokens, batch.num_images / images, drawn)
            synced = i == len(micro_batches) - 1
            with nullcontext() if synced else self.accelerator.no_sync(self.objective):
                loss, losses = self._losses(batch, shares)
                if self.balance is not None and synced:
                    losses["alpha"] = torch.tensor(self.balance.alpha, device=loss.device)
                    if self.balance.due(self.step):
                        probe = self._tokenizer.encoder_output
                        captions = caption_part(losses, self.losses)
                        self.balance.measure(loss, captions, probe, self.accelerator)
                # text alone passes no part that `align` trains: nothing to learn from it there
                if loss.requires_grad:
                    self.accelerator.backward(loss)
            for name, value in {"loss": loss, **losses}.items():
                factor = 1.0 if name in WHOLE else shares.images
                totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach() * factor
        norm = self.accelerator.clip_grad_norm_(
            self.objective.parameters(), self.config.optimizer.max_grad_norm or math.inf
        )
        norm_value = float(whole(norm)) if norm is not None else 0.0
        if world > 1:
            totals = {name: self.accelerator.reduce(value, reduction="mean") for name, value in totals.items()}
        # a discriminator that is lost once stays lost: its gradient counts too
        both = norm_value + (self.critics.gather() if self.critics is not None else 0.0)
        if self.back_offs.needed(totals, both):
            self.back_offs.refuse(self.step + 1, totals, both)
            self._drop_step(statistics)
        else:
            self._update_weights()
        return totals, norm_value

    def _drop_step(self, statistics: list[Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.critics is not None:
            self.critics.drop_step(statistics)

    def _update_weights(self) -> None:
        config, scale = self.config.optimizer, self.back_offs.factor
        set_learning_rates(self.optimizer.optimizer, config, self.step, self.config.steps, scale)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.critics is not None:
            self.critics.step(schedule_factor(config, self.step, self.config.steps) * scale)
        if self.average is not None:
            self.average.update()

    def _losses(self, batch: Batch, shares: Shares) -> tuple[Tensor, Losses]:
        """(loss float[], terms by name) of a micro-batch in training; the critics join, and learn."""
        loss, losses, reconstruction = self._objective(batch, shares, quantized=self.step >= self.config.quantize_after)
        if self.critics is None or reconstruction is None:
            return loss, losses
        pixels = batch.pixel_values[: len(reconstruction)]
        heard, terms = self.critics.judge(reconstruction, pixels, self.step)
        losses |= self.critics.learn(reconstruction, pixels, shares.images)
        return loss + self._alpha * shares.images * heard, losses | terms

    @property
    def _alpha(self) -> float:
        """The weight of L_vq; it has none where there is no other loss."""
        alone = isinstance(self.model, VisionTokenizer) or self.config.stage == "decoder"
        return 1.0 if alone else self.losses.tokenizer_weight

    @property
    def _codes_are_placed(self) -> bool:
        """Whether codes mean something: `quantize_after` places them right before the step that follows."""
        return self.config.quantize_after == 0 or self.step > self.config.quantize_after

    def _objective(self, batch: Batch, shares: Shares, *, quantized: bool) -> ObjectiveOutput:
        quantizes_later = {"quantized": quantized} if self.config.quantize_after else {}
        output: ObjectiveOutput = self.objective(batch, self.losses, shares, **quantizes_later)
        return output

    def _place_codes(self) -> None:
        assert isinstance(self.model, VisionTokenizer)
        distance = place_codes(self.model, self.objective, self.data, self.micro_batch, self.accelerator)
        if self.average is not None:
            self.average.restart(self.model.quantize)
        self.log.codes_placed(self.name, self.step, distance)

    def _health_monitor(self) -> HealthMonitor | None:
        """None where the tokenizer does not train, or nothing is to be measured."""
        config, data = self.config, self.data
        if "vision_tokenizer" not in config.parts or config.health.pictures == 0 or config.stage == "decoder":
            return None
        batches = fixed_batches(
            config.health, data.validation, data.mixture, data.processor, data.max_length, self.micro_batch
        )
        if not batches:
            return None
        return HealthMonitor(
            config.health,
            self.name,
            self.model,
            self.losses,
            self.critics,
            batches,
            config.quantize_after,
            self.accelerator,
            self.log,
        )

    def _rates(self) -> dict[str, float]:
        return {str(group["part"]): float(group["lr"]) for group in self.optimizer.param_groups}

    # -- data ----------------------------------------------------------------------------------------------------------

    def _collate(self, items: Sequence[Encoded]) -> Batch:
        batch = self.data.processor.collate(list(items), packing=self.config.packing)
        return batch.to(self.accelerator.device)

    def _check_freezing(self, batches: list[Batch]) -> None:
        """Assert, with gradients, what trains. A step without pictures or answers can tell nothing and is let pass."""
        assert isinstance(self.model, EttForConditionalGeneration)
        taught = (each for each in batches if each.num_images > 0 and each.num_supervised + each.num_drawn > 0)
        batch = next(taught, None)
        missing = torch.tensor(float(batch is None), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            # all ranks look, or none: they wait for each other in the quantizer
            missing = self.accelerator.reduce(missing)
        if batch is None or bool(missing > 0):
            return
        with gathered(self.objective), self.accelerator.autocast():
            reach = caption_reach(self.model, batch, self.losses)
        check_reach(reach, self.config, self.model.config.visual_input)
        self.log.reach(self.name, reach.norms)

    def _stop_requested(self) -> bool:
        if self.accelerator.num_processes == 1:
            return bool(self._received)
        flag = torch.tensor(float(bool(self._received)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag) > 0)

    def _stopped_alone(self) -> bool:
        """Whether to stop where ranks cannot ask each other."""
        return self.accelerator.num_processes == 1 and bool(self._received)

    def _tell_damage(self, step: int, message: str) -> None:
        self.log.warning(self.name, step, "damaged_checkpoint", message, once=False)

    def _is_best(self, validation_loss: float | None) -> bool:
        """Whether these weights are what the stage may end with; every rank says the same."""
        if self.config.ends_with != "best" or validation_loss is None:
            return False
        return bool(broadcast_object_list([validation_loss < self.saver.best])[0])

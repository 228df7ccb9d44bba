"""The training loop, the only one: every stage, every loss, from one process to many."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from ett.data.mixture import DrawSampler, EncodedDraws, Mixture
from ett.errors import DataError, RecipeError, UserError
from ett.model.ett import EttForConditionalGeneration
from ett.model.processing import Encoded, EttProcessor
from ett.signals import leave_signals_to_the_parent, noted_signals
from ett.tokenizers import VisionTokenizer
from ett.tokenizers.quantizer import IndexBackpropagationQuantizer
from ett.train.average import WeightAverage
from ett.train.checkpoint import Stateful, list_checkpoints, load_checkpoint, save_checkpoint
from ett.train.critics import Critics
from ett.train.health import BackOffs, HealthMonitor, fixed_batches
from ett.train.log import RunLog
from ett.train.objectives import JointObjective, Losses, ObjectiveOutput, Shares, TokenizerObjective
from ett.train.optim import build_optimizer, schedule_factor, set_learning_rates
from ett.train.stages import StageConfig, caption_reach, check_reach, part_of, set_trainable, train_mode
from ett.types import Batch

FEATURES_PER_CODE = 16
"""Features that place one code: k-means over so many times K of them."""


class Interrupted(Exception):
    """The stage was stopped by a signal, after saving.

    Attributes:
        step: finished steps. signal_number: what stopped it.
    """

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step, self.signal_number = step, signal_number


@dataclass(frozen=True)
class StageData:
    """What a stage reads.

    Attributes:
        mixture: training examples by draw number.
        validation: fixed examples for validation, possibly none.
        processor: turns examples into tensors.
        num_workers: processes that decode and encode; 0 does it in the loop.
        max_length: positions after which a conversation is cut; None keeps all.
    """

    mixture: Mixture
    validation: Sequence[Encoded]
    processor: EttProcessor
    num_workers: int
    max_length: int | None = None


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
    ) -> None:
        if config.quantize_after:
            _check_placeable(model)
        self.config, self.name, self.data, self.log = config, name, data, log
        self.accelerator, self.checkpoints = accelerator, checkpoints
        self.model = model.to(accelerator.device)
        self.losses = config.loss_config
        objective: nn.Module
        if isinstance(model, VisionTokenizer):
            model.requires_grad_(True).train()
            objective = TokenizerObjective(model)
            parts: dict[str, nn.Module] = {"vision_tokenizer": model}
        else:
            set_trainable(model, config.parts)
            train_mode(model, config.parts)
            if config.gradient_checkpointing:
                _checkpoint_activations(model.language_model)
            objective = JointObjective(model)
            parts = _modules_by_part(model)
        self.micro_batch, self.accumulation = split_batch(config, accelerator.num_processes)
        self.step = 0
        self.objective: nn.Module
        self.objective, self.optimizer = accelerator.prepare(objective, build_optimizer(parts, config.optimizer))
        self.critics: Critics | None = None
        if Critics.wanted(self.losses):
            rates = config.optimizer.learning_rates
            peak = rates.get("vision_tokenizer", config.optimizer.learning_rate)
            self.critics = Critics(self.losses, config.discriminator, peak, accelerator)
        self.average = None if config.ema_decay is None else WeightAverage(self.model, config.ema_decay)
        self.back_offs = BackOffs(config.health, name, log)
        # before a checkpoint is loaded: drift is measured from the weights that the stage began with
        self.health = self._health_monitor()

    @property
    def _extras(self) -> dict[str, Stateful]:
        """What a checkpoint holds beside weights, optimizer and random states."""
        extras: dict[str, Stateful] = {"back_offs": self.back_offs}
        if self.critics is not None:
            extras["critics"] = self.critics
        if self.average is not None:
            extras["average"] = self.average
        return extras

    def resume(self) -> None:
        """Continue from this stage's newest checkpoint, if there is one."""
        found = list_checkpoints(self.checkpoints, self.name)
        if found:
            load_checkpoint(found[-1], self.model, self.optimizer.optimizer, self._extras, ("back_offs",))
            self.step = found[-1].step

    def save(self) -> None:
        """Write a checkpoint of the steps finished so far.

        Raises:
            CodebookCollapse: there is nothing good to save, and the recipe stops on that.
        """
        if self.health is not None:
            self.health.before_saving(self.step)
        if self.accelerator.is_main_process:
            optimizer = self.optimizer.optimizer
            save_checkpoint(self.checkpoints, self.name, self.step, self.model, optimizer, self._extras)
        self.accelerator.wait_for_everyone()

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint of the last finished step was saved.
            NonFiniteLoss, CodebookCollapse: as the recipe's `health` says.
        """
        config = self.config
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc=self.name,
            unit="step",
            disable=None,
            dynamic_ncols=True,
            leave=True,
        )
        with noted_signals(second_one_stops=True) as received, bar:
            batches = self._batches()
            started, seen = time.monotonic(), 0
            for micro_batches in batches:
                if self.step == 0 and isinstance(self.model, EttForConditionalGeneration):
                    self._check_freezing(micro_batches)
                if config.quantize_after and self.step == config.quantize_after:
                    self._place_codes()
                losses, norm = self._train_step(micro_batches)
                self.step += 1
                seen += config.batch_size
                bar.update()
                last = self.step == config.steps
                if self.step % config.log_every == 0 or last or self.step == 1:
                    values = {name: float(value) for name, value in losses.items()}
                    rate = seen / (time.monotonic() - started)
                    self.log.step(self.name, self.step, config.steps, values, norm, self._rates(), rate)
                    bar.set_postfix_str(_postfix(values, rate))
                validates = last or (config.validate_every is not None and self.step % config.validate_every == 0)
                if validates:
                    self.log.validation(self.name, self.step, self.validate())
                if self.health is not None and self.health.due(self.step, config.steps, validates):
                    self.health.measure(self.step)
                if self._stop_requested(received):
                    self.save()
                    raise Interrupted(self.step, received[0] if received else signal.SIGTERM)
                if config.checkpoint_every and self.step % config.checkpoint_every == 0 and not last:
                    self.save()
        if self.average is not None:
            self.average.apply()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Every loss term on the validation examples, by the names used in training; random states are left alone.

        Where weights are averaged, the average is measured: it is what the stage ends with.
        """
        if not self.data.validation:
            return {}
        self.objective.eval()
        totals: dict[str, float] = {}
        weight = 0.0
        with nullcontext() if self.average is None else self.average.applied():
            for start in range(0, len(self.data.validation), self.micro_batch):
                batch = self._collate(list(self.data.validation[start : start + self.micro_batch]))
                tokens = float(max(1, batch.num_supervised))
                loss, losses, reconstruction = self._objective(batch, Shares(tokens, 1.0))
                if self.critics is not None and reconstruction is not None:
                    losses |= self.critics.measure(reconstruction, batch.pixel_values, self.step)
                for name, value in {"loss": loss, **losses}.items():
                    totals[name] = totals.get(name, 0.0) + float(value) * tokens
                weight += tokens
        if isinstance(self.model, VisionTokenizer):
            self.model.train()
        else:
            train_mode(self.model, self.config.parts)
        return {name: value / weight for name, value in totals.items()}

    # -- one step ------------------------------------------------------------------------------------------------------

    def _train_step(self, micro_batches: list[Batch]) -> tuple[Losses, float]:
        """(terms averaged over the step, gradient norm before clipping)."""
        world = self.accelerator.num_processes
        counts = torch.tensor(
            [
                sum(batch.num_supervised for batch in micro_batches),
                sum(batch.num_images for batch in micro_batches),
            ],
            device=self.accelerator.device,
        )
        if world > 1:
            counts = self.accelerator.reduce(counts)
        tokens, images = (max(1, int(count)) / world for count in counts)
        totals: Losses = {}
        statistics = self.critics.statistics() if self.critics is not None and self.back_offs.allowed else []
        for i, batch in enumerate(micro_batches):
            shares = Shares(tokens, batch.num_images / images)
            synced = i == len(micro_batches) - 1
            with nullcontext() if synced else self.accelerator.no_sync(self.objective):
                loss, losses = self._losses(batch, shares)
                # text alone passes no part that `align` trains: nothing to learn from it there
                if loss.requires_grad:
                    self.accelerator.backward(loss)
            for name, value in {"loss": loss, **losses}.items():
                factor = 1.0 if name in ("loss", "caption_loss") else shares.images
                totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach() * factor
        norm = self.accelerator.clip_grad_norm_(
            self.objective.parameters(), self.config.optimizer.max_grad_norm or math.inf
        )
        norm_value = float(norm) if norm is not None else 0.0
        if world > 1:
            totals = {name: self.accelerator.reduce(value, reduction="mean") for name, value in totals.items()}
        if self.back_offs.needed(totals, norm_value):
            self.back_offs.refuse(self.step + 1, totals, norm_value)
            self.optimizer.zero_grad(set_to_none=True)
            if self.critics is not None:
                self.critics.drop_step(statistics)
        else:
            self._update_weights()
        return totals, norm_value

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
        loss, losses, reconstruction = self._objective(batch, shares)
        if self.critics is None or reconstruction is None:
            return loss, losses
        pixels = batch.pixel_values[: len(reconstruction)]
        heard, terms = self.critics.judge(reconstruction, pixels, self.step)
        losses |= self.critics.learn(reconstruction, pixels, shares.images)
        alpha = 1.0 if isinstance(self.model, VisionTokenizer) else self.losses.tokenizer_weight
        return loss + alpha * shares.images * heard, losses | terms

    def _objective(self, batch: Batch, shares: Shares) -> ObjectiveOutput:
        quantizes_later = {"quantized": self.step >= self.config.quantize_after} if self.config.quantize_after else {}
        output: ObjectiveOutput = self.objective(batch, self.losses, shares, **quantizes_later)
        return output

    @torch.no_grad()
    def _place_codes(self) -> None:
        """Codes go where the features of the mixture's first pictures are; a function of the weights and the recipe alone."""
        assert isinstance(self.model, VisionTokenizer)
        quantizer = self.model.quantize
        assert isinstance(quantizer, IndexBackpropagationQuantizer)
        features: list[Tensor] = []
        wanted, draw = FEATURES_PER_CODE * quantizer.codebook_size, 0
        while sum(each.shape[0] * each.shape[2] * each.shape[3] for each in features) < wanted:
            items = [self.data.processor.encode(self.data.mixture[draw + i], None) for i in range(self.micro_batch)]
            features += [self.model.encode(self._collate(items).pixel_values)]
            draw += self.micro_batch
        rows = torch.cat([each.flatten(2).transpose(1, 2).flatten(0, 1) for each in features])
        distance = quantizer.place_codes(rows.T[None, :, :, None])
        if self.accelerator.num_processes > 1:
            for tensor in (*quantizer.parameters(), *quantizer.buffers()):
                torch.distributed.broadcast(tensor, src=0)
        self.log.codes_placed(self.name, self.step, distance)

    def _health_monitor(self) -> HealthMonitor | None:
        """None where the tokenizer does not train, or nothing is to be measured."""
        config, data = self.config, self.data
        if "vision_tokenizer" not in config.parts or config.health.pictures == 0:
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

    def _batches(self) -> Iterator[list[Batch]]:
        """The micro-batches of each remaining step."""
        sampler = DrawSampler(
            self.step,
            self.config.steps,
            self.micro_batch,
            self.accumulation,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        loader: DataLoader[Any] = DataLoader(
            EncodedDraws(self.data.mixture, self.data.processor, self.data.max_length),
            batch_sampler=sampler,
            collate_fn=_Collate(self.data.processor),
            num_workers=self.data.num_workers,
            worker_init_fn=leave_signals_to_the_parent,
            # its own generator: a loader otherwise draws its workers' seed from the state that training resumes
            generator=torch.Generator(),
        )
        gathered: list[Batch] = []
        for item in loader:
            if isinstance(item, UserError):
                raise item
            gathered.append(item.to(self.accelerator.device))
            if len(gathered) == self.accumulation:
                yield gathered
                gathered = []

    def _collate(self, items: Sequence[Encoded]) -> Batch:
        return self.data.processor.collate(items).to(self.accelerator.device)

    def _check_freezing(self, batches: list[Batch]) -> None:
        """Assert, with gradients, what trains. A step without pictures or answers can tell nothing and is let pass."""
        assert isinstance(self.model, EttForConditionalGeneration)
        batch = next((batch for batch in batches if batch.num_images > 0 and batch.num_supervised > 0), None)
        if batch is None:
            return
        with self.accelerator.autocast():
            reach = caption_reach(self.model, batch, self.losses)
        check_reach(reach, self.config, self.model.config.visual_input)
        self.log.reach(self.name, reach.norms)

    def _stop_requested(self, received: list[int]) -> bool:
        if self.accelerator.num_processes == 1:
            return bool(received)
        flag = torch.tensor(float(bool(received)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag) > 0)


class _Collate:
    """Collates in the worker; an unusable example passes through as its error."""

    def __init__(self, processor: EttProcessor) -> None:
        self.processor = processor

    def __call__(self, items: list[Encoded | UserError]) -> Batch | UserError:
        encoded = []
        for item in items:
            if isinstance(item, UserError):
                return item
            encoded.append(item)
        return self.processor.collate(encoded)


def encode_all(mixture: Mixture, count: int, processor: EttProcessor, max_length: int | None) -> list[Encoded]:
    """The first `count` draws, encoded; a fixed set for validation."""
    return [processor.encode(mixture[draw], max_length) for draw in range(count)]


def _checkpoint_activations(language_model: PreTrainedModel) -> None:
    # named anew on the way from transformers 5.17 to 5.23, where the old name warns
    enable = getattr(language_model, "activation_checkpointing_enable", None)
    (enable or language_model.gradient_checkpointing_enable)({"use_reentrant": False})


def _check_placeable(model: nn.Module) -> None:
    quantizer = model.quantize if isinstance(model, VisionTokenizer) else None
    if not isinstance(quantizer, IndexBackpropagationQuantizer):
        raise RecipeError(
            f"quantize_after places codes by k-means, which {type(quantizer).__name__} has not. Set it to 0."
        )


def _modules_by_part(model: EttForConditionalGeneration) -> dict[str, nn.Module]:
    projector = [model.projector] if model.index_embedding is None else [model.projector, model.index_embedding]
    parts: dict[str, nn.Module] = {
        "vision_tokenizer": model.vision_tokenizer,
        "projector": nn.ModuleList(projector),
        "language_model": model.language_model,
    }
    assert {part_of(name) for name, _ in model.named_parameters()} == set(parts)
    return parts


def split_batch(config: StageConfig, world_size: int) -> tuple[int, int]:
    """(examples per forward on one rank, forwards per step)."""
    micro = config.micro_batch_size or config.batch_size // world_size
    if micro < 1 or config.batch_size % (micro * world_size):
        raise DataError(
            f"batch_size = {config.batch_size} does not divide into micro-batches of {micro} on {world_size} processes. Choose "
            "batch_size as a multiple of micro_batch_size times the number of processes."
        )
    return micro, config.batch_size // (micro * world_size)


def _postfix(values: Mapping[str, float], rate: float) -> str:
    short = {"loss": "loss", "caption_loss": "cap", "reconstruction_loss": "rec", "quantization_loss": "quant"}
    shown = [f"{label} {values[name]:.3f}" for name, label in short.items() if name in values]
    return ", ".join([*shown, f"{rate:.1f} img/s"])

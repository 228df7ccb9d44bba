"""The tokenizer's health while it trains: what is measured, what is told, and when training stops or backs off.

The monitor looks at a few fixed pictures and touches nothing that trains: weights with and without it are equal bit for
bit. What it compares with, the tokenizer as the stage began, it takes before a checkpoint is loaded, so that a resumed run
compares with the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from ett.config import require
from ett.data.mixture import Mixture, encode_draw
from ett.errors import UserError
from ett.losses.joint import LossConfig, tokenizer_losses
from ett.model.ett import EttForConditionalGeneration
from ett.model.processing import Encoded, EttProcessor
from ett.tokenizers import VisionTokenizer
from ett.train.critics import Critics
from ett.train.diagnosis import Situation, diagnose
from ett.train.log import RunLog
from ett.train.measures import (
    Codes,
    decode_codes,
    drift_values,
    encode_pictures,
    gradient_norms,
    softmax_values,
    tokenizer_probes,
    undisturbed,
    usage_values,
)
from ett.train.objectives import Losses, run_model
from ett.types import Batch

GRADIENT_EXAMPLES = 8
"""Examples, at most, on which gradient norms are measured; memory and time of one small micro-batch."""
DRAWS_PER_PICTURE = 16
"""Draws of the mixture, for each picture wanted, among which pictures are looked for."""


class CodebookCollapse(UserError):
    """Fewer codes are in use than the recipe allows; training stopped, and no checkpoint of that state was written."""


class NonFiniteLoss(UserError):
    """A loss or a gradient became NaN or infinite; training stopped before the step was taken."""


@dataclass(frozen=True)
class HealthConfig:
    """How a tokenizer is watched while it trains, and what its faults do. Stages that leave it frozen measure nothing.

    Attributes:
        every: steps between measurements; null measures at each validation. The last step is always measured.
        pictures: so many of the first validation pictures, or of the mixture where there are none, are measured; 0 measures
            nothing.
        min_usage: share of min(K, tokens measured), in [0, 1], under which the codes in use count as a collapse, as does a
            single code. 0 lets everything pass.
        on_collapse: "warn", "stop", or "back_off": training goes back to the last checkpoint, and learning rates are lowered
            for the rest of the stage. With the last two every checkpoint is preceded by a look at the usage, and none holds a
            collapse.
        on_non_finite: "stop", or "back_off": the step is left out and learning rates are lowered for the rest of the stage.
        back_off: factor of all learning rates at each back-off, in (0, 1).
        max_back_offs: after so many of both kinds, >= 1, the next collapse or non-finite step stops the stage.
    """

    every: int | None = None
    pictures: int = 16
    min_usage: float = 0.01
    on_collapse: Literal["warn", "stop", "back_off"] = "warn"
    on_non_finite: Literal["stop", "back_off"] = "stop"
    back_off: float = 0.5
    max_back_offs: int = 3

    def __post_init__(self) -> None:
        require(self.every is None or self.every >= 1, "every", self.every, "at least 1, or null")
        require(self.pictures >= 0, "pictures", self.pictures, "0 or more")
        require(0 <= self.min_usage <= 1, "min_usage", self.min_usage, "in [0, 1]")
        require(0 < self.back_off < 1, "back_off", self.back_off, "in (0, 1)")
        require(self.max_back_offs >= 1, "max_back_offs", self.max_back_offs, "at least 1")


class BackOffs:
    """Decides about steps that are not finite, and remembers by how much learning rates were lowered.

    Attributes:
        factor: of every learning rate from now on, in (0, 1]. count: back-offs so far.
        in_doubt: whether the last step was left out: the weights may be what was wrong, and no checkpoint is written of them
            until a step can be taken again.
    """

    def __init__(self, config: HealthConfig, stage: str, log: RunLog) -> None:
        self.config, self.stage, self.log = config, stage, log
        self.factor, self.count = 1.0, 0
        self.in_doubt = False

    @property
    def spent(self) -> bool:
        """Whether the recipe allows no further one."""
        return self.count >= self.config.max_back_offs

    @property
    def allowed(self) -> bool:
        """Whether the recipe backs off at all."""
        return self.config.on_non_finite == "back_off"

    def needed(self, losses: Losses, norm: float) -> bool:
        """Whether a step must not be taken. Every rank decides the same where these are the same.

        Args:
            losses: float[] each, means over ranks. norm: of the gradient that all ranks share.
        """
        finite = torch.stack([value.detach().float() for value in losses.values()]).isfinite().all()
        self.in_doubt = not (math.isfinite(norm) and bool(finite))
        return self.in_doubt

    def refuse(self, step: int, losses: Losses, norm: float) -> None:
        """Back off because of step `step` (1-based), which the caller leaves out.

        Raises:
            NonFiniteLoss: the recipe stops here.
        """
        shown = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
        what = f"the gradient norm is {norm} ({shown})"
        if not self.allowed or self.spent:
            backed = f" Learning rates had been lowered {self.count} times, to {self.factor:g} of the recipe's." * bool(
                self.count
            )
            knob = "" if self.allowed else ", or continue with --resume and health.on_non_finite=back_off"
            raise NonFiniteLoss(
                f"Stage {self.stage}, step {step}: {what}. The step was not taken; the last checkpoint is kept.{backed} Start "
                f"anew with a lower optimizer.learning_rate or optimizer.max_grad_norm (--overwrite){knob}."
            )
        self._lower()
        message = (
            f"{what[0].upper()}{what[1:]}. The step was left out, and learning rates are {self.factor:g} of the recipe's from "
            f"here on (back-off {self.count} of {self.config.max_back_offs}). If it happens again, lower "
            "optimizer.learning_rate or optimizer.max_grad_norm."
        )
        self.log.warning(self.stage, step, "non_finite", message, once=False)

    def turn_back(self, at: int, to: int) -> None:
        """Back off because the codebook had collapsed after step `at`; step `to` is where training goes on."""
        self._lower()
        message = (
            f"The codebook had collapsed after step {at}. Training goes on from the checkpoint of step {to}, and learning "
            f"rates are {self.factor:g} of the recipe's from here on (back-off {self.count} of "
            f"{self.config.max_back_offs}). If it happens again, raise losses.entropy_weight or lower "
            "optimizer.learning_rates.vision_tokenizer."
        )
        self.log.warning(self.stage, to, "turned_back", message, once=False)

    def _lower(self) -> None:
        self.count += 1
        self.factor *= self.config.back_off

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"factor": self.factor, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.factor, self.count = float(state["factor"]), int(state["count"])


def fixed_batches(
    config: HealthConfig,
    validation: Sequence[Encoded],
    mixture: Mixture,
    processor: EttProcessor,
    max_length: int | None,
    micro_batch: int,
) -> list[Batch]:
    """The examples that are measured again and again, in batches of at most `GRADIENT_EXAMPLES` and `micro_batch`.

    They are the first with pictures among `validation`, or among the mixture's draws, until there are `config.pictures`
    pictures (a few more where the last example has several). No batch where there is no picture.
    """
    chosen: list[Encoded] = []
    shown = [item for item in validation if item.pixel_values]
    candidates = shown or (
        encode_draw(mixture, draw, processor, max_length).item for draw in range(DRAWS_PER_PICTURE * config.pictures)
    )
    for item in candidates:
        if sum(len(each.pixel_values) for each in chosen) >= config.pictures:
            break
        if item.pixel_values:
            chosen.append(item)
    size = min(GRADIENT_EXAMPLES, micro_batch)
    return [processor.collate(chosen[start : start + size]) for start in range(0, len(chosen), size)]


class HealthMonitor:
    """Measures a tokenizer in training on fixed pictures, warns, and stops on a collapse.

    Args:
        config: of the recipe.
        stage: its name, for log and messages.
        model: what trains; it is measured as it is when this is made, too.
        losses: weights in force; terms of weight 0 have no gradient norm.
        critics: whose terms of L_vq are measured with the rest.
        batches: of `fixed_batches`, at least one.
        quantize_after: steps before which codes mean nothing and nothing is measured; drift is then left out.
        accelerator: precision and processes. log: where everything goes.
    """

    def __init__(
        self,
        config: HealthConfig,
        stage: str,
        model: EttForConditionalGeneration | VisionTokenizer,
        losses: LossConfig,
        critics: Critics | None,
        batches: Sequence[Batch],
        quantize_after: int,
        accelerator: Accelerator,
        log: RunLog,
    ) -> None:
        self.config, self.stage, self.model, self.losses, self.critics = config, stage, model, losses, critics
        self.batches, self.quantize_after = batches, quantize_after
        self.accelerator, self.log = accelerator, log
        self.tokenizer = model if isinstance(model, VisionTokenizer) else model.vision_tokenizer
        self._passed = -1
        self.initial: Codes | None = None
        self.first_usage: float | None = None
        if quantize_after == 0:
            with undisturbed(self.tokenizer):
                indices = self.tokenizer.quantize.nearest(self._features())
                self.initial = decode_codes(self.tokenizer, indices, self._size)
            self.first_usage = usage_values(indices, self.tokenizer.codebook_size)["usage"]

    def due(self, step: int, steps: int, validated: bool) -> bool:
        """Whether to measure after `step` of `steps` finished steps."""
        quantized = self.quantize_after == 0 or step > self.quantize_after
        return quantized and (
            step == steps or (validated if self.config.every is None else step % self.config.every == 0)
        )

    def measure(self, step: int) -> None:
        """Measure, log and warn after `step` finished steps.

        Raises:
            CodebookCollapse: as the recipe says. NonFiniteLoss: the weights are ruined.
        """
        judge = self.critics.discriminator if self.critics is not None else None
        with undisturbed(self.model, *([] if judge is None else [judge])):
            features = self._features()
            self._check_finite(step, features)
            indices = self.tokenizer.quantize.nearest(features)
            values = usage_values(indices, self.tokenizer.codebook_size) | softmax_values(self.tokenizer, features)
            if self.initial is not None:
                values |= drift_values(self.initial, decode_codes(self.tokenizer, indices, self._size))
            norms = gradient_norms(self._terms(step), tokenizer_probes(self.tokenizer))
        self.log.health(self.stage, step, values, norms)
        situation = Situation(step, self.tokenizer.quantize, values, norms, self.first_usage, self._caption_is_expected)
        for kind, message in diagnose(situation).items():
            self.log.warning(self.stage, step, kind, message)
        self._judge_usage(step, indices, values)

    def before_saving(self, step: int) -> None:
        """Let no checkpoint hold a collapse, where the recipe stops on one.

        Raises:
            CodebookCollapse: the codebook has collapsed since it was last measured.
        """
        measured = self._passed == step or (self.quantize_after > 0 and step <= self.quantize_after)
        if self.config.on_collapse != "warn" and not measured:
            with undisturbed(self.tokenizer):
                indices = self.tokenizer.quantize.nearest(self._features())
            self._judge_usage(step, indices, usage_values(indices, self.tokenizer.codebook_size))

    def turned_back(self) -> None:
        """Steps are taken again: what passed at them says nothing any more."""
        self._passed = -1

    def _check_finite(self, step: int, features: Tensor) -> None:
        ruined = not bool(features.isfinite().all())
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(ruined), device=self.accelerator.device)
            ruined = bool(self.accelerator.reduce(flag) > 0)
        if ruined:
            raise NonFiniteLoss(
                f"Stage {self.stage}, step {step}: the encoder's features of the watched pictures are not finite. Its "
                "weights are ruined, which no smaller step can mend. The last checkpoint is kept. Start anew with a lower "
                "optimizer.learning_rate or optimizer.max_grad_norm (--overwrite)."
            )

    def _judge_usage(self, step: int, indices: Tensor, values: Mapping[str, float]) -> None:
        possible = min(self.tokenizer.codebook_size, indices.numel())
        in_use = int(values["codes_in_use"])
        collapsed = (
            self.config.min_usage > 0 and possible > 1 and (in_use == 1 or values["usage"] < self.config.min_usage)
        )
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(collapsed), device=self.accelerator.device)
            collapsed = bool(self.accelerator.reduce(flag) > 0)
        if not collapsed:
            self._passed = step
            return
        what = (
            f"The codebook has collapsed: {in_use} of {possible} codes that could be are in use on {indices.shape[0]} pictures "
            f"(health.min_usage = {self.config.min_usage:g}). Codes too close to each other let one of them win everywhere: "
            "raise losses.entropy_weight, lower optimizer.learning_rates.vision_tokenizer, or let a tokenizer stage place the "
            "codes with quantize_after."
        )
        if self.config.on_collapse != "warn":
            raise CodebookCollapse(
                f"Stage {self.stage}, step {step}: {what[0].lower()}{what[1:]} The last checkpoint from before is kept. Start "
                "anew with other settings (--overwrite), or go on regardless with --resume and health.on_collapse=warn."
            )
        self.log.warning(self.stage, step, "collapse", what)

    @property
    def _size(self) -> int:
        """Pictures that are decoded at a time: no more than are encoded at a time."""
        return max(len(batch.pixel_values) for batch in self.batches)

    def _features(self) -> Tensor:
        return encode_pictures(self.tokenizer, [batch.pixel_values for batch in self.batches])

    def _terms(self, step: int) -> Losses:
        """Every loss term of the first batch by name, unweighted, float[] with its graph."""
        batch, losses = self.batches[0].to(self.accelerator.device), self.losses
        reconstruction: Tensor | None
        with self.accelerator.autocast():
            if isinstance(self.model, VisionTokenizer):
                reconstruction, quantized = self.model(batch.pixel_values, entropy=losses.entropy_weight > 0)
                terms = tokenizer_losses(batch.pixel_values, reconstruction, quantized, losses)
            else:
                output = run_model(self.model, batch, losses)
                assert output.losses is not None
                terms, reconstruction = dict(output.losses), output.reconstruction
            if self.critics is not None and reconstruction is not None:
                terms |= self.critics.judge(reconstruction, batch.pixel_values[: len(reconstruction)], step)[1]
        weights = {
            "caption_loss": losses.caption_weight if batch.num_supervised else 0.0,
            "reconstruction_loss": losses.reconstruction_weight,
            "quantization_loss": losses.quantization_weight,
            "entropy_loss": losses.entropy_weight,
        }
        return {name: term for name, term in terms.items() if weights.get(name, 1.0) > 0}

    @property
    def _caption_is_expected(self) -> bool:
        if isinstance(self.model, VisionTokenizer):
            return False
        return self.losses.caption_reaches_tokenizer and self.model.config.visual_input == "embedding"

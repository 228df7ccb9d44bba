"""Optimizer groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from ett.config import require
from ett.errors import RecipeError, unknown

PARTS = ("vision_tokenizer", "projector", "language_model", "image_head")
"""Parts of a model, each with a learning rate of its own if a recipe says so."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with decoupled weight decay, warm-up, then cosine or constant (ETT section 4).

    Attributes:
        learning_rate: peak, > 0.
        learning_rates: peaks of single parts ("vision_tokenizer", "projector", "language_model", "image_head") instead.
        betas, eps, weight_decay: of AdamW. Decay skips vectors (norms, biases) and the codebook.
        max_grad_norm: clip the global gradient norm to this; null does not clip.
        schedule: after warm-up, "cosine" to `final_ratio` of the peak at the last step, or "constant".
        warmup_ratio: share of the steps that rise linearly from 0, in [0, 1).
        final_ratio: share of the peak at which the cosine ends, in [0, 1].
        decay_until: share of the steps after which the cosine has ended and the rate stays, in (0, 1].
    """

    learning_rate: float = 4e-5
    learning_rates: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    final_ratio: float = 0.0
    decay_until: float = 1.0

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        for part, rate in self.learning_rates.items():
            if part not in PARTS:
                raise RecipeError(unknown("part in learning_rates", part, PARTS))
            require(rate > 0, f"learning_rates.{part}", rate, "above 0")
        require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        require(self.eps > 0, "eps", self.eps, "above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "max_grad_norm",
            self.max_grad_norm,
            "above 0, or null",
        )
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "in [0, 1)")
        require(0 <= self.final_ratio <= 1, "final_ratio", self.final_ratio, "in [0, 1]")
        require(
            self.warmup_ratio < self.decay_until <= 1, "decay_until", self.decay_until, "above warmup_ratio, up to 1"
        )


def schedule_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` (0-based) of `steps`, as a share of the peak, in [0, 1].

    Warm-up reaches the peak after ``ceil(warmup_ratio * steps)`` steps; cosine decay reaches `final_ratio` after
    ``decay_until * steps`` steps.
    """
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, config.decay_until * steps - warmup))
    return config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(parts: Mapping[str, nn.Module], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `parts` (name -> module), one group per part and decay.

    Every trainable parameter is in exactly one group, asserted; groups carry ``part`` and ``peak_lr``.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                decays = parameter.dim() >= 2 and "embedding" not in name
                groups.setdefault((part, decays), []).append(parameter)
    wanted = {p for module in parts.values() for p in module.parameters() if p.requires_grad}
    assert seen == wanted, "every trainable parameter belongs in exactly one group"
    param_groups = []
    for (part, decays), parameters in groups.items():
        peak = config.learning_rates.get(part, config.learning_rate)
        decay = config.weight_decay if decays else 0.0
        param_groups.append({"params": parameters, "part": part, "peak_lr": peak, "lr": peak, "weight_decay": decay})
    return torch.optim.AdamW(param_groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, steps: int, scale: float = 1.0
) -> None:
    """Give each group its rate for step `step` (0-based), times `scale`."""
    factor = schedule_factor(config, step, steps) * scale
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor

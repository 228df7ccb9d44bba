"""Gradient balance: alpha follows the two gradients that meet at the encoder's last layer, instead of being fixed.

ETT adds ``L_cap + alpha * L_vq`` with one alpha for a whole stage (eq. 3), while the norms of the two gradients drift apart by
orders of magnitude. Here ``r = |grad L_cap| / |grad (alpha * L_vq)|``, measured now and then at the weight of the encoder's
last layer, is kept in a band: above it alpha rises, below it falls, inside it alpha rests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ett.config import require


@dataclass(frozen=True)
class BalanceConfig:
    """How alpha follows the gradients.

    Attributes:
        low, high: the band of r, 0 < low <= high.
        every: steps between measurements, >= 1; each costs two further ways back through decoder and language model.
        rate: share of the way to the band's nearer edge, of log r, that a measurement takes alpha, in (0, 1].
        lowest, highest: that alpha may become, 0 < lowest <= highest.
    """

    low: float = 0.5
    high: float = 2.0
    every: int = 10
    rate: float = 0.25
    lowest: float = 0.01
    highest: float = 100.0

    def __post_init__(self) -> None:
        require(0 < self.low <= self.high, "low", self.low, "above 0, up to high")
        require(self.every >= 1, "every", self.every, "at least 1")
        require(0 < self.rate <= 1, "rate", self.rate, "in (0, 1]")
        require(0 < self.lowest <= self.highest, "lowest", self.lowest, "above 0, up to highest")


class GradientBalance:
    """Alpha of a stage, and what moves it; its state belongs in the checkpoint.

    Args:
        config: the band. alpha: the first one, > 0.
    """

    def __init__(self, config: BalanceConfig, alpha: float) -> None:
        require(alpha > 0, "tokenizer_weight", alpha, "above 0, where a balance moves it")
        self.config, self.alpha = config, alpha

    def due(self, step: int) -> bool:
        """Whether to measure in step `step` (0-based)."""
        return step % self.config.every == 0

    def measure(self, loss: Tensor, captions: Tensor, probe: Tensor, accelerator: Accelerator) -> None:
        """Move alpha by one micro-batch's gradients; the graphs stay, and ``.grad`` is left alone.

        Args:
            loss: float[], captions plus alpha * L_vq. captions: float[], the part of it that is no L_vq.
            probe: weight of the encoder's last layer. accelerator: every rank must call; norms are averaged over them.
        """
        whole, part = (_gradient(each, probe) for each in (loss, captions))
        norms = torch.stack([part.norm(), (whole - part).norm()])
        if accelerator.num_processes > 1:
            norms = accelerator.reduce(norms, reduction="mean")
        self.follow(*(float(norm) for norm in norms))

    def follow(self, caption_norm: float, tokenizer_norm: float) -> None:
        """Move alpha by the norms of the gradients of L_cap and of alpha * L_vq; norms that tell nothing leave it alone.

        ``alpha <- alpha * (r / clamp(r, low, high)) ** rate``, kept in [lowest, highest].
        """
        config = self.config
        if not (0 < caption_norm < float("inf") and 0 < tokenizer_norm < float("inf")):
            return
        ratio = caption_norm / tokenizer_norm
        edge = min(max(ratio, config.low), config.high)
        self.alpha = min(max(self.alpha * (ratio / edge) ** config.rate, config.lowest), config.highest)

    def state_dict(self) -> dict[str, Any]:
        """Alpha."""
        return {"alpha": self.alpha}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.alpha = float(state["alpha"])


def _gradient(term: Tensor, probe: Tensor) -> Tensor:
    """d term / d probe, zeros where it does not reach."""
    if not term.requires_grad:
        return torch.zeros_like(probe)
    (found,) = torch.autograd.grad(term, [probe], retain_graph=True, allow_unused=True)
    return torch.zeros_like(probe) if found is None else found

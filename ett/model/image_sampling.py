"""From logits of image tokens to one token each: temperature, top-k, top-p, guidance, and a seed for every picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ett.config import require

GuidanceSchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class ImageSampling:
    """How image tokens are drawn.

    Attributes:
        temperature: of the softmax, >= 0; 0 takes the likeliest token.
        top_k: only so many of the likeliest tokens can be drawn, >= 1; null lets all (the paper: top-k = K).
        top_p: only the likeliest tokens whose mass together reaches this can be drawn, in (0, 1]; 1 lets all (the paper).
        guidance: scale s >= 0 of the prompt's influence: logits are ``u + s (c - u)``, c with the prompt and u without it. 1
            needs no second branch.
        guidance_schedule: s over the picture's tokens: "constant"; "linear" or "cosine" from 1 at the first to s at the last.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    guidance: float = 3.0
    guidance_schedule: GuidanceSchedule = "constant"

    def __post_init__(self) -> None:
        allowed = "0 (likeliest token) or above, and finite"
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, allowed)
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1, or null")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(0 <= self.guidance < math.inf, "guidance", self.guidance, "0 or more, and finite")

    @property
    def guided(self) -> bool:
        """Whether a branch without the prompt is needed."""
        return self.guidance != 1.0

    def scale(self, token: int, num_tokens: int) -> float:
        """s at token `token` (0-based) of `num_tokens`."""
        progress = token / max(1, num_tokens - 1)
        share = {"constant": 1.0, "linear": progress, "cosine": 0.5 * (1 - math.cos(math.pi * progress))}
        return 1 + (self.guidance - 1) * share[self.guidance_schedule]


def uniform_numbers(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """float64[count, B] in [0, 1): all that is random in B pictures of `count` tokens.

    A column comes from its own seed, on the CPU: what is drawn depends neither on neighbours in the batch nor on the device's
    source of randomness.
    """
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    columns = [torch.rand(count, generator=source, dtype=torch.float64) for source in sources]
    # below 1 by so much that no product with a sum of probabilities rounds up to that sum
    return torch.stack(columns, dim=1).clamp_(max=1 - 2**-52).to(device)


def draw_tokens(logits: Tensor, sampling: ImageSampling, uniforms: Tensor) -> Tensor:
    """int64[B]: a token for each row; nothing here waits for the device.

    The plain loop: for every row, walk through the cumulated probabilities until they pass a uniform number.

    Args:
        logits: float[B, K], guidance applied. uniforms: float64[B] in [0, 1) of `uniform_numbers`; unused at temperature 0.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # of the greatest logit nothing is left to overflow; a temperature has an inverse from the smallest normal number on
    below = logits.float() - logits.float().amax(dim=-1, keepdim=True)
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    probabilities = kept(below / temperature, sampling.top_k, sampling.top_p).softmax(dim=-1)
    sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True).squeeze(1)


def kept(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """float[B, K] with -inf where a token cannot be drawn; the likeliest one always can."""
    size = logits.shape[-1]
    if top_k is not None and top_k < size:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # a token goes where those before it reach the mass already
        late = ordered.cumsum(dim=-1) - ordered >= top_p
        logits = logits.masked_fill(torch.empty_like(late).scatter(-1, order, late), -math.inf)
    return logits

"""From a hidden state of the language model to the next image token: three interchangeable heads over the codebook.

Position t of a picture holds the codebook embedding of token t, read through the projector; the hidden state
there (before the picture: of the last position of the prompt) predicts token t + 1. One position stands for one token, so a
model that draws neither merges positions nor shows them their neighbours (`check_drawable`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ett.errors import RecipeError
from ett.model.few_rows import turned, worth_copying
from ett.model.projector import ProjectorConfig

HeadKind = Literal["tied", "linear", "vocabulary"]

FRESH_LOGIT_STD = 0.1
"""Spread of a fresh tied head's logits where hidden states have unit variance: nearly uniform, yet gradients pass."""
FRESH_WEIGHT_STD = 0.02
"""Spread of a fresh C x K matrix, as language models initialise their own."""


@dataclass(frozen=True)
class ImageHeadConfig:
    """Which head predicts image tokens; its form is open in the paper.

    Attributes:
        kind: "tied": ``(W·h)·Eᵀ`` with W: C -> D, logits from the codebook itself; "linear": a C x K matrix of its own;
            "vocabulary": such a matrix, whose K logits share one softmax with the text's V, as if the codes had been added to
            the vocabulary.
        bias: a learned logit for each code, which a tied head cannot express otherwise.
    """

    kind: HeadKind = "tied"
    bias: bool = False


def check_drawable(projector: ProjectorConfig) -> None:
    """Refuse a projector through which a model could not read back its own tokens one by one.

    Raises:
        RecipeError: positions are merged, or see neighbours that are not drawn yet.
    """
    if projector.merge_size > 1:
        raise RecipeError(
            f"An image head predicts one token a position, but projector.merge_size = {projector.merge_size} merges "
            f"{projector.merge_size**2} tokens into one. Set merge_size to 1, or leave model.image_head out."
        )
    if projector.context_layers > 0:
        raise RecipeError(
            f"projector.context_layers = {projector.context_layers} shows each position tokens that are drawn after it. Set "
            "context_layers to 0, or leave model.image_head out."
        )


class ImageHead(nn.Module):
    """float[..., C] -> logits float[..., K], float32 outside of autocast."""

    def __init__(self, config: ImageHeadConfig, hidden_size: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.kind = config.kind
        self.layer = nn.Linear(hidden_size, codebook_dim if config.kind == "tied" else codebook_size, bias=False)
        nn.init.normal_(self.layer.weight, std=FRESH_WEIGHT_STD)
        self.bias = nn.Parameter(torch.zeros(codebook_size)) if config.bias else None

    @property
    def shares_softmax(self) -> bool:
        """Whether image tokens are normalised together with the text's vocabulary while training."""
        return self.kind == "vocabulary"

    @torch.no_grad()
    def fit(self, codes: Tensor) -> None:
        """Draw a fresh tied head's weights to the scale of float[K, D] codes; other heads stay as they are."""
        if self.kind == "tied" and not codes.is_meta:
            size = codes.float().pow(2).mean().sqrt().clamp(min=1e-6) * (self.layer.weight.numel() ** 0.5)
            nn.init.normal_(self.layer.weight, std=FRESH_LOGIT_STD / float(size))

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Logits of every code.

        Args:
            hidden: float[..., C]. codes: float[K, D], the codebook as the projector reads it (`Projector.read`); used by a
                tied head alone. No gradient reaches it.
        """
        found: Tensor = self.layer(hidden.to(self.layer.weight.dtype))
        if self.kind == "tied":
            found = found @ codes.detach().to(found.dtype).T
        return found if self.bias is None else found + self.bias

    def fixed(self, codes: Tensor) -> Callable[[Tensor], Tensor]:
        """`forward` on these codes for as long as weights stay as they are, faster for few rows (ett.model.few_rows)."""
        matrix = codes.detach().to(self.layer.weight.dtype) if self.kind == "tied" else self.layer.weight
        if not worth_copying([matrix]):
            return lambda hidden: cast(Tensor, self(hidden, codes))
        columns = turned([matrix])

        def logits(hidden: Tensor) -> Tensor:
            rows = hidden.to(columns.dtype)
            found = (self.layer(rows) if self.kind == "tied" else rows) @ columns
            return found if self.bias is None else found + self.bias

        return logits

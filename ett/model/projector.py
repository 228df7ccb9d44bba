"""Codebook embeddings -> input embeddings of the language model (ETT section 3: an MLP with GELU)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ett.config import require


@dataclass(frozen=True)
class ProjectorConfig:
    """Shape of the projector; depth and width are open in the paper.

    Attributes:
        depth: linear layers, >= 1, GELU between them.
        hidden_size: width between them; None takes the language model's.
        merge_size: n; n x n neighbouring embeddings enter as one position, >= 1.
    """

    depth: int = 2
    hidden_size: int | None = None
    merge_size: int = 1

    def __post_init__(self) -> None:
        require(self.depth >= 1, "depth", self.depth, "at least 1")
        require(
            self.hidden_size is None or self.hidden_size >= 1, "hidden_size", self.hidden_size, "at least 1, or null"
        )
        require(self.merge_size >= 1, "merge_size", self.merge_size, "at least 1")


class Projector(nn.Module):
    """float[I, D, h, w] -> float[I, N / n**2, C], positions in reading order."""

    def __init__(self, config: ProjectorConfig, codebook_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.merge_size = config.merge_size
        width = config.hidden_size or hidden_size
        sizes = [codebook_dim * config.merge_size**2, *[width] * (config.depth - 1), hidden_size]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, embeddings: Tensor) -> Tensor:
        # pixel_unshuffle merges each n x n block into channels, row by row
        merged = F.pixel_unshuffle(embeddings, self.merge_size) if self.merge_size > 1 else embeddings
        x = merged.flatten(2).transpose(1, 2)
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else F.gelu(x))
        return x

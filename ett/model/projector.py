"""Codebook embeddings -> input embeddings of the language model (ETT section 3: an MLP with GELU)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ett.config import require
from ett.tokenizers.base import channels_last

WHITENING_FLOOR = 1e-4
"""Added to each direction's variance, as a share of the largest: directions of mere noise are not blown up."""
POSITION_STD = 0.02
"""Spread of fresh position embeddings, as language models initialise their own."""


@dataclass(frozen=True)
class ProjectorConfig:
    """Shape of the projector; depth and width are open in the paper.

    Attributes:
        depth: linear layers, >= 1, GELU between them.
        hidden_size: width between them; None takes the language model's.
        merge_size: n; n x n neighbouring embeddings enter as one position, >= 1.
        context_layers: 3x3 convolutions with GELU over the grid before merging, of width `hidden_size`, residual from the
            second on, >= 0; they show each position its neighbours, which a causal language model reads only in one
            direction.
        whiten: shift and scale the embeddings first so that over the codebook, as it is when the model is built, they have
            mean 0 and (nearly) unit variance in every direction. A tokenizer's brightness and colour can be a hundred times
            larger than the directions that hold shapes, which a fresh projector would then hardly see.
        normalize_output: give every position the length of the language model's text embeddings (RMS, learned from there).
        grid_positions: learned row and column embeddings for grids of up to so many positions a side are added to the output;
            0 for none. Codes say little about where they are, and a language model's own positions count from the text.
        row_ends: a learned embedding of its own ends each row of positions: another way to say where they are, for grids of
            any size.
    """

    depth: int = 2
    hidden_size: int | None = None
    merge_size: int = 1
    context_layers: int = 0
    whiten: bool = False
    normalize_output: bool = False
    grid_positions: int = 0
    row_ends: bool = False

    def __post_init__(self) -> None:
        require(self.depth >= 1, "depth", self.depth, "at least 1")
        require(
            self.hidden_size is None or self.hidden_size >= 1, "hidden_size", self.hidden_size, "at least 1, or null"
        )
        require(self.merge_size >= 1, "merge_size", self.merge_size, "at least 1")
        require(self.context_layers >= 0, "context_layers", self.context_layers, "0 or more")
        require(self.grid_positions >= 0, "grid_positions", self.grid_positions, "0 or more")


class Projector(nn.Module):
    """float[I, D, h, w] -> float[I, P, C], P = N / n**2 positions in reading order, or h / n more where rows have ends."""

    def __init__(self, config: ProjectorConfig, codebook_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.merge_size = config.merge_size
        width = config.hidden_size or hidden_size
        widths = [codebook_dim, *[width] * config.context_layers]
        self.context = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        sizes = [widths[-1] * config.merge_size**2, *[width] * (config.depth - 1), hidden_size]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.shift: Tensor | None
        self.scale: Tensor | None
        self.register_buffer("shift", torch.zeros(codebook_dim) if config.whiten else None)
        self.register_buffer("scale", torch.eye(codebook_dim) if config.whiten else None)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6) if config.normalize_output else None
        self.rows: nn.Embedding | None = None
        self.columns: nn.Embedding | None = None
        if config.grid_positions:
            self.rows, self.columns = (nn.Embedding(config.grid_positions, hidden_size) for _ in range(2))
            for table in (self.rows, self.columns):
                nn.init.normal_(table.weight, std=POSITION_STD)
        self.row_end = nn.Parameter(torch.empty(hidden_size).normal_(std=POSITION_STD)) if config.row_ends else None
        # as the embeddings come: from a quantizer, which works on rows of channels
        channels_last(self)

    @torch.no_grad()
    def fit(self, codebook: Tensor, text_embeddings: Tensor) -> None:
        """Take the scales of what stands before and behind the projector, where its configuration asks for them.

        Args:
            codebook: float32[K, D]. text_embeddings: float[V, C], the language model's input embeddings.
        """
        if self.shift is not None and self.scale is not None:
            self.shift.copy_(codebook.mean(dim=0))
            centred = (codebook - self.shift).double()
            variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
            floor = WHITENING_FLOOR * variances[-1]
            self.scale.copy_((directions / (variances.clamp(min=0) + floor).sqrt()) @ directions.T)
        size = float(text_embeddings.float().pow(2).mean().sqrt())
        if self.norm is not None:
            self.norm.weight.fill_(size)
        if self.row_end is not None:
            self.row_end.normal_(std=size)

    def read(self, codes: Tensor) -> Tensor:
        """float[..., D] codes as the layers see them: whitened where the configuration says so."""
        return codes if self.shift is None or self.scale is None else (codes - self.shift) @ self.scale

    def forward(self, embeddings: Tensor, start: int = 0, width: int | None = None) -> Tensor:
        """Project a grid, or the one token that was just drawn.

        Args:
            embeddings: float[I, D, h, w].
            start, width: of a 1 x 1 grid that is token number `start`, in reading order, of a grid of `width` columns; where
                rows have ends, the last one of a row brings its end.

        Raises:
            ValueError: a grid that is larger than the position embeddings.
        """
        if self.shift is not None and self.scale is not None:
            centred = embeddings - self.shift[:, None, None]
            embeddings = torch.einsum("ndhw,de->nehw", centred, self.scale)
        for i, convolution in enumerate(self.context):
            seen = F.gelu(convolution(embeddings))
            embeddings = seen if i == 0 else embeddings + seen
        # pixel_unshuffle merges each n x n block into channels, row by row
        n = self.merge_size
        if len(embeddings) == 0:
            # of no pictures pixel_unshuffle leaves the shape as it was
            merged = embeddings.reshape(
                0, n * n * embeddings.shape[1], embeddings.shape[2] // n, embeddings.shape[3] // n
            )
        else:
            merged = F.pixel_unshuffle(embeddings, n) if n > 1 else embeddings
        x = merged.flatten(2).transpose(1, 2)
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else F.gelu(x))
        x = x if self.norm is None else self.norm(x)
        if self.rows is not None and self.columns is not None:
            if width is None:
                x = x + _places(self.rows, self.columns, *merged.shape[2:])
            else:
                row, column = divmod(start, width)
                x = x + self.rows.weight[row] + self.columns.weight[column]
        if self.row_end is None or (width is not None and (start + 1) % width):
            return x
        ends = self.row_end.to(x.dtype).expand(len(x), merged.shape[2], 1, -1)
        return torch.cat([x.unflatten(1, merged.shape[2:]), ends], dim=2).flatten(1, 2)


def _places(rows: nn.Embedding, columns: nn.Embedding, height: int, width: int) -> Tensor:
    """float[height * width, C]: what says where positions are."""
    if max(height, width) > rows.num_embeddings:
        raise ValueError(
            f"A grid of {height} x {width} positions is larger than the projector's grid_positions ({rows.num_embeddings}). "
            "Use smaller pictures, or a projector with more."
        )
    return (rows.weight[:height, None] + columns.weight[None, :width]).flatten(0, 1)

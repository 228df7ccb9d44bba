"""Finite scalar quantization (FSQ, arXiv 2309.15505): each channel is bounded and rounded to a few levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ett.config import require
from ett.tokenizers.base import Precision
from ett.tokenizers.cnn import CNNConfig
from ett.tokenizers.cnn_tokenizer import CNNTokenizer
from ett.tokenizers.implicit import ImplicitQuantizer
from ett.types import Quantized

MARGIN = 1e-3
"""The bound reaches this much (relative) beyond the outermost level, so that rounding can reach it (FSQ, appendix A.1)."""


class FiniteScalarQuantizer(ImplicitQuantizer):
    """FSQ: ``z_d -> round(bound(z_d)) / floor(L_d / 2)``, K = prod(L), D = len(L); embeddings lie in [-1, 1].

    ``bound`` is a tanh scaled to L_d levels, shifted by half a level where L_d is even. The index counts the levels with the
    first channel fastest, ``sum_d digit_d * prod(L[:d])``. Gradients pass the rounding straight through. FSQ needs no other
    loss: L_quant and L_entropy are 0.

    Args:
        levels: L, each at least 3 (for two levels a channel take LFQ).
    """

    levels: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        _check(levels)
        self.codebook_dim = len(levels)
        self.codebook_size = math.prod(levels)
        # not int64: transformers loads every tensor of the vision tokenizer as float32
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32))

    @property
    def device(self) -> torch.device:
        return self.levels.device

    def codes(self, indices: Tensor) -> Tensor:
        levels, basis = self._levels_and_basis()
        digits = torch.div(indices.unsqueeze(-1), basis, rounding_mode="floor") % levels
        return (digits - levels // 2).float() / (levels // 2)

    def forward(self, features: Tensor, entropy: bool = True) -> Quantized:
        with torch.autocast(features.device.type, enabled=False):
            bounded = self._bound(self._rows(features))
            rounded = self._rounded(bounded.detach())
            # in this order the value is the code to the last bit
            embeddings = (rounded + (bounded - bounded.detach())) / (self.levels // 2)
            indices = self._indices(rounded)
        zero = torch.zeros((), dtype=embeddings.dtype, device=embeddings.device)
        return Quantized(embeddings.movedim(-1, 1), indices, zero, zero.clone(), self._counts(indices))

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return self._indices(self._rounded(self._bound(self._rows(features))))

    def _levels_and_basis(self) -> tuple[Tensor, Tensor]:
        """int64[D] each: L and prod(L[:d])."""
        levels = self.levels.long()
        return levels, torch.div(levels.cumprod(0), levels, rounding_mode="floor")

    def _bound(self, z: Tensor) -> Tensor:
        """float[..., D] -> same, in (-L/2, L/2), rounding to L integers."""
        radius = (self.levels - 1).to(z.dtype) * ((1 + MARGIN) / 2)
        offset = (self.levels % 2 == 0).to(z.dtype) / 2
        return torch.tanh(z + torch.atanh(offset / radius)) * radius - offset

    def _rounded(self, bounded: Tensor) -> Tensor:
        """The nearest of the L integers; with a thousand of them, float32 reaches the bound itself."""
        levels = self.levels.to(bounded.dtype)
        return bounded.round().clamp(-(levels // 2), (levels - 1) // 2)

    def _indices(self, rounded: Tensor) -> Tensor:
        levels, basis = self._levels_and_basis()
        return ((rounded.long() + levels // 2) * basis).sum(dim=-1)


@dataclass(frozen=True)
class FSQConfig(CNNConfig):
    """The tokenizer's shape; `CNNConfig` documents encoder and decoder.

    Attributes:
        levels: of `FiniteScalarQuantizer`; the default has K = 64,000 (FSQ's choice for 2^16).
        precision: type that encoder and decoder compute in; the quantizer is float32.
    """

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.levels)


class FSQTokenizer(CNNTokenizer):
    """The own CNN around a `FiniteScalarQuantizer`."""

    tokenizer_type: ClassVar[str] = "fsq"
    config_class: ClassVar[type] = FSQConfig

    config: FSQConfig

    def _quantizer(self) -> FiniteScalarQuantizer:
        return FiniteScalarQuantizer(self.config.levels)


def _check(levels: Sequence[int]) -> None:
    require(len(levels) >= 1, "levels", levels, "a non-empty list")
    require(
        all(level >= 3 for level in levels), "levels", levels, "at least 3 each (for two levels a channel take lfq)"
    )
    require(math.prod(levels) < 2**31, "levels", levels, "fewer than 2^31 codes in all")

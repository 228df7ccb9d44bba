"""Lookup-free quantization (LFQ, MAGVIT-v2, arXiv 2310.05737): each channel is its sign, an index is its bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ett.config import require
from ett.tokenizers.base import Precision
from ett.tokenizers.cnn import CNNConfig
from ett.tokenizers.cnn_tokenizer import CNNTokenizer
from ett.tokenizers.implicit import ImplicitQuantizer
from ett.tokenizers.index_backprop import index_backprop
from ett.tokenizers.quantizer import BETA
from ett.types import Quantized


class LookupFreeQuantizer(ImplicitQuantizer):
    """LFQ: ``z_d -> sign(z_d)`` (0 counts as negative), K = 2^D; embeddings are -1 or 1, the first channel the highest bit.

    Gradients pass the sign straight through. ``L_quant = 0.25 * mean((z - sg(sign(z)))^2)`` keeps features near the corners.
    ``L_entropy = mean_n H(p_n) - H(mean_n p_n)`` with ``p = softmax(2 z . c / T)`` over all K corners c, exact, over all
    ranks while training, and without an N x K matrix (`index_backprop`).

    Args:
        codebook_size: K, a power of two, 2 to 2^24.
        entropy_temperature: T, > 0.
    """

    weights: Tensor

    def __init__(self, codebook_size: int, entropy_temperature: float = 0.01) -> None:
        super().__init__()
        _check(codebook_size, entropy_temperature)
        self.codebook_size = codebook_size
        self.codebook_dim = int(math.log2(codebook_size))
        self.entropy_temperature = entropy_temperature
        # not int64: transformers loads every tensor of the vision tokenizer as float32, which holds these exactly
        self.register_buffer("weights", torch.tensor([2.0**d for d in reversed(range(self.codebook_dim))]))

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def codes(self, indices: Tensor) -> Tensor:
        return ((indices.unsqueeze(-1) & self.weights.long()) != 0).float() * 2 - 1

    def forward(self, features: Tensor, entropy: bool = True) -> Quantized:
        with torch.autocast(features.device.type, enabled=False):
            z = self._rows(features)
            signs = torch.where(z.detach() > 0, 1.0, -1.0).to(z.dtype)
            indices = self._indices(z)
            if entropy:
                corners = self.codebook.to(z.dtype)
                found = index_backprop(
                    2 * z.reshape(-1, self.codebook_dim),
                    corners,
                    self.entropy_temperature,
                    all_ranks=self._all_ranks,
                    through_softmax=False,
                )
                entropy_loss, usage = found.entropy, found.usage
            else:
                entropy_loss = torch.zeros((), dtype=z.dtype, device=z.device)
                usage = self._counts(indices)
            quantization_loss = BETA * F.mse_loss(z, signs)
            # in this order the value is the code to the last bit
            embeddings = signs + (z - z.detach())
        return Quantized(embeddings.movedim(-1, 1), indices, quantization_loss, entropy_loss, usage)

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        return self._indices(self._rows(features))

    def _indices(self, z: Tensor) -> Tensor:
        return ((z > 0) * self.weights.long()).sum(dim=-1)


@dataclass(frozen=True)
class LFQConfig(CNNConfig):
    """The tokenizer's shape; `CNNConfig` documents encoder and decoder.

    Attributes:
        codebook_size, entropy_temperature: of `LookupFreeQuantizer`; D is log2(codebook_size).
        precision: type that encoder and decoder compute in; the quantizer is float32.
    """

    codebook_size: int = 16384
    entropy_temperature: float = 0.01
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.codebook_size, self.entropy_temperature)


class LFQTokenizer(CNNTokenizer):
    """The own CNN around a `LookupFreeQuantizer`."""

    tokenizer_type: ClassVar[str] = "lfq"
    config_class: ClassVar[type] = LFQConfig

    config: LFQConfig

    def _quantizer(self) -> LookupFreeQuantizer:
        return LookupFreeQuantizer(self.config.codebook_size, self.config.entropy_temperature)


def _check(codebook_size: int, entropy_temperature: float) -> None:
    power = codebook_size > 1 and codebook_size & (codebook_size - 1) == 0
    require(power and codebook_size <= 2**24, "codebook_size", codebook_size, "a power of two, 2 to 2^24")
    require(entropy_temperature > 0, "entropy_temperature", entropy_temperature, "above 0")

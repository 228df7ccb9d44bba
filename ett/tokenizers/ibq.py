"""The IBQ vision tokenizer: the reference CNN around an index-backpropagation quantizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ett.config import require
from ett.tokenizers.base import Precision
from ett.tokenizers.cnn import CNNConfig
from ett.tokenizers.cnn_tokenizer import CNNTokenizer
from ett.tokenizers.quantizer import Gradient, IndexBackpropagationQuantizer, Similarity


@dataclass(frozen=True)
class IBQConfig(CNNConfig):
    """The tokenizer's shape; `CNNConfig` documents encoder and decoder, the quantizer its own arguments.

    Attributes:
        codebook_size: K. codebook_dim: D.
        temperature, normalize, radius, entropy_temperature, similarity, gradient: of `IndexBackpropagationQuantizer`.
        precision: type that encoder and decoder compute in, in training and evaluation alike; the quantizer is float32.
    """

    codebook_size: int = 16384
    codebook_dim: int = 256
    temperature: float = 1.0
    normalize: bool = False
    radius: float = 1.0
    entropy_temperature: float = 0.01
    similarity: Similarity = "dot"
    gradient: Gradient = "index_backprop"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.codebook_size >= 2, "codebook_size", self.codebook_size, "at least 2")
        require(self.codebook_dim >= 1, "codebook_dim", self.codebook_dim, "at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.radius > 0, "radius", self.radius, "above 0")
        require(self.entropy_temperature > 0, "entropy_temperature", self.entropy_temperature, "above 0")


class IBQTokenizer(CNNTokenizer):
    """The own CNN around an `IndexBackpropagationQuantizer`."""

    tokenizer_type: ClassVar[str] = "ibq"
    config_class: ClassVar[type] = IBQConfig

    config: IBQConfig
    quantize: IndexBackpropagationQuantizer

    def _quantizer(self) -> IndexBackpropagationQuantizer:
        config = self.config
        return IndexBackpropagationQuantizer(
            config.codebook_size,
            config.codebook_dim,
            temperature=config.temperature,
            normalize=config.normalize,
            radius=config.radius,
            entropy_temperature=config.entropy_temperature,
            similarity=config.similarity,
            gradient=config.gradient,
        )

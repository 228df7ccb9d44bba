"""The IBQ vision tokenizer: the reference CNN around an index-backpropagation quantizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ett.config import require
from ett.tokenizers.base import Precision, VisionTokenizer, channels_last
from ett.tokenizers.cnn import CNNConfig, Decoder, Encoder
from ett.tokenizers.quantizer import IndexBackpropagationQuantizer, Similarity


@dataclass(frozen=True)
class IBQConfig(CNNConfig):
    """The tokenizer's shape; `CNNConfig` documents encoder and decoder, the quantizer its own arguments.

    Attributes:
        codebook_size: K. codebook_dim: D.
        temperature, normalize, entropy_temperature, similarity: of `IndexBackpropagationQuantizer`.
        precision: type that encoder and decoder compute in, in training and evaluation alike; the quantizer is float32.
    """

    codebook_size: int = 16384
    codebook_dim: int = 256
    temperature: float = 1.0
    normalize: bool = False
    entropy_temperature: float = 0.01
    similarity: Similarity = "dot"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.codebook_size >= 2, "codebook_size", self.codebook_size, "at least 2")
        require(self.codebook_dim >= 1, "codebook_dim", self.codebook_dim, "at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.entropy_temperature > 0, "entropy_temperature", self.entropy_temperature, "above 0")


class IBQTokenizer(VisionTokenizer):
    """encoder -> quant_conv -> quantize -> post_quant_conv -> decoder; parameter names as in the reference."""

    tokenizer_type: ClassVar[str] = "ibq"
    config_class: ClassVar[type] = IBQConfig

    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        self.config: IBQConfig = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = IndexBackpropagationQuantizer(
            config.codebook_size,
            config.codebook_dim,
            temperature=config.temperature,
            normalize=config.normalize,
            entropy_temperature=config.entropy_temperature,
            similarity=config.similarity,
        )
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        channels_last(self)

    @property
    def downsample(self) -> int:
        return self.config.downsample

    @property
    def precision(self) -> Precision:
        return self.config.precision

    @property
    def encoder_output(self) -> Tensor:
        return self.quant_conv.weight

    def _encode(self, pixel_values: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixel_values))

    def _decode(self, embeddings: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(embeddings))

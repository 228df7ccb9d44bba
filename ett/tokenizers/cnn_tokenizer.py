"""The body of every tokenizer on the own CNN; what differs between them is the quantizer in its middle."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from ett.tokenizers.base import Precision, VisionTokenizer, channels_last
from ett.tokenizers.cnn import CNNConfig, Decoder, Encoder
from ett.tokenizers.quantizer import Quantizer


class CNNTokenizer(VisionTokenizer):
    """encoder -> quant_conv -> quantize -> post_quant_conv -> decoder; parameter names as in the reference.

    Args:
        config: with the `precision` that encoder and decoder compute in.
    """

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        # in this order: a seed stands for the same fresh weights in every version
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = self._quantizer()
        self.quant_conv = nn.Conv2d(config.z_channels, self.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.codebook_dim, config.z_channels, 1)
        channels_last(self)

    @abstractmethod
    def _quantizer(self) -> Quantizer:
        """A fresh one, as `config` says."""

    @property
    def downsample(self) -> int:
        return int(self.config.downsample)

    @property
    def precision(self) -> Precision:
        precision: Precision = self.config.precision
        return precision

    @property
    def encoder_output(self) -> Tensor:
        return self.quant_conv.weight

    def _encode(self, pixel_values: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixel_values))

    def _decode(self, embeddings: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(embeddings))

"""The joint objective (ETT eq. 3), L = L_cap + alpha * L_vq, and its weights.

Terms that need nothing but the model are computed here and are in the model's own loss. The perceptual and the adversarial
term need networks of their own, which no saved model should carry: the training stage adds them (ett.train.critics).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor

from ett.config import require
from ett.types import Quantized


@dataclass(frozen=True)
class LossConfig:
    """Weights of every term. A term of weight 0 is not computed.

    Attributes:
        caption_weight: of L_cap, >= 0.
        image_weight: of the cross-entropy of image tokens that are drawn, >= 0; of a model with an image head alone.
        image_noise: share, in [0, 1), of a drawn picture's tokens that the language model reads back wrong while it learns:
            they are another picture's of the micro-batch, at the same place. What is to be predicted stays.
        tokenizer_weight: alpha, of L_vq as a whole, >= 0 (ETT: 0.25).
        reconstruction: pixel distance of L_rec.
        reconstruction_weight, quantization_weight: of L_rec and L_quant in L_vq, >= 0 (1).
        entropy_weight: lambda_E of L_entropy in L_vq, >= 0 (0.05).
        perceptual: network of the perceptual distance: "lite0" (EfficientNet-Lite0, package in the extra `perceptual`),
            "lpips_vgg" (LPIPS, packages in the extra `lpips`) or null for none.
        perceptual_weight: of that distance in L_vq, >= 0 (1).
        adversarial_weight: lambda_G of the discriminator's judgement in L_vq, >= 0 (the paper: 0.1; 0 plays no game).
        reconstruction_share: share of each batch's pictures, in (0, 1], that are decoded for L_rec while a language model
            trains beside (at least one of them; the other terms of L_vq see all). For small pictures the decoder is the
            dearest part of a step.
        caption_reaches_tokenizer: False detaches the tokenizer from the caption loss (the reconstruction-only control).
        distillation_weight: in L_vq, of the pixel distance to what the tokenizer made of the picture as the stage began, >= 0.
        soft_caption_weight: of a second caption loss, >= 0, for which the language model reads ``softmax(l / tau) @ E`` instead
            of the chosen codes (GEAR: the hard one trains the language model, the soft one guides the tokenizer).
        soft_temperature: tau, > 0; what the index softmax has is `temperature` of the tokenizer.
    """

    caption_weight: float = 1.0
    image_weight: float = 1.0
    image_noise: float = 0.0
    tokenizer_weight: float = 0.25
    reconstruction: Literal["l1", "l2"] = "l1"
    reconstruction_weight: float = 1.0
    quantization_weight: float = 1.0
    entropy_weight: float = 0.05
    perceptual: Literal["lite0", "lpips_vgg"] | None = None
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.0
    reconstruction_share: float = 1.0
    caption_reaches_tokenizer: bool = True
    distillation_weight: float = 0.0
    soft_caption_weight: float = 0.0
    soft_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in (
            "caption_weight",
            "image_weight",
            "tokenizer_weight",
            "reconstruction_weight",
            "quantization_weight",
            "entropy_weight",
            "perceptual_weight",
            "adversarial_weight",
            "distillation_weight",
            "soft_caption_weight",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.image_noise < 1, "image_noise", self.image_noise, "in [0, 1)")
        require(self.soft_temperature > 0, "soft_temperature", self.soft_temperature, "above 0")
        require(0 < self.reconstruction_share <= 1, "reconstruction_share", self.reconstruction_share, "in (0, 1]")

    @property
    def tokenizer_weights(self) -> dict[str, float]:
        """The weight in L_vq of each of its terms, by the term's name."""
        return {
            "reconstruction_loss": self.reconstruction_weight,
            "quantization_loss": self.quantization_weight,
            "entropy_loss": self.entropy_weight,
            "perceptual_loss": self.perceptual_weight,
            "distillation_loss": self.distillation_weight,
            "adversarial_loss": self.adversarial_weight,
        }

    @property
    def text_weights(self) -> dict[str, float]:
        """The weight beside L_vq of each term of the language model's, by the term's name."""
        return {
            "caption_loss": self.caption_weight,
            "soft_caption_loss": self.soft_caption_weight,
            "image_loss": self.image_weight,
        }

    @property
    def uses_entropy(self) -> bool:
        """Whether the quantizer must compute the entropy term."""
        return self.tokenizer_weight > 0 and self.entropy_weight > 0


def reconstruction_loss(reconstruction: Tensor, pixel_values: Tensor, kind: Literal["l1", "l2"]) -> Tensor:
    """float[]: mean absolute or squared difference of two float[I, 3, H, W] in [-1, 1]."""
    return F.l1_loss(reconstruction, pixel_values) if kind == "l1" else F.mse_loss(reconstruction, pixel_values)


def tokenizer_losses(
    pixel_values: Tensor, reconstruction: Tensor, quantized: Quantized, config: LossConfig
) -> dict[str, Tensor]:
    """The terms of L_vq by name, unweighted, each float[].

    Args:
        pixel_values: float[I, 3, H, W]. reconstruction: of the first of them, float[R, 3, H, W], 1 <= R <= I. Of no pictures, a
            rank's that has none, all terms are 0.
    """
    shown = pixel_values[: len(reconstruction)]
    terms = {
        "reconstruction_loss": reconstruction_loss(reconstruction, shown, config.reconstruction),
        "quantization_loss": quantized.quantization_loss,
        "entropy_loss": quantized.entropy_loss,
    }
    # means over nothing are NaN; as 0 they keep their place in the graph, and no gradient
    return terms if len(pixel_values) else {name: term.nan_to_num() for name, term in terms.items()}


class TermMeans:
    """Means of loss terms over batches, each term over what it is a mean of: text or image tokens, or pictures."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, terms: Mapping[str, float], *, supervised: int, drawn: int, images: int) -> None:
        """Take in a batch's terms, each a mean over the batch.

        Args:
            supervised, drawn, images: text tokens with a label, image tokens with one, and pictures of the batch; a term that
                is a mean over none of them counts nothing.
        """
        own = {"caption_loss": supervised, "soft_caption_loss": supervised, "image_loss": drawn}
        for name, value in terms.items():
            if count := own.get(name, images):
                self._sums[name] = self._sums.get(name, 0.0) + value * count
                self._counts[name] = self._counts.get(name, 0.0) + count

    def means(self) -> dict[str, float]:
        """Term -> mean, of those that any batch had."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}


def whole_loss(terms: Mapping[str, float], config: LossConfig, alpha: float) -> float:
    """L from its unweighted terms (ETT eq. 3); terms that are not there count nothing.

    Args:
        alpha: weight of L_vq; 1 where there is no other loss.
    """
    text, tokenizer = config.text_weights, config.tokenizer_weights
    return sum(text[name] * term for name, term in terms.items() if name in text) + alpha * sum(
        tokenizer[name] * term for name, term in terms.items() if name in tokenizer
    )


def tokenizer_loss(losses: dict[str, Tensor], config: LossConfig) -> Tensor:
    """L_vq, float[], from `tokenizer_losses`' terms (ETT eq. 1; the stage adds the perceptual and the adversarial term)."""
    weights = config.tokenizer_weights
    return cast(Tensor, sum(weights[name] * term for name, term in losses.items() if name in weights))

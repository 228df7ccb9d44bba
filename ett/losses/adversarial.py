"""The adversarial game of L_vq (ETT eq. 1): a patch discriminator, its hinge loss with LeCam, and what the tokenizer hears.

Sources: PatchGAN, Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017, section 3.2.2;
hinge loss, Lim and Ye, "Geometric GAN", 2017; LeCam regularisation, Tseng et al., "Regularizing Generative Adversarial
Networks under Limited Data", 2021, eq. 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ett.config import require

SLOPE = 0.2
"""Of the leaky rectifiers."""
WEIGHT_STD = 0.02
"""Of fresh convolutions and norms' scales, as in PatchGAN."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator of a stage, and how it plays.

    Attributes:
        channels: of the first layer, >= 1; each further strided layer has twice as many, up to eight times.
        strided_layers: convolutions that halve the grid, >= 1. With 3, a logit judges 70 x 70 pixels. The picture's shorter
            side must be `smallest_side` or more.
        learning_rate: of its Adam; null takes the vision tokenizer's peak. It follows the stage's schedule.
        betas: of its Adam.
        generator: what the tokenizer hears: "non_saturating", mean softplus(-logit), or "hinge", -mean logit.
        inherit: go on with the discriminator that came with the tokenizer (an earlier stage's, or one that an imported
            checkpoint ships), with its Adam and LeCam averages where they came too. It must have these `channels` and
            `strided_layers`. False, or where none came, starts a fresh one.
        generator_start: step (0-based) from which the tokenizer hears a fresh one. Until then the discriminator learns alone,
            which a tokenizer needs that comes without one. An inherited one is heard from the first step.
        lecam_weight: of the LeCam term, >= 0; 0 leaves it out.
        lecam_decay: of its averages of the logits, in [0, 1).
    """

    channels: int = 64
    strided_layers: int = 3
    learning_rate: float | None = None
    betas: tuple[float, float] = (0.5, 0.9)
    generator: Literal["non_saturating", "hinge"] = "non_saturating"
    inherit: bool = True
    generator_start: int = 0
    lecam_weight: float = 0.001
    lecam_decay: float = 0.999

    @property
    def smallest_side(self) -> int:
        """Pixels at which one logit is left."""
        return 3 * 2**self.strided_layers

    def __post_init__(self) -> None:
        require(self.channels >= 1, "channels", self.channels, "at least 1")
        require(self.strided_layers >= 1, "strided_layers", self.strided_layers, "at least 1")
        require(
            self.learning_rate is None or self.learning_rate > 0,
            "learning_rate",
            self.learning_rate,
            "above 0, or null",
        )
        require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        require(self.generator_start >= 0, "generator_start", self.generator_start, "0 or more")
        require(self.lecam_weight >= 0, "lecam_weight", self.lecam_weight, "0 or more")
        require(0 <= self.lecam_decay < 1, "lecam_decay", self.lecam_decay, "in [0, 1)")


class PatchDiscriminator(nn.Module):
    """float[I, 3, H, W] in [-1, 1] -> float[I, 1, h', w'], one logit for each overlapping patch; large where it looks real.

    The layers, and their names ``main.{0, 2, 3, ...}``, are those of the tokenizers' reference checkpoints.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        width = config.channels
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        for n in range(1, config.strided_layers + 1):
            inputs, width = width, config.channels * min(2**n, 8)
            stride = 2 if n < config.strided_layers else 1
            layers += [
                nn.Conv2d(inputs, width, 4, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(SLOPE),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=WEIGHT_STD)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, mean=1.0, std=WEIGHT_STD)

    def forward(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self.main(pictures)
        return logits


class LeCam(nn.Module):
    """Running means of the discriminator's logits, and how far it strays from them; the means are part of a checkpoint."""

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """float[] >= 0 of logits of any shape; the means then move by ``1 - decay`` towards these, over all ranks."""
        loss = F.relu(real - self.fake).pow(2).mean() + F.relu(self.real - fake).pow(2).mean()
        self._move(torch.stack([real.detach().mean(), fake.detach().mean(), torch.ones_like(self.real)]))
        return loss

    def move_with_others(self) -> None:
        """For a rank that has nothing to show, while the others call `forward`."""
        self._move(torch.zeros(3, dtype=self.real.dtype, device=self.real.device))

    @torch.no_grad()
    def _move(self, means: Tensor) -> None:
        """`means`: of real and fake logits, and 1; all 0 for a rank without."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(means)
        if means[2] > 0:
            self.real.lerp_(means[0] / means[2], 1 - self.decay)
            self.fake.lerp_(means[1] / means[2], 1 - self.decay)


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """float[] >= 0: half of ``mean max(0, 1 - real) + mean max(0, 1 + fake)`` of logits of any shape."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor, kind: Literal["non_saturating", "hinge"]) -> Tensor:
    """float[] of the discriminator's logits on reconstructions: mean softplus(-fake), or -mean fake."""
    return F.softplus(-fake).mean() if kind == "non_saturating" else -fake.mean()

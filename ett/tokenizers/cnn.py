"""The convolutional encoder and decoder of VQGAN and IBQ, with the reference's parameter names.

L  levels = len(channel_multipliers); level i works at 1 / 2**i of the input's size
encoder: conv_in, down.{i}.{block, attn, downsample}, mid, norm_out, conv_out: float[I, 3, H, W] -> float[I, Z, h, w]
decoder: conv_in, mid, up.{i}.{block, attn, upsample}, norm_out, conv_out:     float[I, Z, h, w] -> float[I, 3, H, W]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ett.config import require
from ett.tokenizers.norm_swish import norm_swish
from ett.tokenizers.upsampling import doubled_convolution


@dataclass(frozen=True)
class CNNConfig:
    """Shape of encoder and decoder. The defaults are the reference's (256 px, f16, 46.75M + 59.90M parameters).

    Attributes:
        channels: width at full resolution; level i has ``channels * channel_multipliers[i]``.
        channel_multipliers: one entry per level; the picture is halved between levels.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        attention_levels: levels with self-attention after each block; -1 is the last.
        z_channels: width of the features between encoder and decoder.
        norm_groups: groups of every GroupNorm; each level's width is a multiple of it.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 4
    attention_levels: tuple[int, ...] = (-1,)
    z_channels: int = 256
    norm_groups: int = 32

    def __post_init__(self) -> None:
        require(len(self.channel_multipliers) >= 1, "channel_multipliers", self.channel_multipliers, "a non-empty list")
        for name in ("channels", "num_res_blocks", "z_channels", "norm_groups"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for width in self.widths:
            require(
                width >= 1 and width % self.norm_groups == 0,
                "channels * channel_multipliers",
                self.widths,
                f"multiples of norm_groups ({self.norm_groups})",
            )
        levels = len(self.channel_multipliers)
        for level in self.attention_levels:
            require(-levels <= level < levels, "attention_levels", level, f"in [-{levels}, {levels - 1}]")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def downsample(self) -> int:
        """Pixels per token side."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    def has_attention(self, level: int) -> bool:
        """Whether `level` (0 is full resolution) carries self-attention."""
        return level in {index % len(self.channel_multipliers) for index in self.attention_levels}

    def norm(self, channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(self.norm_groups, channels, eps=1e-6)


RESIDUAL_SCALE = 0.1
"""Fresh residual branches start this much smaller than PyTorch's default: the skip carries the picture, and training starts
faster (docs/LOG.md: +0.9 dB after 4,000 pictures)."""


def _small(layer: nn.Conv2d) -> nn.Conv2d:
    """`layer`, the last one of a residual branch, with its fresh weights scaled down."""
    with torch.no_grad():
        layer.weight.mul_(RESIDUAL_SCALE)
    return layer


class ResnetBlock(nn.Module):
    """float[I, c_in, h, w] -> float[I, c_out, h, w]: norm, swish, conv, twice, around a skip."""

    def __init__(self, config: CNNConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = config.norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = config.norm(out_channels)
        self.conv2 = _small(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        # absent, not Identity: the reference has no such key where widths are equal
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(norm_swish(self.norm1, x))
        hidden = self.conv2(norm_swish(self.norm2, hidden))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + hidden


class AttentionBlock(nn.Module):
    """Single-head self-attention over the grid, float[I, c, h, w] -> same; q, k, v are 1x1 convolutions."""

    def __init__(self, config: CNNConfig, channels: int) -> None:
        super().__init__()
        self.norm = config.norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = _small(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        q, k, v = (layer(hidden).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the grid: pad right and bottom by one, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the grid: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return doubled_convolution(self.conv, x)


class Level(nn.Module):
    """One resolution: `num_blocks` residual blocks, each followed by attention where the level has it, then a resize."""

    def __init__(
        self, config: CNNConfig, level: int, in_channels: int, num_blocks: int, resize: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        width = config.widths[level]
        self.block = nn.ModuleList(
            ResnetBlock(config, in_channels if i == 0 else width, width) for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(
            AttentionBlock(config, width) for _ in range(num_blocks if config.has_attention(level) else 0)
        )
        self.resize_name = None if resize is None else resize[0]
        if resize is not None:
            self.add_module(*resize)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[i](x)
        return x if self.resize_name is None else self.get_submodule(self.resize_name)(x)


class Middle(nn.Module):
    """The blocks at the smallest grid: residual, attention, residual."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.block_1 = ResnetBlock(config, width, width)
        self.attn_1 = AttentionBlock(config, width)
        self.block_2 = ResnetBlock(config, width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """float[I, 3, H, W] in [-1, 1] -> float[I, z_channels, H / downsample, W / downsample]."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        widths = config.widths
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                config,
                level,
                widths[level - 1] if level > 0 else config.channels,
                config.num_res_blocks,
                ("downsample", Downsample(widths[level])) if level < last else None,
            )
            for level in range(len(widths))
        )
        self.mid = Middle(config)
        self.norm_out = config.norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.conv_in(pixel_values)
        for level in self.down:
            x = level(x)
        return self.conv_out(norm_swish(self.norm_out, self.mid(x)))


class Decoder(nn.Module):
    """float[I, z_channels, h, w] -> float[I, 3, h * downsample, w * downsample], about [-1, 1], not clamped."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        widths = config.widths
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(config)
        # up.0 is full resolution, as in the reference, so the list runs backwards in forward()
        self.up = nn.ModuleList(
            Level(
                config,
                level,
                widths[level + 1] if level < last else widths[-1],
                config.num_res_blocks + 1,
                ("upsample", Upsample(widths[level])) if level > 0 else None,
            )
            for level in range(len(widths))
        )
        self.norm_out = config.norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(norm_swish(self.norm_out, x))

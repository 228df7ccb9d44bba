"""Nearest-neighbour doubling, then a 3 x 3 convolution, without computing anything twice.

The plain form that this file replaces::

    y = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)

A pixel of the doubled grid sees nine pixels, which are copies of four. Which copies coincide depends on whether its row and its
column are even or odd (its phase), so that each phase is a 2 x 2 convolution of x, whose weights are sums of the nine: 4 * 4
products a pixel of x instead of 4 * 9, and the doubled input never exists. All phases are one convolution with four times
the channels, whose results are then interleaved. Equal up to the order of the sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FASTER_FROM = 1 << 16
"""Entries of x from which on this is faster on CPU: below, what surrounds the convolution outweighs what it saves."""


def doubled_convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """``layer`` (3 x 3, padding 1) of float[I, C, h, w] doubled by nearest neighbour: float[I, C', 2 h, 2 w]."""
    if (
        x.numel() < FASTER_FROM
        or x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.float64)
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        doubled: Tensor = layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled
    phases = _phases(_phases(layer.weight, 2).flatten(0, 1), 3).flatten(0, 1)
    bias = None if layer.bias is None else layer.bias.repeat(4)
    # of rows and columns one more than x has: each phase leaves out the first or the last
    found = F.conv2d(x, phases.contiguous(memory_format=torch.channels_last), bias, padding=1)
    interleaved: Tensor = _Interleave.apply(found)
    return interleaved


def _phases(weight: Tensor, dim: int) -> Tensor:
    """[2, ...] with 2 entries along `dim` from [...] with 3: an even pixel has its first alone, an odd one its last."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)])


class _Interleave(torch.autograd.Function):
    """float[I, 4 C, h + 1, w + 1], phases of columns outermost, to float[I, C, 2 h, 2 w], channels last."""

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        phases = phases.contiguous(memory_format=torch.channels_last)
        ctx.shape = phases.shape
        images, _, height, width = _grid(phases.shape)
        rows = _view(phases).clone(memory_format=torch.contiguous_format)
        return rows.view(images, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        images, channels, height, width = _grid(ctx.shape)
        rows = gradient.permute(0, 2, 3, 1).reshape(images, height, 2, width, 2, channels)
        found = gradient.new_zeros(ctx.shape).contiguous(memory_format=torch.channels_last)
        _view(found).copy_(rows)
        return found


def _grid(shape: torch.Size) -> tuple[int, int, int, int]:
    """(I, C, h, w) of what the phases of shape [I, 4 C, h + 1, w + 1] become, not yet doubled."""
    return shape[0], shape[1] // 4, shape[2] - 1, shape[3] - 1


def _view(phases: Tensor) -> Tensor:
    """[I, h, 2, w, 2, C]: pixel (2 i + a, 2 j + b) is what phase (a, b) has at (i + a, j + b)."""
    images, channels, height, width = _grid(phases.shape)
    image, _, row, column = phases.stride()
    size = (images, height, 2, width, 2, channels)
    return phases.as_strided(size, (image, row, row + channels, column, column + 2 * channels, 1))

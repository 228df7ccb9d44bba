"""How close two pictures are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ett.images import Box

MAX_PSNR = 100.0
"""PSNR of equal pictures [dB], where the formula gives infinity, which JSON cannot hold."""

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def inside(picture: Tensor, box: Box | None) -> Tensor:
    """The part of float[..., H, W] inside `box`, all of it for None; a view."""
    return picture if box is None else picture[..., box.top : box.bottom, box.left : box.right]


def _exact(picture: Tensor, box: Box | None) -> Tensor:
    """`inside`, as float64 on the CPU."""
    return inside(picture, box).detach().cpu().double()


def psnr(first: Tensor, second: Tensor, box: Box | None = None) -> float:
    """Peak signal-to-noise ratio [dB] of two pictures, ``10 log10(4 / mean squared difference)``.

    Args:
        first, second: float[3, H, W] in [-1, 1] (data range 2).
        box: compare inside it only, so that padding does not count.

    Returns:
        At most `MAX_PSNR`.
    """
    error = F.mse_loss(_exact(first, box), _exact(second, box)).item()
    return MAX_PSNR if error == 0 else min(MAX_PSNR, 10 * math.log10(4 / error))


def l1(first: Tensor, second: Tensor, box: Box | None = None) -> float:
    """Mean absolute difference of two float[3, H, W] in [-1, 1], in [0, 2]."""
    return F.l1_loss(_exact(first, box), _exact(second, box)).item()


def ssim(first: Tensor, second: Tensor, box: Box | None = None) -> float:
    """Structural similarity of two pictures, in [-1, 1], 1 for equal ones.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    2004: Gaussian window of 11 x 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03, over the places where the window fits, for
    each colour channel and averaged. In a picture smaller than the window, the largest odd window that fits is used.

    Args:
        first, second: float[3, H, W] in [-1, 1]; compared in [0, 1] (data range 1).
        box: compare inside it only.
    """
    x, y = ((_exact(picture, box) + 1) / 2 for picture in (first, second))
    height, width = x.shape[-2:]
    rows, columns = _gaussian(_fitting(height)), _gaussian(_fitting(width))

    def blurred(values: Tensor) -> Tensor:
        down = F.conv2d(values.unsqueeze(1), rows.view(1, 1, -1, 1))
        return F.conv2d(down, columns.view(1, 1, 1, -1))

    mean_x, mean_y = blurred(x), blurred(y)
    variance_x = blurred(x * x) - mean_x**2
    variance_y = blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)) / (
        (mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2)
    )
    return similarity.mean().item()


def _fitting(side: int) -> int:
    """The largest odd window side up to `SSIM_WINDOW` that fits into `side` pixels."""
    window = min(SSIM_WINDOW, side)
    return window if window % 2 else window - 1


def _gaussian(window: int) -> Tensor:
    """float64[window], symmetric, of sum 1."""
    distance = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    weights = torch.exp(-(distance**2) / (2 * SSIM_SIGMA**2))
    return weights / weights.sum()

"""Measures as pure functions: pictures, texts, indices, and how sure a mean is. No models, no files."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ett.images import Box

MAX_PSNR = 100.0
"""PSNR of equal pictures [dB], where the formula gives infinity, which JSON cannot hold."""

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2

_SPELLED = re.compile(r"\S(?: \S)+")


def inside(picture: Tensor, box: Box | None) -> Tensor:
    """The part of float[..., H, W] inside `box`; all of it for None."""
    return picture if box is None else picture[..., box.top : box.bottom, box.left : box.right]


def psnr(first: Tensor, second: Tensor, box: Box | None = None) -> float:
    """Peak signal-to-noise ratio [dB] of two pictures, ``10 log10(4 / mean squared difference)``.

    Args:
        first, second: float[3, H, W] in [-1, 1] (data range 2).
        box: compare inside it only, so that padding does not count.

    Returns:
        At most `MAX_PSNR`.
    """
    error = F.mse_loss(inside(first, box).double(), inside(second, box).double()).item()
    return MAX_PSNR if error == 0 else min(MAX_PSNR, 10 * math.log10(4 / error))


def l1(first: Tensor, second: Tensor, box: Box | None = None) -> float:
    """Mean absolute difference of two float[3, H, W] in [-1, 1], in [0, 2]."""
    return F.l1_loss(inside(first, box).double(), inside(second, box).double()).item()


def ssim(first: Tensor, second: Tensor, box: Box | None = None) -> float:
    """Structural similarity of two pictures, in [-1, 1], 1 for equal ones.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity", 2004:
    Gaussian window of 11 x 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03, over the places where the window fits, for each
    colour channel and averaged. In a picture smaller than the window, the largest odd window that fits is used.

    Args:
        first, second: float[3, H, W] in [-1, 1]; compared in [0, 1] (data range 1).
        box: compare inside it only.
    """
    x, y = ((inside(picture, box).double() + 1) / 2 for picture in (first, second))
    height, width = x.shape[-2:]
    rows, columns = _gaussian(_fitting(height)).to(x.device), _gaussian(_fitting(width)).to(x.device)

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


# -- texts ---------------------------------------------------------------------------------------------------------------


def normalized(text: str) -> str:
    """`text` as answers are compared: case, white space and a final period make no difference."""
    plain = " ".join(text.casefold().split())
    return plain[:-1].rstrip() or plain if plain.endswith(".") else plain


def exact_match(prediction: str, reference: str) -> bool:
    """Whether two answers are the same once `normalized`."""
    return normalized(prediction) == normalized(reference)


def character_errors(prediction: str, reference: str) -> tuple[int, int]:
    """(edits, length) of one answer: the corpus' character error rate is the sum of edits by the sum of lengths.

    Both are `normalized`. A spelled reference ("c a t") is compared without spaces. The length is the reference's, at
    least 1; predictions that run on can take the rate above 1.
    """
    predicted, wanted = normalized(prediction), normalized(reference)
    if _SPELLED.fullmatch(wanted):
        predicted, wanted = predicted.replace(" ", ""), wanted.replace(" ", "")
    return edit_distance(predicted, wanted), max(1, len(wanted))


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of characters between two texts.

    The usual table, a row at a time. Within a row, ``d[j] = min(t[j], d[j - 1] + 1)`` for all j is the running minimum of
    ``t[j] - j``, plus j.
    """
    codes = np.array([ord(character) for character in second], dtype=np.int64)
    steps = np.arange(len(second) + 1)
    row = steps.copy()
    for i, character in enumerate(first, 1):
        best = np.empty_like(row)
        best[0] = i
        best[1:] = np.minimum(row[1:] + 1, row[:-1] + (codes != ord(character)))
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


# -- indices -------------------------------------------------------------------------------------------------------------


def index_counts(indices: Tensor, codebook_size: int) -> Tensor:
    """int64[K]: how often each code occurs among int64[...] indices in [0, K)."""
    return torch.bincount(indices.flatten().cpu(), minlength=codebook_size)


def codebook_usage(counts: Tensor) -> float:
    """Share of the K codes that occur at all, in (0, 1], from int64[K] counts."""
    return (counts > 0).double().mean().item()


def index_perplexity(counts: Tensor) -> float:
    """exp of the entropy of how often codes occur, in [1, K]: as many codes, used equally often, would be as varied."""
    share = counts.double() / counts.sum().clamp(min=1)
    used = share[share > 0]
    return math.exp(-(used * used.log()).sum().item())


# -- how sure a mean is ----------------------------------------------------------------------------------------------------

Values = Sequence[float] | npt.NDArray[np.floating]


def bootstrap_interval(
    values: Values, weights: Values | None = None, *, samples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of ``sum(values) / sum(weights)`` over resampled examples.

    Args:
        values: one sum an example; for a plain mean, its value.
        weights: what the sums are taken over (tokens, characters), > 0; None for 1 each.
        samples: resamples. seed: of the resampling; equal seeds give equal intervals.

    Returns:
        (low, high), or None for fewer than two examples.
    """
    sums = np.asarray(values, dtype=np.float64)
    sizes = np.ones_like(sums) if weights is None else np.asarray(weights, dtype=np.float64)
    if sums.shape != sizes.shape:
        raise ValueError(f"{len(sums)} values cannot have {len(sizes)} weights. Give one weight for each value.")
    if len(sums) < 2:
        return None
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    for i in range(samples):
        drawn = rng.integers(0, len(sums), len(sums))
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap_interval(
    first: Values, second: Values, *, samples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of ``mean(first - second)`` where both hold one value for each of the same examples.

    Raises ValueError where they are not equally many.
    """
    if len(first) != len(second):
        raise ValueError(f"Pairs need equally many values; got {len(first)} and {len(second)}.")
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return bootstrap_interval(difference, samples=samples, seed=seed)

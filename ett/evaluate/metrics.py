"""Measures as pure functions: pictures, texts, indices, and how sure a mean is. No models, no files."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ett.generate.fidelity import MAX_PSNR, l1, psnr, ssim

__all__ = [
    "MAX_PSNR",
    "bootstrap_interval",
    "character_errors",
    "codebook_usage",
    "edit_distance",
    "exact_match",
    "index_counts",
    "index_perplexity",
    "l1",
    "normalized",
    "paired_bootstrap_interval",
    "psnr",
    "ssim",
]

_SPELLED = re.compile(r"\S(?: \S)+")


# -- texts -----------------------------------------------------------------------------------------------------------


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

    The usual table, a row at a time. Within a row, ``d[j] = min(t[j], d[j - 1] + 1)`` for all j is the running minimum
    of ``t[j] - j``, plus j.
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


# -- indices ---------------------------------------------------------------------------------------------------------


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


# -- how sure a mean is ----------------------------------------------------------------------------------------------

Values = Sequence[float] | npt.NDArray[np.floating]

_DRAWS_AT_ONCE = 1 << 18


def bootstrap_interval(
    values: Values, weights: Values | None = None, *, samples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of ``sum(values) / sum(weights)`` over resampled examples.

    Args:
        values: one sum an example; for a plain mean, its value.
        weights: what the sums are taken over (tokens, characters), >= 0 and not all 0; None for 1 each. Resamples without
            weight do not count.
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
    means = []
    # one resample after the other, ``sums[drawn].sum() / sizes[drawn].sum()``, as many at once as memory likes
    rows = max(1, _DRAWS_AT_ONCE // len(sums))
    for start in range(0, samples, rows):
        drawn = rng.integers(0, len(sums), (min(rows, samples - start), len(sums)))
        totals, weight = sums[drawn].sum(axis=1), sizes[drawn].sum(axis=1)
        means.append(totals[weight > 0] / weight[weight > 0])
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
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

"""The EfficientNet-Lite0 kernel distance: as the Fréchet distance of two sets of pictures, and unbiased however few they are.

Bińkowski et al., "Demystifying MMD GANs", 2018, section 4: the squared maximum mean discrepancy of two sets of vectors under
the cubic polynomial kernel, in its unbiased estimate (Gretton et al., "A Kernel Two-Sample Test", 2012, eq. 3). The vectors
are those of `ett.evaluate.frechet.pooled_features`, so the figures compare with those of this same network only.
"""

from __future__ import annotations

from torch import Tensor


def kernel_distance(first: Tensor, second: Tensor, *, paired: bool = False) -> float:
    """Unbiased squared discrepancy of float[n, F] and float[m, F], computed in float64; about 0, and as often below as above,
    where both come from one distribution.

    The plain loop: the mean of k(x, x') over pairs of different vectors of the first set, and likewise of the second, minus
    twice the mean of k(x, y) over pairs of one from each, with ``k(x, y) = (x·y / F + 1)³``.

    Args:
        paired: vector i of one set was made from vector i of the other, and n = m: such pairs tell nothing of the sets, and are
            left out of the mean over pairs of one from each, which they would bias.

    Raises:
        ValueError: fewer than two vectors in a set, vectors of different sizes, or pairs of sets that are not equally large.
    """
    if min(len(first), len(second)) < 2 or first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"Two sets of at least two vectors of one size can be compared, not {list(first.shape)} and {list(second.shape)}."
        )
    if paired and len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} vectors are no pairs.")
    x, y = first.double(), second.double()
    within = sum(_mean_of_pairs(_kernel(each, each)) for each in (x, y))
    across = _kernel(x, y)
    return float(within - 2 * (_mean_of_pairs(across) if paired else across.mean()))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_pairs(kernel: Tensor) -> Tensor:
    """Mean of the entries off the diagonal."""
    count = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))

"""The EfficientNet-Lite0 Fréchet distance: how far the statistics of a set of pictures are from those of another set.

Each picture becomes one vector, the features of EfficientNet-Lite0's last stage averaged over places. Each set is described
by mean and covariance of its vectors, and the value is the squared Fréchet (2-Wasserstein) distance of the two Gaussians with
these moments:

    d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁^½ Σ₂ Σ₁^½)^½

Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982, eq. 4; Heusel et al., "GANs
Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017, eq. 6, had the idea of comparing pictures
so. With another network the figures are others: these compare with those of this same network only, and of equally many
pictures, because the estimate from few of them is too large.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ett.losses.perceptual import STAGES, Lite0Features, enlarged

FEATURES = STAGES[-1][1]
"""Dimension of a picture's vector: the channels of the last stage."""
ENOUGH = FEATURES + 1
"""The fewest pictures whose covariance can have full rank; below, and a good way above, the distance is biased upwards."""


class Moments:
    """Mean and covariance of vectors that come in batches, without keeping them.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances", 1979, eq. 2.1, in float64: unlike sums of squares it loses no digits where the mean is large,
    and the order of the batches makes no difference but for rounding.

    Attributes:
        count: vectors so far.
        mean: float64[D], zeros before the first.
        scatter: float64[D, D], sum of (x − mean)(x − mean)ᵀ.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Take in float[n, D], n >= 0.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        if vectors.dim() != 2 or vectors.shape[1] != len(self.mean):
            raise ValueError(f"Expected vectors of shape [n, {len(self.mean)}], got {list(vectors.shape)}.")
        if not torch.isfinite(vectors).all():
            raise ValueError("A vector holds NaN or infinity, which has no mean. Look for the step that produced it.")
        if len(vectors):
            exact = vectors.detach().cpu().double()
            mean = exact.mean(dim=0)
            self._merge(len(exact), mean, (exact - mean).T @ (exact - mean))

    def merge(self, other: Moments) -> None:
        """Take in everything that `other` has seen, as if it had come here."""
        self._merge(other.count, other.mean, other.scatter)

    @property
    def covariance(self) -> Tensor:
        """float64[D, D], unbiased (divided by count − 1).

        Raises:
            ValueError: fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least two vectors; there are {self.count}.")
        return self.scatter / (self.count - 1)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not count:
            return
        total, apart = self.count + count, mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(apart, apart) * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared Fréchet distance of the Gaussians with these moments, >= 0, in squared units of the vectors; symmetric.

    The last trace is the sum of the singular values of Σ₁^½ Σ₂^½, whose squares are the eigenvalues of Σ₁^½ Σ₂ Σ₁^½: computed
    so, no square root is taken of the rounding errors that stand for zeros where covariances have no full rank.

    Raises:
        ValueError: vectors of different sizes, or fewer than two in a set.
    """
    if len(first.mean) != len(second.mean):
        raise ValueError(
            f"Vectors of {len(first.mean)} and {len(second.mean)} values cannot be compared. Take both from one network."
        )
    one, other = first.covariance, second.covariance
    overlap = torch.linalg.svdvals(_square_root(one) @ _square_root(other)).sum()
    distance = (first.mean - second.mean).square().sum() + one.trace() + other.trace() - 2 * overlap
    # rounding can take what is zero a little below
    return max(0.0, distance.item())


def _square_root(covariance: Tensor) -> Tensor:
    """The symmetric positive semi-definite root of float64[D, D]; eigenvalues that are rounding errors count as zero."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    smallest = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(values > smallest, values, 0.0).sqrt()
    return (vectors * roots) @ vectors.T


def pooled_features(network: Lite0Features, pictures: Sequence[Tensor]) -> Tensor:
    """float32[n, `FEATURES`] on the CPU: of each picture the last stage's features, averaged over places.

    Args:
        network: takes the pictures to its own device.
        pictures: float[3, H, W] in [-1, 1] each, of any sizes; small ones are enlarged as for the EfficientNet-Lite0 distance.
            Neighbours of one size go through the network together.
    """
    weight = network.stem.conv.weight
    found, start = [torch.zeros(0, FEATURES)], 0
    for end in range(1, len(pictures) + 1):
        if end == len(pictures) or pictures[end].shape != pictures[start].shape:
            batch = torch.stack(list(pictures[start:end])).to(weight)
            found.append(network(enlarged(batch))[-1].mean(dim=(2, 3)).float().cpu())
            start = end
    return torch.cat(found)

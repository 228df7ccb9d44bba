"""The Fréchet distance against closed forms, a dense formula and its own invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ett.evaluate.frechet import FEATURES, Moments, frechet_distance, pooled_features
from ett.losses.perceptual import load_lite0


def drawn(seed: int, count: int, size: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return scale * torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing


def moments(vectors: Tensor, batch: int = 7) -> Moments:
    found = Moments(vectors.shape[1])
    for start in range(0, len(vectors), batch):
        found.add(vectors[start : start + batch])
    return found


def given(mean: Tensor, covariance: Tensor) -> Moments:
    found = Moments(len(mean))
    found.count, found.mean, found.scatter = 2, mean.double(), covariance.double()
    return found


def test_moments_are_those_of_all_vectors_together() -> None:
    # a large mean, where sums of squares would lose every digit
    vectors = drawn(0, 50, 6) + 1e6
    found = moments(vectors)
    assert found.count == 50
    assert torch.allclose(found.mean, vectors.mean(dim=0), rtol=1e-14)
    assert torch.allclose(found.covariance, vectors.T.cov(), rtol=1e-8)
    merged = moments(vectors[:13])
    merged.add(vectors[:0])
    merged.merge(moments(vectors[13:]))
    merged.merge(Moments(6))
    assert torch.allclose(merged.covariance, found.covariance, rtol=1e-8)


def test_commuting_gaussians_have_a_closed_form() -> None:
    """Diagonal covariances: ``|m - n|² + sum (s - t)²`` of the standard deviations."""
    generator = torch.Generator().manual_seed(0)
    m, n, s, t = (torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(4))
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    first, second = given(m, turn @ torch.diag(s**2) @ turn.T), given(n, turn @ torch.diag(t**2) @ turn.T)
    expected = (m - n).square().sum() + (s - t).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-12)


def test_two_dimensions_have_a_closed_form() -> None:
    """``tr (AB)^½ = sqrt(tr AB + 2 sqrt(det AB))`` for 2 x 2 positive definite A, B, which do not commute here."""
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.5, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    overlap = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * overlap).item()
    assert frechet_distance(given(torch.zeros(2), a), given(torch.zeros(2), b)) == pytest.approx(expected, rel=1e-12)


def test_equals_the_dense_formula() -> None:
    """With the eigenvalues of the unsymmetric product Σ₁ Σ₂, as the formula is usually written."""
    one, other = drawn(1, 200, 16), drawn(2, 300, 16) + 0.3
    a, b = one.T.cov(), other.T.cov()
    roots = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    expected = (one.mean(0) - other.mean(0)).square().sum() + a.trace() + b.trace() - 2 * roots
    found = frechet_distance(moments(one), moments(other))
    assert found == pytest.approx(expected.item(), rel=1e-10)
    assert frechet_distance(moments(other), moments(one)) == pytest.approx(found, rel=1e-12)


def test_translation_adds_the_square_of_its_length() -> None:
    vectors = drawn(3, 100, 8)
    by = torch.arange(8, dtype=torch.float64) / 4
    assert frechet_distance(moments(vectors), moments(vectors + by)) == pytest.approx(by.square().sum().item())
    other = drawn(4, 100, 8)
    both = frechet_distance(moments(vectors + by), moments(other + by))
    assert both == pytest.approx(frechet_distance(moments(vectors), moments(other)))


@pytest.mark.parametrize("count", [2, 20, 400])
def test_identical_sets_are_at_zero_whatever_their_rank(count: int) -> None:
    vectors = drawn(5, count, FEATURES)
    shuffled = vectors[torch.randperm(count)]
    found = frechet_distance(moments(vectors), moments(shuffled, batch=3))
    assert 0 <= found <= 1e-9 * vectors.square().sum(dim=1).mean().item()


def test_order_and_batches_do_not_matter() -> None:
    one, other = drawn(6, 60, 12), drawn(7, 60, 12, scale=0.5)
    found = frechet_distance(moments(one), moments(other))
    again = frechet_distance(moments(one.flip(0), batch=1), moments(other[torch.randperm(60)], batch=60))
    assert again == pytest.approx(found, rel=1e-11)


def test_constant_sets() -> None:
    """No spread at all: what is left is the distance of the means."""
    assert frechet_distance(moments(torch.zeros(3, 4)), moments(torch.ones(5, 4))) == pytest.approx(4.0)


def test_refusals() -> None:
    found = Moments(3)
    with pytest.raises(ValueError, match=r"\[n, 3\]"):
        found.add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="NaN"):
        found.add(torch.full((1, 3), torch.nan))
    found.add(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least two vectors; there are 1"):
        frechet_distance(found, found)
    with pytest.raises(ValueError, match="3 and 4"):
        frechet_distance(found, Moments(4))


def test_pooled_features_of_pictures_of_any_size() -> None:
    network = load_lite0()
    pictures = [torch.rand(3, *size) * 2 - 1 for size in ((32, 32), (32, 32), (24, 40), (150, 130))]
    found = pooled_features(network, pictures)
    assert found.shape == (4, FEATURES)
    for vector, picture in zip(found, pictures, strict=True):
        assert torch.allclose(pooled_features(network, [picture])[0], vector, atol=1e-4)
    assert pooled_features(network, []).shape == (0, FEATURES)
    # a picture that is large enough goes in as it is
    assert torch.allclose(found[3], network(pictures[3][None])[-1].mean(dim=(2, 3))[0], atol=1e-4)

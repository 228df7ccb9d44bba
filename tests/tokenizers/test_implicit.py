"""FSQ and LFQ against vector-quantize-pytorch, against the dense loop, and against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
import vector_quantize_pytorch as oracle

from ett.errors import RecipeError
from ett.tokenizers import FiniteScalarQuantizer, LookupFreeQuantizer, VisionTokenizer
from tests.tokenizers.cases import CASES

LEVELS = [(5, 4, 3), (8, 8, 8, 5, 5, 5), (3,)]


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_is_the_oracles(levels: tuple[int, ...]) -> None:
    """Values, indices, codebook and the gradient to the features."""
    own, theirs = FiniteScalarQuantizer(levels), oracle.FSQ(list(levels))
    features = (3 * torch.randn(2, len(levels), 6, 5)).requires_grad_(True)
    twin = features.detach().clone().requires_grad_(True)
    found = own(features)
    embeddings, indices = theirs(twin)
    torch.testing.assert_close(found.embeddings, embeddings)
    assert torch.equal(found.indices, indices.long())
    assert torch.equal(own.nearest(features), found.indices)
    torch.testing.assert_close(own.codebook, theirs.implicit_codebook)
    weights = torch.randn_like(embeddings)
    (found.embeddings * weights).sum().backward()
    (embeddings * weights).sum().backward()
    torch.testing.assert_close(features.grad, twin.grad)


def test_fsq_reaches_every_code_and_no_other() -> None:
    """All combinations of levels are codes, distinct, and each is the code of some feature."""
    quantizer = FiniteScalarQuantizer((5, 4, 3))
    levels = [[-1, -0.5, 0, 0.5, 1], [-1, -0.5, 0, 0.5], [-1, 0, 1]]
    expected = {tuple(map(float, code)) for code in itertools.product(*levels)}
    assert {tuple(code.tolist()) for code in quantizer.codebook} == expected
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-8, 8, 41)] * 3, indexing="ij")).flatten(1)
    found = quantizer(grid[None, :, :, None])
    assert len(found.indices.unique()) == quantizer.codebook_size == 60
    assert float(found.usage.sum()) == 41**3
    assert float(found.quantization_loss) == float(found.entropy_loss) == 0


@pytest.mark.parametrize("levels", [1003, 1024])
def test_features_far_out_stay_within_the_levels(levels: int) -> None:
    """Where float32 cannot tell the outermost level from its border."""
    quantizer = FiniteScalarQuantizer((levels,))
    features = torch.tensor([-50.0, 50.0])[None, None, :, None]
    found = quantizer(features)
    assert found.indices.flatten().tolist() == quantizer.nearest(features).flatten().tolist() == [0, levels - 1]
    assert torch.equal(found.embeddings.movedim(1, -1), quantizer.lookup(found.indices).movedim(1, -1))


@pytest.mark.parametrize("codebook_size", [2, 64, 256])
def test_lfq_is_the_oracles(codebook_size: int) -> None:
    own = LookupFreeQuantizer(codebook_size, entropy_temperature=0.5)
    theirs = oracle.LFQ(codebook_size=codebook_size, commitment_loss_weight=1.0).train()
    features = (0.3 * torch.randn(2, own.codebook_dim, 6, 5)).requires_grad_(True)
    twin = features.detach().clone().requires_grad_(True)
    found = own(features)
    (embeddings, indices, _), parts = theirs(twin, inv_temperature=2.0, return_loss_breakdown=True)
    torch.testing.assert_close(found.embeddings, embeddings)
    assert torch.equal(found.indices, indices.long())
    assert torch.equal(own.nearest(features), found.indices)
    assert torch.equal(own.codebook, theirs.codebook)
    torch.testing.assert_close(found.quantization_loss, 0.25 * parts.commitment)
    # the oracle clamps probabilities at 1e-5 before their logarithm
    entropy = parts.per_sample_entropy - parts.batch_entropy
    torch.testing.assert_close(found.entropy_loss, entropy, atol=5e-3, rtol=1e-3)
    weights = torch.randn_like(embeddings)
    ((found.embeddings * weights).sum() + found.quantization_loss).backward()
    ((embeddings * weights).sum() + 0.25 * parts.commitment).backward()
    torch.testing.assert_close(features.grad, twin.grad)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_lfq_entropy_is_the_dense_one(temperature: float) -> None:
    """In float64, value, usage and gradient equal those of the N x K matrix."""
    quantizer = LookupFreeQuantizer(32, temperature)
    features = (0.2 * torch.randn(2, 5, 4, 3, dtype=torch.float64)).requires_grad_(True)
    twin = features.detach().clone().requires_grad_(True)
    found = quantizer(features)
    logits = 2 * twin.movedim(1, -1).flatten(0, 2) @ quantizer.codebook.double().T / temperature
    p, mean = logits.softmax(dim=1), logits.softmax(dim=1).mean(dim=0)
    dense = -torch.xlogy(p, p).sum(dim=1).mean() + torch.xlogy(mean, mean).sum()
    torch.testing.assert_close(found.entropy_loss, dense)
    torch.testing.assert_close(found.usage, p.sum(dim=0))
    found.entropy_loss.backward()
    dense.backward()
    torch.testing.assert_close(features.grad, twin.grad, atol=1e-9, rtol=1e-6)


def test_a_feature_of_zero_has_one_code() -> None:
    found = LookupFreeQuantizer(8)(torch.zeros(1, 3, 1, 1))
    assert found.indices.item() == 0
    assert torch.equal(found.embeddings, -torch.ones(1, 3, 1, 1))


@pytest.mark.parametrize("quantizer", [FiniteScalarQuantizer((5, 5)), LookupFreeQuantizer(4)], ids=["fsq", "lfq"])
def test_wrong_shapes_and_indices_are_refused(quantizer: FiniteScalarQuantizer | LookupFreeQuantizer) -> None:
    with pytest.raises(ValueError, match=r"\[B, 2, h, w\], got \[1, 3, 4, 4\]"):
        quantizer(torch.zeros(1, 3, 4, 4))
    for index in (-1, quantizer.codebook_size):
        with pytest.raises(IndexError, match="must lie in"):
            quantizer.lookup(torch.full((1, 1, 1), index))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("fsq", {"levels": []}, "non-empty"),
        ("fsq", {"levels": [5, 2]}, "at least 3 each"),
        ("fsq", {"levels": [1000] * 4}, "fewer than"),
        ("fsq", {"codebook_size": 64}, "Unknown key"),
        ("lfq", {"codebook_size": 48}, "power of two"),
        ("lfq", {"codebook_size": 1}, "power of two"),
        ("lfq", {"entropy_temperature": 0}, "above 0"),
        ("lfq", {"channels": 10}, "multiples of norm_groups"),
    ],
)
def test_impossible_values_are_named(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        VisionTokenizer.from_config(CASES[name] | changes)

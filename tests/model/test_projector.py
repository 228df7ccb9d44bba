"""The projector's options: what each position sees, at what scale, and where it is."""

from __future__ import annotations

import pytest
import torch

from ett.model.projector import Projector, ProjectorConfig


def test_shape_and_reading_order() -> None:
    projector = Projector(ProjectorConfig(merge_size=2), 6, 10)
    embeddings = torch.randn(3, 6, 4, 8)
    found = projector(embeddings)
    assert found.shape == (3, 8, 10)
    moved = embeddings.clone()
    moved[:, :, :2, 4:6] += 1
    changed = (projector(moved) != found).any(dim=2)
    assert changed.all(dim=0).tolist() == [False, False, True, False, False, False, False, False]


def test_context_reaches_neighbours_and_no_further() -> None:
    projector = Projector(ProjectorConfig(context_layers=2, hidden_size=12), 6, 10)
    embeddings = torch.randn(1, 6, 9, 9)
    moved = embeddings.clone()
    moved[:, :, 4, 4] += 1
    changed = (projector(moved) != projector(embeddings)).any(dim=2).view(9, 9)
    assert changed[2:7, 2:7].all()
    assert changed.sum() == 25


def test_fitted_to_what_stands_before_and_behind() -> None:
    """Directions of very different size come out alike, and positions as long as text embeddings."""
    mixing = torch.linalg.qr(torch.randn(6, 6))[0] * torch.tensor([30.0, 10.0, 3.0, 1.0, 0.5, 0.3])
    codebook = torch.randn(4000, 6) @ mixing.T + 7
    text = 0.02 * torch.randn(50, 10)
    projector = Projector(ProjectorConfig(whiten=True, normalize_output=True), 6, 10)
    projector.fit(codebook, text)
    assert projector.shift is not None
    assert projector.scale is not None
    white = (codebook - projector.shift) @ projector.scale
    covariance = white.T @ white / len(white)
    torch.testing.assert_close(covariance, torch.eye(6), rtol=0, atol=0.6)
    assert (covariance - torch.diag(covariance.diag())).abs().max() < 0.6
    assert torch.linalg.eigvalsh(covariance).min() > 0.3
    rows = projector(codebook[:64].T.view(1, 6, 8, 8))
    assert rows.pow(2).mean().sqrt().item() == pytest.approx(0.02, rel=0.05)
    again = Projector(ProjectorConfig(whiten=True, normalize_output=True), 6, 10)
    again.load_state_dict(projector.state_dict())
    assert torch.equal(again(codebook[:64].T.view(1, 6, 8, 8)), rows)


def test_equal_codes_differ_by_place() -> None:
    embeddings = torch.ones(1, 6, 3, 4)
    plain, placed = (Projector(ProjectorConfig(grid_positions=size), 6, 10) for size in (0, 4))
    for projector, differ in ((plain, False), (placed, True)):
        found = projector(embeddings)[0]
        apart = torch.cdist(found, found)[~torch.eye(12, dtype=torch.bool)]
        assert bool((apart > 1e-3).all()) is differ
    with pytest.raises(ValueError, match="grid_positions"):
        placed(torch.ones(1, 6, 5, 4))

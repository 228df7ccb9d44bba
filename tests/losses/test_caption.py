"""The caption loss without a logits tensor: the plain form's value and gradients, in every chunk and type."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ett.losses import caption
from ett.losses.caption import linear_caption_loss, supervised_positions

VOCABULARY = 23


def problem(dtype: torch.dtype, bias: bool) -> tuple[Tensor, nn.Linear, Tensor]:
    hidden = torch.randn(17, 8, dtype=dtype, requires_grad=True)
    return hidden, nn.Linear(8, VOCABULARY, bias=bias, dtype=dtype), torch.randint(VOCABULARY, (17,))


def gradients(loss: Tensor, hidden: Tensor, head: nn.Linear) -> list[Tensor]:
    return list(torch.autograd.grad(3 * loss, [hidden, *head.parameters()]))


@pytest.mark.parametrize("own", [True, False], ids=["checkpointed", "torch's"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_chunks_equal_the_plain_form(own: bool, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not own and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch has none before 2.13")
    if own:
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    monkeypatch.setitem(caption.CHUNK_ELEMENTS, "cpu", rows * VOCABULARY)
    hidden, head, targets = problem(torch.float64, bias)
    expected = F.cross_entropy(head(hidden), targets, reduction="sum") / 7
    found = linear_caption_loss(hidden, head, targets, 7)
    torch.testing.assert_close(found, expected)
    for ours, plain in zip(gradients(found, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("own", [True, False], ids=["checkpointed", "torch's"])
def test_no_more_than_a_chunk_of_logits_is_held(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is saved for backward is as large as two chunks; the plain form saves all logits."""
    if own:
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    monkeypatch.setitem(caption.CHUNK_ELEMENTS, "cpu", 5 * VOCABULARY)
    hidden, head, targets = problem(torch.float32, False)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        linear_caption_loss(hidden, head, targets)
        within, kept[:] = max(kept, default=0), []
        F.cross_entropy(head(hidden), targets)
    assert within <= max(10 * VOCABULARY, hidden.numel(), head.weight.numel())
    assert max(kept) == 17 * VOCABULARY


def test_bfloat16_under_autocast_gives_a_float32_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(caption.CHUNK_ELEMENTS, "cpu", 5 * VOCABULARY)
    hidden, head, targets = problem(torch.float32, True)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_caption_loss(hidden, head, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(head(hidden), targets), rtol=1e-2, atol=1e-2)
    for ours, plain in zip(
        gradients(found, hidden, head),
        gradients(F.cross_entropy(head(hidden), targets), hidden, head),
        strict=True,
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, plain, rtol=0.05, atol=1e-2)


def test_where_nothing_is_supervised_the_loss_is_zero_and_has_a_graph() -> None:
    hidden, head, targets = problem(torch.float32, False)
    loss = linear_caption_loss(hidden[:0], head, targets[:0])
    assert loss.item() == 0
    assert float(torch.autograd.grad(loss, head.weight)[0].abs().sum()) == 0


def test_positions_are_those_before_a_supervised_token() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-101, -101, 9, -100]])
    by_hand = [row * 4 + t for row in range(2) for t in range(3) if labels[row, t + 1] >= 0]
    assert supervised_positions(labels).tolist() == by_hand


def test_gradients_can_be_taken_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(caption.CHUNK_ELEMENTS, "cpu", 5 * VOCABULARY)
    hidden, head, targets = problem(torch.float32, False)
    loss = linear_caption_loss(hidden, head, targets)
    first, second = (torch.autograd.grad(loss, head.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)

"""GroupNorm and swish in one: values and gradients of the plain form, whichever way is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ett.tokenizers import norm_swish as module
from ett.tokenizers.norm_swish import norm_swish


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_the_plain_form_s(
    groups: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FROM_ELEMENTS", 0)
    monkeypatch.setattr(module, "FROM_PICTURE", 0)
    norm = nn.GroupNorm(groups, 8, eps=1e-6, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3 + torch.randn(3, 8, 5, 7, dtype=torch.float64)).contiguous(memory_format=layout).requires_grad_()
    ours, plain = norm_swish(norm, x), F.silu(norm(x))
    assert type(ours.grad_fn).__name__ == "_NormSwishBackward"
    torch.testing.assert_close(ours, plain)
    gradient = torch.randn_like(plain)
    inputs = [x, norm.weight, norm.bias]
    for a, b in zip(
        torch.autograd.grad(ours, inputs, gradient), torch.autograd.grad(plain, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_small_tensors_take_the_plain_way() -> None:
    norm = nn.GroupNorm(2, 8)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    assert torch.equal(norm_swish(norm, x), F.silu(norm(x)))
    assert "Silu" in type(norm_swish(norm, x).grad_fn).__name__


def test_a_frozen_norm_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FROM_ELEMENTS", 0)
    monkeypatch.setattr(module, "FROM_PICTURE", 0)
    norm = nn.GroupNorm(2, 8).requires_grad_(False)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    norm_swish(norm, x).sum().backward()
    assert norm.weight.grad is None
    assert x.grad is not None

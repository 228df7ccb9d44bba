"""Matrices laid out for few rows compute what layers compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ett.model import few_rows
from ett.model.few_rows import SideBySide, turned, worth_copying
from ett.model.image_head import HeadKind, ImageHead, ImageHeadConfig


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("biases", [(True, False), (False, False)], ids=str)
def test_side_by_side(shape: tuple[int, ...], biases: tuple[bool, bool]) -> None:
    layers = [nn.Linear(8, out, bias=bias) for out, bias in zip((12, 5), biases, strict=True)]
    x = torch.randn(*shape, 8)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    copied = SideBySide(layers, copied=True)
    assert copied.matrix is not None
    torch.testing.assert_close(copied(x), expected)
    assert torch.equal(SideBySide(layers, copied=False)(x), expected)


def test_only_plain_linear_layers_are_copied() -> None:
    """An adapter's forward is more than its matrix."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layers = [nn.Linear(4, 3), Doubled(4, 3)]
    side = SideBySide(layers, copied=True)
    assert side.matrix is None
    x = torch.randn(2, 4)
    assert torch.equal(side(x)[:, 3:], layers[1](x))


def test_what_is_worth_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(6, 4)
    assert worth_copying([matrix])
    assert not worth_copying([matrix, matrix.bfloat16()])
    assert not worth_copying([matrix.to("meta")])
    monkeypatch.setattr(few_rows, "COPIED_BYTES", 2 * matrix.nbytes - 1)
    assert not worth_copying([matrix, matrix])
    assert torch.equal(turned([matrix, matrix[:2]]), torch.cat([matrix, matrix[:2]]).T)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["tied", "linear", "vocabulary"])
def test_a_fixed_head_is_the_head(kind: HeadKind, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    head = ImageHead(ImageHeadConfig(kind, bias), hidden_size=8, codebook_size=20, codebook_dim=4)
    if head.bias is not None:
        nn.init.normal_(head.bias)
    hidden, codes = torch.randn(3, 8), torch.randn(20, 4)
    torch.testing.assert_close(head.fixed(codes)(hidden), head(hidden, codes))
    monkeypatch.setattr(few_rows, "COPIED_BYTES", 0)
    assert torch.equal(head.fixed(codes)(hidden), head(hidden, codes))

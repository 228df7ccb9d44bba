"""Doubling and convolving in phases: values and gradients of the plain form, whichever way is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ett.tokenizers import upsampling as module
from ett.tokenizers.cnn import CNNConfig, Decoder
from ett.tokenizers.upsampling import doubled_convolution


def plain(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), layer.weight, layer.bias, padding=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (2, 6)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_the_plain_form_s(
    bias: bool, size: tuple[int, int], layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FASTER_FROM", 0)
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    ours, theirs = doubled_convolution(layer, x), plain(layer, x)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, theirs)
    gradient = torch.randn_like(theirs)
    inputs = [x, *layer.parameters()]
    pairs = zip(*(torch.autograd.grad(each, inputs, gradient) for each in (ours, theirs)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_small_tensors_and_autocast_take_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 8, 8)
    assert torch.equal(doubled_convolution(layer, x), plain(layer, x))
    monkeypatch.setattr(module, "FASTER_FROM", 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert doubled_convolution(layer, x).dtype == torch.bfloat16


def test_a_decoder_computes_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CNNConfig(channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=1, z_channels=8, norm_groups=4)
    decoder, features = Decoder(config), torch.randn(2, 8, 4, 4)
    names = list(decoder.state_dict())
    before = decoder(features)
    monkeypatch.setattr(module, "FASTER_FROM", 0)
    torch.testing.assert_close(decoder(features), before, rtol=1e-4, atol=1e-5)
    assert list(decoder.state_dict()) == names

"""The patch discriminator that a training checkpoint may ship beside its tokenizer, under the reference's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

DISCRIMINATOR_NAME = "discriminator.safetensors"
"""Beside a tokenizer's weights: the discriminator that it was trained against."""
PREFIX = "loss.discriminator."
"""Of its tensors in a Lightning ``state_dict``."""
KERNEL, WIDEST = 4, 8
"""Side of every kernel, and how many times the first layer's channels the widest ones have."""
_NORM = ("weight", "bias", "running_mean", "running_var")


def shape_of(tensors: Mapping[str, Any]) -> tuple[int, int] | None:
    """(channels, strided layers) of a patch discriminator with these tensors (``main.{0, 2, 3, ...}.*``); None where they are
    not exactly one's (`ett.losses.adversarial.PatchDiscriminator`)."""
    first = tensors.get("main.0.weight")
    if not isinstance(first, Tensor) or first.dim() != 4:
        return None
    channels = first.shape[0]
    kernels = sum(isinstance(tensor, Tensor) and tensor.dim() == 4 for tensor in tensors.values())
    strided = kernels - 2
    if strided < 1:
        return None
    found = {name: tuple(t.shape) if isinstance(t, Tensor) else None for name, t in tensors.items()}
    return (channels, strided) if found == _shapes(channels, strided) else None


def _shapes(channels: int, strided: int) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape: a convolution, then convolutions with norms, then one to a logit."""
    side = (KERNEL, KERNEL)
    shapes: dict[str, tuple[int, ...]] = {"main.0.weight": (channels, 3, *side), "main.0.bias": (channels,)}
    width = channels
    for n in range(1, strided + 1):
        inputs, width = width, channels * min(2**n, WIDEST)
        conv, norm = f"main.{3 * n - 1}", f"main.{3 * n}"
        shapes[f"{conv}.weight"] = (width, inputs, *side)
        shapes |= {f"{norm}.{name}": (width,) for name in _NORM}
        shapes[f"{norm}.num_batches_tracked"] = ()
    last = f"main.{3 * strided + 2}"
    return shapes | {f"{last}.weight": (1, width, *side), f"{last}.bias": (1,)}

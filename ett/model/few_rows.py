"""Products of a few rows with the matrices of linear layers that stay as they are for many calls.

The plain form: each layer called by itself. Matrix libraries on CPUs multiply few rows with a matrix of layout [in, out] up to
twice as fast as with [out, in], which layers keep, where out exceeds in; and small ones side by side faster than one by one
(benchmarks/RESULTS.md). So such matrices are copied that way, up to a bound, before a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

COPIED_BYTES = 512 * 2**20
"""Matrices that take more together are not copied."""


def worth_copying(matrices: Sequence[Tensor]) -> bool:
    """Whether `SideBySide` of these is faster than layers, and affordable: on a CPU, in float32, within `COPIED_BYTES`."""
    plain = all(each.device.type == "cpu" and each.dtype == torch.float32 for each in matrices)
    return plain and sum(each.nbytes for each in matrices) <= COPIED_BYTES


def turned(matrices: Sequence[Tensor]) -> Tensor:
    """float[in, out + out + ...]: copies of float[out, in] matrices, turned and side by side."""
    found = matrices[0].new_empty(matrices[0].shape[1], sum(len(each) for each in matrices))
    for part, each in zip(found.split([len(each) for each in matrices], dim=1), matrices, strict=True):
        part.copy_(each.detach().T)
    return found


class SideBySide:
    """Layers that read the same rows; their outputs one behind the other.

    Args:
        layers: each float[..., in] -> float[..., out]. copied: whether their matrices may be copied; those of plain `nn.Linear`
            layers then are, and later changes of the layers are not seen.
    """

    def __init__(self, layers: Sequence[nn.Module], copied: bool) -> None:
        self.layers = layers
        self.matrix: Tensor | None = None
        self.bias: Tensor | None = None
        linear = [layer for layer in layers if type(layer) is nn.Linear]
        if copied and len(linear) == len(layers):
            self.matrix = turned([layer.weight for layer in linear])
            if any(layer.bias is not None for layer in linear):
                zeros = self.matrix.new_zeros
                self.bias = torch.cat(
                    [zeros(layer.out_features) if layer.bias is None else layer.bias for layer in linear]
                )

    def __call__(self, x: Tensor) -> Tensor:
        """float[..., sum of out] of float[..., in]."""
        if self.matrix is None:
            return torch.cat([layer(x) for layer in self.layers], dim=-1)
        found = x @ self.matrix
        return found if self.bias is None else found + self.bias

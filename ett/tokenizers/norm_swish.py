"""GroupNorm, then swish, as one step of autograd that keeps its input alone.

The plain form that this file replaces::

    y = F.silu(F.group_norm(x, groups, weight, bias, eps))

of which autograd keeps both x and the normalised tensor. Here backward computes the latter again from x and the groups' means
and deviations: one multiplication and addition an entry. It goes picture by picture, so that what it computes stays in the
cache, where torch's backwards pass over main memory (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FROM_ELEMENTS, FROM_PICTURE = 1 << 20, 1 << 15
"""Entries of a tensor, and of one picture in it, from which on this is faster on CPU: below, all of it is in the cache."""


def norm_swish(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """``F.silu(norm(x))`` of float[I, C, h, w], with its gradients (once: gradients of gradients need the plain form)."""
    small = x.numel() < FROM_ELEMENTS or x[0].numel() < FROM_PICTURE
    if (
        small
        or x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.float64)
        or torch.compiler.is_compiling()
    ):
        return F.silu(norm(x))
    found: Tensor = _NormSwish.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return found


class _NormSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        size = (*x.shape[:2], x.shape[2] * x.shape[3])
        normalised, mean, deviation = torch.ops.aten.native_group_norm(x, weight, bias, *size, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, deviation)
        return F.silu(normalised, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, bias, mean, deviation = ctx.saved_tensors
        pictures, channels, height, width = x.shape
        each = channels // mean.shape[1]
        # of the channel's group; deviations are reciprocal
        mean, deviation = mean.repeat_interleave(each, dim=1), deviation.repeat_interleave(each, dim=1)
        scale = weight * deviation
        shift = bias - mean * scale
        count = height * width * each
        x_gradient = torch.empty_like(x)
        weight_gradient, bias_gradient = torch.zeros_like(weight), torch.zeros_like(bias)
        rows, gradients, results = (
            t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).view(pictures, -1, channels)
            for t in (x, gradient, x_gradient)
        )
        for i in range(pictures):
            # gradient to the normalised tensor
            inner = torch.ops.aten.silu_backward(gradients[i], torch.addcmul(shift[i], rows[i], scale[i]))
            sums = inner.sum(dim=0)
            dots = torch.mul(inner, rows[i]).sum(dim=0)
            bias_gradient += sums
            weight_gradient += (dots - sums * mean[i]) * deviation[i]
            # what moves the group's mean and deviation
            sum_of_group = (sums * weight).view(-1, each).sum(dim=1).repeat_interleave(each)
            dot_of_group = (dots * weight).view(-1, each).sum(dim=1).repeat_interleave(each)
            slope = (sum_of_group * mean[i] - dot_of_group) * deviation[i] ** 3 / count
            constant = -slope * mean[i] - sum_of_group * deviation[i] / count
            torch.addcmul(constant, rows[i], slope, out=results[i]).addcmul_(inner, scale[i])
        return x_gradient, weight_gradient, bias_gradient, None, None

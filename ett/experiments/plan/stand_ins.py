"""Tensors with a shape and no values: a model of any size is built and run in no memory.

Modules come from the meta device and become fake tensors, which say that they are on the CPU: unlike meta tensors they take
every road that real ones do, autocast included. Whole numbers of a batch stay real: their values decide which positions are
computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class StandIns:
    """Makes stand-ins of tensors; `mode` is the mode in which they are computed with."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def tensor(self, like: Tensor) -> Tensor:
        """A tensor of the shape, strides and type of `like`."""
        with self.mode:
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)

    def fill(self, module: nn.Module) -> None:
        """Replace every parameter and buffer of `module` by its stand-in, in place; what is shared stays shared."""
        made: dict[int, Tensor] = {}
        for each in module.modules():
            for name, parameter in each._parameters.items():
                if parameter is not None and not _is_filled(parameter):
                    new = made.get(id(parameter))
                    if new is None:
                        new = nn.Parameter(self.tensor(parameter), requires_grad=parameter.requires_grad)
                        made[id(parameter)] = new
                    each._parameters[name] = new  # type: ignore[assignment]  # only parameters were put in
            for name, buffer in each._buffers.items():
                if buffer is not None and not _is_filled(buffer):
                    each._buffers[name] = made.setdefault(id(buffer), self.tensor(buffer))


def _is_filled(tensor: Tensor) -> bool:
    """Whether `tensor` is a stand-in already; what was read from a file in `StandIns.mode` is none yet: it is on no device."""
    return isinstance(tensor, FakeTensor) and not tensor.is_meta


def is_stand_in(value: object) -> bool:
    """Whether `value` is a tensor without values."""
    return isinstance(value, FakeTensor)

"""FSDP2 (`torch.distributed.fsdp.fully_shard`): what a stage trains, divided among its processes instead of copied to each.

A process keeps ``1 / world`` of every weight, gradient and optimizer state. A layer of the language model is gathered while it
computes; what lies around the layers (vision tokenizer, projector, embeddings, heads) is gathered from the beginning of a
forward pass to the end of its way back, because losses read these weights. Weights are float32 and are gathered so; mixed
precision is autocast's, as without sharding: both compute the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ett.errors import RecipeError
from ett.model.ett import EttForConditionalGeneration
from ett.tokenizers import VisionTokenizer

Sharding = Literal["ddp", "fsdp"]
"""How processes share what trains: each holds all of it ("ddp"), or its part ("fsdp")."""


class _Whole(nn.Module):
    """An objective as the root of its sharded parts; called as the objective is."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.objective(*args, **kwargs)

    def make_ready(self) -> None:
        """Nothing by itself. As a forward method it makes this the root before a part of it runs alone."""


def shard(
    objective: nn.Module, model: EttForConditionalGeneration | VisionTokenizer, accelerator: Accelerator
) -> nn.Module:
    """Divide `objective`, whose parameters are `model`'s, among all ranks; returns what is called in its place.

    Parameters become their shards in place, so an optimizer is made after this. Every rank has the whole model before it.

    Raises:
        RecipeError: a parameter of a single number, which cannot be divided.
    """
    for name, parameter in objective.named_parameters():
        if parameter.dim() == 0:
            raise RecipeError(
                f"sharding: fsdp cannot divide {name}, which is a single number (a learned scale of normalised codes). Take "
                "sharding: ddp, or model.vision_tokenizer.normalize: false."
            )
        # a convolution's is laid out channels last, and FSDP cuts contiguous ones alone; the convolution converts it
        parameter.data = parameter.data.contiguous()
    # as DDP does: the first rank's weights are everyone's
    for tensor in objective.state_dict().values():
        dist.broadcast(tensor, src=0)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    root = _Whole(accelerator.prepare_model(objective, evaluation_mode=True))
    for layer in [] if isinstance(model, VisionTokenizer) else repeated_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(root, "make_ready")
    root.make_ready()
    release(root)
    return root


def repeated_layers(model: EttForConditionalGeneration) -> list[nn.Module]:
    """The layers of the language model's stack."""
    repeated = set(model.language_model._no_split_modules or ())
    return [each for each in model.language_model.modules() if type(each).__name__ in repeated]


def release(objective: nn.Module) -> None:
    """Let go of what a forward pass gathered for a way back that does not follow."""
    if isinstance(objective, FSDPModule):
        objective.reshard()


@contextmanager
def gathered(objective: nn.Module) -> Iterator[None]:
    """All weights whole on every rank, to be read by what does not run as `objective`. For all ranks at once.

    What is written to them is lost: `put` writes. Where nothing is sharded, nothing happens.
    """
    units = [module for module in objective.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not objective, recurse=False)
            unit.set_reshard_after_backward(True, recurse=False)
            unit.reshard()


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of `module` are divided among ranks."""
    return any(map(_is_part, module.parameters()))


def _is_part(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be divided among ranks. For all ranks at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Write `value`, which every rank has whole, to `target`, which may be divided."""
    if isinstance(target, DTensor):
        place = target.device_mesh, target.placements
        value = distribute_tensor(value.to(target.device), *place, src_data_rank=None)
    target.copy_(value)


@torch.no_grad()
def like(value: Tensor, target: Tensor) -> Tensor:
    """`value`, which every rank has whole, divided and laid out in memory as `target` is."""
    placed = torch.empty_like(target, requires_grad=False)
    put(placed, value)
    return placed


@torch.no_grad()
def merge(model: nn.Module, keep: bool) -> None:
    """Put whole parameters, on the CPU, in the places of shards, where `keep`; for all ranks at once, after training."""
    merged: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and _is_part(parameter):
                if parameter not in merged:
                    tensor = whole(parameter.detach())
                    merged[parameter] = nn.Parameter(tensor.cpu(), parameter.requires_grad) if keep else parameter
                module._parameters[name] = merged[parameter]

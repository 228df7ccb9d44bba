"""Counts every byte and every FLOP of code that runs on stand-ins.

Memory is what storages hold: each is counted once, from the operation that makes it until nothing refers to it. What an
operation needs inside itself is not seen, nor what an allocator keeps.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ett.experiments.plan.stand_ins import StandIns, is_stand_in

Part = Literal["weights", "gradients", "optimizer", "average", "activations", "quantizer", "logits", "process"]
PARTS: tuple[Part, ...] = get_args(Part)

aten = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # the library counts attention on other devices only
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
        sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)
    ),
}
_NODE_PART = "ett_part"
_ROOM = (aten.empty, aten.empty_strided, aten.randint, aten.randperm)


class Tracker(TorchDispatchMode):
    """While active, inside the mode of `stand_ins`, operations on stand-ins are counted and those on real tensors run.

    Values that a stand-in does not have are assumed: a single number is 1, a mask's positions are none, two tensors are equal.

    Args:
        stand_ins: makes what new tensors are.
        vocabulary: size of the last dimension by which logits are known; 0 where there are none.

    Attributes:
        live: bytes by part now. peak: bytes by part when their sum was largest.
        moment: what is going on, as the caller says. peak_moment: what was when `peak` was reached.
        flops: floating-point operations of matrix products, convolutions and attention.
    """

    def __init__(self, stand_ins: StandIns, vocabulary: int = 0) -> None:
        super().__init__()
        self.stand_ins, self.vocabulary = stand_ins, vocabulary
        self.live: Counter[Part] = Counter()
        self.peak: Counter[Part] = Counter()
        self.flops = 0
        self.moment = self.peak_moment = ""
        self._total = self._largest = 0
        self._storages: dict[int, tuple[Part, int]] = {}
        self._within: list[Part] = []

    # -- what belongs where --------------------------------------------------------------------------------------------

    def assign(self, tensor: Tensor, part: Part) -> None:
        """Count the storage of `tensor` as `part` from now on."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            before, size = self._storages[key]
            self.live[before] -= size
        else:
            size = storage.nbytes()
            self._total += size
            weakref.finalize(storage, self._free, key)
        self._storages[key] = part, size
        self.live[part] += size
        if self._total > self._largest:
            self._largest, self.peak, self.peak_moment = self._total, Counter(self.live), self.moment

    def assign_module(self, module: nn.Module) -> None:
        """The weights of `module`, and their gradients as they come."""
        for tensor in (*module.parameters(), *module.buffers()):
            if is_stand_in(tensor):
                self.assign(tensor, "weights")
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._note_gradient)

    def attribute(self, module: nn.Module, part: Part) -> None:
        """Count what `module` makes, in its forward and in its backward, as `part`."""

        def enter(_module: nn.Module, _inputs: object) -> None:
            self._within.append(part)

        def leave(_module: nn.Module, inputs: tuple[object, ...], outputs: object) -> None:
            self._within.pop()
            until = {t.grad_fn for t in tree_leaves(inputs) if isinstance(t, Tensor)}
            values = tree_leaves(vars(outputs) if hasattr(outputs, "__dict__") else outputs)
            _mark([t.grad_fn for t in values if isinstance(t, Tensor) and t.grad_fn is not None], until, part)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def attribute_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count what a step of `optimizer` makes, its state above all, as the optimizer's."""
        optimizer.register_step_pre_hook(lambda *_: self._within.append("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self._within.pop() and None)

    def _note_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None and is_stand_in(parameter.grad):
            self.assign(parameter.grad, "gradients")

    def _part_of(self, tensor: Tensor) -> Part:
        if self._within:
            return self._within[-1]
        node: Any = torch._C._current_autograd_node()
        if node is not None and _NODE_PART in node.metadata:
            part: Part = node.metadata[_NODE_PART]
            return part
        is_logits = tensor.dim() >= 2 and tensor.shape[-1] == self.vocabulary and tensor.is_floating_point()
        return "logits" if is_logits else "activations"

    def _free(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self.live[part] -= size
        self._total -= size

    # -- one operation -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if any(is_stand_in(leaf) for leaf in leaves):
            assumed = _ASSUMED.get(func)
            if assumed is not None:
                return assumed(self.stand_ins, *args, **kwargs)
            args, kwargs = tree_map_only(Tensor, self._stand_in, (args, kwargs))
            out = func(*args, **kwargs)
        elif any(isinstance(leaf, Tensor) for leaf in leaves) or _has_values(func, kwargs):
            # real numbers stay on the machine that plans
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if is_stand_in(leaf) and leaf.untyped_storage()._cdata not in self._storages:
                self.assign(leaf, self._part_of(leaf))
        return out

    def _stand_in(self, tensor: Tensor) -> Tensor:
        return tensor if is_stand_in(tensor) or tensor.dim() == 0 else self.stand_ins.tensor(tensor)


def _has_values(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation without tensors gives positions or masks that are known, rather than room for results."""
    if all(argument.name != "device" for argument in func._schema.arguments) or func._overloadpacket is aten.arange:
        return True
    dtype = kwargs.get("dtype")
    return func._overloadpacket not in _ROOM and dtype is not None and not dtype.is_floating_point


def _mark(nodes: list[Any], until: set[Any], part: Part) -> None:
    """Note `part` on the nodes of a graph from `nodes` down to those in `until`."""
    seen = set(until)
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        node.metadata[_NODE_PART] = part
        nodes += [below for below, _ in node.next_functions if below is not None and "Accumulate" not in below.name()]


def _one(_stand_ins: StandIns, tensor: Tensor) -> float | int | bool:
    return 1.0 if tensor.is_floating_point() else tensor.dtype == torch.bool or 1


def _no_positions(stand_ins: StandIns, tensor: Tensor) -> Tensor:
    return stand_ins.tensor(torch.empty(0, tensor.dim(), dtype=torch.int64))


def _counts(stand_ins: StandIns, tensor: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return stand_ins.tensor(torch.empty(minlength, dtype=torch.int64 if weights is None else weights.dtype))


def _equal(_stand_ins: StandIns, *_tensors: Tensor) -> bool:
    return True


_ASSUMED: dict[Any, Callable[..., Any]] = {
    aten.equal.default: _equal,
    aten._local_scalar_dense.default: _one,
    aten.nonzero.default: _no_positions,
    aten.bincount.default: _counts,
}

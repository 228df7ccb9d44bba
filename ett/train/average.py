"""An exponential moving average of the weights that train (as public tokenizers are published)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ett.train.sharding import put


class WeightAverage:
    """``average <- decay * average + (1 - decay) * weight`` after every step, over a module's trainable parameters.

    Early on the decay is ``min(decay, (1 + t) / (10 + t))`` after t steps, so that the first weights do not linger.

    Args:
        module: whose parameters are averaged; those that train when this is made.
        decay: in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.average.values()), list(self._parameters.values()), 1 - decay)

    @torch.no_grad()
    def restart(self, module: nn.Module) -> None:
        """Forget what `module`'s weights were before now: they were set anew."""
        own = {id(parameter) for parameter in module.parameters()}
        for name, parameter in self._parameters.items():
            if id(parameter) in own:
                self.average[name].copy_(parameter)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the average; afterwards it holds its own weights again, bit for bit."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._fill(self.average)
        try:
            yield
        finally:
            self._fill(own)

    def apply(self) -> None:
        """The module holds the average from now on."""
        self._fill(self.average)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"updates": self.updates, "average": dict(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.updates = int(state["updates"])
        for name, value in self.average.items():
            put(value, state["average"][name])

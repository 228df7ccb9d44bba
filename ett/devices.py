"""Where a model runs."""

from __future__ import annotations

import os

import torch
from torch import nn

from ett.errors import ModelError


def best_device() -> torch.device:
    """The accelerator of this process (of several, the one of its local rank), if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())


def device_of(name: str | None) -> torch.device:
    """The device called so; None takes the best one.

    Raises:
        ModelError: there is none of that name here.
    """
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"There is no device {name!r} here: {str(error).splitlines()[0]}. Try cpu.") from error
    return device


def place(module: nn.Module, name: str | None = None) -> None:
    """Move a module to the device called so; see `device_of`."""
    module.to(device_of(name))

"""LPIPS with its VGG network: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.

The network and its learned weights of channels are those of the package `lpips`, on the VGG-16 of `torchvision`, whose weights
torchvision fetches once. Neither package is needed for anything else; torchvision has no build for the CPU build of PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ett.errors import ModelError

PACKAGES = ("lpips", "torchvision")
INSTALL = 'pip install "ett-tuning[lpips]"'
MIN_SIDE = 16
"""Pixels that the network's four poolings need."""


class LpipsVGG(nn.Module):
    """The distance of pictures; device and dtype are the network's. Frozen, and in evaluation mode whatever is asked of it.

    Raises:
        ModelError: a package is missing, or VGG's weights are not on this machine and cannot be fetched.
    """

    def __init__(self) -> None:
        super().__init__()
        # read in the middle of a run, it leaves the random state as it was; read under inference mode, it can still train
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that torchvision will drop one day
            self.network = _network()
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LpipsVGG:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, pictures: Tensor, targets: Tensor) -> Tensor:
        """The distance of each picture from its target; autocast does not touch it.

        Args:
            pictures: float[I, 3, H, W] in [-1, 1], H and W at least `MIN_SIDE`; gradients flow to these.
            targets: the same shape and range; no gradients flow to these.

        Returns:
            float32[I] >= 0, 0 for equal pictures.

        Raises:
            ValueError: the shapes differ, are not of pictures, or too small.
        """
        shape = pictures.shape
        if shape != targets.shape or len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < MIN_SIDE:
            raise ValueError(
                f"Pictures of shape {list(shape)} and {list(targets.shape)} cannot be compared. Both must be [I, 3, H, W] with "
                f"the same I, H and W, and sides of at least {MIN_SIDE} pixels."
            )
        with torch.autocast(pictures.device.type, enabled=False):
            distance: Tensor = self.network(pictures.float(), targets.detach().float())
        return distance.flatten()


def lpips_is_installed() -> bool:
    """Whether the packages are there; VGG's weights may still have to be fetched."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def _network() -> nn.Module:
    try:
        lpips: Any = importlib.import_module("lpips")
        network: nn.Module = lpips.LPIPS(net="vgg", verbose=False)
    # the last one: torchvision, where what was fetched has another hash, or where it is built for another torch
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f"LPIPS is not available here ({error}). It needs the packages lpips and torchvision ({INSTALL}) and torchvision's "
            "VGG-16 weights, which are fetched once. Install them, or choose perceptual: lite0, which needs no torchvision."
        ) from error
    return network

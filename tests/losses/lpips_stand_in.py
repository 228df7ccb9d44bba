"""Modules in place of the packages lpips and torchvision, which the tests' installation has not.

The call is the package's: ``lpips.LPIPS(net="vgg", verbose=False)`` is a module, and of two float[I, 3, H, W] in [-1, 1] it
gives float[I, 1, 1, 1]. Like the package it takes `vgg16` from `torchvision.models`, scales its input and compares directions.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _vgg16(pretrained: bool = False) -> Any:
    assert pretrained, "LPIPS wants trained weights"
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()]
    return SimpleNamespace(features=nn.Sequential(*layers, nn.Dropout()))


class LPIPS(nn.Module):
    """Two depths, a learned weight of each channel."""

    def __init__(self, net: str = "alex", verbose: bool = True) -> None:
        super().__init__()
        assert (net, verbose) == ("vgg", False)
        from torchvision import models

        features = models.vgg16(pretrained=True).features
        self.slices = nn.ModuleList([features[:2], features[2:]])
        self.lin = nn.ParameterList([torch.rand(1, 6, 1, 1), torch.rand(1, 8, 1, 1)])

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        total = torch.zeros(())
        for part, weight in zip(self.slices, self.lin, strict=True):
            first, second = part((first + 0.03) / 0.45), part((second + 0.03) / 0.45)
            apart = (F.normalize(first, dim=1) - F.normalize(second, dim=1)).square()
            total = total + (weight * apart).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return total


def install(monkeypatch: pytest.MonkeyPatch, **replaced: Any) -> None:
    """Both packages are there; `replaced` takes the place of ``lpips.LPIPS`` or ``torchvision.models.vgg16``."""
    lpips, torchvision, models = ModuleType("lpips"), ModuleType("torchvision"), ModuleType("torchvision.models")
    lpips.LPIPS = replaced.get("LPIPS", LPIPS)  # type: ignore[attr-defined]
    models.vgg16 = replaced.get("vgg16", _vgg16)  # type: ignore[attr-defined]
    torchvision.models = models  # type: ignore[attr-defined]
    for module in (lpips, torchvision, models):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)

"""Distillation toward the initial tokenizer: what it made of a picture is kept as a second target beside the picture."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor

from ett.losses.joint import reconstruction_loss
from ett.tokenizers import VisionTokenizer


class Teacher:
    """A frozen copy of a tokenizer as its stage found it. It has no state of its own: a resumed stage starts from the same
    weights and makes the same copy.

    Args:
        tokenizer: before its stage's first step, and before a checkpoint is loaded into it.
        kind: pixel distance, as that of the reconstruction loss.
    """

    def __init__(self, tokenizer: VisionTokenizer, kind: Literal["l1", "l2"]) -> None:
        self.tokenizer = copy.deepcopy(tokenizer).requires_grad_(False).eval()
        self.kind: Literal["l1", "l2"] = kind

    def distance(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        """float[]: mean distance of float[R, 3, H, W] reconstructions to the initial tokenizer's of the same `pixels`.

        Gradients flow to `reconstruction` alone.
        """
        with torch.no_grad():
            target = self.tokenizer.decode(self.tokenizer.quantize.lookup(self.tokenizer.tokenize(pixels)))
        return reconstruction_loss(reconstruction, target, self.kind)

"""Pictures through the tokenizer's indices and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor

from ett.errors import DataError, ModelError
from ett.images import Box, from_array, load_image
from ett.model.processing import EttImageProcessor
from ett.tokenizers import VisionTokenizer

Picture = str | Path | bytes | PIL.Image.Image


@dataclass(frozen=True)
class Reconstruction:
    """One picture and what the decoder makes of its indices, both at the size the model works at, padding cut off.

    Attributes:
        original, image: mode RGB, of equal size.
        indices: int64[h, w] of the whole canvas, padding included.
        psnr: [dB]. ssim: in [-1, 1]. Both without padding.
    """

    original: PIL.Image.Image
    image: PIL.Image.Image
    indices: npt.NDArray[np.int64]
    psnr: float
    ssim: float


def sized(tokenizer: VisionTokenizer, size: int | EttImageProcessor) -> EttImageProcessor:
    """How pictures are fitted: an image processor as it is, or square canvases of `size` pixels.

    Raises:
        ModelError: a size that does not divide into tokens.
    """
    step = tokenizer.downsample
    processor = EttImageProcessor(size, size) if isinstance(size, int) else size
    height, width = processor.height, processor.width
    if height % step or width % step or min(height, width) < 1:
        below = max(1, min(height, width) // step) * step
        raise ModelError(
            f"Pictures of {height} x {width} pixels do not divide into tokens of {step} x {step}. Give a multiple of {step}, "
            f"for example {below} or {below + step}."
        )
    return processor



"""The data that flows through the package, and the legend of every shape in it.

Shape legend, used in every docstring:
    B  conversations in a batch          I  images in a batch (>= 0 per conversation)
    H, W  image height, width [pixels]   h, w  token grid, h = H / downsample
    N = h * w  visual tokens an image    n  side of the merged square (n * n tokens -> 1 position)
    D  codebook_dim                      K  codebook_size
    T  text + image positions            V  text vocabulary
    C  hidden_size of the language model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import PIL.Image
import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that carries no loss (the value PyTorch's cross entropy ignores)."""

DRAWN_INDEX = -101
"""Label of a position whose image token is to be predicted: which token that is, the picture says."""

Message = Mapping[str, Any]
"""One turn: ``{"role": "user" | "assistant" | "system", "content": [part, ...]}`` where a part is
``{"type": "image"}`` or ``{"type": "text", "text": str}``."""


@dataclass(frozen=True)
class Example:
    """One conversation about its pictures.

    Attributes:
        id: unique within its source.
        messages: turns in order; the i-th ``{"type": "image"}`` part stands for ``images[i]``.
        images: pictures of any mode and size, opened (``ett.images.load_image``).
        metadata: facts for evaluation (split, style, group ...), never shown to the model.
        image_indices: int[h, w] in [0, K) for each picture, where a code cache stands in for `images` (then empty).
    """

    id: str
    messages: Sequence[Message]
    images: Sequence[PIL.Image.Image]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    image_indices: Sequence[np.ndarray] | None = None

    @property
    def num_images(self) -> int:
        return len(self.images if self.image_indices is None else self.image_indices)


@dataclass
class Batch:
    """A collated batch; T is its longest sequence, shorter ones are padded.

    Attributes:
        pixel_values: float32[I, 3, H, W] in [-1, 1], images in reading order over the batch.
        input_ids: int64[B, T].
        attention_mask: int64[B, T], 1 where a position is real, 0 where it is padding.
        labels: int64[B, T]: token ids of supervised text, ``DRAWN_INDEX`` at image tokens that are drawn, ``IGNORE_INDEX``
            where no loss is taken.
        ids: the examples' ids; B of them, or more where several conversations share a row.
        image_indices: int64[I, h, w] in [0, K) where the pictures come from a code cache (`pixel_values` is then
            float32[0, 3, H, W]), else None.
        loss_positions: int64[S], where in ``labels.flatten()`` the next token is supervised text; None where nobody has looked.
        drawn_tokens: image tokens that carry loss; None where nobody has counted.
        position_ids: int64[B, T] where several conversations share a row, each counted from 0, the padding too; else None.
    """

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    ids: list[str]
    image_indices: Tensor | None = None
    loss_positions: Tensor | None = None
    drawn_tokens: int | None = None
    position_ids: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """The same batch with every tensor on `device` (non-blocking)."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory, from which `to` copies without waiting; a loader calls it."""
        pinned = {
            f.name: getattr(self, f.name).pin_memory()
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)

    @property
    def num_images(self) -> int:
        """I, whether they come as pixels or as indices."""
        return len(self.pixel_values if self.image_indices is None else self.image_indices)

    @property
    def num_supervised(self) -> int:
        """Positions that carry caption loss (the first position of a row never does)."""
        return int((self.labels[:, 1:] >= 0).sum()) if self.loss_positions is None else len(self.loss_positions)

    @property
    def num_drawn(self) -> int:
        """Image tokens that carry loss."""
        return int((self.labels[:, 1:] == DRAWN_INDEX).sum()) if self.drawn_tokens is None else self.drawn_tokens


@dataclass(frozen=True)
class Quantized:
    """What a quantizer returns, whatever its settings.

    Attributes:
        embeddings: float[B, D, h, w], codebook embeddings; differentiable with respect to the
            features and the codebook.
        indices: int64[B, h, w] in [0, K).
        quantization_loss: float[], commitment and codebook terms (ETT eq. 1, L_quant), >= 0.
        entropy_loss: float[], L_entropy in nats, in [-log K, log K]; 0 where the quantizer
            was told not to compute it.
        usage: float[K], expected count of each code in this batch under the index softmax used for
            the entropy term, detached; the hard counts where the term is off.
    """

    embeddings: Tensor
    indices: Tensor
    quantization_loss: Tensor
    entropy_loss: Tensor
    usage: Tensor

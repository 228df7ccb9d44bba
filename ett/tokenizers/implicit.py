"""Codebooks that are a rule instead of a table (FSQ, LFQ).

Nothing here is stored or looked up: an index spells its embedding. What trains is the projection on either side, the CNN's
``quant_conv`` and ``post_quant_conv``, and gradients pass the rounding straight through.

The package vector-quantize-pytorch has both quantizers and is the oracle of their tests, but it does not fit underneath: its
FSQ cannot be built on the meta device and its LFQ keeps its codebook in a buffer that is not saved, so that neither survives
``from_pretrained`` of transformers; its LFQ holds N x K matrices for the entropy term and leaves every loss out in evaluation.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

from ett.tokenizers.quantizer import Quantizer, spans_ranks


class ImplicitQuantizer(Quantizer):
    """A quantizer whose codes are computed from their indices; it has no parameters."""

    @abstractmethod
    def codes(self, indices: Tensor) -> Tensor:
        """float32[..., D] of int64[...] indices in [0, K)."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the quantizer lies."""

    @property
    def codebook(self) -> Tensor:
        return self.codes(torch.arange(self.codebook_size, device=self.device))

    def lookup(self, indices: Tensor) -> Tensor:
        """float32[B, D, h, w]: the embeddings of int64[B, h, w] indices in [0, K).

        Raises:
            IndexError: an index below 0 or above K - 1; looked for on CPU alone, because asking an accelerator waits for it.
        """
        here = indices.numel() > 0 and indices.device.type == "cpu"
        if here and not 0 <= int(indices.min()) <= int(indices.max()) < self.codebook_size:
            raise IndexError(f"Indices must lie in [0, {self.codebook_size}); got {indices.min()} to {indices.max()}.")
        return self.codes(indices).movedim(-1, 1)

    @property
    def _all_ranks(self) -> bool:
        return spans_ranks(self)

    def _rows(self, features: Tensor) -> Tensor:
        """float[B, h, w, D] in float32 (float64 stays)."""
        if features.dim() != 4 or features.shape[1] != self.codebook_dim:
            raise ValueError(
                f"Expected features of shape [B, {self.codebook_dim}, h, w], got {list(features.shape)}. The channels must "
                "equal codebook_dim."
            )
        return features.movedim(1, -1).to(torch.promote_types(features.dtype, torch.float32))

    def _counts(self, indices: Tensor) -> Tensor:
        """float32[K]: how often each index occurs, over all ranks while training."""
        # not `bincount`, which waits for an accelerator to learn how many bins there are
        counts = torch.zeros(self.codebook_size, device=indices.device)
        counts.index_add_(0, indices.flatten(), counts.new_ones(()).expand(indices.numel()))
        if self._all_ranks:
            dist.all_reduce(counts)
        return counts

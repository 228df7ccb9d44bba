"""The loss of drawing: next-image-token cross-entropy, without all logits of a batch at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 27
"""Logits that exist at a time, about: 512 MiB in float32. More are computed chunk by chunk, and once more for the gradients."""


def image_token_loss(
    rows: Tensor,
    targets: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    num_logits: int,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Cross-entropy summed over image tokens, divided by their number.

    Args:
        rows: float[M, C], hidden states that each predict a token. targets: int64[M], the tokens.
        logits_of: float[R, C] -> float[R, `num_logits`]; the softmax is computed in float32.
        num_items: the divisor, as in `caption_loss`; None counts these.

    Returns:
        float32[] in nats per image token; 0, with a graph behind it, where there is none.
    """

    def summed(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(part).float(), wanted, reduction="sum")

    size = max(1, CHUNK_ELEMENTS // num_logits)
    if len(rows) <= size:
        total = summed(rows, targets)
    else:
        parts = zip(rows.split(size), targets.split(size), strict=True)
        total = torch.stack([checkpoint(summed, *part, use_reentrant=False) for part in parts]).sum()
    return total / (max(1, len(rows)) if num_items is None else num_items)

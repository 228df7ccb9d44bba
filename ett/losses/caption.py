"""L_cap (ETT eq. 2): next-token cross-entropy on supervised text positions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ett.types import IGNORE_INDEX


def next_token_labels(labels: Tensor) -> Tensor:
    """int64[B, T]: at each position the label of the *next* one, ``IGNORE_INDEX`` at the end of a row."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def supervised_columns(labels: Tensor) -> Tensor:
    """int64[U], ascending: the positions whose logits some row's loss needs; the head is applied to these alone."""
    return (next_token_labels(labels) != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)


def caption_loss(logits: Tensor, targets: Tensor, num_supervised: Tensor | float | None = None) -> Tensor:
    """Cross-entropy summed over supervised positions, divided by their number.

    Args:
        logits: float[B, U, V], computed in float32 here.
        targets: int64[B, U], the token that each position predicts, or ``IGNORE_INDEX``.
        num_supervised: the divisor; None counts this batch's own. Under gradient accumulation or several ranks it is the
            number in the *global* batch divided by how many losses are averaged into it, so that each token weighs the same.

    Returns:
        float32[] in nats per token; 0 where nothing is supervised.
    """
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    if num_supervised is None:
        num_supervised = (targets != IGNORE_INDEX).sum().clamp(min=1)
    return total / num_supervised

"""L_cap (ETT eq. 2): next-token cross-entropy on supervised text positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ett.types import DRAWN_INDEX, IGNORE_INDEX

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Text logits that exist at a time: 16 MiB of float32 on CPU, 256 MiB on CUDA."""


def next_token_labels(labels: Tensor) -> Tensor:
    """int64[B, T]: at each position the label of the *next* one, ``IGNORE_INDEX`` at the end of a row."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def text_labels(labels: Tensor) -> Tensor:
    """int64[B, T]: `labels` without the image tokens that are drawn."""
    return labels.masked_fill(labels == DRAWN_INDEX, IGNORE_INDEX)


def supervised_columns(labels: Tensor) -> Tensor:
    """int64[U], ascending: the positions whose text logits some row's loss needs; the head is applied to these alone."""
    return (next_token_labels(text_labels(labels)) != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)


def supervised_positions(labels: Tensor) -> Tensor:
    """int64[S], ascending: where in ``labels.flatten()`` the next token is supervised text."""
    return (next_token_labels(labels) >= 0).flatten().nonzero().squeeze(1)


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


def linear_caption_loss(
    hidden: Tensor, head: nn.Linear, targets: Tensor, num_supervised: Tensor | float | None = None
) -> Tensor:
    """`caption_loss` of ``head(hidden)``, without the logits of more than a chunk of positions at a time.

    Where all of them fit one chunk, the plain form is faster and is what runs. Otherwise a chunk's logits are gone before the
    next one's come: gradients are taken with the loss (three GEMMs of 2 S C V operations, as in the plain form, and the
    gradient of the head held), or in less than float32, and before torch 2.13, from logits computed again (four).

    Args:
        hidden: float[S, C], the language model's last state at the positions that predict a supervised token.
        head: C -> V, the language model's own. targets: int64[S], those tokens. num_supervised: as in `caption_loss`.
    """
    rows = max(1, CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"]) // head.out_features)
    if len(hidden) <= rows:
        total = _summed(hidden, head, targets)
    elif hasattr(F, "linear_cross_entropy"):
        total = _fused(hidden, head, targets, rows)
    else:
        parts = zip(hidden.split(rows), targets.split(rows), strict=True)
        sums = [checkpoint(_summed, part, head, wanted, use_reentrant=False) for part, wanted in parts]
        total = torch.stack(sums).sum()
    return total / (max(1, len(hidden)) if num_supervised is None else num_supervised)


def _summed(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return F.cross_entropy(_widened(head(hidden)), targets, reduction="sum")


def _widened(values: Tensor) -> Tensor:
    """`values` in float32, or as they are where that is narrower."""
    return values.float() if values.dtype.itemsize < 4 else values


def _fused(hidden: Tensor, head: nn.Linear, targets: Tensor, rows: int) -> Tensor:
    """torch's own, from 2.13 on, in chunks of our size: its own choice is eight times slower on CPU (benchmarks/RESULTS.md)."""
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    if torch.is_autocast_enabled(hidden.device.type):
        # a custom operator, which autocast does not know
        reduced = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(reduced), weight.to(reduced), None if bias is None else bias.to(reduced)
    # a sum would come in the type of `hidden`, and in bfloat16 have three digits
    reduction = "none" if hidden.dtype.itemsize < 4 else "sum"
    # gradients of single terms are measured before the step's are taken
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, allow_retain_graph=True)
    losses = F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction=reduction, options=options)
    return _widened(losses).sum()

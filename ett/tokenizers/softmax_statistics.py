"""How sharp an index softmax is, over a whole codebook, without an N x K matrix.

The plain form that this file replaces (symbols as in `ett.tokenizers.index_backprop`)::

    logits = query @ keys.T                                  # [N, K]
    p      = softmax(logits, dim=1)
    p_T    = softmax(logits / T, dim=1)
    top-1 mass     = mean_n max_k p[n, k]
    nearest share  = mean_n [argmax_k logits[n, k] == nearest[n]]
    perplexity     = exp(mean_n H(p[n]))
    row entropy    = mean_n H(p_T[n])
    usage entropy  = H(mean_n p_T[n])
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ett.tokenizers.index_backprop import CHUNK_ELEMENTS


@dataclass(frozen=True)
class SoftmaxStatistics:
    """What `softmax_statistics` returns; entropies in nats.

    Attributes:
        top1_mass: mean mass of a row's largest code, in [1 / K, 1]. Near 1 hardly any gradient passes the softmax.
        nearest_share: share of rows whose index is the nearest code's, in [0, 1].
        perplexity: of the rows' softmaxes, in [1, K]; near K they tell no code from another.
        row_entropy: mean_n H(p_T[n]), the part of L_entropy that is lowered.
        usage_entropy: H(mean_n p_T[n]), the part that is raised; ``L_entropy = row_entropy - usage_entropy``.
    """

    top1_mass: float
    nearest_share: float
    perplexity: float
    row_entropy: float
    usage_entropy: float


@torch.no_grad()
def softmax_statistics(
    query: Tensor, keys: Tensor, nearest: Tensor, entropy_temperature: float, *, chunk_rows: int | None = None
) -> SoftmaxStatistics:
    """Statistics of ``softmax(query @ keys.T)`` (p) and of ``softmax(query @ keys.T / T)`` (p_T).

    Args:
        query: float32|float64[N, Q], N >= 1. keys: same type, [K, Q].
        nearest: int64[N], the code nearest to each row by its own measure.
        entropy_temperature: T, > 0.
        chunk_rows: rows at a time; None chooses by device.
    """
    n, k = query.shape[0], keys.shape[0]
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_ELEMENTS.get(query.device.type, CHUNK_ELEMENTS["cuda"]) // k)
    usage = torch.zeros(k, dtype=torch.float64, device=query.device)
    # top-1 mass, nearest, H(p), H(p_T): sums over rows
    sums = torch.zeros(4, dtype=torch.float64, device=query.device)
    for rows, closest in zip(query.split(chunk_rows), nearest.split(chunk_rows), strict=True):
        logits = rows @ keys.T
        maxima, indices = logits.max(dim=1, keepdim=True)
        shifted = logits.sub_(maxima)
        mass, entropy = _mass_and_entropy(shifted)
        sums[0] += mass.amax(dim=1).sum(dtype=torch.float64)
        sums[1] += (indices[:, 0] == closest).sum()
        sums[2] += entropy
        mass, entropy = _mass_and_entropy(shifted / entropy_temperature)
        sums[3] += entropy
        usage += mass.sum(dim=0, dtype=torch.float64)
    top1, share, spread, row_entropy = (sums / n).tolist()
    mean = usage / n
    return SoftmaxStatistics(top1, share, math.exp(spread), row_entropy, -float(torch.xlogy(mean, mean).sum()))


def _mass_and_entropy(shifted: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax float[R, K], sum of the rows' entropies float64[]) of logits float[R, K] whose largest is 0."""
    log_norm = shifted.exp().sum(dim=1, keepdim=True).log()
    mass = (shifted - log_norm).exp_()
    # 0 * -inf where a logit underflows: a code without mass adds nothing
    dots = torch.where(mass > 0, mass * shifted, 0.0).sum(dim=1)
    return mass, (log_norm[:, 0] - dots).sum(dtype=torch.float64)

"""Index backpropagation by rows: how `ett.tokenizers.index_backprop` works on an accelerator.

    R  rows in a chunk, R * K bounded

Launches cost more than memory there, so a chunk of rows meets the whole codebook: every softmax of a row is complete when the
chunk is done.

Work: 1 GEMM of 2*N*K*D FLOPs forward, 4 backward (logits again, `g @ E.T`, and one for each gradient); 3 backward where one
chunk holds all rows and its logits are few, which are then kept as a dense softmax keeps them. Memory: two R x K buffers, the
gradient of the codebook and O(N * D).

Memory traffic, in passes over N * K numbers: forward 1 written by the GEMM and 1 read by the maximum, with entropy 8 more;
backward 2 written by GEMMs, 6 for the softmax and its mean, 4 for the gradient, with entropy 14 more, 2 read by the last GEMMs.
E is read by four GEMMs, its gradient read and written once a chunk: N / R times 6 * K * D in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def entropy_of_rows(logits: Tensor, maxima: Tensor, temperature: float, usage: Tensor, log_norms: Tensor) -> Tensor:
    """Sum over the rows of H(softmax(logits / T)), float[].

    Adds the rows' probabilities to `usage` [K] and writes log(sum exp((logits - max) / T)) to `log_norms` [R, 1].
    """
    scaled = (logits - maxima) / temperature
    weights = scaled.exp()
    norms = weights.sum(dim=1, keepdim=True)
    dots = torch.linalg.vecdot(weights, scaled).unsqueeze(1)
    torch.log(norms, out=log_norms)
    usage += weights.div_(norms).sum(dim=0)
    return (log_norms - dots / norms).sum()


@dataclass(frozen=True)
class EntropyOfRows:
    """What a chunk needs for dL_entropy/dlogits: T, log sum exp((l - max) / T) [R, 1], log mean_n p_T [K], factor []."""

    temperature: float
    log_norms: Tensor
    log_mean: Tensor
    scale: Tensor

    def gradient(self, logits: Tensor, maxima: Tensor) -> Tensor:
        """p_T * (c - sum_k p_T,k c_k) * scale / T, float[R, K]; c up to a constant of the row, which the mean removes."""
        log_weights = ((logits - maxima) / self.temperature).sub_(self.log_norms)
        weights, c = log_weights.exp(), self.log_mean - log_weights
        mean = torch.linalg.vecdot(weights, c).unsqueeze(1)
        return c.sub_(mean).mul_(weights).mul_(self.scale / self.temperature)


def to_logit_gradient(logits: Tensor, maxima: Tensor, values: Tensor, entropy: EntropyOfRows | None = None) -> None:
    """Turn values = g @ E.T into the loss's gradient to the logits, in place; both are [R, K].

    values <- p * (values - sum_k p_k values_k) + p_T * (c - sum_k p_T,k c_k) * scale / T, with p = softmax(logits).
    """
    weights = (logits - maxima).exp_()
    weights /= weights.sum(dim=1, keepdim=True)
    values.sub_(torch.linalg.vecdot(weights, values).unsqueeze(1)).mul_(weights)
    if entropy is not None:
        values += entropy.gradient(logits, maxima)

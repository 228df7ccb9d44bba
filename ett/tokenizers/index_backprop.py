"""Index backpropagation over a codebook without an N x K matrix: the arithmetic behind the quantizer.

    N  vectors to quantize     K  codes     D  their dimension     R  rows in a chunk, R * K bounded

The plain loop that this file replaces (IBQ; symbols as in the paper, `sg` = stop-gradient)::

    logits  = query @ codebook.T                       # [N, K]: 4 GiB at N = 8,192 and K = 131,072
    p       = softmax(logits, dim=1)
    onehot  = one_hot(logits.argmax(dim=1))
    output  = (onehot - sg(p) + p) @ codebook          # value: codebook[argmax]
    p_T     = softmax(logits / T, dim=1)
    entropy = mean_n H(p_T[n]) - H(mean_n p_T[n])

A chunk of rows meets the whole codebook, so that every softmax of a row is complete when the chunk is done and nothing of
size K is kept per row. Backward recomputes the logits of a chunk. Work: 1 GEMM of 2*N*K*D FLOPs forward, 4 backward
(logits again, `g @ E.T`, and one for each gradient), with or without the entropy term; memory: two R x K buffers, the
gradient of the codebook and O(N * D). Where one chunk holds all rows and its logits are few (`KEPT_ELEMENTS`), they are kept
for the way back as a dense softmax would: 3 GEMMs backward. Without gradient through the softmax (straight-through, no
entropy) backward is one `index_add_` and no GEMM; a codebook that does not learn saves the last.

Memory traffic, in passes over N * K numbers: forward 1 written by the GEMM and 1 read by the maximum, with entropy 2 more
reads; backward 2 written by GEMMs, 2 read for the softmax and its mean, 2 read and 1 written for the gradient, 2 read by the
last GEMMs. On CPU entropy shares the middle ones, which stay in the cache. E is read by four GEMMs and its gradient read and
written once a chunk, N / R times 6 * K * D in all; z and its gradient, O(N * D), once.

On CPU the passes over a chunk run in column blocks that stay in the cache, and the entropy softmax, whose terms underflow
to exactly zero below `max - 104 * T` in float32, touches only the codes above that bound where they are few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Entries of one chunk's logits: 32 MiB of float32 on CPU, 512 MiB on CUDA."""
CACHE_ELEMENTS = 1 << 17
"""Entries of a column block on CPU: two operands of 512 KiB share the second-level cache."""
KEPT_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits of one chunk that are kept from forward to backward: 16 MiB of float32 on CPU, 256 MiB on CUDA."""
SPARSE_SHARE = 1 / 32
"""The entropy softmax goes sparse where at most this share of its terms is above underflow."""
_UNDERFLOW = {torch.float32: 104.0, torch.float64: 746.0}
"""exp(-x) is exactly zero in the type for every x above this."""
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class IndexBackpropOutput:
    """What `index_backprop` returns.

    Attributes:
        soft: float[N, D], value codebook[indices]; gradient of IBQ's straight-through one-hot.
        hard: float[N, D], codebook[indices]; gradient to the selected codes alone.
        indices: int64[N], the largest logit (the first of equals).
        entropy: float[], mean_n H(p_T[n]) - H(mean_n p_T[n]) in nats, or 0 where it was not asked for.
        usage: float[K], sum over n of p_T[n] (all ranks), or the count of each index where entropy is off.
    """

    soft: Tensor
    hard: Tensor
    indices: Tensor
    entropy: Tensor
    usage: Tensor


def index_backprop(
    query: Tensor,
    codebook: Tensor,
    entropy_temperature: float | None = None,
    *,
    all_ranks: bool = False,
    chunk_rows: int | None = None,
) -> IndexBackpropOutput:
    """Quantize `query` over `codebook` with IBQ's gradients.

    Args:
        query: float32|float64[N, D]; logits are `query @ codebook.T`, so scale the query to set their temperature.
        codebook: same type, [K, D].
        entropy_temperature: T of the entropy term, > 0; None leaves the term out.
        all_ranks: take the mean over n across all ranks of the default process group (every rank must call). The returned
            entropy is then ``mean_n H(p_T[n])`` of this rank's N rows minus H of the mean over all ranks' M rows. To be weighed
            as every mean over a rank's rows is: times ``N * world / M``, and averaged over ranks, as DDP does with gradients,
            values and gradients are those of the term over all M rows, whatever their shares.
        chunk_rows: rows at a time; None chooses by device.

    Source: IBQ (arXiv 2412.02692), whose backward is, by the chain rule (docs/method.md):
    ``dL/dl_k = p_k (g.e_k - sum_j p_j g.e_j)`` and ``dL_entropy/dl = p_T (c - sum p_T c) / (N T)`` with
    ``c = -l/T + log mean_n p_T``.
    """
    if query.dtype not in _UNDERFLOW or codebook.dtype != query.dtype:
        raise TypeError(
            f"The quantizer works in float32 (or float64 for tests); got {query.dtype} features and a {codebook.dtype} "
            "codebook. Keep the quantizer out of mixed precision: its indices would change."
        )
    if chunk_rows is None:
        budget = _of_device(CHUNK_ELEMENTS, query.device)
        chunk_rows = max(1, min(query.shape[0], budget // codebook.shape[0]))
    outputs = _IndexBackprop.apply(query, codebook, entropy_temperature, all_ranks, chunk_rows)
    return IndexBackpropOutput(*outputs)


@torch.no_grad()
def nearest_logit(query: Tensor, codebook: Tensor) -> Tensor:
    """int64[N]: argmax of `query @ codebook.T`, in chunks; the indices that `index_backprop` gives, and nothing else."""
    rows = max(1, _of_device(CHUNK_ELEMENTS, query.device) // codebook.shape[0])
    with _full_float32(query.device):
        return torch.cat([(chunk @ codebook.T).argmax(dim=1) for chunk in query.split(rows)])


class _IndexBackprop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, codebook: Tensor, temperature: float | None, all_ranks: bool, rows: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        n, k = query.shape[0], codebook.shape[0]
        indices = torch.empty(n, dtype=torch.int64, device=query.device)
        maxima = torch.empty(n, 1, dtype=query.dtype, device=query.device)
        log_norms = torch.empty(n, 1, dtype=query.dtype, device=query.device)
        row_entropy = query.new_zeros(())
        usage = query.new_zeros(k)
        buffer = query.new_empty(min(rows, n), k)
        with _full_float32(query.device):
            for chunk in _chunks(n, rows):
                logits = torch.mm(query[chunk], codebook.T, out=buffer[: chunk.stop - chunk.start])
                torch.max(logits, dim=1, keepdim=True, out=(maxima[chunk], indices[chunk, None]))
                if temperature is not None:
                    row_entropy += _entropy_of_rows(logits, maxima[chunk], temperature, usage, log_norms[chunk])
        total = torch.full((), float(n), dtype=query.dtype, device=query.device)
        if temperature is None:
            # not `bincount`, which waits for an accelerator to learn how many bins there are
            usage.index_add_(0, indices, torch.ones_like(usage[:1]).expand(n))
        if all_ranks:
            dist.all_reduce(usage)
            dist.all_reduce(total)
        entropy = query.new_zeros(())
        if temperature is not None:
            mean = usage / total
            entropy = row_entropy / n + torch.xlogy(mean, mean).sum()
        hard = codebook[indices]
        kept = buffer if rows >= n and buffer.numel() <= _of_device(KEPT_ELEMENTS, query.device) else None
        ctx.save_for_backward(query, codebook, indices, maxima, log_norms, usage, total, kept)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(indices, usage)
        return hard, hard.clone(), indices, entropy, usage

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        soft_grad: Tensor | None,
        hard_grad: Tensor | None,
        _indices: None,
        entropy_grad: Tensor | None,
        _usage: None,
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        query, codebook, indices, maxima, log_norms, usage, total, kept = ctx.saved_tensors
        temperature: float | None = ctx.temperature if entropy_grad is not None else None
        learns = ctx.needs_input_grad[1]
        codebook_grad = torch.zeros_like(codebook) if learns else None
        to_chosen = sum(grad for grad in (soft_grad, hard_grad) if grad is not None)
        if soft_grad is None and temperature is None:
            # nothing came by way of the softmax
            if codebook_grad is not None and isinstance(to_chosen, Tensor):
                codebook_grad.index_add_(0, indices, to_chosen)
            return torch.zeros_like(query), codebook_grad, None, None, None
        n, k = query.shape[0], codebook.shape[0]
        query_grad = torch.empty_like(query)
        size = min(ctx.rows, n)
        logits_buffer = query.new_empty(size, k) if kept is None else kept
        value_buffer = query.new_empty(size, k)
        with torch.autocast(query.device.type, enabled=False), _full_float32(query.device):
            log_mean = (usage / total).clamp_(min=torch.finfo(query.dtype).tiny).log_()
            # a row counts 1 / (rows of all ranks) once the caller's weight, N * world / M, and DDP's average are in
            scale = None if entropy_grad is None else entropy_grad / max(n, 1)
            for chunk in _chunks(n, ctx.rows):
                length = chunk.stop - chunk.start
                logits, values = logits_buffer[:length], value_buffer[:length]
                if kept is None:
                    torch.mm(query[chunk], codebook.T, out=logits)
                if soft_grad is None:
                    values.zero_()
                else:
                    torch.mm(soft_grad[chunk], codebook.T, out=values)
                if temperature is None or scale is None:
                    _to_logit_gradient(logits, maxima[chunk], values)
                else:
                    term = _EntropyTerm(temperature, log_norms[chunk], log_mean, scale)
                    _to_logit_gradient(logits, maxima[chunk], values, term)
                torch.mm(values, codebook, out=query_grad[chunk])
                if codebook_grad is not None:
                    codebook_grad.addmm_(values.T, query[chunk])
            if codebook_grad is not None and isinstance(to_chosen, Tensor):
                codebook_grad.index_add_(0, indices, to_chosen)
        return query_grad, codebook_grad, None, None, None


def _of_device(budgets: Mapping[str, int], device: torch.device) -> int:
    return budgets.get(device.type, budgets["cuda"])


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 in float32, whatever the program around allows: TF32's 10 bits of mantissa change indices."""
    if device.type != "cuda":
        yield
        return
    allowed = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = allowed


def _chunks(n: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Column ranges whose entries fit the cache on CPU; the whole width elsewhere, where a kernel launch costs more."""
    width = matrix.shape[1] if matrix.device.type != "cpu" else max(256, CACHE_ELEMENTS // matrix.shape[0])
    return _chunks(matrix.shape[1], width)


def _exp(exponents: Tensor) -> Tensor:
    """exp of exponents <= 0, in place.

    By way of exp2 on CPU: where the result underflows, which most terms of a peaked softmax do, torch's exp takes up to 16
    times as long (docs/LOG.md).
    """
    return exponents.mul_(_LOG2_E).exp2_() if exponents.device.type == "cpu" else exponents.exp_()


def _above_underflow(logits: Tensor, maxima: Tensor, temperature: float) -> tuple[Tensor, Tensor] | None:
    """(row, column) of each term of softmax(logits / T) that is not exactly zero, or None where they are too many."""
    if logits.device.type != "cpu":
        return None
    mask = logits > maxima - _UNDERFLOW[logits.dtype] * temperature
    if int(mask.sum()) > SPARSE_SHARE * mask.numel():
        return None
    row, column = mask.nonzero(as_tuple=True)
    return row, column


def _entropy_of_rows(logits: Tensor, maxima: Tensor, temperature: float, usage: Tensor, log_norms: Tensor) -> Tensor:
    """Sum over the rows of H(softmax(logits / T)), float[].

    Adds the rows' probabilities to `usage` [K] and writes log(sum exp((logits - max) / T)) to `log_norms` [R, 1].
    """
    support = _above_underflow(logits, maxima, temperature)
    if support is not None:
        row, column = support
        scaled = (logits[row, column] - maxima[row, 0]) / temperature
        weights = scaled.exp()
        norms = torch.zeros_like(maxima[:, 0]).index_add_(0, row, weights)
        torch.log(norms[:, None], out=log_norms)
        weights /= norms[row]
        usage.index_add_(0, column, weights)
        return norms.log().sum() - torch.dot(weights, scaled)
    norms, dots = torch.zeros_like(maxima), torch.zeros_like(maxima)
    for block in _blocks(logits):
        scaled = (logits[:, block] - maxima) / temperature
        weights = _exp(scaled.clone())
        norms += weights.sum(dim=1, keepdim=True)
        dots += torch.linalg.vecdot(weights, scaled).unsqueeze(1)
    torch.log(norms, out=log_norms)
    for block in _blocks(logits):
        weights = _exp(((logits[:, block] - maxima) / temperature).sub_(log_norms))
        usage[block] += weights.sum(dim=0)
    return (log_norms - dots / norms).sum()


@dataclass(frozen=True)
class _EntropyTerm:
    """What a chunk needs for dL_entropy/dlogits: T, log sum exp((l - max) / T) [R, 1], log mean_n p_T [K], factor []."""

    temperature: float
    log_norms: Tensor
    log_mean: Tensor
    scale: Tensor

    def parts(self, logits: Tensor, maxima: Tensor, log_mean: Tensor) -> tuple[Tensor, Tensor]:
        """(p_T, c) of the given logits; c up to a constant of the row, which taking off the row's mean removes."""
        log_weights = ((logits - maxima) / self.temperature).sub_(self.log_norms)
        return _exp(log_weights.clone()), log_mean - log_weights


def _to_logit_gradient(logits: Tensor, maxima: Tensor, values: Tensor, entropy: _EntropyTerm | None = None) -> None:
    """Turn values = g @ E.T into the loss's gradient to the logits, in place; both are [R, K].

    values <- p * (values - sum_k p_k values_k) + p_T * (c - sum_k p_T,k c_k) * scale / T, with p = softmax(logits).
    """
    norm, dot, mean_c = torch.zeros_like(maxima), torch.zeros_like(maxima), torch.zeros_like(maxima)
    support = None if entropy is None else _above_underflow(logits, maxima, entropy.temperature)
    for block in _blocks(logits):
        weights = _exp(logits[:, block] - maxima)
        norm += weights.sum(dim=1, keepdim=True)
        dot += torch.linalg.vecdot(weights, values[:, block]).unsqueeze(1)
        if entropy is not None and support is None:
            mean_c += torch.linalg.vecdot(*entropy.parts(logits[:, block], maxima, entropy.log_mean[block])).unsqueeze(
                1
            )
    dot /= norm
    log_norm = maxima + norm.log()
    for block in _blocks(logits):
        weights = _exp(logits[:, block] - log_norm)
        values[:, block].sub_(dot).mul_(weights)
        if entropy is not None and support is None:
            p, c = entropy.parts(logits[:, block], maxima, entropy.log_mean[block])
            values[:, block] += c.sub_(mean_c).mul_(p).mul_(entropy.scale / entropy.temperature)
    if entropy is not None and support is not None:
        row, column = support
        log_weights = (logits[row, column] - maxima[row, 0]) / entropy.temperature - entropy.log_norms[row, 0]
        p, c = log_weights.exp(), entropy.log_mean[column] - log_weights
        mean_c = torch.zeros_like(maxima[:, 0]).index_add_(0, row, p * c)
        gradient = p * (c - mean_c[row]) * (entropy.scale / entropy.temperature)
        values.view(-1).index_add_(0, row * logits.shape[1] + column, gradient)

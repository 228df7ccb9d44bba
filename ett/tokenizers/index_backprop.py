"""Index backpropagation over a codebook without an N x K matrix: the arithmetic behind the quantizer.

    N  vectors to quantize     K  codes     D  their dimension     R  rows in a chunk, R * K bounded

The plain loop that this file replaces (IBQ; symbols as in the paper, `sg` = stop-gradient)::

    logits  = query @ codebook.T                       # [N, K]: 4 GiB at N = 8,192 and K = 131,072
    p       = softmax(logits, dim=1)
    onehot  = one_hot(logits.argmax(dim=1))
    output  = (onehot - sg(p) + p) @ codebook          # value: codebook[argmax]
    p_T     = softmax(logits / T, dim=1)
    entropy = mean_n H(p_T[n]) - H(mean_n p_T[n])

Two schedules are exact and hold no N x K matrix:

* **Tiles** (`ett.tokenizers.index_tiles`), on a CPU: some rows meet some codes at a time. Six GEMMs of 2*N*K*D FLOPs a step,
  two forward and four backward, as the dense form has, and no buffer that grows with N * K.
* **Rows** (`ett.tokenizers.index_rows`), on an accelerator: a chunk of rows meets the whole codebook. Five GEMMs, one forward
  and four backward, three where the logits of all are so few that they are kept; two buffers of a chunk's logits.

Both say what memory they move. With or without the entropy term the GEMMs are as many. Without gradient through the softmax
(straight-through) forward is one GEMM and backward one `index_add_`; a codebook that does not learn saves the last GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ett.tokenizers.index_rows import EntropyOfRows, entropy_of_rows, to_logit_gradient
from ett.tokenizers.index_tiles import (
    EntropyOfTiles,
    SoftmaxOfTiles,
    Support,
    best_of_tiles,
    chunks,
    entropy_of_support,
    entropy_of_tiles,
    gradients,
    search,
)

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Entries of the logits of one chunk of rows: 32 MiB of float32 on CPU, 512 MiB on CUDA."""
KEPT_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits of one chunk of rows that are kept from forward to backward: 16 MiB of float32 on CPU, 256 MiB on CUDA."""
TILED_DEVICES = ("cpu",)
"""Where the schedule is by tiles, unless `chunk_rows` are asked for."""


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
    through_softmax: bool = True,
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
        through_softmax: whether a gradient will come to `soft`, so that what it needs is best found at once; if one comes all
            the same, the tiles are gone through once more.
        chunk_rows: chunks of so many rows; None chooses the schedule by device and size.

    Source: IBQ (arXiv 2412.02692), whose backward is, by the chain rule (docs/method.md):
    ``dL/dl_k = p_k (g.e_k - sum_j p_j g.e_j)`` and ``dL_entropy/dl = p_T (c - sum p_T c) / (N T)`` with
    ``c = -l/T + log mean_n p_T``.
    """
    if query.dtype not in (torch.float32, torch.float64) or codebook.dtype != query.dtype:
        raise TypeError(
            f"The quantizer works in float32 (or float64 for tests); got {query.dtype} features and a {codebook.dtype} "
            "codebook. Keep the quantizer out of mixed precision: its indices would change."
        )
    if chunk_rows is None and query.device.type in TILED_DEVICES:
        return IndexBackpropOutput(
            *_ByTiles.apply(
                query, codebook, entropy_temperature, all_ranks, through_softmax and torch.is_grad_enabled()
            )
        )
    if chunk_rows is None:
        budget = _of_device(CHUNK_ELEMENTS, query.device)
        chunk_rows = max(1, min(query.shape[0], budget // codebook.shape[0]))
    return IndexBackpropOutput(*_ByRows.apply(query, codebook, entropy_temperature, all_ranks, chunk_rows))


@torch.no_grad()
def nearest_logit(query: Tensor, codebook: Tensor) -> Tensor:
    """int64[N]: argmax of `query @ codebook.T`; the indices that `index_backprop` gives, and nothing else."""
    if query.device.type in TILED_DEVICES:
        return best_of_tiles(query, codebook)
    rows = max(1, _of_device(CHUNK_ELEMENTS, query.device) // codebook.shape[0])
    with _full_float32(query.device):
        return torch.cat([(chunk @ codebook.T).argmax(dim=1) for chunk in query.split(rows)])


class _ByTiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, codebook: Tensor, temperature: float | None, all_ranks: bool, attend: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        attend = attend and any(ctx.needs_input_grad)
        found = search(query, codebook, attend=attend, temperature=temperature)
        row_entropy, usage, entropy_norms = query.new_zeros(()), query.new_zeros(len(codebook)), None
        if temperature is not None and found.support is not None:
            row_entropy = entropy_of_support(found.support, usage)
        elif temperature is not None:
            row_entropy, entropy_norms = entropy_of_tiles(query, codebook, found.maxima, temperature, usage)
        usage, total, entropy = _batch_entropy(row_entropy, usage, found.indices, temperature, all_ranks)
        support = () if found.support is None else (found.support.row, found.support.code, found.support.log_weight)
        kept = (found.log_norms, found.attention, entropy_norms, *support)
        ctx.save_for_backward(query, codebook, found.indices, usage, total, *kept)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(found.indices, usage)
        hard = codebook[found.indices]
        return hard, hard.clone(), found.indices, entropy, usage

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
        query, codebook, indices, usage, total, log_norms, attention, entropy_norms, *support = ctx.saved_tensors
        softmax = term = None
        if soft_grad is not None:
            if attention is None:
                found = search(query, codebook, attend=True)
                log_norms, attention = found.log_norms, found.attention
            softmax = SoftmaxOfTiles(soft_grad, indices, log_norms, attention)
        if entropy_grad is not None and ctx.temperature is not None:
            term = EntropyOfTiles(
                ctx.temperature,
                _log_mean(usage, total),
                entropy_grad / max(len(query), 1),
                Support(*support) if support else None,
                entropy_norms,
            )
        learns = ctx.needs_input_grad[1]
        with torch.autocast(query.device.type, enabled=False):
            query_grad, codebook_grad = gradients(query, codebook, softmax, term, codebook_learns=learns)
        _add_to_chosen(codebook_grad, indices, soft_grad, hard_grad)
        return query_grad, codebook_grad, None, None, None


class _ByRows(torch.autograd.Function):
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
            for chunk in chunks(n, rows):
                logits = torch.mm(query[chunk], codebook.T, out=buffer[: chunk.stop - chunk.start])
                torch.max(logits, dim=1, keepdim=True, out=(maxima[chunk], indices[chunk, None]))
                if temperature is not None:
                    row_entropy += entropy_of_rows(logits, maxima[chunk], temperature, usage, log_norms[chunk])
        usage, total, entropy = _batch_entropy(row_entropy, usage, indices, temperature, all_ranks)
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
        if soft_grad is None and temperature is None:
            # nothing came by way of the softmax
            _add_to_chosen(codebook_grad, indices, soft_grad, hard_grad)
            return torch.zeros_like(query), codebook_grad, None, None, None
        n, k = query.shape[0], codebook.shape[0]
        query_grad = torch.empty_like(query)
        size = min(ctx.rows, n)
        logits_buffer = query.new_empty(size, k) if kept is None else kept
        value_buffer = query.new_empty(size, k)
        with torch.autocast(query.device.type, enabled=False), _full_float32(query.device):
            log_mean = _log_mean(usage, total)
            # a row counts 1 / (rows of all ranks) once the caller's weight, N * world / M, and DDP's average are in
            scale = None if entropy_grad is None else entropy_grad / max(n, 1)
            for chunk in chunks(n, ctx.rows):
                length = chunk.stop - chunk.start
                logits, values = logits_buffer[:length], value_buffer[:length]
                if kept is None:
                    torch.mm(query[chunk], codebook.T, out=logits)
                if soft_grad is None:
                    values.zero_()
                else:
                    torch.mm(soft_grad[chunk], codebook.T, out=values)
                if temperature is None or scale is None:
                    to_logit_gradient(logits, maxima[chunk], values)
                else:
                    term = EntropyOfRows(temperature, log_norms[chunk], log_mean, scale)
                    to_logit_gradient(logits, maxima[chunk], values, term)
                torch.mm(values, codebook, out=query_grad[chunk])
                if codebook_grad is not None:
                    codebook_grad.addmm_(values.T, query[chunk])
        _add_to_chosen(codebook_grad, indices, soft_grad, hard_grad)
        return query_grad, codebook_grad, None, None, None


def _batch_entropy(
    row_entropy: Tensor, usage: Tensor, indices: Tensor, temperature: float | None, all_ranks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(usage of all ranks [K], rows of all ranks [], entropy term []), given the sum of the rows' entropies and this rank's
    usage."""
    n = len(indices)
    total = torch.full((), float(n), dtype=usage.dtype, device=usage.device)
    if temperature is None:
        # not `bincount`, which waits for an accelerator to learn how many bins there are
        usage.index_add_(0, indices, torch.ones_like(usage[:1]).expand(n))
    if all_ranks:
        dist.all_reduce(usage)
        dist.all_reduce(total)
    if temperature is None:
        return usage, total, usage.new_zeros(())
    mean = usage / total
    return usage, total, row_entropy / n + torch.xlogy(mean, mean).sum()


def _log_mean(usage: Tensor, total: Tensor) -> Tensor:
    return (usage / total).clamp_(min=torch.finfo(usage.dtype).tiny).log_()


def _add_to_chosen(codebook_grad: Tensor | None, indices: Tensor, *grads: Tensor | None) -> None:
    """Add what came to the selected codes themselves, in place."""
    to_chosen = sum(grad for grad in grads if grad is not None)
    if codebook_grad is not None and isinstance(to_chosen, Tensor):
        codebook_grad.index_add_(0, indices, to_chosen)


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

"""Index backpropagation tile by tile: how `ett.tokenizers.index_backprop` works on a CPU.

    R x W  a tile of logits that stays in the cache

R rows of the query meet W codes at a time, as in attention by tiles: a row's maximum, its softmax's sum and its mean of codes
``a = softmax(logits) @ codebook`` are carried from tile to tile and rescaled where the maximum grows. No buffer grows with
N * K or with K. With ``a`` known, the way back needs no whole row either: the sum in the softmax's gradient is a dot product::

    dL/dl_k = p_k (g.e_k - sum_j p_j g.e_j) = p_k (g.e_k - g.a)

Work: 2 GEMMs of 2*N*K*D FLOPs forward (logits, and ``a``), 4 backward (logits again, ``g @ E.T``, one for each gradient): the
six of the dense form. All are products of tiles, which a BLAS does at the rate of square matrices; products with a codebook
of 131,072 in whole run at half that rate, for their rows lie a power of two apart (docs/LOG.md).

Memory traffic, in passes over N * K numbers, all of them within the cache: forward 1 written by the GEMM, 1 read by the
maximum, 2 read and written by the exponential, 2 read by its sum and by the GEMM; backward 2 written by GEMMs, 4 read and
written by the exponential and the gradient, 2 read by the last GEMMs. E is read twice and its gradient written once; z, ``a``
and their gradients, O(N * D), come once for every W codes.

The entropy softmax, at a low temperature, has few terms above underflow. They are found on the way (`_Candidates`) and all
that follows, the gradients too, is of these alone; where they are many, their tiles are gone through again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ROWS, TILE_CODES = 1024, 1024
"""R and W: a tile of float32 is 4 MiB. Of tiles of 0.5 to 8 MiB these took the least time on two cores (docs/LOG.md)."""
SPARSE_TERMS, SPARSE_SHARE = 32, 1 / 1024
"""The entropy softmax goes sparse where no more terms a row than these, or than this share of K, may be above underflow."""
UNDERFLOW = {torch.float32: 104.0, torch.float64: 746.0}
"""exp(-x) is exactly zero in the type for every x above this."""
GATHERED = 1 << 14
"""Terms of the entropy softmax whose codes and vectors are held at a time on the way back."""
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Support:
    """The terms of softmax(l / T) above underflow: row int64[M], code int64[M], log p_T[M], by code within rows of tiles."""

    row: Tensor
    code: Tensor
    log_weight: Tensor


@dataclass(frozen=True)
class Found:
    """What a search over the codebook finds.

    Attributes:
        indices: int64[N], the largest logit (the first of equals). maxima: float[N, 1], its value.
        log_norms: float[N, 1], log sum_k exp(l_k). attention: float[N, D], softmax(l) @ codebook. Both None unless asked for.
        support: of the entropy softmax; None where it was not asked for or has too many terms.
    """

    indices: Tensor
    maxima: Tensor
    log_norms: Tensor | None
    attention: Tensor | None
    support: Support | None


def best_of_tiles(query: Tensor, codebook: Tensor) -> Tensor:
    """int64[N], the largest of ``query @ codebook.T`` (the first of equals), and nothing else: one GEMM."""
    maxima, indices = _nothing_found(query)
    for rows, codes, tile in _tiles_of_logits(query, codebook):
        _raise_maxima(tile, maxima[rows], indices[rows], codes.start)
    return indices


def search(query: Tensor, codebook: Tensor, *, attend: bool = False, temperature: float | None = None) -> Found:
    """Meet every code once.

    Args:
        query: float32|float64[N, D]. codebook: same type, [K, D].
        attend: find the softmax's sums and means of codes, at the price of a second GEMM.
        temperature: T of the entropy softmax; None looks for no support.
    """
    maxima, indices = _nothing_found(query)
    norms = torch.zeros_like(maxima)
    attention = torch.zeros_like(query) if attend else None
    candidates = None if temperature is None else _Candidates(temperature, len(query), len(codebook), query.dtype)
    for rows, codes, tile in _tiles_of_logits(query, codebook):
        top = maxima[rows]
        before = top.clone()
        largest, higher = _raise_maxima(tile, top, indices[rows], codes.start)
        if candidates is not None:
            candidates.add(tile, largest, top, rows.start, codes.start)
        if attention is not None:
            weights = _exp(tile.sub_(top))
            if len(higher):
                shrunk = (before - top)[higher].exp_()
                norms[rows][higher] *= shrunk
                attention[rows][higher] *= shrunk
            norms[rows] += weights.sum(dim=1, keepdim=True)
            attention[rows].addmm_(weights, codebook[codes])
    support = None if candidates is None else candidates.support(maxima)
    if attention is None:
        return Found(indices, maxima, None, None, support)
    return Found(indices, maxima, maxima + norms.log(), attention.div_(norms), support)


def entropy_of_support(support: Support, usage: Tensor) -> Tensor:
    """Sum over the rows of H(p_T), float[]; adds the rows' p_T to `usage` [K]."""
    weights = support.log_weight.exp()
    usage.index_add_(0, support.code, weights)
    return -torch.dot(weights, support.log_weight)


def entropy_of_tiles(
    query: Tensor, codebook: Tensor, maxima: Tensor, temperature: float, usage: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of every term, and log sum exp(l / T) float[N, 1]; `search` found `maxima`. Two GEMMs."""
    norms, dots = torch.zeros_like(maxima), torch.zeros_like(maxima)
    for rows, _, tile in _tiles_of_logits(query, codebook):
        scaled = tile.sub_(maxima[rows]).div_(temperature)
        weights = _exp(scaled.clone())
        norms[rows] += weights.sum(dim=1, keepdim=True)
        dots[rows] += torch.linalg.vecdot(weights, scaled).unsqueeze(1)
    log_norms = norms.log()
    entropy = (log_norms - dots / norms).sum()
    log_norms += maxima / temperature
    for rows, codes, tile in _tiles_of_logits(query, codebook):
        usage[codes] += _exp(tile.div_(temperature).sub_(log_norms[rows])).sum(dim=0)
    return entropy, log_norms


@dataclass(frozen=True)
class SoftmaxOfTiles:
    """What the softmax's own gradient needs: the gradient to its mean of codes [N, D], and of `Found` indices [N], log_norms
    [N, 1] and attention [N, D]."""

    gradient: Tensor
    indices: Tensor
    log_norms: Tensor
    attention: Tensor


@dataclass(frozen=True)
class EntropyOfTiles:
    """What dL_entropy/dlogits needs: T, log mean_n p_T [K], factor [], and either the support or log sum exp(l / T) [N, 1]."""

    temperature: float
    log_mean: Tensor
    scale: Tensor
    support: Support | None
    log_norms: Tensor | None


def gradients(
    query: Tensor,
    codebook: Tensor,
    softmax: SoftmaxOfTiles | None,
    entropy: EntropyOfTiles | None,
    *,
    codebook_learns: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss's gradients, by way of the logits, to query [N, D] and codebook [K, D] (None unless it learns).

    Args:
        softmax: the term of the mean of codes; None where none came.
        entropy: the entropy term; None where none came.

    Of the chosen code, which may have nearly all of the mass, ``g.e_k - g.a`` is taken as ``g.(e_k - a)``: where a softmax is
    saturated, two roundings of one product would otherwise leave a difference, and its gradient is exactly 0.
    """
    query_grad = torch.zeros_like(query)
    codebook_grad = torch.zeros_like(codebook) if codebook_learns else None
    dense = entropy if entropy is not None and entropy.support is None else None
    means = None if dense is None else _means_of_tiles(query, codebook, dense)
    if softmax is not None or dense is not None:
        values_buffer = _buffer(query, codebook)
        dots, at_chosen = None, None
        if softmax is not None:
            dots = torch.linalg.vecdot(softmax.gradient, softmax.attention).unsqueeze(1)
            at_chosen = torch.linalg.vecdot(softmax.gradient, codebook[softmax.indices] - softmax.attention)
        for rows, codes, logits in _tiles_of_logits(query, codebook):
            block = codebook[codes]
            values = _tile(values_buffer, rows, codes)
            addition = None
            if dense is not None:
                assert means is not None
                weights, c = _entropy_parts(dense, logits, rows, codes)
                addition = c.sub_(means[rows]).mul_(weights).mul_(dense.scale / dense.temperature)
            if softmax is None:
                assert addition is not None
                values.copy_(addition)
            else:
                assert dots is not None
                assert at_chosen is not None
                torch.mm(softmax.gradient[rows], block.T, out=values)
                values.sub_(dots[rows])
                place = softmax.indices[rows] - codes.start
                here = ((place >= 0) & (place < len(block))).nonzero()[:, 0]
                values[here, place[here]] = at_chosen[rows][here]
                values.mul_(_exp(logits.sub_(softmax.log_norms[rows])))
                if addition is not None:
                    values += addition
            query_grad[rows].addmm_(values, block)
            if codebook_grad is not None:
                codebook_grad[codes].addmm_(values.T, query[rows])
    if entropy is not None and entropy.support is not None:
        _add_gradients_of_support(entropy, entropy.support, query, codebook, query_grad, codebook_grad)
    return query_grad, codebook_grad


def chunks(n: int, size: int) -> Iterator[slice]:
    """Slices that cover range(n), `size` at a time."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


class _Candidates:
    """Terms of softmax(l / T) that may be above underflow, collected while the rows' maxima still grow; given up where they are
    too many."""

    def __init__(self, temperature: float, rows: int, codes: int, dtype: torch.dtype) -> None:
        self.temperature = temperature
        self.reach = UNDERFLOW[dtype] * temperature
        self.room = rows * max(SPARSE_TERMS, int(SPARSE_SHARE * codes))
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, tile: Tensor, largest: Tensor, maxima: Tensor, first_row: int, first_code: int) -> None:
        """Look at float[R, W] logits with rows' maxima `largest`, where the largest so far, these among them, are `maxima`."""
        if self.room < 0:
            return
        bound = maxima - self.reach
        hot = (largest > bound)[:, 0].nonzero()[:, 0]
        if not len(hot):
            return
        near = tile[hot]
        row, code = (near > bound[hot]).nonzero(as_tuple=True)
        self.room -= len(row)
        if self.room < 0:
            self.found.clear()
        else:
            self.found.append((hot[row] + first_row, code + first_code, near[row, code]))

    def support(self, maxima: Tensor) -> Support | None:
        """Those that are, the rows' maxima being float[N, 1] in the end; None where they were too many."""
        if self.room < 0:
            return None
        nothing = torch.zeros(0, dtype=torch.int64, device=maxima.device)
        found = [(nothing, nothing, maxima[:0, 0]), *self.found]
        row, code, value = (torch.cat(each) for each in zip(*found, strict=True))
        near = (value > maxima[row, 0] - self.reach).nonzero()[:, 0]
        row, code, value = row[near], code[near], value[near]
        scaled = (value - maxima[row, 0]) / self.temperature
        norms = torch.zeros_like(maxima[:, 0]).index_add_(0, row, scaled.exp())
        return Support(row, code, scaled - norms.log()[row])


def _add_gradients_of_support(
    term: EntropyOfTiles,
    support: Support,
    query: Tensor,
    codebook: Tensor,
    query_grad: Tensor,
    codebook_grad: Tensor | None,
) -> None:
    """Add ``p_T * (c - sum_k p_T,k c_k) * scale / T`` times codes, and times vectors, in place; c = log mean p_T - log p_T."""
    weights, c = support.log_weight.exp(), term.log_mean[support.code] - support.log_weight
    means = torch.zeros_like(query[:, 0]).index_add_(0, support.row, weights * c)
    gradient = weights * (c - means[support.row]) * (term.scale / term.temperature)
    for some in chunks(len(gradient), GATHERED):
        row, code, factor = support.row[some], support.code[some], gradient[some, None]
        query_grad.index_add_(0, row, factor * codebook[code])
        if codebook_grad is not None:
            codebook_grad.index_add_(0, code, factor * query[row])


def _entropy_parts(term: EntropyOfTiles, logits: Tensor, rows: slice, codes: slice) -> tuple[Tensor, Tensor]:
    """(p_T, c) of a tile."""
    assert term.log_norms is not None
    log_weights = (logits / term.temperature).sub_(term.log_norms[rows])
    return _exp(log_weights.clone()), term.log_mean[codes] - log_weights


def _means_of_tiles(query: Tensor, codebook: Tensor, term: EntropyOfTiles) -> Tensor:
    """sum_k p_T,k c_k of each row, float[N, 1]; one GEMM."""
    means = torch.zeros_like(query[:, :1])
    for rows, codes, logits in _tiles_of_logits(query, codebook):
        means[rows] += torch.linalg.vecdot(*_entropy_parts(term, logits, rows, codes)).unsqueeze(1)
    return means


def _tiles_of_logits(query: Tensor, codebook: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, codes, their logits), each tile in the same memory as the one before."""
    buffer = _buffer(query, codebook)
    for codes in chunks(len(codebook), TILE_CODES):
        for rows in chunks(len(query), TILE_ROWS):
            yield rows, codes, torch.mm(query[rows], codebook[codes].T, out=_tile(buffer, rows, codes))


def _nothing_found(query: Tensor) -> tuple[Tensor, Tensor]:
    """(maxima float[N, 1], their indices int64[N]) before the first tile."""
    maxima = query.new_full((len(query), 1), -math.inf)
    return maxima, torch.zeros(len(query), dtype=torch.int64, device=query.device)


def _raise_maxima(tile: Tensor, maxima: Tensor, indices: Tensor, first_code: int) -> tuple[Tensor, Tensor]:
    """Carry maxima [R, 1] and indices [R] on over a tile [R, W], in place: (its rows' maxima [R, 1], which rows it raised)."""
    largest = tile.amax(dim=1, keepdim=True)
    higher = (largest > maxima)[:, 0].nonzero()[:, 0]
    if len(higher):
        # of equals the first: within the tile, and a later tile has to be above
        indices[higher] = tile[higher].argmax(dim=1) + first_code
    torch.maximum(maxima, largest, out=maxima)
    return largest, higher


def _buffer(query: Tensor, codebook: Tensor) -> Tensor:
    """Room for the largest tile."""
    return query.new_empty(min(TILE_ROWS, len(query)) * min(TILE_CODES, len(codebook)))


def _tile(buffer: Tensor, rows: slice, codes: slice) -> Tensor:
    """The beginning of `buffer` as a matrix without gaps."""
    height, width = rows.stop - rows.start, codes.stop - codes.start
    return buffer[: height * width].view(height, width)


def _exp(exponents: Tensor) -> Tensor:
    """exp of exponents <= 0, in place, by way of exp2: where the result underflows, which most terms of a peaked softmax do,
    torch's exp on a CPU takes up to 16 times as long (docs/LOG.md)."""
    return exponents.mul_(LOG2_E).exp2_()

"""What a tokenizer in training is measured by; nothing here leaves a trace in what trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ett.generate.fidelity import l1, psnr
from ett.tokenizers import VisionTokenizer
from ett.train.checkpoint import random_state, restore_random_state
from ett.train.objectives import Losses


@dataclass(frozen=True)
class Codes:
    """What a tokenizer makes of P pictures.

    Attributes:
        indices: int64[P, h, w]. reconstructions: float[P, 3, H, W] in [-1, 1]. Both on the CPU.
    """

    indices: Tensor
    reconstructions: Tensor


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards the modules' modes and the random states are what they were.

    A layer that recomputes its activations to save memory keeps its own mode, which is what tells it to.
    """
    modes = {module: module.training for each in modules for module in each.modules()}
    state = random_state()
    for module, mode in modes.items():
        module.training = mode and bool(getattr(module, "gradient_checkpointing", False))
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        restore_random_state(state)


@torch.no_grad()
def encode_pictures(tokenizer: VisionTokenizer, pictures: Sequence[Tensor]) -> Tensor:
    """Features float[P, D, h, w] of P pictures, given as parts float[R, 3, H, W] in [-1, 1] that are encoded one by one."""
    device = tokenizer.encoder_output.device
    return torch.cat([tokenizer.encode(part.to(device)) for part in pictures])


def decode_codes(tokenizer: VisionTokenizer, indices: Tensor, size: int) -> Codes:
    """The codes of int64[P, h, w] indices, decoded `size` pictures at a time."""
    parts = [tokenizer.detokenize(part).cpu() for part in indices.split(size)]
    return Codes(indices.cpu(), torch.cat(parts))


def usage_values(indices: Tensor, codebook_size: int) -> dict[str, float]:
    """How many codes int64[...] indices in [0, K) use: ``codes_in_use``, ``usage``, ``index_perplexity``.

    ``usage`` is the share of as many codes as could be in use, min(K, number of indices). ``index_perplexity`` is exp of the
    entropy of how often codes occur, in [1, K].
    """
    counts = torch.bincount(indices.flatten().cpu(), minlength=codebook_size)
    share = counts.double() / counts.sum()
    in_use = int((counts > 0).sum())
    return {
        "codes_in_use": float(in_use),
        "usage": in_use / min(codebook_size, indices.numel()),
        "index_perplexity": float(torch.exp(-torch.xlogy(share, share).sum())),
    }


def softmax_values(tokenizer: VisionTokenizer, features: Tensor) -> dict[str, float]:
    """The index softmax on float[P, D, h, w] (`SoftmaxStatistics`); empty where the quantizer has none."""
    found = tokenizer.quantize.softmax_statistics(features)
    if found is None:
        return {}
    return {
        "top1_mass": found.top1_mass,
        "nearest_share": found.nearest_share,
        "softmax_perplexity": found.perplexity,
        "row_entropy": found.row_entropy,
        "usage_entropy": found.usage_entropy,
    }


def drift_values(before: Codes, now: Codes) -> dict[str, float]:
    """How far `now` is from `before`, means over pictures.

    ``indices_changed`` is a share in [0, 1], ``reconstruction_drift`` a mean absolute difference in [0, 2] (both as in the
    evaluation task "drift"), ``reconstruction_drift_psnr`` the PSNR between the two reconstructions [dB].
    """
    pairs = list(zip(before.reconstructions, now.reconstructions, strict=True))
    return {
        "indices_changed": float((before.indices != now.indices).double().mean()),
        "reconstruction_drift": sum(l1(*pair) for pair in pairs) / len(pairs),
        "reconstruction_drift_psnr": sum(psnr(*pair) for pair in pairs) / len(pairs),
    }


def tokenizer_probes(tokenizer: VisionTokenizer) -> dict[str, Tensor]:
    """Where gradients of the tokenizer's losses are compared: one parameter each of "encoder" and "codebook"."""
    probes = {"encoder": tokenizer.encoder_output}
    # a codebook fixed by rule (FSQ, LFQ) has nothing to train; a table may have a learned scale beside it
    codebook = max(tokenizer.quantize.parameters(), key=Tensor.numel, default=None)
    if codebook is not None:
        probes["codebook"] = codebook
    return probes


def gradient_norms(terms: Losses, probes: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Norm of each term's gradient at each probe (place -> term -> norm), 0 where it does not reach.

    Terms that depend on nothing that trains are left out. ``.grad`` of the probes is left alone.
    """
    found: dict[str, dict[str, float]] = {place: {} for place in probes}
    for name, term in terms.items():
        if not term.requires_grad:
            continue
        grads = torch.autograd.grad(term, list(probes.values()), retain_graph=True, allow_unused=True)
        for place, grad in zip(probes, grads, strict=True):
            found[place][name] = 0.0 if grad is None else float(grad.norm())
    return found

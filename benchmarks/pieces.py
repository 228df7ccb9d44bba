"""Pieces of a training step against their plain forms, forward and backward, alternately in one process.

    python benchmarks/pieces.py                        # two minutes on one core
    python benchmarks/pieces.py --pieces doubling
    python benchmarks/pieces.py --device cuda

"caption loss": from hidden states of supervised positions to the gradients of states and head. Plain is all logits at once,
"own chunks" is torch's fused operator with the chunks that it chooses itself. "norm, swish": of the widest level of a CNN.
"doubling": nearest neighbour and a 3 x 3 convolution, as the levels of the demo's decoder have them.
Times are CPU time on CPU, which other processes disturb least, and wall time on CUDA.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ett.losses.caption import linear_caption_loss
from ett.tokenizers.norm_swish import norm_swish
from ett.tokenizers.upsampling import doubled_convolution

Sides = dict[str, Callable[[], None]]

CAPTIONS = {
    "demo": (384, 192, 264),
    "SmolLM2, 300 tokens": (300, 576, 49152),
    "SmolLM2, 1,200 tokens": (1200, 576, 49152),
}
"""Supervised positions S, width C, vocabulary V."""
NORMS = {"16 x 16 x 64 x 64": (16, 16, 64), "4 x 128 x 128 x 128": (4, 128, 128)}
"""Pictures, channels, side."""
DOUBLINGS = {
    f"{pictures} x {channels} x {side} x {side}": (pictures, channels, side)
    for pictures in (4, 16)
    for channels, side in ((128, 8), (64, 16), (32, 32))
}


def captions(shape: tuple[int, int, int], device: str) -> Sides:
    positions, width, vocabulary = shape
    hidden = torch.randn(positions, width, device=device, requires_grad=True)
    head = nn.Linear(width, vocabulary, bias=False, device=device)
    targets = torch.randint(vocabulary, (positions,), device=device)

    def backward(loss: Tensor) -> None:
        torch.autograd.grad(loss, [hidden, head.weight])

    def own_chunks() -> Tensor:
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, head.weight, targets, reduction="sum", options=options)

    sides: Sides = {
        "plain": lambda: backward(F.cross_entropy(head(hidden).float(), targets, reduction="sum")),
        "ours": lambda: backward(linear_caption_loss(hidden, head, targets, 1.0)),
    }
    if hasattr(F, "linear_cross_entropy"):
        sides["own chunks"] = lambda: backward(own_chunks())
    return sides


def norms(shape: tuple[int, int, int], device: str) -> Sides:
    pictures, channels, side = shape
    norm = nn.GroupNorm(4, channels, eps=1e-6, device=device)
    x = torch.randn(pictures, channels, side, side, device=device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(x)

    def backward(y: Tensor) -> None:
        torch.autograd.grad(y, [x, norm.weight, norm.bias], gradient)

    return {"plain": lambda: backward(F.silu(norm(x))), "ours": lambda: backward(norm_swish(norm, x))}


def doublings(shape: tuple[int, int, int], device: str) -> Sides:
    pictures, channels, side = shape
    layer = nn.Conv2d(channels, channels, 3, padding=1, device=device).to(memory_format=torch.channels_last)
    x = torch.randn(pictures, channels, side, side, device=device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(pictures, channels, 2 * side, 2 * side, device=device)
    gradient = gradient.contiguous(memory_format=torch.channels_last)

    def backward(y: Tensor) -> None:
        torch.autograd.grad(y, [x, *layer.parameters()], gradient)

    return {
        "plain": lambda: backward(layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))),
        "ours": lambda: backward(doubled_convolution(layer, x)),
    }


PIECES: dict[str, tuple[Callable[[tuple[int, int, int], str], Sides], dict[str, tuple[int, int, int]]]] = {
    "caption loss": (captions, CAPTIONS),
    "norm, swish": (norms, NORMS),
    "doubling": (doublings, DOUBLINGS),
}


def seconds(run: Callable[[], None], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    started = clock()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - started


def report(name: str, sides: Sides, repeats: int, device: str) -> None:
    found: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats + 1):
        for side, run in sides.items():
            taken = seconds(run, device)
            if turn > 0:  # the first one warms up
                found[side].append(taken)
    shown = []
    for side, values in found.items():
        ratios = [plain / value for plain, value in zip(found["plain"], values, strict=True)]
        against = "" if side == "plain" else f" (plain / this: {statistics.median(ratios):.2f})"
        shown.append(f"{side} {statistics.median(values) * 1e3:.1f} ms{against}")
    print(f"{name}: {', '.join(shown)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", nargs="+", choices=list(PIECES), default=list(PIECES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(
        f"{arguments.device}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{platform.processor() or platform.machine()}"
    )
    for piece in arguments.pieces:
        make, shapes = PIECES[piece]
        for name, shape in shapes.items():
            report(f"{piece}, {name}", make(shape, arguments.device), arguments.repeats, arguments.device)


if __name__ == "__main__":
    main()

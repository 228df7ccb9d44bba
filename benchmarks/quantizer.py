"""Quantizer, forward and backward with the entropy term: ours against the dense form, alternately in one process.

    python benchmarks/quantizer.py                             # N = 2,048, K = 131,072, D = 256: about 3 minutes on 2 cores
    python benchmarks/quantizer.py --rows 512 --codes 16384
    python benchmarks/quantizer.py --rows 8192 --device cuda   # both sides without TF32

The baseline is IBQ as the paper writes it, in the same type and threads, with nothing done twice: one logits matrix,
autograd's own softmax. Peak memory is each side's alone, in a process of its own: Linux's high-water mark (on CUDA the
allocator's), and how far above the memory before the step it lies, with and without the gradient of the codebook.

The share of the machine's ceiling is that of the step's products of 2 * N * K * D operations (six on a CPU, by tiles; five on
CUDA, by rows; four where logits are kept) in a square product's rate.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor

from ett.tokenizers.index_backprop import KEPT_ELEMENTS, TILED_DEVICES, index_backprop

TEMPERATURE = 0.01


def dense(query: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """(embeddings, entropy term), every N x K matrix held."""
    logits = query @ codebook.T
    p = logits.softmax(dim=1)
    onehot = F.one_hot(logits.argmax(dim=1), codebook.shape[0]).to(query.dtype)
    embeddings = (onehot - p.detach() + p) @ codebook
    scaled = logits / TEMPERATURE
    log_p = scaled.log_softmax(dim=1)
    p_t = log_p.exp()
    mean = p_t.mean(dim=0)
    entropy = -(p_t * log_p).sum(dim=1).mean() + (mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
    return embeddings, entropy


def ours(query: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    found = index_backprop(query, codebook, TEMPERATURE)
    return found.soft, found.entropy


SIDES = {"ours": ours, "dense": dense}


def inputs(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query = torch.randn(arguments.rows, arguments.dim)
    codebook = torch.randn(arguments.codes, arguments.dim) * arguments.code_std
    weights = torch.randn(arguments.rows, arguments.dim)
    device = arguments.device
    return query.to(device).requires_grad_(), codebook.to(device).requires_grad_(), weights.to(device)


def step(side: str, query: Tensor, codebook: Tensor, weights: Tensor) -> float:
    """Seconds of one forward and backward."""
    query.grad = codebook.grad = None
    _wait(query)
    started = time.perf_counter()
    embeddings, entropy = SIDES[side](query, codebook)
    ((embeddings * weights).sum() + entropy).backward()
    _wait(query)
    return time.perf_counter() - started


def rate_of_a_square_product(query: Tensor) -> float:
    """GFLOP/s of 2,048 x 2,048 times itself; the median of seven."""
    square = torch.randn(2048, 2048, device=query.device)
    out, taken = square @ square, []
    for _ in range(7):
        _wait(query)
        started = time.perf_counter()
        torch.mm(square, square, out=out)
        _wait(query)
        taken.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(taken) / 1e9


def num_products(query: Tensor, codebook: Tensor) -> int:
    """Of 2 * N * K * D operations, in one step of ours."""
    device = query.device.type
    if device in TILED_DEVICES:
        return 6
    return 4 if len(query) * len(codebook) <= KEPT_ELEMENTS[device] else 5


def _wait(query: Tensor) -> None:
    if query.is_cuda:
        torch.cuda.synchronize()


def status_mib(field: str) -> float:
    """A line of /proc/self/status: VmRSS, what is resident now; VmHWM, its peak since the last reset."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) / 1024
    raise KeyError(field)


def memory_of_a_step(side: str, given: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """(peak of the process [MiB], of which the step added [MiB])."""
    if given[0].is_cuda:
        held = torch.cuda.memory_allocated()
        step(side, *given)
        reached = torch.cuda.max_memory_allocated()
        return reached / 2**20, (reached - held) / 2**20
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_mib("VmRSS")
    step(side, *given)
    peak = status_mib("VmHWM")
    return peak, peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="N")
    parser.add_argument("--codes", type=int, default=131072, help="K")
    parser.add_argument("--dim", type=int, default=256, help="D")
    parser.add_argument("--code-std", type=float, default=0.35, help="scale of the codes; features have 1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--only", choices=sorted(SIDES), help="one step of one side, print its memory [MiB]: whole, added"
    )
    arguments = parser.parse_args()
    given = inputs(arguments)
    if arguments.only:
        print(*memory_of_a_step(arguments.only, given))
        return
    print(
        f"N {arguments.rows}, K {arguments.codes}, D {arguments.dim}, float32, {arguments.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.processor() or platform.machine()}"
    )
    for side in SIDES:
        step(side, *given)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(arguments.repeats):
        for side in SIDES:
            seconds[side].append(step(side, *given))
    ratios = [d / o for o, d in zip(seconds["ours"], seconds["dense"], strict=True)]
    memory = {}
    for side in SIDES:
        command = [sys.executable, *sys.argv, "--only", side]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        memory[side] = [float(number) for number in printed]
    gradient = arguments.codes * arguments.dim * 4 / 2**20
    for side, values in seconds.items():
        whole, added = memory[side]
        print(
            f"{side:<6} median {statistics.median(values):6.2f} s  (min {min(values):.2f}, max {max(values):.2f})   "
            f"process {whole / 1024:5.2f} GiB, of which the step {added / 1024:5.2f} GiB, "
            f"{added - gradient:,.0f} MiB beyond the codebook's gradient"
        )
    print(
        f"dense / ours: time {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f}), "
        f"memory of the step {memory['dense'][1] / memory['ours'][1]:.1f}"
    )
    products, rate = num_products(*given[:2]), rate_of_a_square_product(given[0])
    done = products * 2 * arguments.rows * arguments.codes * arguments.dim / statistics.median(seconds["ours"]) / 1e9
    print(f"ours: {products} products at {done:,.0f} GFLOP/s, {done / rate:.0%} of a square product's {rate:,.0f}")


if __name__ == "__main__":
    main()

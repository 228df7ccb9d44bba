"""The quantizer over K, the number of codes, and over N, the number of vectors: ours against the dense form, and a figure.

    python benchmarks/quantizer_scaling.py                     # K = 1,024 to 262,144, N = 128 to 8,192; an hour on one core
    python benchmarks/quantizer_scaling.py --codes 1024 4096 --rows 128 512 --repeats 1 --figure /tmp/scaling.svg
    python benchmarks/quantizer_scaling.py --device cuda

Both sides of `benchmarks/quantizer.py`, forward and backward with the entropy term, alternately; the memory that a step adds is
each side's in a process of its own. The dense form is left out where it would add more than `--dense-memory`.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from quantizer import SIDES, inputs, step

DENSE_MATRICES = 8
"""N x K matrices that the dense form holds at once, as measured."""
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "quantizer_scaling.svg"


@dataclass(frozen=True)
class Point:
    """One side at one size: seconds of a step (median), and GiB that it adds."""

    side: str
    rows: int
    codes: int
    seconds: float
    memory: float


def measure(rows: int, codes: int, arguments: argparse.Namespace) -> list[Point]:
    """Every side that fits, measured at N = `rows` and K = `codes`."""
    dense = DENSE_MATRICES * 4 * rows * codes <= arguments.dense_memory * 2**30
    sides = [side for side in SIDES if side != "dense" or dense]
    options = {"rows": rows, "codes": codes, "dim": arguments.dim, "code_std": 0.35, "device": arguments.device}
    given = inputs(argparse.Namespace(**options))
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(arguments.repeats + 1):
        for side in sides:
            taken = step(side, *given)
            if turn > 0:  # the first one warms up
                seconds[side].append(taken)
    found = []
    for side in sides:
        words = ["--rows", rows, "--codes", codes, "--dim", arguments.dim, "--device", arguments.device, "--only", side]
        command = [sys.executable, str(Path(__file__).with_name("quantizer.py")), *map(str, words)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        found.append(Point(side, rows, codes, statistics.median(seconds[side]), float(printed[1]) / 1024))
        print(
            f"N {rows:>6}, K {codes:>7}, {side:<6} {found[-1].seconds:8.3f} s, {found[-1].memory:7.3f} GiB", flush=True
        )
    return found


# -- the figure ----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 380, 260, 58, 30, 40
STROKES = {"ours": "stroke:#0b62c4", "dense": "stroke:#b45309;stroke-dasharray:6 3"}


def panel(title: str, label: str, unit: str, lines: dict[str, list[tuple[float, float]]]) -> list[str]:
    """SVG elements of one plot with logarithmic axes, a tick at every power of ten on the left and at every x below."""
    xs = sorted({x for points in lines.values() for x, _ in points})
    ys = [y for points in lines.values() for _, y in points]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    across = max(math.log(xs[-1] / xs[0]), 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (WIDTH - LEFT - 14) * math.log(x / xs[0]) / across
        return right, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log10(y) - low) / max(1, high - low)

    parts = [f'<text x="{LEFT}" y="18" class="title">{title}</text>']
    for power in range(low, high + 1):
        _, y = place(xs[0], 10.0**power)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - 14}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g} {unit}</text>')
    for x in xs:
        text = f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"
        parts.append(f'<text x="{place(x, 1)[0]:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>')
    for side, points in lines.items():
        placed = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline style="{STROKES[side]}" points="{path}"/>')
        parts += [f'<circle style="{STROKES[side]}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in placed]
        below = 17 if side == "ours" else -7
        parts.append(f'<text x="{placed[-1][0]:.1f}" y="{placed[-1][1] + below:.1f}" text-anchor="end">{side}</text>')
    return parts


def figure(over_codes: Sequence[Point], over_rows: Sequence[Point], note: str) -> str:
    """An SVG of four plots: time and memory over K and over N."""
    plots = []
    for points, axis in ((over_codes, "codes"), (over_rows, "rows")):
        fixed = f"N = {points[0].rows:,}" if axis == "codes" else f"K = {points[0].codes:,}"
        label = "K, codes" if axis == "codes" else "N, vectors"
        for value, unit, name in (("seconds", "s", "Time of a step"), ("memory", "GiB", "Memory that it adds")):
            lines: dict[str, list[tuple[float, float]]] = {}
            for point in points:
                if getattr(point, value) > 0:
                    lines.setdefault(point.side, []).append((getattr(point, axis), getattr(point, value)))
            plots.append(panel(f"{name}, {fixed}", label, unit, lines))
    style = (
        "text{font:11px sans-serif;fill:#24292f}.title{font-weight:bold}.grid{stroke:#d0d7de}"
        "polyline{fill:none;stroke-width:2}circle{fill:#fff;stroke-width:2}"
    )
    groups = [
        f'<g transform="translate({i % 2 * WIDTH} {i // 2 * HEIGHT})">{"".join(parts)}</g>'
        for i, parts in enumerate(plots)
    ]
    size = f"{2 * WIDTH} {2 * HEIGHT + 22}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-label="{note}"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(groups)}'
        f'<text x="{LEFT}" y="{2 * HEIGHT + 12}">{note}</text></svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, nargs="+", default=[1 << power for power in range(10, 19, 2)], help="K")
    parser.add_argument("--rows", type=int, nargs="+", default=[1 << power for power in range(7, 14, 2)], help="N")
    parser.add_argument("--at-rows", type=int, default=512, help="N while K varies")
    parser.add_argument("--at-codes", type=int, default=16384, help="K while N varies")
    parser.add_argument("--dim", type=int, default=256, help="D")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dense-memory", type=float, default=6.0, help="GiB that the dense form may add")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="SVG to write")
    arguments = parser.parse_args()
    machine = f"{arguments.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"D {arguments.dim}, float32, {machine}, {platform.processor() or platform.machine()}")
    over_codes = [each for codes in arguments.codes for each in measure(arguments.at_rows, codes, arguments)]
    over_rows = [each for rows in arguments.rows for each in measure(rows, arguments.at_codes, arguments)]
    note = f"Forward and backward with the entropy term, D = {arguments.dim}, float32, {machine}"
    arguments.figure.write_text(figure(over_codes, over_rows, note), encoding="utf-8")
    print(f"{arguments.figure} written")


if __name__ == "__main__":
    main()

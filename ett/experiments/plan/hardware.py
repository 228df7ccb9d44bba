"""Machines by name: what their makers say they hold and compute."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from ett.errors import RecipeError, unknown

GIB = 2**30
ASSUMED_UTILISATION = {"cpu": 0.25, "cuda": 0.35}
"""Share of the peak rate that a step is taken to reach. An assumption, not a measurement of this package."""


@dataclass(frozen=True)
class Hardware:
    """A device; figures are the maker's, dense.

    Attributes:
        device: torch's type, "cpu" or "cuda".
        memory: bytes of one device; null is whatever the machine has.
        fp32, bf16: peak rate of matrix products in either precision [FLOP/s] (without TF32, as the loop computes).
    """

    device: Literal["cpu", "cuda"]
    memory: int | None
    fp32: float
    bf16: float

    def rate(self, precision: str) -> float:
        """Peak [FLOP/s] of a recipe's precision."""
        return self.bf16 if precision == "bf16" else self.fp32


HARDWARE = {
    # two AVX-512 cores at 2.6 GHz, 64 float32 operations a cycle; bfloat16 is no faster without AMX
    "cpu-2core": Hardware("cpu", None, 0.33e12, 0.33e12),
    "rtx4090": Hardware("cuda", 24 * GIB, 82.6e12, 165e12),
    "l40s": Hardware("cuda", 48 * GIB, 91.6e12, 362e12),
    "a100-40gb": Hardware("cuda", 40 * GIB, 19.5e12, 312e12),
    "a100-80gb": Hardware("cuda", 80 * GIB, 19.5e12, 312e12),
    "h100-80gb": Hardware("cuda", 80 * GIB, 67e12, 989e12),
    "h200-141gb": Hardware("cuda", 141 * 10**9, 67e12, 989e12),
}


def find_hardware(name: str) -> Hardware:
    """The machine called `name`.

    Raises:
        RecipeError: there is none.
    """
    if name not in HARDWARE:
        raise RecipeError(unknown("hardware", name, HARDWARE))
    return HARDWARE[name]


def parse_memory(text: str) -> int:
    """Bytes of "24GiB", "80GB" or "512MiB".

    Raises:
        RecipeError: it is no such quantity.
    """
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    for unit, size in units.items():
        if text.endswith(unit):
            try:
                amount = float(text.removesuffix(unit))
            except ValueError:
                break
            if 0 < amount < float("inf"):
                return int(amount * size)
    raise RecipeError(f"The device memory {text!r} is not a quantity such as 24GiB or 80GB. Units: {', '.join(units)}.")


def machine_memory() -> int:
    """Bytes of this machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

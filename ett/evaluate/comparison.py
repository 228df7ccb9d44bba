"""Differences between models measured on the same examples: pooled over sources, with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ett.errors import UserError

Parts = Mapping[str, Sequence[Sequence[float]]]
"""Metric -> (sum, weight) of each example, as `Evaluation.to_json` writes them under "parts"."""

Array = npt.NDArray[np.float64]

BOOTSTRAP_SAMPLES = 4000


@dataclass(frozen=True)
class Difference:
    """Metric of the first minus metric of the second, on the same examples.

    Attributes:
        value: the difference of the two values, each taken over all examples and seeds.
        interval: 95 % percentile interval of the paired bootstrap; None for a single example.
        num_examples, num_seeds: that it was taken over.
    """

    value: float
    interval: tuple[float, float] | None
    num_examples: int
    num_seeds: int

    def to_json(self) -> dict[str, Any]:
        interval = None if self.interval is None else list(self.interval)
        return {
            "value": self.value,
            "interval": interval,
            "num_examples": self.num_examples,
            "num_seeds": self.num_seeds,
        }


def pooled(parts: Parts) -> dict[str, Array]:
    """Per-example (sum, weight), float64[N, 2], of every metric for each source and for all sources that share a prefix.

    ``drawn_text.font.psnr`` and ``drawn_text.word.psnr`` also give ``drawn_text.psnr``, and with ``names.pair.psnr``
    ``psnr``. Sources are joined in the order of `parts`.
    """
    found: dict[str, list[Sequence[Sequence[float]]]] = {}
    for name, rows in parts.items():
        *source, metric = name.split(".")
        for depth in range(len(source) + 1):
            found.setdefault(".".join([*source[:depth], metric]), []).append(rows)
    return {name: np.concatenate([np.asarray(r, dtype=np.float64) for r in rows]) for name, rows in found.items()}


def ratio(rows: Array) -> float:
    """``sum(sums) / sum(weights)`` of float64[..., 2]."""
    total, weight = rows.reshape(-1, 2).sum(axis=0)
    return float(total / weight)


def difference(
    first: Sequence[Array], second: Sequence[Array], *, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> Difference:
    """Compare two arms.

    Args:
        first, second: for each seed float64[N, 2], (sum, weight) of each example; the same seeds and examples in both.
        samples: resamples. seed: of the resampling.

    A resample draws examples, and seeds where there are several, with replacement, the same ones for both arms, so that
    what is common to both (a hard example, a lucky seed) cancels.

    Raises:
        UserError: the arms were not measured on the same examples or seeds.
    """
    if len(first) != len(second) or len({rows.shape for rows in (*first, *second)}) != 1:
        raise UserError(
            "The two arms were not measured on the same examples and seeds, so they cannot be paired. Evaluate both with the "
            "same sources and limit."
        )
    a, b = np.stack(first), np.stack(second)
    num_seeds, num_examples, _ = a.shape
    value = ratio(a) - ratio(b)
    if num_examples < 2:
        return Difference(value, None, num_examples, num_seeds)
    examples = _draws(num_examples, samples, seed)
    seeds = _draws(num_seeds, samples, seed + 1)
    drawn_a, drawn_b = (sum(seeds[:, s, None] * (examples @ rows[s]) for s in range(num_seeds)) for rows in (a, b))
    # a resample without weight, such as one without an example that counts, has no value
    able = (drawn_a[:, 1] > 0) & (drawn_b[:, 1] > 0)
    found = drawn_a[able, 0] / drawn_a[able, 1] - drawn_b[able, 0] / drawn_b[able, 1]
    low, high = np.percentile(found, [2.5, 97.5])
    return Difference(value, (float(low), float(high)), num_examples, num_seeds)


@lru_cache(maxsize=8)
def _draws(count: int, samples: int, seed: int) -> Array:
    """float64[samples, count]: how often each of `count` things comes up when `count` are drawn with replacement."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples).astype(np.float64)


def compare(arms: Mapping[str, Sequence[Parts]], reference: str) -> dict[str, dict[str, Difference]]:
    """``{"<arm> - <reference>": {metric: Difference}}`` for every other arm, of the metrics that both have.

    Args:
        arms: name -> per-example parts of each seed, seeds in the same order.
        reference: the arm that is subtracted from the others.
    """
    tables = {name: [pooled(parts) for parts in seeds] for name, seeds in arms.items()}
    found: dict[str, dict[str, Difference]] = {}
    for name, table in tables.items():
        if name == reference:
            continue
        shared = [metric for metric in table[0] if all(metric in each for each in (*table, *tables[reference]))]
        found[f"{name} - {reference}"] = {
            metric: difference([each[metric] for each in table], [each[metric] for each in tables[reference]])
            for metric in shared
        }
    return found

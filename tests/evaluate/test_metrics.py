"""Measures against values worked out by hand, and against the plain loops that their tricks replace."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from ett.evaluate.metrics import (
    MAX_PSNR,
    bootstrap_interval,
    character_errors,
    codebook_usage,
    edit_distance,
    exact_match,
    index_counts,
    index_perplexity,
    l1,
    normalized,
    paired_bootstrap_interval,
    psnr,
    ssim,
)
from ett.images import Box


def test_psnr_of_a_constant_difference() -> None:
    black, grey = torch.full((3, 8, 8), -1.0), torch.full((3, 8, 8), -0.8)
    # mean squared difference 0.04 at data range 2: 10 log10(4 / 0.04) = 20 dB
    assert psnr(black, grey) == pytest.approx(20.0, abs=1e-5)
    assert l1(black, grey) == pytest.approx(0.2)


def test_psnr_of_equal_pictures_is_capped() -> None:
    picture = torch.rand(3, 4, 4)
    assert psnr(picture, picture) == MAX_PSNR == 100.0
    assert psnr(picture, picture + 1e-9) <= MAX_PSNR


def test_padding_does_not_count() -> None:
    first, second = torch.zeros(3, 20, 20), torch.zeros(3, 20, 20)
    second[:, :4] = 1.0
    box = Box(left=0, top=4, right=20, bottom=20)
    assert psnr(first, second, box) == MAX_PSNR
    assert ssim(first, second, box) == pytest.approx(1.0)
    assert l1(first, second, box) == 0.0
    assert psnr(first, second) < 20


def test_ssim_of_constant_pictures() -> None:
    # no variance: (2 ab + C1) / (a^2 + b^2 + C1) with a = 0, b = 0.5
    first, second = torch.full((3, 16, 16), -1.0), torch.zeros(3, 16, 16)
    assert ssim(first, second) == pytest.approx(1e-4 / (0.25 + 1e-4), rel=1e-9)


def test_ssim_against_the_plain_loop() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, 3, 13, 12))
    weights = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(weights, weights) / weights.sum() ** 2
    values = []
    for channel in range(3):
        x, y = (a[channel] + 1) / 2, (b[channel] + 1) / 2
        for i in range(3):
            for j in range(2):
                p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert ssim(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(float(np.mean(values)), abs=1e-10)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (2, 3), (10, 11), (11, 10)])
def test_ssim_of_small_pictures(height: int, width: int) -> None:
    picture = torch.rand(3, height, width) * 2 - 1
    assert ssim(picture, picture) == pytest.approx(1.0)
    assert -1 <= ssim(picture, -picture) < 1


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("  A  Red\nFox. ", "a red fox"),
        ("STRASSE", "straße".casefold()),
        (".", "."),
        ("a..", "a."),
        ("", ""),
        (" . ", "."),
    ],
)
def test_normalized(given: str, plain: str) -> None:
    assert normalized(given) == plain


def test_exact_match() -> None:
    assert exact_match("Red  fox.", "red fox")
    assert not exact_match("red foxes", "red fox")


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == distance


def test_edit_distance_against_the_plain_table() -> None:
    def plain(a: str, b: str) -> int:
        table = [list(range(len(b) + 1))]
        for i, x in enumerate(a, 1):
            row = [i]
            for j, y in enumerate(b, 1):
                row.append(min(table[-1][j] + 1, row[-1] + 1, table[-1][j - 1] + (x != y)))
            table.append(row)
        return table[-1][-1]

    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("ab\U0001f600", k=rng.randrange(9))) for _ in range(2))
        assert edit_distance(a, b) == plain(a, b)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("c a t", "c a t", (0, 3)),
        ("cat", "c a t", (0, 3)),
        ("c o t s", "c a t", (2, 3)),
        ("Cat.", "cat", (0, 3)),
        ("a b", "ab", (1, 2)),
        ("x", ".", (1, 1)),
        ("abcdef", "a", (5, 1)),
    ],
)
def test_character_errors(prediction: str, reference: str, expected: tuple[int, int]) -> None:
    assert character_errors(prediction, reference) == expected


def test_codebook_figures() -> None:
    counts = index_counts(torch.tensor([[[0, 0], [3, 3]]]), 8)
    assert counts.tolist() == [2, 0, 0, 2, 0, 0, 0, 0]
    assert codebook_usage(counts) == 0.25
    assert index_perplexity(counts) == pytest.approx(2.0)
    assert index_perplexity(torch.tensor([5, 0])) == 1.0
    share = np.array([0.75, 0.25])
    assert index_perplexity(torch.tensor([3, 1])) == pytest.approx(math.exp(-(share * np.log(share)).sum()))


def test_bootstrap() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    low, high = bootstrap_interval(values) or (0.0, 0.0)
    # 1.96 * 2 / sqrt(400) = 0.196
    assert low == pytest.approx(values.mean() - 0.196, abs=0.04)
    assert high == pytest.approx(values.mean() + 0.196, abs=0.04)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    assert bootstrap_interval([1.0]) is None
    assert bootstrap_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)


@pytest.mark.parametrize("count", [2, 7, 1000])
def test_bootstrap_is_the_plain_loop(count: int) -> None:
    rng = np.random.default_rng(count)
    values, weights = rng.normal(size=count), rng.integers(1, 9, count).astype(float)
    draws, means = np.random.default_rng(5), []
    for _ in range(600):
        drawn = draws.integers(0, count, count)
        means.append(values[drawn].sum() / weights[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    assert bootstrap_interval(values, weights, samples=600, seed=5) == (low, high)


def test_bootstrap_of_a_ratio() -> None:
    # each example has 2 nats a token, whatever its length
    assert bootstrap_interval([2.0, 20.0, 8.0], [1, 10, 4]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="weight"):
        bootstrap_interval([1.0, 2.0], [1.0])


def test_pairs_are_surer_than_two_means() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 10, 200)
    low, high = paired_bootstrap_interval(difficulty + 1 + rng.normal(0, 0.1, 200), difficulty) or (0.0, 0.0)
    assert 0.9 < low < 1 < high < 1.1
    with pytest.raises(ValueError, match="equally many"):
        paired_bootstrap_interval([1.0], [1.0, 2.0])

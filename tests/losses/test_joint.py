"""Means of loss terms over batches, and the sum that they make."""

from __future__ import annotations

import pytest

from ett.losses.joint import LossConfig, TermMeans, whole_loss


def test_each_term_counts_over_its_own() -> None:
    """Three batches: a drawing without words, words without a picture, and a picture with a caption."""
    found = TermMeans()
    found.add({"caption_loss": 0.0, "image_loss": 5.0, "psnr": 20.0}, supervised=0, drawn=64, images=1)
    found.add({"caption_loss": 1.0, "image_loss": 0.0}, supervised=100, drawn=0, images=0)
    found.add({"caption_loss": 3.0, "image_loss": 0.0, "psnr": 26.0}, supervised=100, drawn=0, images=2)
    assert found.means() == pytest.approx({"caption_loss": 2.0, "image_loss": 5.0, "psnr": 24.0})


def test_batches_of_any_size_give_one_mean() -> None:
    values, counts = [0.5, 2.0, 4.0, 1.0], [3, 1, 2, 6]
    whole, split = TermMeans(), TermMeans()
    mean = sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)
    whole.add({"caption_loss": mean}, supervised=sum(counts), drawn=0, images=0)
    for value, count in zip(values, counts, strict=True):
        split.add({"caption_loss": value}, supervised=count, drawn=0, images=0)
    assert split.means() == pytest.approx(whole.means())


def test_nothing_has_no_mean() -> None:
    found = TermMeans()
    found.add({"caption_loss": 0.0}, supervised=0, drawn=0, images=0)
    assert found.means() == {}
    assert whole_loss({}, LossConfig(), 0.25) == 0


def test_the_whole_is_the_weighted_sum() -> None:
    config = LossConfig(
        image_weight=0.5, reconstruction_weight=2.0, quantization_weight=3.0, entropy_weight=0.1, perceptual_weight=7.0
    )
    terms = {"caption_loss": 1.0, "image_loss": 4.0, "reconstruction_loss": 0.5, "quantization_loss": 0.2}
    terms |= {"entropy_loss": -3.0, "perceptual_loss": 0.3, "psnr": 20.0, "codes_in_use": 5.0}
    expected = 1.0 + 0.5 * 4.0 + 0.25 * (2 * 0.5 + 3 * 0.2 - 0.1 * 3 + 7 * 0.3)
    assert whole_loss(terms, config, 0.25) == pytest.approx(expected)

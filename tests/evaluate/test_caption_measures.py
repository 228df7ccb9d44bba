"""Caption measures against hand counts and against figures of other implementations."""

from __future__ import annotations

import math

import pytest

from ett.errors import ModelError
from ett.evaluate import caption_measures
from ett.evaluate.caption_measures import bleu_4, cider_d, rouge_l, why_missing, words

CAPTIONS = ["a red cat sits on the mat", "two dogs play in a park", "the blue bus stops", "snow"]
TOLD = [
    ["a red cat is sitting on a mat", "the cat sits on the mat", "cat on a mat in the sun"],
    ["two dogs are playing in the park", "dogs in a park"],
    ["a blue bus at the stop", "the blue bus stops here today"],
    ["a mountain with snow"],
]


def test_words() -> None:
    assert words("Don't pet the dog’s T-shirt, it's 3.5 m (can't)! 'So'") == [
        "do", "n't", "pet", "the", "dog", "'s", "t-shirt", "it", "'s", "3.5", "m", "ca", "n't", "so",
    ]  # fmt: skip
    assert words("Ein Kätzchen; 猫!") == ["ein", "kätzchen", "猫"]
    assert words("...") == []


def test_cider_d_by_hand() -> None:
    """One-word captions: only unigrams count, a fourth of ten, and a word of every picture weighs nothing."""
    assert cider_d(["cat", "dog"], [["cat"], ["dog"]]) == pytest.approx([2.5, 2.5])
    assert cider_d(["cat", "cat"], [["cat"], ["dog"]]) == pytest.approx([2.5, 0.0])
    assert cider_d(["red", "red"], [["red"], ["red"]]) == [0.0, 0.0]
    # the mean over references
    assert cider_d(["cat", "dog"], [["cat", "ox"], ["dog"]]) == pytest.approx([1.25, 2.5])
    # a word said twice is clipped to the reference's once: 1 * 1 / (2 * 1), times the penalty for one bigram more
    penalty = math.exp(-1 / (2 * 6**2))
    assert cider_d(["cat cat", "dog"], [["cat"], ["dog"]])[0] == pytest.approx(2.5 / 2 * penalty)


def test_cider_d_is_that_of_another_implementation() -> None:
    """`aac_metrics.functional.cider_d` 0.6.0 on the same words."""
    expected = [3.9043682426431436, 2.974362692114142, 4.34729592019308, 1.273774560665568]
    assert cider_d(CAPTIONS, TOLD) == pytest.approx(expected, rel=1e-9)


def test_rouge_l() -> None:
    # "two dogs in park" of six and seven words; "dogs in a park" of six and four: 2 * (4/6) * 1 / (4/6 + 1) is the higher
    found = rouge_l(CAPTIONS, TOLD)
    assert found[1] == pytest.approx(0.8)
    # "snow", one of one and of four: 2 * 1 * (1/4) / (5/4)
    assert found[3] == pytest.approx(0.4)
    assert rouge_l(["don't, 猫"], [["Do n't 猫!"]]) == [1.0]


def test_bleu_4() -> None:
    value, interval = bleu_4(CAPTIONS, TOLD)
    # by `aac_metrics.functional.bleu` 0.6.0
    assert value == pytest.approx(0.4750, abs=5e-5)
    assert interval is not None
    assert interval[0] < value < interval[1]
    assert bleu_4(CAPTIONS, TOLD) == (value, interval)
    # 7 of 8 words in place, 5 of 7 pairs, 3 of 6 triples, 2 of 5 quadruples, and no brevity penalty
    single, none = bleu_4(["a b c d e x g h"], [["a b c d e f g h"]])
    assert single == pytest.approx((7 / 8 * 5 / 7 * 3 / 6 * 2 / 5) ** 0.25)
    assert none is None
    assert bleu_4(["a cat"], [["a cat"]])[0] == 0.0


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_missing() == ""
    monkeypatch.setattr(caption_measures, "DISTRIBUTIONS", ("no-such-package", "sacrebleu"))
    with pytest.raises(ModelError, match=r'no-such-package, which is not.*pip install "ett-tuning\[captions\]"'):
        bleu_4(CAPTIONS, TOLD)

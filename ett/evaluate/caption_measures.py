"""How near a caption is to what people wrote: CIDEr-D, ROUGE-L and BLEU-4 over one tokenization.

BLEU is sacrebleu's, ROUGE-L Google's rouge-score; both are optional. CIDEr-D is written out here: the packages that have it
bring Java's tools, audio models or 100 MB of other measures along. The COCO server splits words with Java's Stanford
tokenizer; `words` follows its rules for English, but not every one of them: compare figures of this code with each other.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ett.errors import ModelError

DISTRIBUTIONS = ("sacrebleu", "rouge-score")
INSTALL = 'pip install "ett-tuning[captions]"'
MAX_ORDER = 4
SIGMA = 6.0
"""Of CIDEr-D's penalty for captions longer or shorter than a reference [n-grams]."""

Ngram = tuple[str, ...]

_CLITIC = r"n't|'(?:s|re|ve|ll|d|m)"
_WORD = re.compile(rf"(?:{_CLITIC})\b|[^\W_]+?(?=n't\b)|[^\W_]+(?:[-.][^\W_]+)*")


def words(caption: str) -> list[str]:
    """Lower-case words without punctuation; "don't" is "do" and "n't", "dog's" is "dog" and "'s"."""
    return _WORD.findall(caption.lower().replace("’", "'"))


# -- CIDEr-D -----------------------------------------------------------------------------------------------------------


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, in [0, 10] (arXiv:1411.5726, section 5; constants and lengths as in the COCO server's code).

    Of n-grams for n = 1 to 4, weighted by how rare they are among the pictures: the cosine between caption and reference,
    with each weight clipped to the reference's, times a penalty for another length; averaged over n and references.

    Args:
        captions: one for each of at least two pictures; of a single one no n-gram is rarer than another, so that all are 0.
        references: what people wrote about each, at least one.
    """
    told = [[_ngrams(words(reference)) for reference in each] for each in references]
    pictures_with = Counter(ngram for each in told for ngram in {ngram for counts in each for ngram in counts})
    rarity = {ngram: math.log(len(told) / count) for ngram, count in pictures_with.items()}
    unseen = math.log(len(told))

    def weighted(counts: Counter[Ngram]) -> list[dict[Ngram, float]]:
        orders: list[dict[Ngram, float]] = [{} for _ in range(MAX_ORDER)]
        for ngram, count in counts.items():
            orders[len(ngram) - 1][ngram] = count * rarity.get(ngram, unseen)
        return orders

    scores = []
    for caption, each in zip(captions, told, strict=True):
        said = _ngrams(words(caption))
        vectors = weighted(said)
        similarities = [
            math.exp(-((_num_pairs(said) - _num_pairs(counts)) ** 2) / (2 * SIGMA**2))
            * sum(map(_clipped_cosine, vectors, weighted(counts)))
            / MAX_ORDER
            for counts in each
        ]
        scores.append(10 * sum(similarities) / len(similarities))
    return scores


def _ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, MAX_ORDER + 1) for i in range(len(tokens) - n + 1)
    )  # fmt: skip


def _num_pairs(counts: Counter[Ngram]) -> int:
    """Bigrams: what the COCO server's code takes for the length."""
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _clipped_cosine(said: dict[Ngram, float], told: dict[Ngram, float]) -> float:
    norms = math.hypot(*said.values()) * math.hypot(*told.values())
    shared = sum(min(weight, told[ngram]) * told[ngram] for ngram, weight in said.items() if ngram in told)
    return shared / norms if norms else 0.0


# -- BLEU and ROUGE ----------------------------------------------------------------------------------------------------


def why_missing() -> str:
    """Why BLEU and ROUGE cannot be computed, and how to mend it; "" where they can."""
    missing = [name for name in DISTRIBUTIONS if not _is_installed(name)]
    if not missing:
        return ""
    return (
        f"Captions are scored with {' and '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed. "
        f"Install, or leave the task captions out: {INSTALL}"
    )


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _optional(module: str) -> Any:
    missing = why_missing()
    if missing:
        raise ModelError(missing)
    return importlib.import_module(module)


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L of each caption, in [0, 1]: F1 of the longest common subsequence of words, of the reference it is highest for.

    Raises:
        ModelError: rouge-score is not installed.
    """
    scorer = _optional("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_Words())
    return [
        float(scorer.score_multi(list(each), caption)["rougeL"].fmeasure)
        for caption, each in zip(captions, references, strict=True)
    ]


class _Words:
    """`words` as rouge-score asks for them."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def bleu_4(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, samples: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float] | None]:
    """(BLEU-4 of all captions together, in [0, 1]; its 95 % bootstrap interval over pictures, None for a single one).

    Unsmoothed: 0 where no caption shares four words in a row with a reference, as one of three words never does.

    Raises:
        ModelError: sacrebleu is not installed.
    """
    bleu = _optional("sacrebleu.metrics").BLEU(tokenize="none", effective_order=True)
    rows = []
    for caption, each in zip(captions, references, strict=True):
        found = bleu.sentence_score(" ".join(words(caption)), [" ".join(words(reference)) for reference in each])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    counts = np.asarray(rows, dtype=np.int64)

    def together(row: Sequence[int]) -> float:
        matched, totals, (said, told) = row[:MAX_ORDER], row[MAX_ORDER:-2], row[-2:]
        return float(bleu.compute_bleu(matched, totals, said, told, smooth_method="none").score) / 100

    value = together(counts.sum(axis=0).tolist())
    if len(rows) < 2:
        return value, None
    drawn = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=samples)
    low, high = np.percentile([together(row) for row in (drawn @ counts).tolist()], [2.5, 97.5])
    return value, (float(low), float(high))

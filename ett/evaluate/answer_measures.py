"""How right an answer in words is, as pure functions of texts: the rules of VQA, of documents, of yes or no, of reading."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

from ett.evaluate.metrics import edit_distance, normalized

NUM_VOTES = 10
"""Answers that people gave to each question of VQA v2, TextVQA and VizWiz: as many are votes, fewer are alternatives."""

ANLS_THRESHOLD = 0.5
"""Answers less similar than this are wrong, not half right."""

LENGTHS = {"1_to_2": 2, "3_to_4": 4, "5_to_8": 8, "9_to_16": 16, "17_or_more": math.inf}
"""Class of texts -> its greatest length in characters."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_SPELLINGS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's "
    "how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock "
    "oughtn't shan't she'd've should've shouldn't shouldn't've somebody'll somebody's someone'd someone'll someone's "
    "something'd something'll that's there'd there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
)
_CONTRACTIONS = {word.replace("'", ""): word for word in _SPELLINGS.split()}
"""Without apostrophes -> as it is spelled; words of their own ("well", "its") are not among them."""


def vqa_normalized(text: str) -> str:
    """`text` as the VQA challenge compares answers (github.com/GT-Vision-Lab/VQA): lower case, punctuation away, number words
    as digits, no articles, contractions with their apostrophes.

    A mark is dropped where one of its kind stands beside a space or the text holds a number like 1,000, and is a space
    elsewhere; a period stays before a digit. As in today's harnesses all answers are normalized, not only where people differ.
    """
    plain = " ".join(text.split())
    joined, grouped = plain, re.search(r"\d,\d", plain)
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in plain or f" {mark}" in plain
        joined = joined.replace(mark, "" if beside_space or grouped else " ")
    words = [_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", joined).lower().split()]
    return " ".join(_CONTRACTIONS.get(w.replace("'", ""), w) for w in words if w not in ("a", "an", "the"))


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """In [0, 1]: of ten references, min(n / 3, 1) where n agree, averaged as the challenge does over leaving one person
    out, which is min(0.3 n, 1); of any other number, whether one agrees."""
    agreeing = [vqa_normalized(reference) for reference in references].count(vqa_normalized(prediction))
    return min(0.3 * agreeing, 1.0) if len(references) == NUM_VOTES else float(agreeing > 0)


def anls(prediction: str, references: Sequence[str]) -> float:
    """Normalized Levenshtein similarity to the nearest reference, 0 below `ANLS_THRESHOLD` (arXiv:1907.00490, as the
    DocVQA challenge computes it): case and white space make no difference."""

    def similarity(first: str, second: str) -> float:
        return 1 - edit_distance(first, second) / max(len(first), len(second), 1)

    said = " ".join(prediction.lower().split())
    best = max(similarity(said, " ".join(reference.lower().split())) for reference in references)
    return best if best >= ANLS_THRESHOLD else 0.0


def yes_or_no(text: str) -> bool | None:
    """What an answer says first: True for "yes", False for "no" or "not", None for neither."""
    found = re.search(r"\b(yes|no|not)\b", text.lower())
    return None if found is None else found[0] == "yes"


def chosen(text: str, choices: Sequence[str]) -> int | None:
    """Which of at most 26 choices an answer names, by its letter or in its own words; None where it names none.

    A letter counts alone, in brackets, before one of ".):,", or after "answer", "option" or "choice" ("The answer is B").
    There, where a word like "a" or "I" may follow as well, what is said after "is" is first looked for among the choices,
    articles aside, and a letter without brackets counts where it is a capital or ends the text; "I" only where no word follows.
    """
    said = text.strip()
    names = "".join(letters(choices))
    for pattern in (
        rf"\(?([{names}])\)?[.:]?",  # nothing else
        rf"\(([{names}])\).*|([{names}])[.):,].*",  # before the choice itself
    ):
        found = re.fullmatch(pattern, said, re.DOTALL | re.IGNORECASE)
        if found:
            return names.index((found[1] or found[2]).upper())
    after = re.fullmatch(r".*\b(?:answer|option|choice)\s+is\b\s*:?(.*)", said, re.DOTALL | re.IGNORECASE)
    if after:
        same = _same_words(after[1], choices)
        if same is not None:
            return same
    found = re.fullmatch(
        r"(?is:.*\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*)"
        rf"(?:\((?i:([{names}]))\b|(?!I\s+\w)([{names}])\b|(?i:([{names}]))\W*$)(?s:.*)",
        said,
    )
    if found:
        return names.index((found[1] or found[2] or found[3]).upper())
    return _same_words(said, choices)


def _same_words(text: str, choices: Sequence[str]) -> int | None:
    """The choice that `text` is, word by word, or else but for an article in front of either; None where it is none."""
    for plain in (normalized, _without_article):
        for i, choice in enumerate(choices):
            if plain(choice) == plain(text):
                return i
    return None


def _without_article(text: str) -> str:
    return re.sub(r"^(?:a|an|the) (?=\w)", "", normalized(text))


def letters(choices: Sequence[str]) -> Sequence[str]:
    """ "A", "B", ...: what each of at most 26 choices is called."""
    assert len(choices) <= len(string.ascii_uppercase)
    return string.ascii_uppercase[: len(choices)]


def words_read(prediction: str, reference: str) -> tuple[int, int]:
    """(words of the reference that are there, in their order; words of the reference): the longest common subsequence.

    Both are `normalized`; what else was said does not count against it. For a single word this is whether it was read.
    """
    said, wanted = normalized(prediction).split(), normalized(reference).split()
    if len(wanted) > 1 and all(len(word) == 1 for word in wanted):  # spelled: one word
        said, wanted = ["".join(said)], ["".join(wanted)]
    row = [0] * (len(said) + 1)
    for word in wanted:
        best = [0]
        for j, other in enumerate(said):
            best.append(row[j] + 1 if word == other else max(row[j + 1], best[j]))
        row = best
    return row[-1], max(1, len(wanted))


def length_class(length: int) -> str:
    """Which of `LENGTHS` a text of so many characters belongs to."""
    return next(name for name, greatest in LENGTHS.items() if length <= greatest)

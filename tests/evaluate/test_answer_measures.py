"""Answers scored against values worked out by hand from the challenges' rules."""

from __future__ import annotations

import pytest

from ett.evaluate.answer_measures import (
    anls,
    chosen,
    length_class,
    letters,
    vqa_accuracy,
    vqa_normalized,
    words_read,
    yes_or_no,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Two\ndogs.", "2 dogs"),
        ("an apple, a pear", "apple pear"),  # the comma has a space beside it: dropped
        ("red-ish", "red ish"),  # it has not: a space
        ("well-known - really", "wellknown really"),  # one of its kind has: all are dropped
        ("1,000", "1000"),
        ("3.5 a.m.", "3.5 am"),
        ("yes?", "yes"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("its well", "its well"),
        ("none", "0"),
        ("the", ""),
    ],
)
def test_vqa_normalization(text: str, expected: str) -> None:
    assert vqa_normalized(text) == expected


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_answers_are_votes(agreeing: int, expected: float) -> None:
    references = ["Cat"] * agreeing + [f"dog {i}" for i in range(10 - agreeing)]
    assert vqa_accuracy("a cat.", references) == pytest.approx(expected)
    # the challenge's own words: the mean, over leaving one person out, of min(those who agree / 3, 1)
    others = [agreeing - (i < agreeing) for i in range(10)]
    assert vqa_accuracy("a cat.", references) == pytest.approx(sum(min(n / 3, 1) for n in others) / 10)


def test_other_numbers_of_answers_are_alternatives() -> None:
    assert vqa_accuracy("kitten", ["cat", "kitten"]) == 1.0
    assert vqa_accuracy("kitten", ["cat", "dog"]) == 0.0
    assert vqa_accuracy("two", ["2"]) == 1.0


def test_anls() -> None:
    assert anls("  Hello  World ", ["hello world"]) == 1.0
    assert anls("abcd", ["abxd", "zzzz"]) == 0.75  # one edit of four; the nearest counts
    assert anls("ab", ["ax"]) == 0.5  # the threshold itself is kept, as by the challenge's script
    assert anls("abc", ["axy"]) == 0.0  # a third, which is below it
    assert anls("", ["word"]) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", True),
        ("yes, there is no doubt", True),
        ("No", False),
        ("there is not a dog", False),
        ("nobody knows", None),
        ("", None),
    ],
)
def test_yes_or_no(text: str, expected: bool | None) -> None:
    assert yes_or_no(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", 1),
        ("b.", 1),
        (" (C) ", 2),
        ("C. x", 2),
        ("(A), because", 0),
        ("The answer is B", 1),
        ("Option: c", 2),
        ("Dog.", 1),  # in its own words
        ("A cat", 0),  # the article is not the letter, and the words are the choice
        ("A bird", None),
        ("D", None),  # there are three
        ("Beautiful", None),
        ("", None),
    ],
)
def test_chosen(text: str, expected: int | None) -> None:
    assert chosen(text, ["a cat", "dog", "ox"]) == expected


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("The answer is a dog", ["cat", "dog"], 1),
        ("The answer is a cat.", ["dog", "a cat"], 1),
        ("The best option is a red car", ["blue bus", "red car"], 1),
        ("The best option is a green car", ["blue bus", "red car"], None),
        ("The answer I would give is cat", [*"stuvwxyz", "dog", "cat"], None),
        ("The answer I would give: J", [*"stuvwxyz", "dog", "cat"], None),
        ("The answer is I.", [*"stuvwxyz", "dog", "cat"], 8),
        ("The answer is A because it barks", ["dog", "cat"], 0),
        ("the answer is b", ["dog", "cat"], 1),
        ("Option (b) is right", ["dog", "cat"], 1),
        ("Option B is right", ["dog", "cat"], 1),
        ("My choice: the dog", ["dog", "cat"], None),
        ("The dog.", ["cat", "dog"], 1),
    ],
)
def test_a_word_is_no_letter(text: str, choices: list[str], expected: int | None) -> None:
    assert chosen(text, choices) == expected


def test_letters() -> None:
    assert list(letters(["x", "y", "z"])) == ["A", "B", "C"]


def test_words_read() -> None:
    assert words_read("the Fox", "Fox.") == (1, 1)
    assert words_read("quick the fox", "the quick brown fox") == (2, 4)  # "the fox" or "quick fox": order counts
    assert words_read("c a t", "c a t") == (1, 1)
    assert words_read("cat", "c a t") == (1, 1)
    assert words_read("c a p", "c a t") == (0, 1)
    assert words_read("", "word") == (0, 1)


def test_length_classes_meet() -> None:
    assert [length_class(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 99)] == [
        "1_to_2", "1_to_2", "3_to_4", "3_to_4", "5_to_8", "5_to_8", "9_to_16", "9_to_16", "17_or_more", "17_or_more",
    ]  # fmt: skip

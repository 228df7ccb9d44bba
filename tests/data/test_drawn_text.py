"""Drawn text: pure, inside the picture, legible, and no string in two splits."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from fontTools.ttLib import TTFont

from ett.data.drawn_text import (
    BUILTIN,
    DOCUMENT,
    DOCUMENT_QUESTIONS,
    KINDS,
    SPLITS,
    TEXT_COLOURS,
    DrawnText,
    Look,
    contrast_ratio,
    fonts,
    split_of,
    words,
)
from ett.errors import DataError

DIGEST = """
import hashlib
from ett.data.drawn_text import DrawnText
source = DrawnText("font", size=64, difficulty=1.0, kinds=("word", "number", "letters", "colour"), seed=3)
digest = hashlib.sha256()
for index in (0, 5, 17, 101):
    example = source[index]
    digest.update(repr((example.id, example.messages, example.metadata)).encode() + example.images[0].tobytes())
print(digest.hexdigest())
"""


def test_the_same_in_any_process_and_order() -> None:
    source = DrawnText("font", size=64, difficulty=1.0, kinds=KINDS, seed=3)
    examples = {index: source[index] for index in (101, 17, 5, 0)}
    digest = hashlib.sha256()
    for _, example in sorted(examples.items()):
        digest.update(repr((example.id, example.messages, example.metadata)).encode() + example.images[0].tobytes())
    run = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest.hexdigest()
    assert pickle.loads(pickle.dumps(source))[5].images[0].tobytes() == examples[5].images[0].tobytes()


def test_seeds_splits_and_positions_differ() -> None:
    pictures = {
        DrawnText(split, seed=seed)[index].images[0].tobytes()
        for split in SPLITS
        for seed in (0, 1)
        for index in range(5)
    }
    assert len(pictures) == len(SPLITS) * 2 * 5


def test_no_string_is_in_two_splits() -> None:
    seen: dict[str, set[str]] = {}
    for split in SPLITS:
        source = DrawnText(split, size=64, difficulty=0.7, kinds=KINDS, length=400)
        seen[split] = {source[index].metadata["text"].lower() for index in range(400)}
        assert {split_of(text) for text in seen[split]} == {split}
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not seen[one] & seen[other]


def test_fonts_are_held_out_whole() -> None:
    trained = {font.name for font in fonts() if not font.held_out}
    held_out = {font.name for font in fonts() if font.held_out}
    assert 0.2 <= len(held_out) / len(fonts()) <= 0.34
    assert 14 <= len(fonts()) <= 20
    for split in SPLITS:
        source = DrawnText(split, size=48, length=150)
        used = {source[index].metadata["font"] for index in range(150)}
        assert used == (held_out if split == "font" else trained)


def test_fonts_are_small_ascii_and_ours_by_name() -> None:
    assert sum(path.stat().st_size for path in (BUILTIN / "fonts").iterdir()) <= 600_000
    reserved = ("lato", "merriweather", "playfair", "pacifico", "lobster", "comfortaa", "righteous", "roboto")
    for font in fonts():
        with TTFont(font.path) as opened:
            assert set(range(0x20, 0x7F)) <= set(opened.getBestCmap())
            names = " ".join(opened["name"].getDebugName(number) or "" for number in (1, 3, 4, 6)).lower()
            assert "ett drawn" in names
            assert not [name for name in reserved if name in names]


def test_words_are_several_thousand_and_plain() -> None:
    assert len(words()) == len(set(words())) >= 3_000
    assert all(word.isascii() and word.isalpha() and word.islower() and 3 <= len(word) <= 10 for word in words())


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [32, 64, 96])
def test_the_text_is_whole_and_stands_out(size: int, difficulty: float) -> None:
    """Drawn by its metadata alone, the ink is at least as far from the edge as promised and differs from the ground."""
    source = DrawnText("train", size=size, difficulty=difficulty, kinds=KINDS, length=120)
    for index in range(120):
        example = source[index]
        (image,) = example.images
        assert (image.mode, image.size) == ("RGB", (size, size))
        if example.metadata["background"] != "flat":
            continue
        pixels = np.asarray(image).astype(int)
        ground = pixels[0, 0]
        ink = np.abs(pixels - ground).sum(axis=2) > 0
        rows, columns = np.where(ink.any(axis=1))[0], np.where(ink.any(axis=0))[0]
        assert rows[0] >= 2
        assert columns[0] >= 2
        assert rows[-1] < size - 2
        assert columns[-1] < size - 2
        colour = TEXT_COLOURS[example.metadata["colour"]]
        assert contrast_ratio(colour, (ground[0], ground[1], ground[2])) >= Look.at(difficulty).contrast


def test_difficulty_shrinks_and_turns() -> None:
    def average(difficulty: float, fact: str) -> float:
        source = DrawnText("train", size=64, difficulty=difficulty, length=200)
        return float(np.mean([abs(source[index].metadata[fact]) for index in range(200)]))

    assert average(0.0, "font_size") > average(0.5, "font_size") > average(1.0, "font_size")
    assert average(0.0, "rotation") < average(0.5, "rotation") < average(1.0, "rotation")
    easy = DrawnText("train", size=64, difficulty=0.5, length=300)
    assert min(easy[index].metadata["font_size"] for index in range(300)) >= 12


def test_answers_say_what_is_drawn() -> None:
    plain = DrawnText("word", kinds=KINDS)
    spelled = DrawnText("word", kinds=KINDS, spelled=True)
    kinds = set()
    for index in range(100):
        facts = plain[index].metadata
        answer = plain[index].messages[1]["content"][0]["text"]
        letters = spelled[index].messages[1]["content"][0]["text"]
        kinds.add(facts["question_kind"])
        if facts["question_kind"] == "colour":
            assert answer == letters == facts["colour"]
        else:
            assert answer == facts["text"]
            assert letters == " ".join(facts["text"])
    assert kinds == set(KINDS)


def test_short_answers_name_the_first_or_the_last_character() -> None:
    kinds = ("word", "number", "letters")
    whole = DrawnText("word", kinds=kinds)
    source = DrawnText("word", kinds=kinds, short_answers=True)
    places = []
    for index in range(100):
        example = source[index]
        question, answer = example.messages[0]["content"][1]["text"], example.messages[1]["content"][0]["text"]
        text = example.metadata["text"]
        assert text == whole[index].metadata["text"]
        assert np.array_equal(example.images[0], whole[index].images[0])
        first = "first" in question
        assert first != ("last" in question)
        assert answer == text[0 if first else -1]
        places.append(first)
    assert 30 < sum(places) < 70
    for given in ({"spelled": True}, {"kinds": ("word", "colour")}):
        with pytest.raises(DataError, match="short_answers is for words"):
            DrawnText("word", short_answers=True, **given)


def test_lengths() -> None:
    assert len(DrawnText("train")) == 1_000_000
    assert [len(DrawnText(split)) for split in SPLITS[1:]] == [512] * 3
    assert DrawnText("train")[999_999].id.endswith("/999999")
    with pytest.raises(IndexError):
        DrawnText("train", length=3)[3]


def test_takes_under_three_milliseconds() -> None:
    source = DrawnText("train", size=96, difficulty=0.5)
    for index in range(300):
        source[index]
    start = time.process_time()
    for index in range(300):
        source[index]
    assert (time.process_time() - start) / 300 < 0.003


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(DataError, match="Did you mean 'font'"):
        DrawnText("fonts")
    with pytest.raises(DataError, match="Did you mean 'number'"):
        DrawnText(kinds=("numbers",))
    with pytest.raises(DataError, match="at least one kind"):
        DrawnText(kinds=())
    with pytest.raises(DataError, match=r"lies in \[0, 1\]; 1.5"):
        DrawnText(difficulty=1.5)
    with pytest.raises(DataError, match="at least 32 pixels, not 16"):
        DrawnText(size=16)
    with pytest.raises(DataError, match="at least 1, not 0"):
        DrawnText(length=0)


def test_documents_have_lines_of_words_of_their_split() -> None:
    """Whole, within the picture, several lines high, the same each time; other kinds are what they were."""
    source = DrawnText("word", size=96, difficulty=0.4, kinds=(DOCUMENT,), length=40)
    drawn = {len(source[i].metadata["text"].split()) for i in range(40)}
    assert min(drawn) >= 2
    assert len(drawn) > 2
    for i in range(12):
        example = source[i]
        answer = example.messages[-1]["content"][0]["text"]
        assert answer == example.metadata["text"] == " ".join(answer.split())
        assert all(split_of(word) == "word" for word in answer.split())
        assert example.messages[0]["content"][1]["text"] in DOCUMENT_QUESTIONS
        assert example.images[0].tobytes() == source[i].images[0].tobytes()
    # black on white, upright: rows of ink and rows of paper alternate, once for each line
    plain = DrawnText("train", size=128, difficulty=0.0, kinds=(DOCUMENT,), lines=(3, 3), length=30)
    counts = []
    for i in range(30):
        example = plain[i]
        if example.metadata["background"] != "flat":
            continue
        pixels = np.asarray(example.images[0], dtype=int)
        ink = (np.abs(pixels - pixels[0, 0]).sum(axis=2) > 60).any(axis=1)
        assert not ink[0]
        assert not ink[-1]
        counts.append(int((np.diff(ink.astype(int)) == 1).sum()))
    # dots of i and hanging strokes may part or join rows
    assert sorted(counts)[len(counts) // 2] == 3
    assert DrawnText("train", size=64, kinds=("word", DOCUMENT), length=4)[1].id == "drawn-text/train/0/1"


def test_documents_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="32 pixels hold"):
        DrawnText(size=32, difficulty=0.0, kinds=(DOCUMENT,), lines=(4, 4))
    with pytest.raises(DataError, match="lines ="):
        DrawnText(kinds=(DOCUMENT,), lines=(3, 2))
    assert DrawnText(size=64, difficulty=0.0, kinds=(DOCUMENT,), lines=(2, 9), length=3)[2].metadata["text"]

"""The built-in artwork: what is committed is what is listed, splits share nothing they must not, answers are facts."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest

from ett.data.artwork import (
    BUILTIN,
    FACT_QUESTIONS,
    NAME_QUESTIONS,
    QUESTIONS,
    SPLITS,
    STYLES,
    ArtworkFacts,
    ArtworkNames,
    ArtworkQuestions,
)
from ett.data.shards import ShardIndex
from ett.errors import DataError

Facts = Mapping[str, Any]
FAMILIES = {"noto": "noto", "noto-v1": "noto", "fluent-emoji": "fluent-emoji", "fluent-emoji-flat": "fluent-emoji"}


@cache
def facts(split: str) -> Sequence[Facts]:
    shards = ShardIndex([BUILTIN / f"artwork-{split}.tar.gz"])
    return [json.loads(shards.read(sample, "json")) for sample in shards]


def concepts(split: str) -> set[str]:
    return {fact["concept"] for fact in facts(split)}


def units(split: str) -> set[tuple[str, str]]:
    return {(fact["concept"], fact["family"]) for fact in facts(split)}


def test_every_file_has_its_listed_hash() -> None:
    listed = {}
    for line in (BUILTIN / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, name = line.split("  ")
        listed[name] = digest
    found = {
        path.relative_to(BUILTIN).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in BUILTIN.rglob("*")
        if path.is_file() and path.name != "SHA256SUMS" and "__pycache__" not in path.parts
    }
    assert found == listed


def test_the_folder_is_at_most_twenty_megabytes() -> None:
    assert sum(path.stat().st_size for path in BUILTIN.rglob("*") if path.is_file()) <= 20_000_000


def test_about_nine_thousand_pictures_in_six_styles() -> None:
    assert sum(len(facts(split)) for split in SPLITS) > 9_000
    assert {fact["style"] for split in SPLITS for fact in facts(split)} == set(STYLES)
    assert min(len(facts(split)) for split in SPLITS) > 250


def test_no_picture_has_a_skin_tone_and_keys_are_unique() -> None:
    keys = [f"{fact['style']}-{fact['hexcode']}" for split in SPLITS for fact in facts(split)]
    assert len(keys) == len(set(keys))
    assert not [key for key in keys if any(f"1f3f{tone}" in key.split("-") for tone in "bcdef")]
    assert not [fact["name"] for split in SPLITS for fact in facts(split) if "skin tone" in fact["name"]]


def test_twins_are_on_one_side() -> None:
    for split in SPLITS:
        for fact in facts(split):
            assert fact["split"] == split
            assert fact["family"] == FAMILIES.get(fact["style"], fact["style"])
    side = defaultdict(set)
    for split in SPLITS:
        for unit in units(split):
            side[unit].add(split)
    assert [unit for unit, splits in side.items() if len(splits) > 1] == []


def test_one_style_is_held_out_whole() -> None:
    assert {fact["style"] for fact in facts("style")} == {"emojione"}
    assert not any(fact["style"] == "emojione" for split in SPLITS if split != "style" for fact in facts(split))


def test_unseen_concepts_are_nowhere_else() -> None:
    others = set().union(*(concepts(split) for split in SPLITS if split != "concept"))
    assert not concepts("concept") & others
    names = {fact["name"] for split in SPLITS if split != "concept" for fact in facts(split)}
    assert not {fact["name"] for fact in facts("concept")} & names


def test_variants_of_a_concept_stay_together() -> None:
    concept_of = {fact["name"]: fact["concept"] for split in SPLITS for fact in facts(split)}
    for group in (
        ("person running", "man running", "woman running", "woman running: facing right"),
        ("family: man, woman, boy", "family: woman, girl", "family"),
        ("person", "man: red hair", "woman: bald"),
        ("prince", "princess", "person with crown"),
        ("backhand index pointing left", "backhand index pointing up"),
    ):
        assert len({concept_of[name] for name in group}) == 1, group
    assert concept_of["man running"] != concept_of["man walking"]


@pytest.mark.parametrize("split", ["validation", "pair", "style"])
def test_held_out_pictures_have_names_that_train_knows(split: str) -> None:
    assert {fact["name"] for fact in facts(split)} <= {fact["name"] for fact in facts("train")}


def test_no_drawing_is_in_two_splits() -> None:
    seen: dict[str, str] = {}
    for split in SPLITS:
        shards = ShardIndex([BUILTIN / f"artwork-{split}.tar.gz"])
        for sample in shards:
            digest = hashlib.sha256(shards.read(sample, "webp")).hexdigest()
            assert seen.setdefault(digest, split) == split, sample.key


@pytest.mark.parametrize("split", SPLITS)
def test_names_are_conversations_about_opened_pictures(split: str) -> None:
    source = ArtworkNames(split)
    asked = set()
    for index in range(0, len(source), 23):
        example = source[index]
        (image,) = example.images
        assert (image.mode, image.size) == ("RGB", (96, 96))
        user, assistant = example.messages
        assert user["content"][0] == {"type": "image"}
        assert assistant["content"] == [{"type": "text", "text": example.metadata["name"]}]
        assert example.metadata["split"] == split
        asked.add(user["content"][1]["text"] if len(user["content"]) > 1 else None)
    assert asked <= set(NAME_QUESTIONS)
    assert len(asked) >= 4
    assert len({source[i].id for i in range(100)}) == 100


def test_answers_are_the_facts() -> None:
    answers = {}
    for kind in QUESTIONS:
        source = ArtworkQuestions("train", [kind])
        for index in range(len(source) if kind != "group" else 50):
            example = source[index]
            assert example.metadata["question_kind"] == kind
            assert example.messages[0]["content"][1]["text"] in QUESTIONS[kind]
            answers[kind, example.metadata["name"]] = example.messages[1]["content"][0]["text"]
    assert answers["colour", "red heart"] == "red"
    assert answers["flag", "flag: Greece"] == "Greece"
    assert answers["time", "five-thirty"] == "5:30"
    assert answers["direction", "backhand index pointing down"] == "down"
    assert answers["written", "FREE button"] == "FREE"
    assert ("colour", "white cane") not in answers


def test_every_picture_has_a_group_question() -> None:
    assert len(ArtworkQuestions("pair", ["group"])) == len(ArtworkNames("pair"))
    assert len(ArtworkQuestions("pair")) > len(ArtworkNames("pair"))


def test_a_pickled_source_gives_the_same_examples() -> None:
    source = ArtworkQuestions("concept")
    again = pickle.loads(pickle.dumps(source))
    for index in (0, 7, len(source) - 1):
        ours, theirs = source[index], again[index]
        assert (ours.id, ours.messages, ours.metadata) == (theirs.id, theirs.messages, theirs.metadata)
        assert ours.images[0].tobytes() == theirs.images[0].tobytes()


def test_wrong_arguments_name_the_nearest() -> None:
    with pytest.raises(DataError, match="Did you mean 'validation'"):
        ArtworkNames("valid")
    with pytest.raises(DataError, match="Did you mean 'colour'"):
        ArtworkQuestions("train", ["color"])
    with pytest.raises(DataError, match="No picture of split 'pair' has a question of kind flag"):
        ArtworkQuestions("pair", ["flag"])
    with pytest.raises(IndexError):
        ArtworkNames("pair")[-1]


def test_the_notice_names_every_source_and_licence() -> None:
    notice = (BUILTIN / "NOTICE").read_text(encoding="utf-8")
    sources = json.loads((BUILTIN / "fonts" / "fonts.json").read_text(encoding="utf-8"))
    for name in [*(f"@iconify-json/{style} " for style in STYLES), *(font["package"] for font in sources.values())]:
        assert name in notice, name
    for words in (
        "Apache License\nVersion 2.0, January 2004",
        "Creative Commons Attribution 4.0 International",
        "Section 8",
        "SIL OPEN FONT LICENSE",
        "UNICODE LICENSE V3",
        "Miles Johnson",
        "Copyright (c) Microsoft Corporation.\n\nPermission is hereby granted",
        "skin tones",
    ):
        assert words in notice, words


def test_facts_are_asked_in_words_alone_once_for_each_name() -> None:
    source = ArtworkFacts("concept")
    names = {fact["name"] for fact in facts("concept")}
    examples = [source[i] for i in range(len(source))]
    assert {example.metadata["name"] for example in examples} == names
    assert len({(e.metadata["name"], e.metadata["question_kind"]) for e in examples}) == len(examples)
    for example in examples[::7]:
        question, answer = (message["content"] for message in example.messages)
        assert example.images == ()
        assert [part["type"] for part in question] == ["text"]
        assert example.metadata["name"] in question[0]["text"]
        assert "{" not in question[0]["text"]
        assert answer[0]["text"] == example.metadata[example.metadata["question_kind"]]
    assert {e.metadata["question_kind"] for e in examples} <= set(FACT_QUESTIONS)
    with pytest.raises(IndexError):
        source[len(source)]

"""The built-in artwork: pictures in six styles with their real names, and questions about them.

Names, groups and the other facts come from Unicode CLDR and emojibase; the wording of every question is ours.

Splits, fixed by hashes of names (``tools/builtin_data/splits.py``); a base concept is what the gender, family, hair and
direction variants of a name share, a family is a set of near-twin styles (noto and noto-v1, fluent-emoji and its flat
version):
    train       what is learnt from.
    validation  for tuning: known names in known styles, in a combination that train does not have.
    pair        the same kind, for final figures only.
    style       known names in a style that nothing else has (emojione), for final figures only.
    concept     base concepts that nothing else has, in the styles of train, for final figures only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ett.data.shards import ShardIndex
from ett.data.sources import Source, conversation
from ett.errors import DataError, unknown
from ett.images import load_image
from ett.types import Example

BUILTIN = Path(__file__).with_name("builtin")
SPLITS = ("train", "validation", "pair", "style", "concept")
HELD_OUT_SPLITS = ("pair", "style", "concept")
"""For final figures only: nothing is chosen by them."""

STYLES = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "twemoji", "emojione")

# Templates below are ours; answers are facts that came with the pictures.
NAME_QUESTIONS: tuple[str | None, ...] = (
    None,
    "What is this?",
    "Name this picture.",
    "What does the picture show?",
    "What is in the image?",
    "Describe the picture.",
)
"""One is chosen by a hash of the example's id; None is a picture without words."""

QUESTIONS: Mapping[str, Sequence[str]] = {
    "group": ("Which group does this belong to?", "What sort of thing is this?"),
    "colour": ("What colour is it?", "Which colour does it have?"),
    "flag": ("Whose flag is this?", "Which country or region has this flag?"),
    "time": ("What time does the clock show?", "What time is it?"),
    "direction": ("Which way does it point or face?", "In which direction does it point?"),
    "written": ("What is written on it?", "Which characters does it show?"),
}
"""Kind of question -> wordings; the kind is also the key of the answer in a picture's facts."""

QUESTION_KINDS = tuple(QUESTIONS)

FACT_QUESTIONS: Mapping[str, Sequence[str]] = {
    "group": ('Which group does "{name}" belong to?', 'What sort of thing is "{name}"?'),
    "subgroup": ('Which kind of {group} is "{name}"?',),
}
"""Fact that is asked for -> wordings, for which a picture is not needed."""

_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class _Collection:
    """One split: where its pictures lie, and their facts in the same order."""

    shards: ShardIndex
    facts: Sequence[Mapping[str, Any]]

    def example(self, index: int, question: str | None, answer: str, kind: str, source: str) -> Example:
        sample = self.shards[index]
        facts = self.facts[index]
        return Example(
            id=f"{source}/{sample.key}" if kind == "name" else f"{source}/{sample.key}/{kind}",
            messages=conversation(question, answer),
            images=(load_image(self.shards.read(sample, "webp")),),
            metadata={"source": source, **facts, "question_kind": kind},
        )


@lru_cache(maxsize=len(SPLITS))
def _collection(split: str) -> _Collection:
    if split not in SPLITS:
        raise DataError(unknown("split of the built-in artwork", split, SPLITS))
    shards = ShardIndex([BUILTIN / f"artwork-{split}.tar.gz"])
    return _Collection(shards, [json.loads(shards.read(sample, "json")) for sample in shards])


class ArtworkNames(Source):
    """Every picture of a split with its name as the answer.

    Metadata: source, split, style, family, name, concept, hexcode, group, subgroup, tags, question_kind ("name"), and
    gender, flag, time, direction, colour, written where they apply.

    Args:
        split: one of `SPLITS`.

    Raises:
        DataError: an unknown split.
    """

    name = "artwork-names"

    def __init__(self, split: str = "train") -> None:
        self.split = split
        self._pictures = _collection(split)

    def __len__(self) -> int:
        return len(self._pictures.facts)

    def __getitem__(self, index: int) -> Example:
        _check(index, len(self))
        answer = self._pictures.facts[index]["name"]
        question = _choose(NAME_QUESTIONS, f"{self._pictures.shards[index].key}/name")
        return self._pictures.example(index, question, answer, "name", self.name)

    def facts(self, index: int) -> Mapping[str, Any]:
        """What is known of picture `index`: its example's metadata but for source and question_kind, without opening it."""
        return self._pictures.facts[index]


class ArtworkQuestions(Source):
    """Every (picture, kind of question) of a split whose answer the picture's facts hold.

    Pictures in the order of the shard, kinds in the order of `QUESTION_KINDS`. Metadata as `ArtworkNames`;
    question_kind is the kind.

    Args:
        split: one of `SPLITS`.
        kinds: the kinds to ask, some of `QUESTION_KINDS`. Every picture has a group; the others are rarer.

    Raises:
        DataError: an unknown split or kind, or kinds that no picture of the split has.
    """

    name = "artwork-questions"

    def __init__(self, split: str = "train", kinds: Sequence[str] = QUESTION_KINDS) -> None:
        for kind in kinds:
            if kind not in QUESTIONS:
                raise DataError(unknown("kind of question", kind, QUESTION_KINDS))
        self.split = split
        self._pictures = _collection(split)
        self._entries = [
            (index, kind)
            for index, facts in enumerate(self._pictures.facts)
            for kind in QUESTION_KINDS
            if kind in kinds and kind in facts
        ]
        if not self._entries:
            raise DataError(f"No picture of split {split!r} has a question of kind {', '.join(kinds) or '(none)'}.")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        _check(index, len(self))
        picture, kind = self._entries[index]
        question = _choose(QUESTIONS[kind], f"{self._pictures.shards[picture].key}/{kind}")
        return self._pictures.example(picture, question, self._pictures.facts[picture][kind], kind, self.name)


class ArtworkFacts(Source):
    """Questions in words alone about the names of a split, each name once: what a language model knows, or keeps, without
    pictures. Metadata as `ArtworkNames`; question_kind is the fact that is asked for.

    Args:
        split: one of `SPLITS`.

    Raises:
        DataError: an unknown split.
    """

    name = "artwork-facts"

    def __init__(self, split: str = "train") -> None:
        self.split = split
        self._pictures = _collection(split)
        first: dict[str, int] = {}
        for index, facts in enumerate(self._pictures.facts):
            first.setdefault(facts["name"], index)
        self._entries = [
            (index, kind) for index in first.values() for kind in FACT_QUESTIONS if kind in self._pictures.facts[index]
        ]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        _check(index, len(self))
        picture, kind = self._entries[index]
        facts = self._pictures.facts[picture]
        question = _choose(FACT_QUESTIONS[kind], f"{facts['name']}/{kind}").format(**facts)
        return Example(
            id=f"{self.name}/{self._pictures.shards[picture].key}/{kind}",
            messages=conversation(question, facts[kind], num_images=0),
            images=(),
            metadata={"source": self.name, **facts, "question_kind": kind},
        )


def _check(index: int, length: int) -> None:
    if not 0 <= index < length:
        raise IndexError(f"example {index} of {length}")


def _choose(choices: Sequence[_Choice], key: str) -> _Choice:
    return choices[int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % len(choices)]

"""What an example says is right: its first answer, or what its metadata state under `ANSWERS`, `CAPTIONS` or `CHOICES`."""

from __future__ import annotations

from typing import Any

from ett.data.artwork import ArtworkFacts
from ett.data.manifest import Manifest, question_and_reference
from ett.data.sources import Source
from ett.errors import DataError
from ett.evaluate.answer_measures import letters
from ett.evaluate.metrics import normalized
from ett.types import Example

ANSWERS, CAPTIONS, CHOICES = "answers", "captions", "choices"
"""Metadata: short answers that are all right, or the votes of ten people; what people wrote about the picture; what there is to
choose from."""
TEXT = "text"
"""Metadata: what is written in the picture."""
MAX_CHOICES = 26


def references(example: Example, key: str) -> list[str] | None:
    """The right texts: those under `key`, or the first answer where the metadata have none of the three keys. None where they
    have another one, for then the example is another task's, and where there is no answer.

    Raises:
        DataError: what is under `key` is no list of texts.
    """
    if key in example.metadata:
        return _texts(example, key)
    if any(other in example.metadata for other in (ANSWERS, CAPTIONS, CHOICES)):
        return None
    reference = question_and_reference(example)[1]
    return None if reference is None else [reference]


def choices_and_right(example: Example) -> tuple[list[str], int] | None:
    """(what there is to choose from, which of it is right) of an example with `CHOICES`; None without.

    The first answer is the right choice, or its letter.

    Raises:
        DataError: fewer than two or more than 26 choices, two of them the same, or an answer that is none of them.
    """
    if CHOICES not in example.metadata:
        return None
    choices = _texts(example, CHOICES)
    plain = [normalized(choice) for choice in choices]
    if not 2 <= len(choices) <= MAX_CHOICES or len(set(plain)) < len(plain):
        raise DataError(
            f"Example {example.id!r} has the choices {choices}. Give 2 to {MAX_CHOICES} different ones (case and white space "
            "make no difference)."
        )
    reference = question_and_reference(example)[1] or ""
    if normalized(reference) in plain:
        return choices, plain.index(normalized(reference))
    named = [i for i, letter in enumerate(letters(choices)) if normalized(reference) == letter.lower()]
    if not named:
        raise DataError(
            f"Example {example.id!r} has the answer {reference!r}, which is none of its choices: {choices}. Let the first "
            f"answer be one of them, or its letter ({letters(choices)[0]} to {letters(choices)[-1]})."
        )
    return choices, named[0]


def first_of_manifest(source: Source) -> Example | None:
    """The example that decides what runs unasked on a manifest; None for other sources, which state nothing of this kind."""
    return source[0] if isinstance(source, Manifest) else None


def text_only(source: Source) -> bool:
    """Whether a source is the built-in one in words alone. Of a manifest the task "text" is asked for by name."""
    return source.name == ArtworkFacts.name


def manifest_states(source: Source, key: str) -> bool:
    """Whether `source` is a manifest whose first example has `key`."""
    first = first_of_manifest(source)
    return first is not None and key in first.metadata


def _texts(example: Example, key: str) -> list[str]:
    given: Any = example.metadata[key]
    if not isinstance(given, list) or not given or not all(isinstance(text, str) and text.strip() for text in given):
        raise DataError(
            f"Example {example.id!r} has {key!r} = {given!r}. Give a list of texts, at least one, none empty."
        )
    return given

"""The lines of a JSONL file: where each begins, how long it may be, and its text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from ett.data.places import Place
from ett.errors import DataError

MAX_LINE_BYTES = 256 * 2**20
"""Longest line read [bytes]: room for pictures embedded as base64, and a bound on the memory that a file which is no
JSONL at all can take."""


def next_line(file: BinaryIO) -> bytes:
    """The line at the file's place, with its line break; of one that is too long, enough to tell."""
    return file.readline(MAX_LINE_BYTES + 1)


def is_too_long(line: bytes) -> bool:
    """Whether `next_line` found a line longer than `MAX_LINE_BYTES`."""
    return len(line) > MAX_LINE_BYTES


class KeyTwice(ValueError):
    """A key stands twice in one object, and nothing says which of its values is meant."""


def parsed(text: str) -> Any:
    """The JSON value that `text` holds.

    Raises:
        KeyTwice: a key is there twice in one object, at any depth.
        ValueError: it is no JSON. RecursionError: it nests too deeply.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise KeyTwice(f"the key {json.dumps(twice[:100])} is there twice in one object. Keep one of them.")
    return fields


def lines_of(file: BinaryIO, path: Place) -> Iterator[tuple[int, int, str]]:
    """(byte offset, line number from 1, text) of each line that is not blank.

    Raises:
        DataError: as `decoded`.
    """
    offset = number = 0
    while data := next_line(file):
        number += 1
        text = decoded(data, path, number)
        if text.strip():
            yield offset, number, text
        offset += len(data)


def decoded(line: bytes, path: Place, number: int) -> str:
    """The text of line `number`, counted from 1; the first may begin with a byte order mark.

    Raises:
        DataError: it is too long, or not UTF-8.
    """
    if is_too_long(line):
        raise DataError(
            f"{path}:{number}: the line is longer than {MAX_LINE_BYTES // 2**20} MiB. Give one JSON object a line, with "
            "large pictures as files."
        )
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8. "
            "Save the file as UTF-8."
        ) from None


def kind_of(value: object) -> str:
    """JSON's name of a parsed value's type."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def shown(value: object) -> str:
    """A value in a message: quoted as in JSON, plain ASCII, cut to a readable length."""
    try:
        text = json.dumps(value)
    except RecursionError:
        # what was just shallow enough to be read
        return f"a JSON {kind_of(value)} that nests without end"
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"

"""A manifest: someone else's pictures and conversations, one JSON object a line (JSONL).

Two dialects, told apart by the field that holds the turns:

- LLaVA: ``{"id", "image": "relative/path" | ["...", ...], "conversations": [{"from": "human" | "gpt" | "system",
  "value": "<image>\\n..."}]}``
- OpenAI: ``{"id", "image": ..., "messages": [{"role": "user" | "assistant" | "system", "content": text or parts}]}``, a
  part being ``{"type": "text", "text"}``, ``{"type": "image"}`` (the next picture of ``image``) or ``{"type":
  "image_url", "image_url": {"url": "relative/path" | "data:image/png;base64,..."}}``.

In both, ``images`` is another name for ``image``, and ``<image>`` in a text stands for the next picture of that list.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ett.data.far import BLOCK, BrokenSource, Far
from ett.data.json_lines import MAX_LINE_BYTES, KeyTwice, decoded, kind_of, lines_of, next_line, parsed, shown
from ett.data.once import once, open_text
from ett.data.places import Place, Watch, leads_out, lies_in, loadable, place, stamps
from ett.data.sources import Source
from ett.errors import DataError, unknown
from ett.images import load_image
from ett.types import Example, Message

MARKER = "<image>"

CHUNK = 1000
"""Lines that a fingerprint holds at a time."""

_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_OPENAI_ROLES = {"user": "user", "assistant": "assistant", "system": "system"}
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")

_Picture = str | bytes | Far
"""A file's path or address, or an embedded picture's encoded bytes."""


@dataclass(frozen=True)
class _Record:
    """A line, checked: `pictures` in the order of the image parts of `messages`."""

    id: str
    messages: Sequence[Message]
    pictures: Sequence[_Picture]
    metadata: Mapping[str, Any]


class Manifest(Source):
    """The examples of a JSONL manifest, in its order; blank lines do not count.

    The whole text is checked on construction, and that every picture file exists; decoding waits for ``manifest[i]``.
    Only the lines' places are kept, 16 bytes an example, and a line is read again when its example is asked for, so
    that instances are small to pickle and safe to share with worker processes.

    A missing or null ``id`` becomes the line number. Pictures without a marker come first in the first human turn. A
    turn's text loses the line breaks around a marker and the white space at its ends. Any turn but a system turn may
    hold pictures. A text-only conversation, and one without an answer (to generate from), are examples too; the order
    of the roles is not judged, but a system turn comes first. Unused fields of a line end up in the metadata.

    Picture paths are relative to the manifest's folder. Nothing outside that folder is read, be it by ``..`` or by a
    symbolic link, unless it lies in `image_root`, which also admits absolute paths into it. Of addresses in a manifest
    nothing is fetched.

    A manifest may itself lie at an address that `fsspec` knows. Its pictures then lie beside it; they are looked for when they
    are asked for, and each is fetched by itself.

    Attributes:
        name: the file's name without its suffix.
        path: the file.
    """

    def __init__(self, path: str | Place, *, limit: int | None = None, image_root: str | Path | None = None) -> None:
        """
        Args:
            path: the JSONL file or its address, UTF-8 (a byte order mark is allowed).
            limit: use, and check, only the first `limit` examples; None for all.
            image_root: a further folder whose pictures may be used; not for addresses.

        Raises:
            DataError: the manifest cannot be used; the message gives file, line and what is wrong with it.
            BrokenSource: its address does not answer, then or later, or it was changed while in use.
            ValueError: `limit` is not positive.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}; it must be at least 1, or None for all examples.")
        self.path = place(path)
        self.name = self.path.stem
        if isinstance(self.path, Far) and image_root is not None:
            raise DataError(
                "Pictures of a manifest at an address lie beside it, so image_root is not for it. Leave it out."
            )
        self._folder = "" if isinstance(self.path, Far) else os.path.realpath(self.path.parent)
        self._image_root = None if image_root is None else os.path.realpath(image_root)
        if self._image_root is not None and not os.path.isdir(self._image_root):
            raise DataError(f"image_root {image_root} is not a folder. Give the folder that holds the pictures.")
        self._offsets, self._lines, self._end = array("Q"), array("Q"), 0
        self._watch = Watch()
        if isinstance(self.path, Far):
            key = (type(self), self.path, self._watch.check(self.path), limit)
            self._offsets, self._lines, self._end = once(key, lambda: self._places(limit))
        else:
            self._places(limit)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} examples; there is no number {index}.")
        line = self._lines[index]
        with self._open(self._room(index)) as file:
            record = self._read_one(file, index)
        try:
            images = [load_image(loadable(picture, MAX_LINE_BYTES)) for picture in record.pictures]
        except BrokenSource:
            raise
        except DataError as error:
            raise self._wrong(line, str(error)) from error
        return Example(record.id, record.messages, images, record.metadata)

    def fingerprint(self) -> str:
        """A hash of every line, and of path, size and time of change (or version) of every picture file."""
        digest = blake2b(digest_size=16)
        with self._open() as file:
            for start in range(0, len(self), CHUNK):
                indices = range(start, min(start + CHUNK, len(self)))
                records = [self._read_one(file, index) for index in indices]
                files = [[place(p) for p in record.pictures if not isinstance(p, bytes)] for record in records]
                found = iter(stamps([each for own in files for each in own]))
                for record, own in zip(records, files, strict=True):
                    digest.update(repr((record, list(islice(found, len(own))))).encode())
        return digest.hexdigest()

    def _room(self, index: int) -> int:
        """Bytes from the line of example `index` to that of the next, which one request fetches."""
        following = self._offsets[index + 1] if index + 1 < len(self) else self._end
        return min(following - self._offsets[index], MAX_LINE_BYTES + 1)

    def _open(self, block: int = BLOCK) -> BinaryIO:
        """The file, if it is the one whose lines' places are known; from an address `block` bytes at a time."""
        if isinstance(self.path, Far):
            return open_text(self.path, self._watch.check(self.path), block)
        try:
            if self.path.exists() and not self.path.is_file():
                raise DataError(f"{self.path} is not a file but a folder or device. Give the path of a JSONL file.")
            return self._watch.open(self.path)
        except FileNotFoundError:
            raise DataError(f"{self.path} does not exist. Give the path of a JSONL file.") from None
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}. Check its permissions.") from error

    def _places(self, limit: int | None) -> tuple[array[int], array[int], int]:
        """(offset and number of each example's line, where the last ends)."""
        with self._open() as file:
            self._read_all(file, limit)
        return self._offsets, self._lines, self._end

    def _read_all(self, file: BinaryIO, limit: int | None) -> None:
        """Checks every line and notes where it lies."""
        digests = array("Q")
        for offset, line, text in lines_of(file, self.path):
            record = self._parse(text, line)
            digests.append(int.from_bytes(blake2b(record.id.encode(), digest_size=8).digest(), "little"))
            self._offsets.append(offset)
            self._lines.append(line)
            if len(self) == limit:
                break
        self._end = file.tell()
        if not len(self):
            raise DataError(f"{self.path} is empty: it has no line with an example. Give one JSON object a line.")
        self._refuse_twins(file, digests)

    def _refuse_twins(self, file: BinaryIO, digests: array[int]) -> None:
        """Two lines with one id are an error. Equal digests are only a reason to compare the ids themselves."""
        values = np.frombuffer(digests, dtype=np.uint64)
        order = np.argsort(values, kind="stable")
        equal = values[order][1:] == values[order][:-1]
        suspects = sorted({int(i) for i in order[1:][equal]} | {int(i) for i in order[:-1][equal]})
        first: dict[str, int] = {}
        for index in suspects:
            record_id = self._read_one(file, index).id
            line = self._lines[index]
            if record_id in first:
                raise self._wrong(
                    line,
                    f"the id {record_id!r} is that of line {first[record_id]} too (a line without an id has its number "
                    "as the id). Make the ids unique.",
                )
            first[record_id] = line

    def _read_one(self, file: BinaryIO, index: int) -> _Record:
        file.seek(self._offsets[index])
        line = self._lines[index]
        return self._parse(decoded(next_line(file), self.path, line), line)

    def _parse(self, text: str, line: int) -> _Record:
        """The record that a line holds, everything but the pictures' content checked."""
        try:
            fields = parsed(text)
        except KeyTwice as error:
            raise self._wrong(line, str(error)) from None
        except (ValueError, RecursionError) as error:
            hint = ""
            if line == 1 and text.lstrip().startswith("["):
                hint = " It looks like one JSON array; write each of its items on a line of its own."
            raise self._wrong(line, f"this is not JSON ({error}). Give one JSON object a line.{hint}") from error
        if not isinstance(fields, dict):
            hint = " (JSONL has no array around its lines)" if isinstance(fields, list) else ""
            raise self._wrong(line, f"this is a JSON {kind_of(fields)}, not an object{hint}. Give one object a line.")
        try:
            return self._record(fields, line)
        except _LineError as error:
            raise self._wrong(line, str(error)) from None

    def _record(self, fields: dict[str, Any], line: int) -> _Record:
        turns = _Turns(listed=self._listed(fields), locate=self._locate)
        if "conversations" in fields and "messages" in fields:
            raise _LineError("both 'conversations' and 'messages' are given. Keep one of them.")
        if "conversations" in fields:
            for number, turn in enumerate(_list_of_turns(fields, "conversations"), 1):
                turns.add(number, _role(turn, number, "from", _LLAVA_ROLES), _field(turn, number, "value"))
        elif "messages" in fields:
            for number, turn in enumerate(_list_of_turns(fields, "messages"), 1):
                turns.add(number, _role(turn, number, "role", _OPENAI_ROLES), _field(turn, number, "content"))
        else:
            given = ", ".join(map(repr, fields)) or "none"
            raise _LineError(f"there is neither 'conversations' nor 'messages' among its fields ({given}). Add one.")
        messages, pictures = turns.finish()
        used = {"id", "image", "images", "conversations", "messages"}
        metadata = {key: value for key, value in fields.items() if key not in used}
        return _Record(_id(fields, line), messages, pictures, metadata)

    def _listed(self, fields: dict[str, Any]) -> list[_Picture]:
        """The pictures of the line's ``image`` field."""
        if "image" in fields and "images" in fields:
            raise _LineError("both 'image' and 'images' are given. Keep one of them.")
        given = fields.get("image", fields.get("images"))
        if given is None:
            return []
        entries = given if isinstance(given, list) else [given]
        return [self._locate(entry) for entry in entries]

    def _locate(self, reference: object) -> _Picture:
        """The existing file or embedded bytes that a picture's entry names."""
        if not isinstance(reference, str) or not reference:
            raise _LineError(f"a picture is given as {shown(reference)}. Give its path as a text that is not empty.")
        if reference.startswith("data:"):
            return _embedded(reference)
        url = _URL.match(reference)
        if url:
            raise _LineError(
                f"the picture {shown(reference)} is a {url[1]} address. Nothing is fetched: "
                "download it and give its path."
            )
        _refuse_surrogates(reference)
        if "\0" in reference:
            raise _LineError(f"the picture path {shown(reference)} holds a null character. Mend the path.")
        if isinstance(self.path, Far):
            self._refuse_outside(reference, reference)
            return self.path.beside(reference)
        path = os.path.realpath(os.path.join(self._folder, reference))
        # Before looking whether it exists: what lies outside is nobody's to learn from a manifest.
        self._refuse_outside(reference, path)
        if os.path.isdir(path) or reference.endswith("/"):
            raise _LineError(f"the picture {shown(reference)} is a folder. Give the path of a picture file.")
        if not os.path.isfile(path):
            raise _LineError(
                f"the picture {shown(reference)} does not exist. Paths are relative to the manifest's folder."
            )
        return path

    def _refuse_outside(self, reference: str, path: str) -> None:
        if isinstance(self.path, Far):
            if leads_out(reference):
                raise _LineError(
                    f"the picture {shown(reference)} leads out of the manifest's folder. At an address pictures lie beside "
                    "their manifest: give plain relative paths with '/'."
                )
            return
        root = self._image_root
        if root is not None and lies_in(path, root):
            return
        if os.path.isabs(reference):
            where = "no image_root is given" if root is None else "it is not in image_root"
            raise _LineError(
                f"the picture {shown(reference)} is an absolute path and {where}. Make it relative to the manifest's "
                "folder, or give the folder that holds the pictures as image_root."
            )
        if not lies_in(path, self._folder):
            raise _LineError(
                f"the picture {shown(reference)} leads out of the manifest's folder (by '..' or a symbolic link). "
                "Move it into the folder, or, if you trust the manifest, allow the folder that holds the pictures with "
                "image_root=."
            )

    def _wrong(self, line: int, problem: str) -> DataError:
        return DataError(f"{self.path}:{line}: {problem}")


class _LineError(Exception):
    """What is wrong with a line; `Manifest` puts file and line number in front."""


@dataclass
class _Turns:
    """The turns of one line while they are read: image parts are counted out against the listed pictures."""

    listed: list[_Picture]
    locate: Callable[[object], _Picture]
    messages: list[dict[str, Any]] = field(default_factory=list)
    # One entry an image part in reading order; None stands for the next of `listed`.
    pictures: list[_Picture | None] = field(default_factory=list)

    def add(self, number: int, role: str, content: object) -> None:
        """Turn `number` (from 1)."""
        if role == "system" and number > 1:
            raise _LineError(f"turn {number} is a system turn. Only the first turn can be one; move or remove it.")
        if isinstance(content, str):
            parts = self._from_text(content)
        elif isinstance(content, list):
            parts = [part for item in content for part in self._from_part(number, item)]
        else:
            raise _LineError(
                f"turn {number} has a JSON {kind_of(content)} as its content. Give a text (or, in 'messages', a list)."
            )
        if role == "system" and any(part["type"] == "image" for part in parts):
            raise _LineError("the system turn holds a picture. Move it into a human turn.")
        self.messages.append({"role": role, "content": _trimmed(parts)})

    def finish(self) -> tuple[Sequence[Message], list[_Picture]]:
        """Every turn and every picture, once all turns are there."""
        marked = self.pictures.count(None)
        user = next((message for message in self.messages if message["role"] == "user"), None)
        if not marked and self.listed:
            if user is None:
                raise _LineError(
                    f"there is no human turn to hold the pictures. Add one, or mark their place by {MARKER}."
                )
            # All parts before the first human turn belong to none or to an answer: count those pictures first.
            before = sum(_num_images(message) for message in self.messages[: self.messages.index(user)])
            user["content"][:0] = [{"type": "image"} for _ in self.listed]
            self.pictures[before:before] = [None for _ in self.listed]
        elif marked != len(self.listed):
            raise _LineError(
                f"the turns mark {marked} pictures ({MARKER}), but {len(self.listed)} are listed in 'image'. "
                "Give as many pictures as markers, or no marker at all to put them in front."
            )
        for number, message in enumerate(self.messages, 1):
            if not message["content"]:
                raise _LineError(f"turn {number} is empty: it holds neither text nor a picture. Fill or remove it.")
        following = iter(self.listed)
        return self.messages, [next(following) if picture is None else picture for picture in self.pictures]

    def _from_text(self, text: str) -> list[dict[str, str]]:
        """`text` cut at its markers."""
        _refuse_surrogates(text)
        pieces = text.split(MARKER)
        parts: list[dict[str, str]] = []
        for i, piece in enumerate(pieces):
            if i:
                parts.append({"type": "image"})
                self.pictures.append(None)
                piece = piece.lstrip("\r\n")
            if i < len(pieces) - 1:
                piece = piece.rstrip("\r\n")
            if piece.strip():
                parts.append({"type": "text", "text": piece})
        return parts

    def _from_part(self, number: int, part: object) -> list[dict[str, str]]:
        """One part of an OpenAI content list."""
        if not isinstance(part, dict):
            raise _LineError(
                f"turn {number} holds a JSON {kind_of(part)} as a part. A part is an object with a 'type'."
            )
        kind = part.get("type")
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise _LineError(f"turn {number} has a text part whose 'text' is {shown(text)}. Give a text.")
            return self._from_text(text)
        if kind == "image":
            others = [key for key, value in part.items() if key != "type" and value is not None]
            if others:
                raise _LineError(
                    f"turn {number} has an image part with other fields ({', '.join(map(repr, others))}). It stands "
                    "for the next picture of 'image'; a part with its own picture has the type 'image_url'."
                )
            self.pictures.append(None)
            return [{"type": "image"}]
        if kind == "image_url":
            address = part.get("image_url")
            if not isinstance(address, dict) or "url" not in address:
                raise _LineError(
                    f'turn {number} has an image_url part without a url. Write {{"type": "image_url", "image_url": '
                    '{"url": "relative/path"}}.'
                )
            self.pictures.append(self.locate(address["url"]))
            return [{"type": "image"}]
        raise _LineError(f"turn {number}: {unknown('part type', kind, ('text', 'image', 'image_url'))}")


def question_and_reference(example: Example) -> tuple[str | None, str | None]:
    """What an evaluation asks and what it compares with: the text of the first human turn and of the first answer.

    The texts between pictures are joined by a space; None where there is no such turn or it holds pictures only.
    """
    return _first_text(example, "user"), _first_text(example, "assistant")


def _first_text(example: Example, role: str) -> str | None:
    content = next((message["content"] for message in example.messages if message["role"] == role), ())
    return " ".join(part["text"].strip() for part in content if part["type"] == "text") or None


def _num_images(message: Message) -> int:
    return sum(part["type"] == "image" for part in message["content"])


def _trimmed(parts: list[dict[str, str]]) -> list[dict[str, str]]:
    """`parts` without white space before the first text and after the last."""
    texts = [part for part in parts if part["type"] == "text"]
    if texts:
        texts[0]["text"] = texts[0]["text"].lstrip()
        texts[-1]["text"] = texts[-1]["text"].rstrip()
    return parts


def _list_of_turns(fields: dict[str, Any], name: str) -> list[dict[str, Any]]:
    turns = fields[name]
    if not isinstance(turns, list) or not turns:
        raise _LineError(f"{name!r} is {shown(turns)}. Give a list of at least one turn.")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise _LineError(f"turn {number} is a JSON {kind_of(turn)}. A turn is an object.")
    return turns


def _field(turn: dict[str, Any], number: int, name: str) -> object:
    if name not in turn:
        raise _LineError(f"turn {number} lacks {name!r} (it has {', '.join(map(repr, turn)) or 'no fields'}). Add it.")
    return turn[name]


def _role(turn: dict[str, Any], number: int, name: str, roles: Mapping[str, str]) -> str:
    given = _field(turn, number, name)
    if not isinstance(given, str) or given not in roles:
        raise _LineError(f"turn {number}: {unknown(f'{name!r}', given, roles)}")
    return roles[given]


def _id(fields: dict[str, Any], line: int) -> str:
    given = fields.get("id")
    if given is None:
        return str(line)
    # bool is a kind of int to Python, but not an id to anyone.
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise _LineError(f"'id' is {shown(given)}. Give a text or a whole number, or leave it out.")
    _refuse_surrogates(str(given))
    return str(given)


def _embedded(url: str) -> bytes:
    header = _DATA_URL.match(url)
    if not header:
        raise _LineError(f"the picture {shown(url)} is no data URL of a picture. Write data:image/png;base64,...")
    try:
        data = base64.b64decode(url[header.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise _LineError(f"the picture {shown(url)} is not valid base64 ({error}). Encode it again.") from error
    if not data:
        raise _LineError(f"the picture {shown(url)} holds no bytes. Encode it again.")
    return data


def _refuse_surrogates(text: str) -> None:
    """JSON can escape half a character ("\\ud800"), which no tokenizer, file name or log can take later on."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _LineError(
            f"a text holds half a character ({shown(text[error.start])}, a lone surrogate). Write it whole or "
            "remove it."
        ) from None

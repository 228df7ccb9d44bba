"""Examples as they lie in a manifest or in shards, undecoded and one by one: one that cannot be used stops no other."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ett.data.far import BrokenSource, Far, Unreachable, out_of_reach
from ett.data.json_lines import MAX_LINE_BYTES, KeyTwice, decoded, is_too_long, next_line, parsed, shown
from ett.data.manifest import Manifest, _LineError, _Record
from ett.data.places import SHARD_SUFFIXES, Place, Stamp, place, shard_paths, stamp, stamps
from ett.data.shards import ShardIndex, ShardSample
from ett.errors import DataError
from ett.types import Message

MAX_MEMBER_BYTES = MAX_LINE_BYTES
"""Largest member of a shard that is read, and largest picture that is put into one [bytes]."""

SCANNED_AT_ONCE = 16
"""Shards at addresses that are scanned at a time."""
SCANNED_KEPT = 100_000
"""Shards at addresses whose index is kept while they stay as they are."""

Kind = Literal[
    "refused_shard",
    "not_utf8",
    "too_long",
    "not_json",
    "missing_field",
    "wrong_field",
    "empty_text",
    "unsafe_path",
    "missing_picture",
    "broken_picture",
    "huge_picture",
    "duplicate_id",
    "not_encodable",
]
"""What can be wrong with an example (or a whole shard)."""

_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif", "ppm")
_PICTURE_MEMBER = re.compile(rf"(?:([0-9]{{1,9}})\.)?(?:{'|'.join(_EXTENSIONS)})")
_PICTURE_LIKE = re.compile(rf"(?:.*\.)?(?:{'|'.join((*_EXTENSIONS, 'heic', 'heif', 'jxl', 'jfif', 'svg'))})", re.DOTALL)
"""Members that somebody took for a picture of the sample, read or not."""


class Refused(DataError):
    """An example that cannot be used: `kind`, and a message that says why and how to mend it, but not where."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[Refused], tuple[Kind, str]]:
        return Refused, (self.kind, str(self))


@dataclass(frozen=True)
class Entry:
    """An example before its pictures are decoded.

    Attributes:
        pictures: a file's path or address or its encoded bytes for each image part of `messages`, in order.
    """

    id: str
    messages: Sequence[Message]
    pictures: Sequence[str | bytes | Far]
    metadata: Mapping[str, Any]


class Entries(ABC):
    """Entries by position; pickles small, holds no open file."""

    refused: Sequence[tuple[str, Refused]] = ()
    """(where, what) of whole shards that are not read."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """File and line, or shard and key."""

    @abstractmethod
    def read(self, index: int) -> Entry:
        """Entry number `index`.

        Raises:
            Refused: it cannot be used. BrokenSource: it was changed, or its address does not answer.
        """


def open_entries(path: str | Place, image_root: str | Path | None = None) -> Lines | Samples:
    """The entries of a manifest (any other file), a shard (.tar, .tar.gz, .tgz), or a folder with shards or one manifest; at an
    address, of a manifest (.jsonl) or of what `shard_paths` finds there. Patterns are those of `shard_paths`.

    Raises:
        DataError: there is nothing to read. BrokenSource: an address does not answer.
    """
    path = place(path)
    files: Sequence[Place]
    folder = path if isinstance(path, Path) and path.is_dir() else None
    if isinstance(path, Far):
        files = [path] if path.name.endswith(".jsonl") else shard_paths(str(path))[0]
    elif not path.exists() and any(sign in str(path) for sign in "*?[{"):
        files, folder = shard_paths(str(path))
    else:
        files = [path] if folder is None else sorted(path.iterdir())
    shards = [file for file in files if file.name.endswith(SHARD_SUFFIXES)]
    if shards:
        if image_root is not None:
            raise DataError("Shards hold their pictures, so image_root is for manifests alone. Leave it out.")
        return Samples(shards, folder=folder)
    manifests = [file for file in files if file.name.endswith(".jsonl")] if files != [path] else files
    if len(manifests) != 1:
        raise DataError(
            f"{path} has no shards (.tar, .tar.gz) and {len(manifests)} manifests (.jsonl). Give the path of one of them."
        )
    return Lines(manifests[0], image_root=image_root)


class Lines(Manifest, Entries):
    """The lines of a manifest by its own rules, but each is checked only when it is read."""

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index]}"

    def read(self, index: int) -> Entry:
        with self._open(self._room(index)) as file:
            file.seek(self._offsets[index])
            data = next_line(file)
        line = self._lines[index]
        try:
            return _entry(self._parse(decoded(data, self.path, line), line))
        except (Refused, BrokenSource):
            raise
        except DataError as error:
            raise Refused(_kind_of_line(data), str(error).removeprefix(f"{self.where(index)}: ")) from error

    def _read_all(self, file: BinaryIO, limit: int | None) -> None:
        offset = number = 0
        while len(self) != limit and (data := next_line(file)):
            number += 1
            if data.removeprefix(BOM_UTF8).strip():
                self._offsets.append(offset)
                self._lines.append(number)
            # the rest of a line that is too long, or nothing at the end of the file
            while data and not data.endswith(b"\n"):
                data = next_line(file)
            offset = file.tell()
        self._end = offset
        if not len(self):
            raise DataError(f"{self.path} is empty: it has no line with an example. Give one JSON object a line.")

    def _locate(self, reference: object) -> str | bytes | Far:
        try:
            return super()._locate(reference)
        except _LineError as error:
            embedded = isinstance(reference, str) and reference.startswith("data:")
            raise Refused("broken_picture" if embedded else "missing_picture", str(error)) from None

    def _refuse_outside(self, reference: str, path: str) -> None:
        try:
            super()._refuse_outside(reference, path)
        except _LineError as error:
            raise Refused("unsafe_path", str(error)) from None


class Samples(Entries):
    """The samples of shards: ``{key}.json`` with a manifest line's fields or ``{key}.txt`` with a caption, and pictures
    ``{key}.png`` (.jpg, ...), several as ``{key}.0.png``, ``{key}.1.png`` and so on.

    Without an ``id`` the key is one. Other fields of the JSON become metadata. Where its ``image`` names pictures, there must
    be as many members, whatever they were called before; other members that look like pictures (``{key}.mask.png``) are left
    out beside the sample's own, and an error alone. A shard with an unsafe member or damage is refused as a whole. Of gzipped
    shards, one at a time is kept in memory.

    Args:
        shards: their paths or addresses.
        folder: refuse those that lead out of it by a symbolic link.

    Raises:
        BrokenSource: an address does not answer. Unreachable: nothing is there; a shard that one process of a launch lacks and
            others have would give each another order.
    """

    def __init__(self, shards: Sequence[Place], *, folder: Path | None = None) -> None:
        refused, indices = [], []
        with ThreadPoolExecutor(SCANNED_AT_ONCE) as pool:
            far = any(isinstance(shard, Far) for shard in shards)
            scanned = pool.map(_scanned, shards) if far else (_scanned(shard, folder) for shard in shards)
            for shard, found in zip(shards, scanned, strict=True):
                if isinstance(found, ShardIndex):
                    indices.append(found)
                else:
                    refused.append((str(shard), Refused("refused_shard", str(found).removeprefix(f"{shard}: "))))
        self.refused = refused
        self.ends = [0]
        for index in indices:
            self.ends.append(self.ends[-1] + len(index))
        self._indices = indices
        self._current: tuple[int, ShardIndex] | None = None

    def __len__(self) -> int:
        return self.ends[-1]

    def where(self, index: int) -> str:
        number, sample = self._sample(index)
        key = sample.key if sample.key.isprintable() else ascii(sample.key)
        return f"{self._indices[number].shards[0]}: {key}"

    def fingerprint(self) -> str:
        """A hash of every shard's name, size and time of change, or version."""
        digest = blake2b(digest_size=16)
        shards = [index.shards[0] for index in self._indices]
        for shard, its_stamp in zip(shards, stamps(shards), strict=True):
            if its_stamp is None:
                raise out_of_reach(shard, FileNotFoundError("it is gone"))
            digest.update(repr((shard.name, *its_stamp)).encode())
        return digest.hexdigest()

    def read(self, index: int) -> Entry:
        number, sample = self._sample(index)
        if self._current is None or self._current[0] != number:
            self._current = (number, copy.copy(self._indices[number]))
        try:
            return _sample_entry(sample, self._current[1])
        except (Refused, BrokenSource):
            raise
        except DataError as error:
            raise Refused("refused_shard", str(error)) from error

    def _sample(self, index: int) -> tuple[int, ShardSample]:
        number = bisect_right(self.ends, index) - 1
        return number, self._indices[number][index - self.ends[number]]


def _scanned(shard: Place, folder: Path | None = None) -> ShardIndex | DataError:
    """The index of a shard, or what is wrong with its content."""
    try:
        if folder is not None and isinstance(shard, Path) and not shard.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{shard} leads out of {folder} by a symbolic link. Copy the shard into the folder.")
        index = _scanned_before(shard, stamp(shard)) if isinstance(shard, Far) else ShardIndex([shard])
        # a copy leaves the unpacked content behind
        return copy.copy(index)
    except (BrokenSource, Unreachable):
        raise
    except DataError as error:
        return error


@lru_cache(maxsize=SCANNED_KEPT)
def _scanned_before(shard: Far, its_stamp: Stamp) -> ShardIndex:
    """A run opens its data several times; what lies far away is read through once."""
    return copy.copy(ShardIndex([shard], {shard: its_stamp}))


def _sample_entry(sample: ShardSample, shard: ShardIndex) -> Entry:
    for name, (_, size) in sample.members.items():
        if size > MAX_MEMBER_BYTES:
            raise Refused(
                "too_long", f".{name} has {size} bytes; at most {MAX_MEMBER_BYTES} are read. Shrink or remove it."
            )
    matches = [match for match in map(_PICTURE_MEMBER.fullmatch, sample.members) if match]
    names = [match[0] for match in sorted(matches, key=lambda match: int(match[1] or 0))]
    fields = _object(shard.read(sample, "json")) if "json" in sample.members else {}
    pictures = _listed(fields, names, sample)
    if not {"conversations", "messages"} & fields.keys():
        if "txt" not in sample.members or not names:
            raise Refused(
                "missing_field",
                f"its members ({', '.join('.' + name for name in sample.members)}) hold no text or no picture. Add a .txt "
                "with a caption, or a .json with 'messages' or 'conversations'.",
            )
        caption = [{"type": "text", "text": _utf8(shard.read(sample, "txt"), ".txt")}]
        marks = [{"type": "image"} for _ in pictures]
        fields["messages"] = [{"role": "user", "content": marks}, {"role": "assistant", "content": caption}]
    if fields.get("id") is None:
        fields["id"] = sample.key
    fields.pop("images", None)
    fields["image"] = pictures
    try:
        return _entry(_MemberRules({name: shard.read(sample, name) for name in names})._record(fields, 0))
    except _LineError as error:
        raise Refused(_kind_of_fields(fields), str(error)) from None


def _listed(fields: Mapping[str, Any], names: Sequence[str], sample: ShardSample) -> list[str]:
    """The pictures of a sample in their order: members, and those that its JSON embeds.

    Args:
        fields: of its JSON. names: its members that are read as pictures.

    Raises:
        Refused: other pictures are named than are there.
    """
    given = fields.get("image", fields.get("images"))
    listed = [] if given is None else given if isinstance(given, list) else [given]
    embedded = [each for each in listed if isinstance(each, str) and each.startswith("data:")]
    unread = [name for name in sample.members if name not in names and _PICTURE_LIKE.fullmatch(name)]
    allowed = (
        f"Pictures of a sample are {{key}}.png, or {{key}}.0.png, {{key}}.1.png ... (or .{', .'.join(_EXTENSIONS)})"
    )
    if listed and len(listed) - len(embedded) != len(names):
        there = ", ".join(f".{name}" for name in names) or "none"
        others = f"; not read: {', '.join(f'.{name}' for name in unread)}" if unread else ""
        raise Refused(
            "missing_picture",
            f"pictures named in its .json: {len(listed) - len(embedded)} ({shown(given)}); among its members: {len(names)} "
            f"({there}{others}). {allowed}; add, rename or convert them, or mend 'image'.",
        )
    if unread and not names and not embedded:
        raise Refused(
            "missing_picture",
            f"its members that look like pictures ({', '.join(f'.{name}' for name in unread)}) are not read, and it has no "
            f"others. {allowed}; rename, convert or remove them.",
        )
    if not listed:
        return list(names)
    # where pictures lay before they were put into the shard says nothing now
    members = iter(names)
    return [each if isinstance(each, str) and each.startswith("data:") else next(members) for each in listed]


class _MemberRules(Manifest):
    """The rules of a manifest's line where pictures are members of a sample: no file is looked for."""

    def __init__(self, members: Mapping[str, bytes]) -> None:
        self._members = members

    def _locate(self, reference: object) -> str | bytes | Far:
        if isinstance(reference, str) and reference in self._members:
            return self._members[reference]
        if isinstance(reference, str) and reference.startswith("data:"):
            return super()._locate(reference)
        raise Refused(
            "missing_picture", f"the picture {str(reference)[:100]!r} is no member of its sample. Add it to the shard."
        )


def _entry(record: _Record) -> Entry:
    return Entry(record.id, record.messages, record.pictures, record.metadata)


def _utf8(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("not_utf8", f"byte {error.start + 1} of {name} is not UTF-8. Save it as UTF-8.") from None


def _object(data: bytes) -> dict[str, Any]:
    text = _utf8(data, ".json")
    try:
        fields = parsed(text)
    except KeyTwice as error:
        raise Refused("wrong_field", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise Refused("not_json", f".json is not JSON ({error}). Write it anew.") from None
    if not isinstance(fields, dict):
        raise Refused("not_json", ".json holds no object. Give the fields of one example.")
    return fields


def _kind_of_line(data: bytes) -> Kind:
    """What is wrong with a line that was refused."""
    if is_too_long(data):
        return "too_long"
    try:
        return _kind_of_fields(_object(data))
    except Refused as refused:
        return refused.kind


def _kind_of_fields(fields: Mapping[str, Any]) -> Kind:
    """What is wrong with fields that were refused, their pictures apart."""
    turns = fields.get("conversations", fields.get("messages"))
    names = ("from", "value") if "conversations" in fields else ("role", "content")
    if not turns or not isinstance(turns, list):
        return "missing_field"
    if not all(isinstance(turn, dict) and set(names) <= turn.keys() for turn in turns):
        return "missing_field"
    return "empty_text" if any(_blank(turn[names[1]]) for turn in turns) else "wrong_field"


def _blank(content: object) -> bool:
    if isinstance(content, list):
        return all(
            isinstance(part, dict) and part.get("type") == "text" and _blank(part.get("text")) for part in content
        )
    return isinstance(content, str) and not content.strip()

"""A manifest to tar shards and back, in parallel and resumable (`ett data convert`).

    shards:    OUT/convert.json, OUT/000000.tar, ...; of example i ``{i:08}.json``: id, messages in OpenAI's form and other
               fields; and its pictures, ``{i:08}.png`` or, of several, ``{i:08}.0.png``, ``{i:08}.1.png``, ...
    manifest:  OUT/convert.json, OUT/manifest.jsonl, OUT/pictures/000000/..., a folder for each shard

Pictures keep their bytes; what they are called follows from those. A part (a shard's worth) is written under a name of its own
and renamed when it is on the disk, so a part that is there is whole. The bytes depend on source and options alone: a conversion
that was killed and run again ends as one that was not.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ett.data.entries import MAX_MEMBER_BYTES, Entry, Lines, Refused, Samples, open_entries
from ett.data.far import Far
from ett.data.manifest import CHUNK, Manifest
from ett.data.parallel import mapped
from ett.data.places import Place, Stamp, loadable, place, stamps
from ett.errors import DataError
from ett.files import fsync, fsync_tree

MARKER_NAME = "convert.json"
MANIFEST_NAME = "manifest.jsonl"
DEFAULT_SHARD_EXAMPLES = 1000
_VERSION = 1
_PARTS = ".parts"
_BLOCK = 512

_MAGIC = (
    (b"\xff\xd8\xff", 0, "jpg"),
    (b"\x89PNG\r\n\x1a\n", 0, "png"),
    (b"WEBP", 8, "webp"),
    (b"GIF8", 0, "gif"),
    (b"BM", 0, "bmp"),
    (b"II*\0", 0, "tif"),
    (b"MM\0*", 0, "tif"),
    (b"ftypavi", 4, "avif"),
    (b"ftypmif1", 4, "avif"),
    (b"jP  ", 4, "jp2"),
    (b"\xff\x4f\xff\x51", 0, "jp2"),
    *((b"P" + kind, 0, "ppm") for kind in (b"1", b"2", b"3", b"4", b"5", b"6", b"f", b"F")),
)
"""(bytes, where they stand, extension) of the formats that `ett.images` opens."""


@dataclass(frozen=True)
class Part:
    """What makes one shard: entries `start` to `stop` (excluded) of the source."""

    number: int
    start: int
    stop: int


def convert(
    source: str | Place,
    destination: str | Path,
    *,
    shard_examples: int = DEFAULT_SHARD_EXAMPLES,
    shard_bytes: int | None = None,
    workers: int = 1,
    image_root: str | Path | None = None,
) -> int:
    """Write a manifest as shards, or shards as a manifest; returns the number of examples.

    Args:
        source: as of `ett.data.entries.open_entries`; nothing may be wrong with it.
        destination: a folder, made here; one that an earlier call has not finished is completed.
        shard_examples: examples a shard. shard_bytes: instead, the largest size of a shard [bytes]; an example that is larger
            has one for itself. Both are for shards that are written.
        workers: processes.

    Raises:
        DataError: the source cannot be used, or the destination holds something else.
    """
    entries, folder = open_entries(source, image_root), Path(destination)
    plan: dict[str, Any] = {"version": _VERSION}
    writer: _Writer
    if isinstance(entries, Lines):
        # every line by the manifest's own rules, ids among them, before anything is written
        plan |= {"source": Manifest(entries.path, image_root=image_root).fingerprint()}
        plan |= {"shard_examples": shard_examples} if shard_bytes is None else {"shard_bytes": shard_bytes}
        parts = _by_count(len(entries), shard_examples) if shard_bytes is None else _by_bytes(entries, shard_bytes)
        writer = _ToShards(entries, folder)
    else:
        if entries.refused:
            where, refused = entries.refused[0]
            raise DataError(f"{where}: {refused}")
        plan |= {"source": entries.fingerprint()}
        parts = [
            Part(k, start, stop) for k, (start, stop) in enumerate(zip(entries.ends, entries.ends[1:], strict=False))
        ]
        writer = _ToManifest(entries, folder)
    _claim(folder, plan)
    with _explained(folder):
        for _ in mapped(writer, [part for part in parts if not writer.is_finished(part)], workers):
            pass
        writer.finish(parts)
        for leftover in folder.glob(".[0-9]*.tmp"):  # from processes that were killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return len(entries)


@dataclass(frozen=True)
class _Writer(ABC):
    """Writes parts; goes to the worker processes."""

    entries: Lines | Samples
    folder: Path

    def __call__(self, part: Part) -> None:
        with _explained(self.folder):
            self.write(part)

    @abstractmethod
    def is_finished(self, part: Part) -> bool: ...

    @abstractmethod
    def write(self, part: Part) -> None: ...

    @abstractmethod
    def finish(self, parts: Sequence[Part]) -> None:
        """After every part: what is there is on the disk."""

    def work(self, name: str) -> Path:
        """A place that no other process writes to."""
        return self.folder / f".{name}.{os.getpid()}.tmp"

    def read(self, index: int) -> Entry:
        try:
            return self.entries.read(index)
        except Refused as refused:
            where = self.entries.where(index)
            raise DataError(f"{where}: {refused} `ett data check` shows all that is wrong.") from refused

    @contextmanager
    def open(self, index: int, picture: str | bytes | Far) -> Iterator[tuple[BinaryIO, int, str]]:
        """(file, size [bytes], extension) of a picture of entry `index`."""
        if isinstance(picture, Far):
            opened = cast(BinaryIO, loadable(picture, MAX_MEMBER_BYTES))
        else:
            opened = io.BytesIO(picture) if isinstance(picture, bytes) else open(picture, "rb")  # noqa: SIM115
        with opened as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            start = file.read(16)
            file.seek(0)
            extension = next((name for magic, at, name in _MAGIC if start[at : at + len(magic)] == magic), None)
            named = "a picture" if isinstance(picture, bytes) else picture
            if extension is None:
                raise DataError(f"{self.entries.where(index)}: {named} is of no known kind. Convert or remove it.")
            if size > MAX_MEMBER_BYTES:
                raise DataError(
                    f"{self.entries.where(index)}: {named} has {size} bytes; a shard's member may have {MAX_MEMBER_BYTES}. "
                    "Shrink or remove it."
                )
            yield file, size, extension


class _ToShards(_Writer):
    def is_finished(self, part: Part) -> bool:
        target = self._target(part)
        if target.is_symlink() or (target.exists() and not target.is_file()):
            raise DataError(f"{target} is not a shard that was written here. Remove it, or choose another folder.")
        return target.exists()

    def write(self, part: Part) -> None:
        target = self._target(part)
        work = self.work(target.name)
        with tarfile.open(work, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(part.start, part.stop):
                entry = self.read(index)
                text = _as_json(entry, {})
                tar.addfile(_header(f"{index:08}.json", len(text)), io.BytesIO(text))
                for number, picture in enumerate(entry.pictures):
                    with self.open(index, picture) as (file, size, extension):
                        tar.addfile(_header(_picture_name(index, number, entry, extension), size), file)
        fsync(work)
        work.replace(target)

    def finish(self, parts: Sequence[Part]) -> None:
        fsync(self.folder)

    def _target(self, part: Part) -> Path:
        return self.folder / f"{part.number:06}.tar"


class _ToManifest(_Writer):
    """A part's lines wait in ``.parts`` until all are there; its pictures are in place before its lines."""

    def is_finished(self, part: Part) -> bool:
        return (self.folder / MANIFEST_NAME).exists() or self._lines(part).exists()

    def write(self, part: Part) -> None:
        pictures = self.folder / "pictures" / f"{part.number:06}"
        work, work_lines = self.work(pictures.name), self.work(f"{pictures.name}.jsonl")
        shutil.rmtree(work, ignore_errors=True)  # process numbers come again
        work.mkdir()
        with work_lines.open("wb") as lines:
            for index in range(part.start, part.stop):
                entry = self.read(index)
                names = []
                for number, picture in enumerate(entry.pictures):
                    with self.open(index, picture) as (file, _, extension):
                        name = _picture_name(index - part.start, number, entry, extension)
                        with (work / name).open("xb") as copy:
                            shutil.copyfileobj(file, copy)
                    names.append(f"pictures/{pictures.name}/{name}")
                lines.write(_as_json(entry, {"image": names} if names else {}) + b"\n")
        fsync_tree(work)
        fsync(work_lines)
        pictures.parent.mkdir(exist_ok=True)
        if pictures.exists():  # from a process that was killed between the two renames
            shutil.rmtree(pictures)
        work.replace(pictures)
        fsync(pictures.parent)
        self._lines(part).parent.mkdir(exist_ok=True)
        work_lines.replace(self._lines(part))

    def finish(self, parts: Sequence[Part]) -> None:
        target = self.folder / MANIFEST_NAME
        if not target.exists():
            work = self.folder / f".{MANIFEST_NAME}.tmp"
            with work.open("wb") as whole:
                for part in parts:
                    with self._lines(part).open("rb") as lines:
                        shutil.copyfileobj(lines, whole)
            try:
                Manifest(work)  # ids of different shards may be the same
            except DataError as error:
                raise DataError(f"{error} (A line is a sample, in their order; `ett data check` names it.)") from error
            fsync(work)
            work.replace(target)
            fsync(self.folder)
        shutil.rmtree(self.folder / _PARTS, ignore_errors=True)

    def _lines(self, part: Part) -> Path:
        return self.folder / _PARTS / f"{part.number:06}.jsonl"


def _claim(folder: Path, plan: Mapping[str, Any]) -> None:
    """Make the folder this conversion's own, or find that it is.

    Raises:
        DataError: it is something else's.
    """
    marker = folder / MARKER_NAME
    text = json.dumps(plan, indent=2) + "\n"
    with _explained(folder):
        if marker.is_file():
            if marker.read_text(encoding="utf-8") != text:
                raise DataError(
                    f"{folder} holds another conversion: its source or options were different, or have changed. Delete it, or "
                    "choose another folder."
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        work = folder / f".{MARKER_NAME}.tmp"
        if any(path != work for path in folder.iterdir()):
            raise DataError(
                f"{folder} is not empty and no conversion's (it has no {MARKER_NAME}). Choose another folder."
            )
        work.write_text(text, encoding="utf-8")
        fsync(work)
        work.replace(marker)
        fsync(folder)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"The conversion into {folder} failed: {error}. Mend it and run the command again.") from error


def _by_count(total: int, examples: int) -> list[Part]:
    starts = range(0, total, examples)
    return [Part(k, start, min(start + examples, total)) for k, start in enumerate(starts)]


def _by_bytes(entries: Lines, largest: int) -> list[Part]:
    """As many entries a shard as it has room for, by the sizes that they will have in a tar."""
    parts: list[Part] = []
    start = used = 0
    for index, sizes in _sized(entries):
        size = sum(_BLOCK + -(-each // _BLOCK) * _BLOCK for each in sizes)
        # a tar is filled up to whole records of its own size
        records = -(-(used + size + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        if index > start and records > largest:
            parts.append(Part(len(parts), start, index))
            start, used = index, 0
        used += size
    return [*parts, Part(len(parts), start, len(entries))]


def _sized(entries: Lines) -> Iterator[tuple[int, list[int]]]:
    """(index, the sizes [bytes] of an entry's JSON and pictures), many pictures looked at together."""
    for first in range(0, len(entries), CHUNK):
        held: list[tuple[int, list[int], list[Place]]] = []
        for index in range(first, min(first + CHUNK, len(entries))):
            entry = entries.read(index)
            inside = [len(each) for each in entry.pictures if isinstance(each, bytes)]
            files = [place(each) for each in entry.pictures if not isinstance(each, bytes)]
            held.append((index, [len(_as_json(entry, {})), *inside], files))
        every = [file for _, _, files in held for file in files]
        found = iter(zip(every, stamps(every), strict=True))
        for index, inside, files in held:
            yield index, [*inside, *(_size(*next(found)) for _ in files)]


def _size(where: Place, its_stamp: Stamp | None) -> int:
    if its_stamp is None:
        raise DataError(f"{where} does not exist. `ett data check` shows all that is wrong.")
    return its_stamp[0]


def _as_json(entry: Entry, more: Mapping[str, Any]) -> bytes:
    """The fields of a manifest's line; ASCII, for metadata may hold half a character."""
    fields = {"id": entry.id, **more, "messages": entry.messages, **entry.metadata}
    try:
        return json.dumps(fields).encode()
    except RecursionError as error:
        raise DataError(f"Example {entry.id!r} nests its fields too deeply. Remove them.") from error


def _picture_name(index: int, number: int, entry: Entry, extension: str) -> str:
    return f"{index:08}.{extension}" if len(entry.pictures) == 1 else f"{index:08}.{number}.{extension}"


def _header(name: str, size: int) -> tarfile.TarInfo:
    """Without times and owners, so that equal contents make equal shards."""
    header = tarfile.TarInfo(name)
    header.size = size
    return header

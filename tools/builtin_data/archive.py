"""Reproducible files: shards whose bytes depend on their content alone, and the list of hashes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from builtin_data.artwork import Picture

SUMS = "SHA256SUMS"


def sidecar(picture: Picture, split: str) -> bytes:
    """The facts about a picture as JSON; what does not apply is left out."""
    emoji = picture.emoji
    facts: dict[str, str | Sequence[str] | None] = {
        "name": emoji.name,
        "hexcode": emoji.code,
        "style": picture.style,
        "family": picture.family,
        "group": emoji.group,
        "subgroup": emoji.subgroup,
        "tags": emoji.tags,
        "gender": emoji.gender,
        "concept": emoji.concept,
        **emoji.facts,
        "split": split,
    }
    kept = {key: value for key, value in facts.items() if value is not None}
    return json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode()


def write_shard(path: Path, pictures: Sequence[Picture], split: str) -> None:
    """A gzipped WebDataset shard of ``{key}.webp`` and ``{key}.json``.

    Gzipped because a tar pads every member to 512 bytes behind a header of 512: for pictures of 1.3 kB, two thirds of
    the shard would be padding.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for picture in pictures:
            for extension, content in (("json", sidecar(picture, split)), ("webp", picture.webp)):
                member = tarfile.TarInfo(f"{picture.key}.{extension}")
                member.size, member.mode = len(content), 0o644
                tar.addfile(member, io.BytesIO(content))
    with path.open("wb") as file, gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as zipped:
        zipped.write(packed.getvalue())


def content_hash(path: Path) -> str:
    """SHA-256 of a file, of what is inside for a gzipped one: zlib's forks pack the same bytes differently."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return hashlib.sha256(data).hexdigest()


def write_sums(folder: Path) -> None:
    """`SUMS`: ``<sha256>  <path>`` for every file, as ``sha256sum -c`` reads it."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n" for name, path in sorted(_files(folder).items())
    ]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def differences(built: Path, committed: Path) -> list[str]:
    """What distinguishes the built folder from the committed one, and that from its own list of hashes."""
    listed = {}
    for line in (committed / SUMS).read_text(encoding="utf-8").splitlines():
        digest, name = line.split("  ", 1)
        listed[name] = digest
    ours, theirs = _files(built), _files(committed)
    found = []
    for name in sorted({*listed, *ours, *theirs}):
        if name not in listed:
            found.append(f"{name}: not listed in {SUMS}")
        elif name not in ours:
            found.append(f"{name}: not built")
        elif name not in theirs:
            found.append(f"{name}: listed but not committed")
        elif hashlib.sha256(theirs[name].read_bytes()).hexdigest() != listed[name]:
            found.append(f"{name}: the committed file is not the listed one")
        elif content_hash(ours[name]) != content_hash(theirs[name]):
            found.append(f"{name}: built with other content")
    return found


def _files(folder: Path) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.name != SUMS and "__pycache__" not in path.parts
    }

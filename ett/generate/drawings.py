"""A folder of drawn pictures: one file each, all of them on a sheet, and a manifest that says how each came to be."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ett import __version__
from ett.errors import DataError
from ett.files import lines_of
from ett.generate.draw import Picture, Request, sheet
from ett.model.image_sampling import ImageSampling

MANIFEST, GRID = "manifest.json", "grid.png"


def open_folder(out: Path, overwrite: bool) -> None:
    """Make `out` ready for drawings; with `overwrite`, those that its manifest names are deleted.

    Raises:
        DataError: it holds anything else, or drawings that are not to be overwritten, or cannot be made.
    """
    manifest = out / MANIFEST
    try:
        out.mkdir(parents=True, exist_ok=True)
        occupied, drawn = any(out.iterdir()), manifest.is_file()
        if occupied and not (drawn and overwrite):
            advice = ", or replace its drawings with --overwrite." if drawn else "."
            raise DataError(f"{out} is not empty. Choose another --out folder{advice}")
        if occupied:
            for name in [*_drawn_files(manifest), GRID, MANIFEST]:
                (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}. Choose another --out folder.") from error


def _drawn_files(manifest: Path) -> list[str]:
    try:
        return [Path(image["file"]).name for image in json.loads(manifest.read_text(encoding="utf-8"))["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest} is not a manifest of drawings. Choose another --out folder.") from error


def write_drawings(
    pictures: Iterable[Picture], out: Path, facts: Mapping[str, Any], columns: int
) -> Iterator[tuple[Path, Request]]:
    """Write each picture as it comes, before it its entry in the manifest, and in the end the sheet.

    What was interrupted is thus a folder that `open_folder` knows: its manifest names every picture that is there.

    Args:
        facts: of the manifest beside its ``images``, from `manifest_facts`. columns: of the sheet.

    Yields:
        (file written, what was asked for).

    Raises:
        DataError: the folder cannot be written.
    """
    entries, shown = [], []
    try:
        for number, picture in enumerate(pictures):
            request = picture.request
            path = out / f"{number:04d}-{slug(request.prompt)}-{request.seed}.png"
            entries.append(entry(path.name, [request]))
            write_manifest(out / MANIFEST, {**facts, "images": entries})
            picture.image.save(path)
            shown.append(picture.image)
            yield path, request
        sheet(shown, columns).save(out / GRID)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}. Choose another --out folder.") from error


def entry(file: str, shown: Sequence[Request]) -> dict[str, Any]:
    """What a manifest says about one file, which shows one picture or several of a prompt; ``rewritten_prompt`` is null where
    nothing was rewritten."""
    return {
        "file": file,
        "prompt": shown[0].prompt,
        "rewritten_prompt": shown[0].rewritten,
        "seeds": [request.seed for request in shown],
    }


def manifest_facts(
    model: str, checkpoint: str, sampling: ImageSampling, size: Sequence[int], rewriter: str | None
) -> dict[str, Any]:
    """What holds for all pictures of a folder.

    Args:
        model: as it was named. checkpoint: `checkpoint_hash`. size: (H, W) [pixels]. rewriter: name of the hook, or None.
    """
    return {
        "ett": __version__,
        "model": model,
        "checkpoint_sha256": checkpoint,
        "size": list(size),
        "sampling": asdict(sampling),
        "rewriter": rewriter,
    }


def write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    work.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    work.replace(path)


def slug(prompt: str) -> str:
    """A piece of a file's name: the prompt's letters and digits, at most 40 of them."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.casefold()).strip("-")[:40].rstrip("-") or "picture"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        DataError: it cannot be read, or holds none.
    """
    try:
        prompts = lines_of(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    if not prompts:
        raise DataError(f"{path} holds no prompt. Write one a line.")
    return prompts

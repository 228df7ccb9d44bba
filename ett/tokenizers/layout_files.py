"""Files of foreign checkpoints: read without running anything in them, written whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ett.errors import ModelError
from ett.files import fsync, fsync_tree

OWN_FILES = frozenset(
    {
        "config.json",
        "config.yaml",
        "model.safetensors",
        "model.ckpt",
        "tokenizer.ckpt",
        "tokenizer.yaml",
        "discriminator.safetensors",
        "diffusion_pytorch_model.safetensors",
    }
)
"""What imports and exports write: a folder with anything else in it is never replaced."""

# What zipfile raises for damage: its own error where it looks for it, others where a field leads astray.
_BAD_ARCHIVE = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    OverflowError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
# What torch.load raises for an archive whose parts are whole but whose pickle is not what it expects. Caught around it alone.
_BAD_PICKLE = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, OSError)


def read_weights(path: Path) -> dict[str, Any]:
    """What is in a checkpoint file: names to tensors (safetensors), or whatever mapping was saved (PyTorch).

    A PyTorch file is unpickled with ``weights_only``, so it can hold tensors and plain values and cannot run code; the
    checksum of each of its parts is compared first.

    Raises:
        ModelError: damaged, cut short, another format, or with Python objects that loading would have to run.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pytorch(path)
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ModelError(f"{path} holds no names with tensors (it holds a {type(content).__name__}).")
    return dict(content)


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Is the file complete, and is it safetensors?") from error


def _read_pytorch(path: Path) -> Any:
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on pickle protocols; what cannot be read raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is refused: it holds {_culprit(str(error))}, and loading that could run code. Only tensors and plain "
            "values are read (weights_only). If you trust the file, save its state_dict alone with torch.save."
        ) from error
    except _BAD_PICKLE as error:
        raise ModelError(f"{path} cannot be read: {type(error).__name__}: {str(error)[:200]}.") from error


def _check_archive(path: Path) -> None:
    """Every part of the zip archive that torch.save writes is there with its checksum, else ModelError."""
    try:
        if not zipfile.is_zipfile(path):
            raise ModelError(_no_archive(path))
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except ModelError:
        raise
    except _BAD_ARCHIVE as error:
        raise ModelError(f"{path} is damaged: {error}. Copy or download it again.") from error
    if damaged is not None:
        raise ModelError(f"{path} is damaged: the checksum of {damaged} does not match. Copy or download it again.")


def _no_archive(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        return f"{path} is cut short: the end of the archive is missing. Copy or download it again."
    return (
        f"{path} is not a checkpoint of PyTorch 1.6 or newer (a zip archive). Older and bare pickles are not read, because "
        "loading them could run code. If you trust the file, save its state_dict again with torch.save."
    )


def _culprit(message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message)
    return f"the Python object {found[1]}" if found else "something besides tensors and plain values"


def as_float32(tensors: Mapping[str, Any], where: str) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors in float32, remarks on what had to be widened); half precisions widen without loss.

    Raises:
        ModelError: not a tensor, not a floating-point one, float64 (which would be rounded), or not finite.
    """
    out: dict[str, Tensor] = {}
    widened: dict[str, int] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
            raise ModelError(f"{where}: {name} is a {type(tensor).__name__}, not a dense tensor with values.")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(f"{where}: {name} is {tensor.dtype}; weights are float32, bfloat16 or float16.")
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{where}: {name} holds numbers that are not finite. The file is damaged or diverged.")
        if tensor.dtype != torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            widened[kind] = widened.get(kind, 0) + 1
        out[name] = tensor.float()
    remarks = [f"{count} tensors were stored as {kind} and are float32 now, exactly" for kind, count in widened.items()]
    return out, remarks


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file whose top level names values.

    Raises:
        ModelError: not there, or not such a file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ModelError(f"{path} is not valid {kind}: {str(error)[:200]}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must name values at its top level; it holds a {type(content).__name__}.")
    return content


def check_destination(destination: Path, source: Path | None, *, folder: bool, overwrite: bool) -> None:
    """Refuse a destination that must not be written, before any work is done.

    Raises:
        ModelError: occupied, holding files that are none of ours, of the other kind, or where the source is.
    """
    target = destination.resolve()
    if source is not None and (target == source.resolve() or target in source.resolve().parents):
        raise ModelError(
            f"{destination} holds the source {source}, which would be replaced. Choose another destination."
        )
    if folder and destination.exists() and not destination.is_dir():
        raise ModelError(f"{destination} is a file; give a folder.")
    if not folder and destination.is_dir():
        raise ModelError(f"{destination} is a folder; give a file's name, or one without a suffix for a folder.")
    present = sorted(p.name for p in destination.iterdir()) if destination.is_dir() else []
    if not overwrite and (present or (destination.exists() and not folder)):
        raise ModelError(f"{destination} already exists. Replace it with --overwrite, or choose another destination.")
    strange = [name for name in present if name not in OWN_FILES]
    if strange:
        raise ModelError(f"{destination} also holds {', '.join(strange[:3])}, so it is not replaced. Choose another.")


def publish(destination: Path, write: Callable[[Path], None], *, folder: bool) -> None:
    """Let `write` fill a folder (or write a file) beside `destination`, then move it there in one step.

    Whatever stops it, `destination` is as before or complete, and nothing else is left.

    Raises:
        ModelError: it cannot be written.
    """
    target = destination.resolve()
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            work.mkdir()
        write(work)
        fsync_tree(work)
        if folder and target.exists():
            target.rename(old)  # a rename cannot replace a folder that holds files
        work.replace(target)
        fsync(target.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise ModelError(f"{destination} cannot be written: {reason}. Choose another destination.") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for path in (work, old):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

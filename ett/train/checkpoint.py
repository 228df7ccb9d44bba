"""Training checkpoints: atomic on disk, complete, and strict when read back.

A checkpoint is a folder ``<stage>-<step>`` with ``weights.safetensors`` (the parameters that train and every buffer),
``state.pt`` (optimizer, random states, critics and averages, loaded with ``weights_only``) and ``checkpoint.json`` (step,
hashes). It appears under its name only when all of it is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ett.errors import ModelError
from ett.files import fsync, fsync_tree


class Stateful(Protocol):
    """What can be saved in a checkpoint beside the weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


WEIGHTS, STATE, META = "weights.safetensors", "state.pt", "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its folder and the number of finished steps."""

    path: Path
    step: int


def training_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a stage changes: trainable parameters and buffers by name, shared ones once."""
    tensors: dict[str, Tensor] = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    state = module.state_dict()
    tensors |= {name: buffer for name, buffer in module.named_buffers() if name in state}
    return tensors


def save_checkpoint(
    directory: Path,
    stage: str,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    extras: Mapping[str, Stateful] | None = None,
    keep: int = 2,
) -> Checkpoint:
    """Write a checkpoint of `step` finished steps and drop all but the newest `keep` of this stage.

    Args:
        extras: what else has a state, by name: a discriminator, averages.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{stage}-{step:07d}"
    work = directory / f".{target.name}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in training_tensors(module).items()}
    save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})
    others = {name: each.state_dict() for name, each in (extras or {}).items()}
    torch.save({"optimizer": optimizer.state_dict(), "random": random_state(), "extras": others}, work / STATE)
    meta = {"stage": stage, "step": step, "sha256": {name: _sha256(work / name) for name in (WEIGHTS, STATE)}}
    (work / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    publish(work, target)
    for old in list_checkpoints(directory, stage)[:-keep]:
        shutil.rmtree(old.path)
    return Checkpoint(target, step)


def load_checkpoint(
    checkpoint: Checkpoint,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    extras: Mapping[str, Stateful] | None = None,
    optional: Collection[str] = (),
) -> None:
    """Put weights, optimizer, random states and `extras` back, exactly as they were.

    Args:
        optional: extras that a checkpoint may lack; they stay as they are.

    Raises:
        ModelError: a damaged file, or a checkpoint of another architecture.
    """
    _check_whole(checkpoint)
    stored = load_file(checkpoint.path / WEIGHTS)
    own = training_tensors(module)
    state = torch.load(checkpoint.path / STATE, weights_only=True, map_location="cpu")
    others = state.get("extras", {})
    wanted = {name: each for name, each in (extras or {}).items() if name in others or name not in optional}
    same = stored.keys() == own.keys() and others.keys() == wanted.keys()
    if not same or any(stored[name].shape != own[name].shape for name in own):
        raise ModelError(
            f"{checkpoint.path} belongs to another architecture or stage than the recipe describes. Resume with the recipe "
            "that the run was started with (recipe.yaml in its folder), or start anew with --overwrite."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    optimizer.load_state_dict(state["optimizer"])
    for name, each in wanted.items():
        each.load_state_dict(others[name])
    restore_random_state(state["random"])


def _check_whole(checkpoint: Checkpoint) -> None:
    """Every file is there with the hash that was recorded when it was written."""
    advice = f"Delete the folder {checkpoint.path} to resume from the checkpoint before it."
    try:
        hashes = json.loads((checkpoint.path / META).read_text(encoding="utf-8"))["sha256"]
        for name in (WEIGHTS, STATE):
            if _sha256(checkpoint.path / name) != hashes[name]:
                raise ModelError(f"{checkpoint.path / name} is damaged: its hash is not the recorded one. {advice}")
    except FileNotFoundError as error:
        raise ModelError(f"{error.filename} is missing. {advice}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ModelError(f"{checkpoint.path / META} is damaged. {advice}") from error


def list_checkpoints(directory: Path, stage: str) -> list[Checkpoint]:
    """This stage's complete checkpoints, oldest first."""
    found = []
    for path in directory.glob(f"{stage}-*") if directory.is_dir() else ():
        number = path.name[len(stage) + 1 :]
        if number.isdigit() and (path / META).is_file():
            found.append(Checkpoint(path, int(number)))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def publish(work: Path, target: Path) -> None:
    """Move a finished folder to its final name so that a crash leaves either the whole of it or nothing."""
    fsync_tree(work)
    if target.exists():
        # re-done work (a resumed run saving the same step): the old folder goes aside first, a rename cannot replace it
        aside = target.with_name(f".{target.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        work.rename(target)
        shutil.rmtree(aside)
    else:
        work.rename(target)
    fsync(target.parent)


def random_state() -> dict[str, Any]:
    """The random states that training draws from, as tensors."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()

"""Training checkpoints: atomic on disk, complete, and strict when read back.

A checkpoint is a folder ``<stage>-<step>`` with ``weights.safetensors`` (the parameters that train and every buffer),
``state.pt`` (optimizer, every rank's random states, critics, averages; loaded with ``weights_only``) and ``checkpoint.json``
(step, hashes, the validation's loss). It appears under its name only when all of it is on the disk. The newest ones are kept,
and the one whose validation was best.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ett.errors import ModelError
from ett.files import fsync, fsync_tree
from ett.train.sharding import like, put, whole


class Stateful(Protocol):
    """What can be saved in a checkpoint beside the weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


WEIGHTS, STATE, META = "weights.safetensors", "state.pt", "checkpoint.json"
KEPT = 2
"""Checkpoints of a stage that are kept beside the best one: should the last be damaged, there is another."""

ASIDE = ".old"
"""Ends the name of a folder that makes room for a newer one of its name."""

# What torch.load and the owners of a state raise for content that is none of theirs. Caught around them alone.
_BAD_STATE = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, OSError)


class CheckpointError(ModelError):
    """A checkpoint that could not be written; those from before are untouched."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its folder and the number of finished steps."""

    path: Path
    step: int

    @property
    def validation_loss(self) -> float:
        """Of the validation after `step`; infinite where there was none."""
        try:
            loss = json.loads((self.path / META).read_text(encoding="utf-8"))["validation_loss"]
        except (OSError, ValueError, KeyError, TypeError):
            return math.inf
        return float(loss) if isinstance(loss, int | float) else math.inf


@dataclass(frozen=True)
class Snapshot:
    """Everything that a checkpoint holds, in memory of its own on the host: training may go on while it is written.

    Attributes:
        weights: `training_tensors`. state: what goes to ``state.pt``.
        validation_loss: of the validation after `step`, None where there was none.
    """

    stage: str
    step: int
    weights: Mapping[str, Tensor]
    state: Mapping[str, Any]
    validation_loss: float | None = None


def training_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a stage changes: trainable parameters and buffers by name, shared ones once."""
    tensors: dict[str, Tensor] = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    state = module.state_dict()
    tensors |= {name: buffer for name, buffer in module.named_buffers() if name in state}
    return tensors


def take_snapshot(
    stage: str,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    extras: Mapping[str, Stateful] | None = None,
    random_states: Sequence[Mapping[str, Any]] | None = None,
    validation_loss: float | None = None,
    kept: bool = True,
) -> Snapshot:
    """The state after `step` finished steps; of what is divided among ranks, for all of them at once.

    Args:
        extras: what else has a state, by name: a discriminator, averages.
        random_states: `random_state` of every rank, in their order; None takes this process's.
        kept: False on a rank that only hands over its part; tensors are then empty.
    """
    others = {name: each.state_dict() for name, each in (extras or {}).items()}
    states = [random_state()] if random_states is None else list(random_states)
    state = _copied({"optimizer": optimizer.state_dict(), "random": states, "extras": others}, kept)
    return Snapshot(stage, step, _copied(training_tensors(module), kept), state, validation_loss)


def write_checkpoint(directory: Path, snapshot: Snapshot, keep: int = KEPT) -> Checkpoint:
    """Put a snapshot on the disk, then drop all checkpoints of its stage but the newest `keep` and the best.

    Raises:
        CheckpointError: it cannot be written; what is there stays as it was.
    """
    target = directory / f"{snapshot.stage}-{snapshot.step:07d}"
    work = directory / f".{target.name}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in snapshot.weights.items()}
        save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})
        torch.save(dict(snapshot.state), work / STATE)
        meta = {
            "stage": snapshot.stage,
            "step": snapshot.step,
            "validation_loss": snapshot.validation_loss,
            "sha256": {name: _sha256(work / name) for name in (WEIGHTS, STATE)},
        }
        (work / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        publish(work, target)
    except (OSError, SafetensorError, RuntimeError) as error:
        # what was begun takes the room that a smaller file may need to tell of it
        shutil.rmtree(work, ignore_errors=True)
        raise CheckpointError(_unwritten(directory, snapshot, error)) from error
    checkpoints = list_checkpoints(directory, snapshot.stage)
    best = best_of(checkpoints)
    for old in checkpoints[:-keep]:
        if old != best:
            _drop(old.path)
    return Checkpoint(target, snapshot.step)


def _drop(path: Path) -> None:
    """Delete a checkpoint's folder; killed on the way, no half of it is left under its name. One that cannot go stays."""
    aside = path.with_name(f".{path.name}.old")
    with suppress(OSError):
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _unwritten(directory: Path, snapshot: Snapshot, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    whole = list_checkpoints(directory, snapshot.stage)
    before = f"The one of step {whole[-1].step} is whole" if whole else "There is none before it in this stage"
    try:
        free = f" ({shutil.disk_usage(directory).free / 2**20:,.0f} MiB are free there)"
    except OSError:
        free = ""
    return (
        f"Stage {snapshot.stage}: the checkpoint of step {snapshot.step} could not be written to {directory}: {reason}{free}. "
        f"{before}. Make room, then continue with --resume."
    )


def load_checkpoint(
    checkpoint: Checkpoint,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    extras: Mapping[str, Stateful] | None = None,
    optional: Collection[str] = (),
    rank: int = 0,
) -> None:
    """Put weights, optimizer, random states and `extras` back, exactly as they were.

    Args:
        optional: extras that a checkpoint may lack; they stay as they are.
        rank: whose random state is put back. A rank that was not there when the checkpoint was written starts one of its own.

    Raises:
        ModelError: a file that cannot be read or holds more than tensors and plain values, or a checkpoint of another
            architecture. Whether the files are as they were written is `newest_whole`'s to find out.
    """
    stored, state = _read(checkpoint)
    own = training_tensors(module)
    others = state["extras"]
    wanted = {name: each for name, each in (extras or {}).items() if name in others or name not in optional}
    same = stored.keys() == own.keys() and others.keys() - set(optional) == wanted.keys() - set(optional)
    if not same or any(stored[name].shape != own[name].shape for name in own):
        raise ModelError(
            f"{checkpoint.path} belongs to another architecture or stage than the recipe describes. Resume with the recipe "
            "that the run was started with (recipe.yaml in its folder), or start anew with --overwrite."
        )
    try:
        optimizer.load_state_dict(_divided(state["optimizer"], optimizer))
        for name, each in wanted.items():
            each.load_state_dict(others[name])
        restore_random_state(_state_of_rank(state["random"], rank))
    except _BAD_STATE as error:
        raise ModelError(
            f"{checkpoint.path / STATE} does not hold the state of this stage ({type(error).__name__}: {str(error)[:200]}). "
            "Resume with the recipe and the version that wrote it, or start anew with --overwrite."
        ) from error
    for name, tensor in own.items():
        put(tensor, stored[name])


def load_weights(checkpoint: Checkpoint, module: nn.Module, extras: Mapping[str, Stateful]) -> None:
    """Put the weights and `extras` of a checkpoint of this very stage back, and nothing else."""
    stored, state = _read(checkpoint)
    for name, tensor in training_tensors(module).items():
        put(tensor, stored[name])
    for name, each in extras.items():
        each.load_state_dict(state["extras"][name])


def _read(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        stored = load_file(checkpoint.path / WEIGHTS)
        state = torch.load(checkpoint.path / STATE, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{checkpoint.path / STATE} is refused: it holds more than tensors and plain values, and loading that could run "
            "code. This program never writes such a file."
        ) from error
    except (SafetensorError, *_BAD_STATE) as error:
        raise ModelError(f"{checkpoint.path} cannot be read: {type(error).__name__}: {str(error)[:200]}.") from error
    if not isinstance(state, dict) or not {"optimizer", "random", "extras"} <= state.keys():
        raise ModelError(f"{checkpoint.path / STATE} is not a training state.")
    if not isinstance(state["extras"], dict):
        raise ModelError(f"{checkpoint.path / STATE} is not a training state.")
    return stored, state


def newest_whole(directory: Path, stage: str, tell: Callable[[int, str], None]) -> Checkpoint | None:
    """The newest checkpoint of `stage` whose files are as they were written; None where there are no checkpoints at all.

    Args:
        tell: gets (step of the checkpoint that is taken, message) for each newer one that is damaged. It is set aside as
            ``<name>.damaged``.

    Raises:
        ModelError: there are checkpoints, but none is whole.
    """
    checkpoints = list_checkpoints(directory, stage)
    found, damaged = _first_whole(list(reversed(checkpoints)))
    if found is not None:
        for each, reason in damaged:
            aside = _set_aside(each)
            tell(
                found.step,
                f"The checkpoint of step {each.step} is damaged: {reason} It was set aside as {aside}; the run goes on from "
                f"step {found.step}.",
            )
    elif damaged:
        reasons = " ".join(reason for _, reason in damaged)
        raise ModelError(
            f"No checkpoint of stage {stage} in {directory} is whole. {reasons} Delete them to begin the stage anew with "
            "--resume, or put back a copy."
        )
    return found


def best_whole(directory: Path, stage: str, tell: Callable[[int, str], None]) -> Checkpoint | None:
    """The checkpoint of `stage` whose validation was best among those whose files are as they were written; None where none
    was validated.

    Args:
        tell: see `newest_whole`; for each better one that is damaged.

    Raises:
        ModelError: checkpoints were validated, but none of them is whole.
    """
    validated = [each for each in list_checkpoints(directory, stage) if math.isfinite(each.validation_loss)]
    found, damaged = _first_whole(sorted(validated, key=lambda each: each.validation_loss))
    if found is None and damaged:
        raise ModelError(
            f"No checkpoint of a validation of stage {stage} in {directory} is whole, and the stage ends with the best one. "
            f"{' '.join(reason for _, reason in damaged)} Put back a copy, then continue with --resume."
        )
    for each, reason in damaged:
        aside = _set_aside(each)
        tell(
            each.step,
            f"The best checkpoint, of step {each.step}, is damaged: {reason} It was set aside as {aside}; the stage ends with "
            "the best of the others.",
        )
    return found


def _first_whole(candidates: Sequence[Checkpoint]) -> tuple[Checkpoint | None, list[tuple[Checkpoint, str]]]:
    """(the first that is whole, the damaged ones before it with what is wrong)."""
    damaged: list[tuple[Checkpoint, str]] = []
    for checkpoint in candidates:
        reason = find_damage(checkpoint)
        if reason is None:
            return checkpoint, damaged
        damaged.append((checkpoint, reason))
    return None, damaged


def _set_aside(checkpoint: Checkpoint) -> Path:
    aside = checkpoint.path.with_name(f"{checkpoint.path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.path.rename(aside)
    return aside


def find_damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's files, compared with the hashes recorded when they were written; None if nothing."""
    try:
        hashes = json.loads((checkpoint.path / META).read_text(encoding="utf-8"))["sha256"]
        for name in (WEIGHTS, STATE):
            if _sha256(checkpoint.path / name) != hashes[name]:
                return f"{checkpoint.path / name} is damaged: its hash is not the recorded one."
    except FileNotFoundError as error:
        return f"{error.filename} is missing."
    except OSError as error:
        return f"{error.filename or checkpoint.path} cannot be read: {error.strerror}."
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{checkpoint.path / META} is damaged."
    return None


def list_checkpoints(directory: Path, stage: str) -> list[Checkpoint]:
    """This stage's checkpoints, oldest first. Folders appear whole: one that lacks a file was damaged (`find_damage`)."""
    found = []
    for path in directory.glob(f"{stage}-*") if directory.is_dir() else ():
        number = path.name[len(stage) + 1 :]
        if number.isdecimal():
            found.append(Checkpoint(path, int(number)))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def checkpoint_folders(directory: Path, stage: str) -> list[Path]:
    """Every folder of this stage: its checkpoints, damaged ones set aside, and what was half written."""
    # the digits tell "chat-0000002" from the stage "chat-2"
    name = re.compile(rf"\.?{re.escape(stage)}-\d{{7,}}(\.\w+)?")
    return [path for path in directory.iterdir() if name.fullmatch(path.name)] if directory.is_dir() else []


def best_of(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The one whose validation loss was lowest, the first of equals; None where none was validated."""
    best = min(checkpoints, key=lambda checkpoint: checkpoint.validation_loss, default=None)
    return best if best is not None and math.isfinite(best.validation_loss) else None


def publish(work: Path, target: Path) -> None:
    """Move a finished folder to its final name so that a crash leaves either the whole of it or nothing."""
    fsync_tree(work)
    if target.exists():
        # re-done work (a resumed run saving the same step): the old folder goes aside first, a rename cannot replace it
        aside = target.with_name(f".{target.name}{ASIDE}")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        work.rename(target)
        shutil.rmtree(aside)
    else:
        work.rename(target)
    fsync(target.parent)


def put_back(aside: Path) -> bool:
    """Give a folder that `publish` had set aside its name again, where a kill came before another had it; whether it was so."""
    target = aside.with_name(aside.name.removeprefix(".").removesuffix(ASIDE))
    if not aside.name.endswith(ASIDE) or target.exists():
        return False
    aside.rename(target)
    return True


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


def _state_of_rank(states: Any, rank: int) -> Mapping[str, Any]:
    # one process's alone, as they were written before there were several
    states = [states] if isinstance(states, Mapping) else states
    if rank < len(states):
        return dict(states[rank])
    digest = hashlib.sha256(bytes(states[0]["cpu"].tolist()) + rank.to_bytes(4, "little")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    state: dict[str, Any] = {"cpu": generator.get_state()}
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(int.from_bytes(digest[8:16], "little"))
    return state


def _copied(value: Any, kept: bool) -> Any:
    """`value` with each tensor in it, whole, copied to memory of its own on the host; not `kept`, they are empty."""
    if isinstance(value, Tensor):
        tensor = whole(value.detach())
        return tensor.to("cpu", copy=True) if kept else torch.empty(0)
    if isinstance(value, Mapping):
        return {key: _copied(item, kept) for key, item in value.items()}
    return type(value)(_copied(item, kept) for item in value) if isinstance(value, list | tuple) else value


def _divided(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's stored state with what belongs to a parameter divided and laid out as the parameter is.

    A fused step goes through memory and asks no tensor for its strides, and a convolution's weight has others where it is
    sharded.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        **state,
        "state": {
            i: {
                name: like(value, parameters[i]) if value.shape == parameters[i].shape else value
                for name, value in each.items()
            }
            for i, each in state["state"].items()
        },
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()

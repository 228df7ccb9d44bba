"""Finding a foreign checkpoint, telling its layout, and taking the tokenizer's tensors out of it by reference name.

What a checkpoint is, its content decides, not its file name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ett.errors import ModelError
from ett.tokenizers.layout_architecture import Stated, reference_body, state_diffusers, state_reference
from ett.tokenizers.layout_discriminator import PREFIX, shape_of
from ett.tokenizers.layout_files import read_mapping, read_weights
from ett.tokenizers.layout_names import from_diffusers, some

SEED_VOKEN, EMU, DIFFUSERS = LAYOUTS = ("seed-voken", "emu3.5", "diffusers")
EMU_MODEL_TYPE = "Emu3p5VisionVQ"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHT_FILES = (DIFFUSERS_WEIGHTS, "diffusion_pytorch_model.bin", "model.safetensors", "model.ckpt")
"""What is looked for in a folder, in this order; after them a lone ``*.ckpt``."""
_EMA, _LOSS = "model_ema.", "loss."
_EMA_STATE = ("decay", "num_updates")


@dataclass(frozen=True)
class LeftOut:
    """Something of the source that the destination does not hold: `what` it is, how many tensors, and `why`."""

    what: str
    count: int
    why: str

    def __str__(self) -> str:
        number = f" ({self.count} tensor{'s' * (self.count > 1)})" if self.count else ""
        return f"{self.what}{number}: {self.why}"


@dataclass(frozen=True)
class Source:
    """A foreign checkpoint that was read.

    Attributes:
        layout: one of `LAYOUTS`.
        weights_file: where `tensors` come from; config_file: what `stated` was read from, if anything.
        tensors: the tokenizer's, by reference name, as stored (not yet checked).
        weights: "EMA" or "raw", and why.
        stated: what the configuration says.
        left_out, notes: for the report.
        discriminator: the one that the tokenizer was trained against (``main.*``); empty where the file has none.
    """

    layout: str
    weights_file: Path
    config_file: Path | None
    tensors: Mapping[str, Any]
    weights: str
    stated: Stated
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    discriminator: Mapping[str, Tensor] = field(default_factory=dict)


def read_source(source: Path, config: Path | None, *, raw: bool) -> Source:
    """Read the checkpoint at `source`, a file or a folder; `config` replaces the configuration beside it.

    Raises:
        ModelError: nothing there, no known layout, damaged, incomplete averages, or an unsupported configuration.
    """
    weights = _weights_file(source)
    content = read_weights(weights)
    if isinstance(content.get("state_dict"), Mapping):
        layout, tensors = SEED_VOKEN, {str(name): value for name, value in content["state_dict"].items()}
    elif any(name.startswith("encoder.down_blocks.") for name in content):
        layout, tensors = DIFFUSERS, content
    elif any(name.startswith("encoder.down.") for name in content):
        layout, tensors = EMU, content
    else:
        raise ModelError(
            f"{weights} is in no known layout ({', '.join(LAYOUTS)}): it has neither a state_dict nor tensors named "
            f"encoder.down.* or encoder.down_blocks.*, but {some([str(name) for name in content]) or 'nothing'}."
        )
    path, stated = _configuration(layout, weights, config)
    left_out = tuple(
        LeftOut(name, 0, f"a second file of weights; {weights.name} was read")
        for name in WEIGHT_FILES
        if source.is_dir() and name != weights.name and (source / name).is_file()
    )
    if layout == SEED_VOKEN:
        chosen, kind, dropped = _lightning_tensors(tensors, raw, str(weights))
        notes = _average_notes(tensors, kind, raw)
        other = discriminator_of(tensors)
        return Source(layout, weights, path, chosen, kind, stated, (*dropped, *left_out), notes, other)
    if layout == DIFFUSERS:
        tensors = from_diffusers(tensors, str(weights))
    return Source(layout, weights, path, tensors, "raw (the layout has no EMA)", stated, left_out)


def _weights_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise ModelError(f"There is no {source}. Give a checkpoint's file or folder.")
    for name in WEIGHT_FILES:
        if (source / name).is_file():
            return source / name
    if found := sorted(source.glob("*.index.json")):
        raise ModelError(f"{source} holds weights in several parts ({found[0].name}); only a single file is read.")
    lone = sorted(source.glob("*.ckpt"))
    if len(lone) == 1:
        return lone[0]
    if lone:
        raise ModelError(f"{source} holds {len(lone)} checkpoints ({some([p.name for p in lone])}). Give one of them.")
    hint = f" It has a folder vae: give {source / 'vae'}." if (source / "vae").is_dir() else ""
    raise ModelError(f"{source} holds no weights: looked for {', '.join(WEIGHT_FILES)} and *.ckpt.{hint}")


def _configuration(layout: str, weights: Path, given: Path | None) -> tuple[Path | None, Stated]:
    """(its file, what it says); SEED-Voken's checkpoints need none."""
    folder = weights.parent
    beside: tuple[Path, ...]
    if layout == SEED_VOKEN:
        beside = (weights.with_suffix(".yaml"), folder / "config.yaml")
    elif layout == EMU and weights.suffix != ".safetensors":
        beside = (folder / "config.yaml", folder / "config.json")
    elif layout == EMU:
        beside = (folder / "config.json", folder / "config.yaml")
    else:
        beside = (folder / "config.json",)
    path = given or next((p for p in beside if p.is_file()), None)
    if path is None:
        if layout == SEED_VOKEN:
            return None, Stated({})
        wanted = " or ".join(p.name for p in beside)
        raise ModelError(
            f"{weights} has no {wanted} beside it, which the layout {layout} needs. Give one with --config."
        )
    content = read_mapping(path)
    if layout == DIFFUSERS:
        return path, state_diffusers(content, str(path))
    if layout == SEED_VOKEN and given is None and reference_body(content) is None:
        return None, Stated({})  # a file of that name about something else
    if layout == EMU and path.suffix == ".json":
        _check_model_type(content, path)
    return path, state_reference(content, str(path))


def _check_model_type(content: Mapping[str, Any], path: Path) -> None:
    kind = content.get("model_type")
    if kind == "ett_vision_tokenizer":
        raise ModelError(f"{path.parent} is a tokenizer saved by ett already: use it as it is.")
    if kind != EMU_MODEL_TYPE:
        raise ModelError(f"{path} is of a model_type {kind!r}; only {EMU_MODEL_TYPE} is read with these tensor names.")


def _lightning_tensors(
    state: Mapping[str, Any], raw: bool, where: str
) -> tuple[dict[str, Any], str, tuple[LeftOut, ...]]:
    """(the tokenizer's tensors by reference name, which they are, what was left out) of a Lightning state_dict."""
    own = {name: t for name, t in state.items() if not name.startswith((_LOSS, _EMA))}
    averages = {name[len(_EMA) :]: t for name, t in state.items() if name.startswith(_EMA)}
    bookkeeping = [name for name in _EMA_STATE if averages.pop(name, None) is not None]
    strange = "it is no patch discriminator as this package trains, or holds numbers that are not finite"
    known = bool(discriminator_of(state))
    out = [
        LeftOut(
            f"{group}.*",
            count,
            strange
            if group == PREFIX.removesuffix(".") and not known
            else "it trains the tokenizer and is no part of it",
        )
        for group, count in _groups(state).items()
    ]
    if not averages:
        return own, "raw (the file holds no EMA)", tuple(out)
    if raw:
        out.append(LeftOut("model_ema.*", len(averages) + len(bookkeeping), "EMA weights; the raw ones were asked for"))
        return own, "raw (as asked for; the file holds EMA weights too)", tuple(out)
    chosen, losses = _averages_by_name(own, averages, where)
    out.append(LeftOut("raw weights", len(own), "the EMA weights were taken; --raw takes these instead"))
    if losses:
        out.append(LeftOut("model_ema.loss*", losses, "averages of the training losses' weights"))
    if bookkeeping:
        out.append(LeftOut("model_ema." + ", ".join(bookkeeping), len(bookkeeping), "state of the averaging itself"))
    return chosen, "EMA", tuple(out)


def discriminator_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The discriminator's tensors of a Lightning state_dict by their own names (``main.*``), in float32; empty where there is
    none, or none of the kind that this package trains, with finite values."""
    found = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    if shape_of(found) is None or not all(map(_is_usable, found.values())):
        return {}
    return {name: t.float() if t.is_floating_point() else t.long() for name, t in found.items()}


def _is_usable(tensor: Any) -> bool:
    """Whether a tensor is dense, of real numbers, there, and finite."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided or tensor.is_complex():
        return False
    return bool(tensor.isfinite().all())


def _groups(state: Mapping[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in state:
        if name.startswith(_LOSS):
            group = ".".join(name.split(".")[:2])
            counts[group] = counts.get(group, 0) + 1
    return counts


def _averages_by_name(own: Mapping[str, Any], averages: Mapping[str, Any], where: str) -> tuple[dict[str, Any], int]:
    """(averages under the names of `own`, number of those of training losses): an average's name has lost its dots."""
    dotless: dict[str, str] = {}
    for name in own:
        if (other := dotless.setdefault(name.replace(".", ""), name)) != name:
            raise ModelError(f"{where}: {other} and {name} share one EMA name. Import with --raw.")
    losses = [key for key in averages if key.startswith("loss") and key not in dotless]
    missing = [name for key, name in dotless.items() if key not in averages]
    strange = [key for key in averages if key not in dotless and not key.startswith("loss")]
    reshaped = [
        f"{name} is {_shape(averages[key])}, raw {_shape(own[name])}"
        for key, name in dotless.items()
        if key in averages and _shape(averages[key]) != _shape(own[name])
    ]
    if missing or strange or reshaped:
        problems = [
            f"{len(names)} {what} ({some(names)})"
            for what, names in (
                ("missing", missing),
                ("without a tensor they average", strange),
                ("of another shape than the raw weights", reshaped),
            )
            if names
        ]
        raise ModelError(
            f"{where}: its EMA weights are not complete or not those of this model: {'; '.join(problems)}. --raw takes the raw "
            "weights."
        )
    return {name: averages[key] for key, name in dotless.items()}, len(losses)


def _shape(tensor: Any) -> list[int] | str:
    return list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__


def _average_notes(state: Mapping[str, Any], kind: str, raw: bool) -> tuple[str, ...]:
    updates = state.get(_EMA + "num_updates")
    if kind != "EMA" or raw or updates is None or getattr(updates, "numel", lambda: 0)() != 1:
        return ()
    if not math.isfinite(float(updates)):
        return (f"num_updates of its EMA weights is {float(updates)}, which says nothing of them",)
    number = int(updates)
    if number == 0:
        return ("the EMA weights were never updated (num_updates is 0): they may be those before training",)
    return (f"EMA of {number:,} updates",) if number > 0 else ()

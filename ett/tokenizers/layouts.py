"""Import and export of vision tokenizers in other projects' checkpoint layouts (docs/checkpoints.md).

``seed-voken``  a Lightning checkpoint: tensors under ``state_dict`` with reference names, beside them the training losses'
                (``loss.*``) and exponential averages (``model_ema.<name without its dots>``)
``emu3.5``      a folder of ``config.json`` and ``model.safetensors``, or of ``config.yaml`` and ``model.ckpt``: reference names
``diffusers``   a folder of ``config.json`` and ``diffusion_pytorch_model.safetensors`` (or ``.bin``): diffusers' names

The architecture is always inferred from the tensors' shapes; a configuration must agree with it, and adds what no shape shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ett.config import from_mapping
from ett.errors import ModelError, unknown
from ett.tokenizers.base import CONFIG_NAME, WEIGHTS_NAME, VisionTokenizer, load_strictly
from ett.tokenizers.ibq import IBQConfig, IBQTokenizer
from ett.tokenizers.layout_architecture import (
    REFERENCE_ENTROPY_TEMPERATURE,
    REFERENCE_NORM_GROUPS,
    choose_norm_groups,
    ddconfig,
    diffusers_config,
    infer_architecture,
)
from ett.tokenizers.layout_discriminator import DISCRIMINATOR_NAME, PREFIX, shape_of
from ett.tokenizers.layout_files import as_float32, check_destination, publish
from ett.tokenizers.layout_names import some, to_diffusers, translate
from ett.tokenizers.layout_sources import (
    DIFFUSERS_WEIGHTS,
    EMU,
    EMU_MODEL_TYPE,
    LAYOUTS,
    SEED_VOKEN,
    LeftOut,
    Source,
    read_source,
)

FILE_SUFFIXES = (".ckpt", ".pt", ".pth")
"""A destination that ends so is a file (``seed-voken`` alone), any other a folder."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LayoutReport:
    """What an import read or an export wrote; `str` of it is for people.

    Attributes:
        layout: one of `LAYOUTS`.
        source, destination: the file or folder read, and where it went.
        weights: "EMA" or "raw", and why.
        num_tensors, num_parameters: of the tokenizer; all of them were read or written.
        config: the tokenizer's architecture.
        downsample: pixels per token side.
        discriminator: of an import, what became of the one that the source ships; "" where it ships none that can be used.
        left_out: what of the source was not taken over.
        notes: what was assumed, converted or cannot be expressed.
    """

    layout: str
    source: str
    destination: str
    weights: str
    num_tensors: int
    num_parameters: int
    config: IBQConfig
    downsample: int
    discriminator: str = ""
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        c = self.config
        levels = [str(i) for i in range(len(c.channel_multipliers)) if c.has_attention(i)]
        rows = [
            ("layout", self.layout),
            ("source", self.source),
            ("destination", self.destination),
            ("weights", self.weights),
            ("tensors", f"{self.num_tensors}, {self.num_parameters:,} parameters"),
            ("codebook", f"K = {c.codebook_size:,}, D = {c.codebook_dim}"),
            ("downsample", f"{self.downsample} pixels per token side"),
            (
                "architecture",
                f"channels {c.channels} x {list(c.channel_multipliers)}, {c.num_res_blocks} residual blocks per level, "
                f"attention at level {', '.join(levels) or 'none'} (0 is full resolution), z_channels {c.z_channels}, "
                f"norm_groups {c.norm_groups}",
            ),
            *([("discriminator", self.discriminator)] if self.discriminator else []),
            *(("left out", str(out)) for out in self.left_out),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{name:<14}{text}" for name, text in rows)


def read_tokenizer(
    source: str | Path, *, raw: bool = False, config: str | Path | None = None, norm_groups: int | None = None
) -> tuple[IBQTokenizer, LayoutReport]:
    """The tokenizer of a foreign checkpoint, in float32 and evaluation mode, and what was read. No discriminator comes with it.

    Args:
        source: a file or folder of one of `LAYOUTS`; which one, its content decides.
        raw: take the raw weights of a SEED-Voken checkpoint; else its exponential averages where it has them.
        config: the configuration to read instead of the one beside the weights.
        norm_groups: of every GroupNorm, which no tensor shows; None takes the configuration's, else the reference's 32.

    Raises:
        UserError: nothing there, no known layout, a damaged file, one that would have to run code, an unsupported
            configuration or one of other weights, tensors that are missing or too many.
    """
    return _interpreted(read_source(Path(source), None if config is None else Path(config), raw=raw), norm_groups)


def _interpreted(found: Source, norm_groups: int | None) -> tuple[IBQTokenizer, LayoutReport]:
    where = str(found.weights_file)
    tensors, converted = as_float32(found.tensors, where)
    architecture = infer_architecture(tensors, where)
    found.stated.compare(architecture, str(found.config_file))
    assumed: list[str] = []
    groups = norm_groups if norm_groups is not None else found.stated.norm_groups
    if groups is None:
        groups, remark = choose_norm_groups(architecture)
        assumed.append(remark)
    temperature = found.stated.entropy_temperature
    if found.config_file is None:
        assumed.append(
            "no configuration: taken for an IBQ tokenizer, whose index is the code of the largest dot product"
        )
    if architecture["attention_levels"] == (len(architecture["channel_multipliers"]) - 1,):
        architecture["attention_levels"] = (-1,)
    fields = {
        **architecture,
        "norm_groups": groups,
        "entropy_temperature": REFERENCE_ENTROPY_TEMPERATURE if temperature is None else temperature,
    }
    tokenizer = _build(from_mapping(IBQConfig, fields, where), tensors, where)
    report = _report(tokenizer, found.layout, source=where, weights=found.weights)
    notes = (*found.notes, *found.stated.remarks, *converted, *assumed)
    return tokenizer, replace(report, left_out=found.left_out, notes=notes)


def import_tokenizer(
    source: str | Path,
    destination: str | Path,
    *,
    raw: bool = False,
    config: str | Path | None = None,
    norm_groups: int | None = None,
    overwrite: bool = False,
) -> LayoutReport:
    """Write the tokenizer of a foreign checkpoint as `VisionTokenizer.save_pretrained` does, and beside it the discriminator,
    if the checkpoint ships one: training goes on with it.

    Args:
        source, raw, config, norm_groups: of `read_tokenizer`.
        destination: a folder; it appears complete or not at all.
        overwrite: replace a destination that holds nothing but a tokenizer.

    Raises:
        UserError: as `read_tokenizer`, or a destination that is occupied or cannot be written.
    """
    destination = Path(destination)
    check_destination(destination, Path(source), folder=True, overwrite=overwrite)
    found = read_source(Path(source), None if config is None else Path(config), raw=raw)
    tokenizer, report = _interpreted(found, norm_groups)
    if found.discriminator:
        shape = shape_of(found.discriminator)
        assert shape is not None
        kept = f"kept as {DISCRIMINATOR_NAME}: channels {shape[0]}, strided_layers {shape[1]}; training goes on with it"
        group = f"{PREFIX}*"
        report = replace(
            report, discriminator=kept, left_out=tuple(out for out in report.left_out if out.what != group)
        )

    def write(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        if found.discriminator:
            named = {f"discriminator.{name}": t.contiguous() for name, t in found.discriminator.items()}
            save_file(named, folder / DISCRIMINATOR_NAME, metadata={"format": "pt"})

    publish(destination, write, folder=True)
    return replace(report, destination=str(destination))


def export_tokenizer(
    tokenizer: VisionTokenizer,
    destination: str | Path,
    layout: str,
    *,
    dtype: str = "float32",
    source: Path | None = None,
    overwrite: bool = False,
) -> LayoutReport:
    """Write `tokenizer` in one of `LAYOUTS`.

    Args:
        tokenizer: an IBQ tokenizer whose codes are found by dot product.
        destination: a folder, or for ``seed-voken`` also a file (``*.ckpt``); it appears complete or not at all.
        layout: one of `LAYOUTS`.
        dtype: one of `DTYPES`; a narrower one than float32 only where it changes no value.
        source: where `tokenizer` was loaded from, for the report and so that it is not replaced.
        overwrite: replace a destination that holds nothing but a tokenizer.

    Raises:
        ModelError: an unknown layout, a tokenizer that the layout cannot express, values that `dtype` would round, or a
            destination that is occupied or cannot be written.
    """
    if layout not in LAYOUTS:
        raise ModelError(unknown("layout", layout, LAYOUTS))
    destination = Path(destination)
    folder = destination.suffix not in FILE_SUFFIXES
    if not folder and layout != SEED_VOKEN:
        raise ModelError(f"The layout {layout} is a folder; {destination} is a file's name. Leave its suffix out.")
    ibq = _expressible(tokenizer, layout)
    check_destination(destination, source, folder=folder, overwrite=overwrite)
    tensors = _narrow({name: t.detach().cpu().contiguous() for name, t in ibq.state_dict().items()}, dtype)
    publish(destination, _writer(layout, ibq.config, tensors, folder), folder=folder)
    report = _report(ibq, layout, source=str(source or "memory"), weights=f"as they are, in {dtype}")
    return replace(
        report, destination=str(destination), notes=(*_export_notes(ibq.config, layout, folder), *_left_behind(source))
    )


def _build(config: IBQConfig, tensors: Mapping[str, Tensor], where: str) -> IBQTokenizer:
    with torch.device("meta"):
        tokenizer = IBQTokenizer(config)
    load_strictly(tokenizer.to_empty(device="cpu"), dict(tensors), where)
    return tokenizer.eval()


def _report(tokenizer: IBQTokenizer, layout: str, *, source: str, weights: str) -> LayoutReport:
    state = tokenizer.state_dict()
    parameters = sum(tensor.numel() for tensor in state.values())
    return LayoutReport(layout, source, "", weights, len(state), parameters, tokenizer.config, tokenizer.downsample)


# -- export ----------------------------------------------------------------------------------------------------------------


def _expressible(tokenizer: VisionTokenizer, layout: str) -> IBQTokenizer:
    """`tokenizer`, if code that reads `layout` would find the same indices and codes with it; else ModelError."""
    if not isinstance(tokenizer, IBQTokenizer):
        raise ModelError(f"Only IBQ tokenizers can be exported; this one is a {type(tokenizer).__name__}.")
    config = tokenizer.config
    problem = None
    if config.similarity != "dot":
        problem = (
            f"similarity: {config.similarity} picks the nearest code and keeps its unit of distance in the tensor "
            "quantize.distance_unit; the layouts know the largest dot product alone, so every index could differ"
        )
    elif config.normalize:
        problem = (
            "normalize: true compares l2-normalised codes with a learned scale (the tensor quantize.log_scale); the layouts "
            "have neither"
        )
    elif layout not in (SEED_VOKEN, EMU):
        levels = len(config.channel_multipliers)
        attention = [level for level in range(levels) if config.has_attention(level)]
        if config.channel_multipliers[0] != 1:
            problem = (
                f"its first level is {config.channel_multipliers[0]} times as wide as conv_in; there the two are equal"
            )
        elif attention not in ([], [levels - 1]):
            problem = f"it has attention at levels {attention}; AutoencoderVQ has it at the last level or nowhere"
    unknown_names = [n for n in tokenizer.state_dict() if translate(n, 1, to_diffusers=True) is None]
    if unknown_names and not problem:
        problem = f"the layouts have no place for its {some(unknown_names)}"
    if problem:
        raise ModelError(f"This tokenizer cannot be written in the layout {layout}: {problem}.")
    return tokenizer


def _export_notes(config: IBQConfig, layout: str, folder: bool) -> tuple[str, ...]:
    """What the layout does not hold, and what follows; none of it changes an index of a float32 reader."""
    notes: list[str] = []
    if config.norm_groups != REFERENCE_NORM_GROUPS:
        kept = "ett reads it from the configuration" if folder else "import the file with --norm-groups"
        notes.append(
            f"norm_groups is {config.norm_groups}: the projects' own code has {REFERENCE_NORM_GROUPS} written in and would "
            f"compute something else; {kept}"
        )
    if config.temperature != 1.0:
        notes.append(f"temperature {config.temperature} is not written: it shapes gradients in training, no index")
    if config.entropy_temperature != REFERENCE_ENTROPY_TEMPERATURE and (layout not in (SEED_VOKEN, EMU) or not folder):
        notes.append(
            f"entropy_temperature {config.entropy_temperature} is not written: it is of the training loss alone"
        )
    if config.precision != "float32":
        notes.append(f"precision {config.precision} is not written: in another precision some indices can differ")
    if layout == SEED_VOKEN:
        notes.append("there are no EMA weights: the file is for a configuration with use_ema: false")
    return tuple(notes)


def _left_behind(source: Path | None) -> tuple[str, ...]:
    """What lies beside the source and belongs to training."""
    if source is None or not (source / DISCRIMINATOR_NAME).is_file():
        return ()
    return (
        f"{DISCRIMINATOR_NAME} beside {source} is not written: training that goes on from here begins with a fresh one",
    )


def _narrow(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    if dtype not in DTYPES:
        raise ModelError(unknown("dtype", dtype, DTYPES))
    if dtype == "float32":
        return dict(tensors)
    out = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    rounded = [name for name, tensor in tensors.items() if not torch.equal(out[name].to(tensor.dtype), tensor)]
    if rounded:
        raise ModelError(f"{dtype} would round {len(rounded)} tensors, {rounded[0]} first. Export in float32.")
    return out


def _writer(layout: str, config: IBQConfig, tensors: dict[str, Tensor], folder: bool) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        if layout == SEED_VOKEN:
            torch.save({"state_dict": tensors}, path / "tokenizer.ckpt" if folder else path)
            if folder:
                _write_yaml(path / "tokenizer.yaml", {"model": _lightning_config(config)})
        elif layout == EMU:
            _write_json(path / CONFIG_NAME, _emu_json(config))
            _write_yaml(path / "config.yaml", _reference_config(config))
            save_file(tensors, path / WEIGHTS_NAME, metadata={"format": "pt"})
            torch.save(tensors, path / "model.ckpt")
        else:
            _write_json(path / CONFIG_NAME, diffusers_config(config))
            named = to_diffusers(tensors, len(config.channel_multipliers))
            save_file(named, path / DIFFUSERS_WEIGHTS, metadata={"format": "pt"})

    return write


def _reference_config(config: IBQConfig) -> dict[str, Any]:
    return {
        "ddconfig": ddconfig(config),
        "n_embed": config.codebook_size,
        "embed_dim": config.codebook_dim,
        **_beyond_reference(config),
        "entropy_temperature": config.entropy_temperature,
    }


def _lightning_config(config: IBQConfig) -> dict[str, Any]:
    arguments = {**_reference_config(config), "l2_normalize": False, "use_ema": False}
    return {"class_path": "src.IBQ.models.ibqgan.IBQ", "init_args": arguments}


def _emu_json(config: IBQConfig) -> dict[str, Any]:
    return {
        "model_type": EMU_MODEL_TYPE,
        "architectures": [f"{EMU_MODEL_TYPE}Model"],
        **ddconfig(config),
        "codebook_size": config.codebook_size,
        "embed_dim": config.codebook_dim,
        **_beyond_reference(config),
        "entropy_temperature": config.entropy_temperature,
    }


def _beyond_reference(config: IBQConfig) -> dict[str, Any]:
    """Keys that the reference does not have and we read back."""
    return {} if config.norm_groups == REFERENCE_NORM_GROUPS else {"norm_groups": config.norm_groups}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")

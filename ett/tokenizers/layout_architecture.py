"""The architecture of a foreign checkpoint: what tensor shapes show, and what its configuration states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from torch import Tensor

from ett.errors import ModelError
from ett.tokenizers.ibq import IBQConfig

REFERENCE_NORM_GROUPS = 32
REFERENCE_ENTROPY_TEMPERATURE = 0.01
REFERENCE_RESOLUTION = 256
"""Training size [pixels] that configurations of the reference state attention by."""


def infer_architecture(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """`IBQConfig`'s fields that tensor shapes show, from tensors by reference name.

    Raises:
        ModelError: a tensor that every such tokenizer has is missing, or widths that are no multiples of the first.
    """

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in tensors:
            raise ModelError(
                f"{where} has no tensor {name}: it is no tokenizer of this architecture, or not all of it is there."
            )
        if tensors[name].ndim != dims or 0 in tensors[name].shape:
            raise ModelError(f"{where}: {name} is {list(tensors[name].shape)}; expected {dims} dimensions, none empty.")
        return tuple(tensors[name].shape)

    first = "encoder.down.0.block.{}.conv1.weight"
    channels = shape("encoder.conv_in.weight", 4)[0]
    shape(first.format(0), 4)
    levels = 1
    while f"encoder.down.{levels}.block.0.conv1.weight" in tensors:
        levels += 1
    blocks = 1
    while first.format(blocks) in tensors:
        blocks += 1
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    if any(width % channels for width in widths):
        raise ModelError(f"{where}: the levels' widths {widths} must be multiples of the first layer's, {channels}.")
    attention = tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in tensors)
    codes, dim = shape("quantize.embedding.weight", 2)
    return {
        "channels": channels,
        "channel_multipliers": tuple(width // channels for width in widths),
        "num_res_blocks": blocks,
        "attention_levels": attention,
        "z_channels": shape("encoder.conv_out.weight", 4)[0],
        "codebook_size": codes,
        "codebook_dim": dim,
    }


@dataclass(frozen=True)
class Stated:
    """What a configuration says.

    Attributes:
        architecture: `IBQConfig`'s fields that it states, to be compared with the tensors.
        norm_groups, entropy_temperature: what no shape shows; None where it does not say.
        remarks: for the report.
    """

    architecture: Mapping[str, Any]
    norm_groups: Any = None
    entropy_temperature: Any = None
    remarks: tuple[str, ...] = ()

    def compare(self, inferred: Mapping[str, Any], where: str) -> None:
        """Raises ModelError where the configuration and the tensors' shapes disagree."""
        wrong = [
            f"{key} is {value}, the tensors' shapes give {inferred[key]}"
            for key, value in self.architecture.items()
            # to Python true is 1
            if value is not None
            and (value != inferred[key] or isinstance(value, bool) != isinstance(inferred[key], bool))
        ]
        if wrong:
            raise ModelError(f"{where} does not describe these weights: {'; '.join(wrong)}.")


def reference_body(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of a SEED-Voken or Emu3.5 configuration that states the tokenizer, or None where there is none.

    Emu3.5's YAML has ``ddconfig`` at the top level, its JSON the same keys without it, SEED-Voken's YAML under
    ``model.init_args``.
    """
    model = content.get("model")
    inside = next((model[k] for k in ("init_args", "params") if k in model), None) if isinstance(model, dict) else None
    body = content if inside is None else inside
    if not isinstance(body, Mapping):
        return None
    return body if isinstance(body.get("ddconfig"), Mapping) or "ch_mult" in body else None


def state_reference(content: Mapping[str, Any], where: str) -> Stated:
    """What a SEED-Voken or Emu3.5 configuration says.

    Raises:
        ModelError: not such a configuration, or a tokenizer that this package does not compute the same way.
    """
    body = reference_body(content)
    if body is None:
        raise ModelError(f"{where} states no tokenizer: it has neither ddconfig nor ch_mult.")
    model = content.get("model")
    kind = str((model.get("class_path") or model.get("target") or "") if isinstance(model, dict) else "")
    if kind and not kind.endswith("IBQ"):
        raise ModelError(f"{where} is of a {kind}; only IBQ's quantizer (the largest dot product) is read.")
    shape = body["ddconfig"] if isinstance(body.get("ddconfig"), Mapping) else body
    for name, expected in (("double_z", False), ("in_channels", 3), ("out_ch", 3)):
        _require(shape, name, expected, where)
    for name in ("l2_normalize", "cosine_similarity"):
        _require(body, name, False, where)
    _require(body, "remap", None, where)
    architecture = {
        "channels": shape.get("ch"),
        "channel_multipliers": _integers(shape.get("ch_mult"), "ch_mult", where),
        "num_res_blocks": shape.get("num_res_blocks"),
        "attention_levels": _attention_levels(shape, where),
        "z_channels": shape.get("z_channels"),
        "codebook_size": body.get("n_embed", body.get("codebook_size")),
        "codebook_dim": body.get("embed_dim"),
    }
    dropout = shape.get("dropout")
    remarks = (f"dropout {dropout} of the source is not carried over",) if dropout else ()
    groups = body.get("norm_groups", shape.get("norm_groups"))
    return Stated(architecture, groups, body.get("entropy_temperature"), remarks)


def _attention_levels(shape: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    sizes = _integers(shape.get("attn_resolutions"), "attn_resolutions", where)
    side, multipliers = shape.get("resolution"), shape.get("ch_mult")
    if sizes is None or not isinstance(side, int) or multipliers is None:
        return None
    return tuple(level for level in range(len(multipliers)) if side // 2**level in sizes)


def _integers(value: Any, name: str, where: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(item, int) for item in value):
        raise ModelError(f"{where}: {name} must be a list of whole numbers, it is {value!r}.")
    return tuple(value)


def _require(given: Mapping[str, Any], name: str, expected: Any, where: str) -> None:
    if name in given and (given[name] or None) != (expected or None):
        raise ModelError(f"{where}: {name} = {given[name]!r} is not supported; only {expected!r} is.")


def state_diffusers(content: Mapping[str, Any], where: str) -> Stated:
    """What a diffusers-style ``config.json`` (URSA's ``AutoencoderVQ``) says; errors as `state_reference`."""
    kind = content.get("_class_name", "AutoencoderVQ")
    if kind in ("VQModel", "AutoencoderKL"):
        raise ModelError(f"{where} is of a {kind}, which has no quantizer by dot product; only AutoencoderVQ is read.")
    for name, expected in (("in_channels", 3), ("out_channels", 3), ("act_fn", "silu"), ("temporal_stride", 1)):
        _require(content, name, expected, where)
    _require(content, "_quantizer_name", "VQuantizer", where)
    widths = _integers(content.get("block_out_channels"), "block_out_channels", where)
    if widths is not None and not (widths and all(width > 0 and width % widths[0] == 0 for width in widths)):
        raise ModelError(f"{where}: block_out_channels = {list(widths)} must be multiples of the first.")
    last = len(widths) - 1 if widths else None
    attention = content.get("attn_down_block")
    architecture = {
        "channels": widths[0] if widths else None,
        "channel_multipliers": tuple(width // widths[0] for width in widths) if widths else None,
        "num_res_blocks": content.get("layers_per_block"),
        "attention_levels": ((last,) if attention else ()) if last is not None and attention is not None else None,
        "z_channels": content.get("latent_channels"),
        "codebook_size": content.get("num_vq_embeddings"),
        "codebook_dim": content.get("vq_embed_dim"),
    }
    remarks = () if kind == "AutoencoderVQ" else (f"_class_name is {kind}; it was read as an AutoencoderVQ",)
    return Stated(architecture, content.get("norm_num_groups"), None, remarks)


def choose_norm_groups(architecture: Mapping[str, Any]) -> tuple[int, str]:
    """(groups of every GroupNorm where nothing states them, a remark on where the number comes from)."""
    widths = [architecture["channels"] * m for m in architecture["channel_multipliers"]]
    groups = gcd(REFERENCE_NORM_GROUPS, architecture["channels"], *widths)
    if groups == REFERENCE_NORM_GROUPS:
        return groups, f"GroupNorm has {groups} groups as in the reference; no tensor shows it"
    return groups, (
        f"GroupNorm has {groups} groups: the reference's {REFERENCE_NORM_GROUPS} do not divide the widths {widths}, and no "
        "tensor shows the number. If it is another, import again with --norm-groups"
    )


def ddconfig(config: IBQConfig) -> dict[str, Any]:
    """The reference's description of encoder and decoder."""
    levels = len(config.channel_multipliers)
    side = max(REFERENCE_RESOLUTION, 2**levels)
    return {
        "double_z": False,
        "z_channels": config.z_channels,
        "resolution": side,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.channels,
        "ch_mult": list(config.channel_multipliers),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [side // 2**level for level in range(levels) if config.has_attention(level)],
        "dropout": 0.0,
    }


def diffusers_config(config: IBQConfig) -> dict[str, Any]:
    """``config.json`` of URSA's AutoencoderVQ."""
    levels = len(config.channel_multipliers)
    attention = config.has_attention(levels - 1)
    return {
        "_class_name": "AutoencoderVQ",
        "_quantizer_name": "VQuantizer",
        "act_fn": "silu",
        "attn_down_block": attention,
        "attn_up_block": attention,
        "block_out_channels": list(config.widths),
        "decoder_dtype": None,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": config.z_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "num_vq_embeddings": config.codebook_size,
        "out_channels": 3,
        "sample_size": REFERENCE_RESOLUTION,
        "spatial_stride": config.downsample,
        "temporal_stride": 1,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "vq_embed_dim": config.codebook_dim,
    }

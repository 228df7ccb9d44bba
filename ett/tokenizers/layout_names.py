"""Names of the foreign layouts.

"Reference names" are those of SEED-Voken and Emu3.5, which are also this package's own
(``encoder.down.{i}.block.{j}.conv1.weight``); diffusers' differ (``encoder.down_blocks.{i}.resnets.{j}.conv1.weight``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ett.errors import ModelError

# (reference, diffusers); levels of the decoder count in opposite directions
_PREFIXES = (
    ("conv_in.", "conv_in."),
    ("down.{i}.block.{j}.", "down_blocks.{i}.resnets.{j}."),
    ("down.{i}.attn.{j}.", "down_blocks.{i}.attentions.{j}."),
    ("down.{i}.downsample.", "down_blocks.{i}.downsamplers.0."),
    ("up.{i}.block.{j}.", "up_blocks.{i}.resnets.{j}."),
    ("up.{i}.attn.{j}.", "up_blocks.{i}.attentions.{j}."),
    ("up.{i}.upsample.", "up_blocks.{i}.upsamplers.0."),
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.attn_1.", "mid_block.attentions.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("norm_out.", "conv_norm_out."),
    ("conv_out.", "conv_out."),
)
_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_RESIZE = {"conv": "conv"}
_LINEAR = ("q", "k", "v", "proj_out")
_CODEBOOK = ("quantize.embedding.weight", "quantizer.embedding.weight")
_OUTSIDE = ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias")


def translate(name: str, levels: int, *, to_diffusers: bool) -> str | None:
    """The same tensor's name in the other layout, or None where the layout has no such name.

    Args:
        name: a reference name (`to_diffusers`) or a diffusers name.
        levels: of the architecture; the decoder's counting is reversed.
    """
    source, target = (0, 1) if to_diffusers else (1, 0)
    if name == _CODEBOOK[source]:
        return _CODEBOOK[target]
    if name in _OUTSIDE:
        return name
    module, _, rest = name.partition(".")
    stem, _, leaf = rest.rpartition(".")
    if module not in ("encoder", "decoder") or leaf not in ("weight", "bias"):
        return None
    for pair in _PREFIXES:
        found = re.fullmatch(_pattern(pair[source]) + r"(?P<layer>[\w.]*)", stem + ".")
        if found is None:
            continue
        layer = _layer(pair[0], found["layer"].removesuffix("."), to_diffusers)
        if layer is None:
            return None
        place = {key: int(value) for key, value in found.groupdict().items() if key in "ij"}
        if pair[0].startswith("up."):
            place["i"] = levels - 1 - place["i"]
        return ".".join(part for part in (module, pair[target].format(**place).rstrip("."), layer, leaf) if part)
    return None


def _pattern(template: str) -> str:
    # no leading zeros, so that two names never mean one tensor
    return re.sub(r"\\\{(i|j)\\\}", r"(?P<\1>0|[1-9][0-9]*)", re.escape(template))


def _layer(reference_prefix: str, layer: str, to_diffusers: bool) -> str | None:
    if ".block" in reference_prefix:
        table = _RESNET
    elif ".attn" in reference_prefix:
        table = _ATTENTION
    elif "sample" in reference_prefix:
        table = _RESIZE
    else:
        table = {"": ""}
    return (table if to_diffusers else {value: key for key, value in table.items()}).get(layer)


def _is_linear(reference_name: str) -> bool:
    """Whether diffusers stores this 1x1 convolution as a Linear layer's float[c, c]."""
    parts = reference_name.split(".")
    return any(p.startswith("attn") for p in parts) and parts[-2] in _LINEAR and parts[-1] == "weight"


def to_diffusers(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Reference names to diffusers names; attention's float[c, c, 1, 1] become float[c, c]."""
    out = {}
    for name, tensor in tensors.items():
        new = translate(name, levels, to_diffusers=True)
        assert new is not None, name
        out[new] = tensor[:, :, 0, 0].contiguous() if _is_linear(name) else tensor
    return out


def from_diffusers(tensors: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The inverse of `to_diffusers`.

    Raises:
        ModelError: a name that the layout does not have, or an attention weight that is no matrix.
    """
    levels = len({found[1] for name in tensors if (found := re.match(r"decoder\.up_blocks\.(\d+)\.", name))})
    out: dict[str, Any] = {}
    strange: list[str] = []
    for name, tensor in tensors.items():
        new = translate(name, levels, to_diffusers=False)
        if new is None:
            strange.append(name)
            continue
        if _is_linear(new):
            if getattr(tensor, "ndim", 0) != 2:
                raise ModelError(f"{where}: {name} must be a matrix, it is {list(getattr(tensor, 'shape', ()))}.")
            tensor = tensor[:, :, None, None]
        out[new] = tensor
    if strange:
        raise ModelError(f"{where} has {len(strange)} tensors unknown to the diffusers layout: {some(strange)}.")
    return out


def some(names: Sequence[str]) -> str:
    """The first three of `names`."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

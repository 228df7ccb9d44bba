"""A discriminator goes with its tokenizer: what a stage leaves beside its model for the next one that plays the game.

``discriminator.safetensors`` holds ``discriminator.<name>`` (weights and statistics by the reference's names),
``optimizer.<state>.<name>`` (Adam's moments and steps of a parameter) and ``lecam.<name>``. An imported checkpoint leaves the
first part alone: the others are in no foreign file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ett.errors import ModelError, RecipeError
from ett.losses.adversarial import DiscriminatorConfig
from ett.tokenizers.layout_discriminator import DISCRIMINATOR_NAME, shape_of

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_LECAM = {"real", "fake"}
_STAGE = re.compile(r"(\d+)-[\w-]+")


@dataclass(frozen=True)
class Inheritance:
    """What `read_inheritance` found.

    Attributes:
        source: the file.
        discriminator: its whole state. moments: of each parameter by name, Adam's; empty where the file has none.
        lecam: the averages; empty where the file has none.
        channels, strided_layers: as in `DiscriminatorConfig`.
    """

    source: Path
    discriminator: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
    lecam: Mapping[str, Tensor]
    channels: int
    strided_layers: int

    def check(self, config: DiscriminatorConfig) -> None:
        """Raise RecipeError where a stage's discriminator has another shape."""
        if (self.channels, self.strided_layers) != (config.channels, config.strided_layers):
            raise RecipeError(
                f"The discriminator that comes with the tokenizer ({self.source}) has channels {self.channels} and "
                f"strided_layers {self.strided_layers}, the recipe's has {config.channels} and {config.strided_layers}. Give "
                "`discriminator` the same, or set discriminator.inherit to false for a fresh one."
            )


def find_discriminator(folder: Path) -> Path | None:
    """The discriminator that goes with the model in `folder`, or None.

    Args:
        folder: a saved tokenizer or model. Of a run's stage that played no game, an earlier one's discriminator is taken.
    """
    found = _STAGE.fullmatch(folder.name)
    candidates = [folder]
    if folder.parent.name == "stages" and found is not None:
        numbered = ((_STAGE.fullmatch(path.name), path) for path in folder.parent.glob("*-*"))
        earlier = [(int(name[1]), path) for name, path in numbered if name is not None and int(name[1]) < int(found[1])]
        candidates += [path for _, path in sorted(earlier, reverse=True)]
    return next((path / DISCRIMINATOR_NAME for path in candidates if (path / DISCRIMINATOR_NAME).is_file()), None)


def save_discriminator(folder: Path, state: Mapping[str, Any], names: list[str]) -> None:
    """Write what `read_inheritance` reads.

    Args:
        state: of `Critics.state_dict`. names: of the discriminator's parameters, in the optimizer's order.
    """
    tensors = {f"discriminator.{name}": tensor for name, tensor in state["discriminator"].items()}
    tensors |= {f"lecam.{name}": tensor for name, tensor in state["lecam"].items()}
    for i, moments in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{kind}.{names[i]}": torch.as_tensor(value) for kind, value in moments.items()}
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, folder / DISCRIMINATOR_NAME, metadata={"format": "pt"})


def read_inheritance(path: Path) -> Inheritance:
    """Read a file of `save_discriminator`, or of an import.

    Raises:
        ModelError: it cannot be read, or holds no discriminator of this kind.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Is the file complete?") from error
    parts: dict[str, dict[str, Tensor]] = {"discriminator": {}, "lecam": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise ModelError(f"{path} is no discriminator's file: it holds {name}.")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(f"{path}: {name} holds numbers that are not finite.")
        parts[part][rest] = tensor
    shape = shape_of(parts["discriminator"])
    if shape is None:
        raise ModelError(f"{path} holds no patch discriminator as this package has it.")
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        kind, _, parameter = name.partition(".")
        moments.setdefault(parameter, {})[kind] = tensor
        weight = parts["discriminator"].get(parameter)
        shapes = {} if weight is None else dict(zip(_MOMENTS, (torch.Size(), weight.shape, weight.shape), strict=True))
        if shapes.get(kind) != tensor.shape:
            raise ModelError(f"{path}: optimizer.{name} belongs to no weight of this discriminator.")
    incomplete = [parameter for parameter, kinds in moments.items() if len(kinds) != len(_MOMENTS)]
    if incomplete or parts["lecam"].keys() not in (set(), _LECAM) or any(t.dim() for t in parts["lecam"].values()):
        raise ModelError(f"{path} is incomplete: {incomplete[0] if incomplete else 'the LeCam averages'} cannot go on.")
    return Inheritance(path, parts["discriminator"], moments, parts["lecam"], *shape)

"""What every vision tokenizer offers, and how one is saved and loaded."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ett.config import from_mapping, to_mapping
from ett.errors import ModelError, RecipeError, unknown
from ett.tokenizers.quantizer import SCALES, IndexBackpropagationQuantizer, Quantizer
from ett.types import Quantized

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

Precision = Literal["float32", "bfloat16"]


class VisionTokenizer(nn.Module, ABC):
    """Pictures <-> features <-> codebook embeddings. Subclasses are final and implement the two private methods.

    The precision of encoder and decoder is a property of the tokenizer, not of the run: training, caching and evaluation
    must agree on it, or indices change. It holds whatever autocast surrounds the call.
    """

    registry: ClassVar[dict[str, type[VisionTokenizer]]] = {}
    tokenizer_type: ClassVar[str]
    config_class: ClassVar[type]

    config: Any
    quantize: Quantizer
    """Called on float[I, D, h, w]; returns `Quantized`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "tokenizer_type" in cls.__dict__:  # others are abstract
            VisionTokenizer.registry[cls.tokenizer_type] = cls

    # -- what a subclass implements ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def downsample(self) -> int:
        """Pixels per token side."""

    @property
    @abstractmethod
    def precision(self) -> Precision:
        """Type that encoder and decoder compute in."""

    @property
    @abstractmethod
    def encoder_output(self) -> Tensor:
        """Weight of the encoder's last layer, where gradient norms of losses are compared."""

    @abstractmethod
    def _encode(self, pixel_values: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, embeddings: Tensor) -> Tensor: ...

    # -- what every tokenizer does -------------------------------------------------------------------------------------

    @property
    def codebook_size(self) -> int:
        """K, number of codes."""
        return self.quantize.codebook_size

    @property
    def codebook_dim(self) -> int:
        """D, dimension of a code."""
        return self.quantize.codebook_dim

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Features before quantization.

        Args:
            pixel_values: float[I, 3, H, W] in [-1, 1]; H and W are multiples of `downsample`.

        Returns:
            float[I, D, H / downsample, W / downsample].

        Raises:
            ValueError: a size that is not a multiple of `downsample`, or not three channels.
        """
        side = self.downsample
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"Expected pixel_values of shape [I, 3, H, W], got {list(pixel_values.shape)}.")
        if pixel_values.shape[2] % side or pixel_values.shape[3] % side or 0 in pixel_values.shape[2:]:
            raise ValueError(
                f"Pictures of {pixel_values.shape[2]} x {pixel_values.shape[3]} pixels do not divide into tokens of "
                f"{side} x {side}. Resize or pad them to multiples of {side}."
            )
        return self._run(self._encode, pixel_values)

    def decode(self, embeddings: Tensor) -> Tensor:
        """float[I, 3, H, W], about [-1, 1] and not clamped, from codebook embeddings float[I, D, h, w]."""
        return self._run(self._decode, embeddings)

    def forward(self, pixel_values: Tensor, entropy: bool = True) -> tuple[Tensor, Quantized]:
        """(reconstruction float[I, 3, H, W], `Quantized`) of float[I, 3, H, W] in [-1, 1]."""
        quantized = self.quantize(self.encode(pixel_values), entropy)
        return self.decode(quantized.embeddings), quantized

    @torch.no_grad()
    def tokenize(self, pixel_values: Tensor) -> Tensor:
        """int64[I, h, w] indices of float[I, 3, H, W] in [-1, 1]."""
        return self.quantize.nearest(self.encode(pixel_values))

    @torch.no_grad()
    def detokenize(self, indices: Tensor) -> Tensor:
        """float[I, 3, H, W] clamped to [-1, 1] from int64[I, h, w] indices in [0, K)."""
        return self.decode(self.quantize.lookup(indices)).clamp(-1, 1)

    def _run(self, function: Any, x: Tensor) -> Tensor:
        reduced = self.precision == "bfloat16"
        # what tensor cores want, and on CPU never slower than the other layout (docs/LOG.md)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=reduced):
            output: Tensor = function(x if reduced else x.to(self.encoder_output.dtype))
        return output if output.dtype == torch.float64 else output.float()

    # -- saving and loading --------------------------------------------------------------------------------------------

    def config_mapping(self) -> dict[str, Any]:
        """The configuration as plain values, its type under ``tokenizer_type``."""
        return {"tokenizer_type": self.tokenizer_type, **to_mapping(self.config)}

    @staticmethod
    def from_config(mapping: dict[str, Any], where: str = "vision_tokenizer") -> VisionTokenizer:
        """A tokenizer with fresh weights from `config_mapping`'s form (the type defaults to "ibq").

        Raises:
            RecipeError: an unknown type or key, or an impossible value.
        """
        given = dict(mapping)
        kind = given.pop("tokenizer_type", "ibq")
        if not isinstance(kind, str) or kind not in VisionTokenizer.registry:
            raise RecipeError(unknown(f"{where}.tokenizer_type", kind, VisionTokenizer.registry))
        cls = VisionTokenizer.registry[kind]
        return cls(from_mapping(cls.config_class, given, where))

    def reconfigured(self, changes: Mapping[str, Any], where: str = "vision_tokenizer") -> VisionTokenizer:
        """The same weights, not copied, under other settings: a temperature, say, or where gradients go.

        Codes found by distance can also be compared by dot product, and any be normalised: the unit of distance is then left
        out, a learned scale begins. Indices change by that, and have to be trained on. Codes that were normalised go on, where
        they are no longer, as the vectors of length `radius` that they stood for: dot products choose the same ones. A smaller
        codebook has the centres that k-means finds among the saved codes, each of which counts once.

        Args:
            changes: fields of the configuration. where: the recipe's name of them, for errors.

        Raises:
            RecipeError: an unknown field, an impossible value, or one that asks for other weights.
        """
        with torch.random.fork_rng(devices=[]), next(self.parameters()).device:
            changed = VisionTokenizer.from_config({**self.config_mapping(), **changes}, where)
        own, given = changed.state_dict(keep_vars=True), self.state_dict(keep_vars=True)
        for name in (f"quantize.{scale}" for scale in SCALES):
            if name not in own:
                given.pop(name, None)
        if isinstance(self.quantize, IndexBackpropagationQuantizer) and self.quantize.normalize:
            assert isinstance(changed.quantize, IndexBackpropagationQuantizer)
            if not changed.quantize.normalize:
                given["quantize.embedding.weight"] = nn.Parameter(self.quantize.codebook.detach())
        if "quantize.distance_unit" in own and "quantize.distance_unit" not in given:
            raise RecipeError(
                f'{where}.similarity: "distance" has a unit that is measured on pictures as a tokenizer is trained, and the '
                "saved tokenizer has none. Keep its similarity, or train a tokenizer from the start with this one."
            )
        if changed.codebook_size < self.codebook_size and isinstance(changed.quantize, IndexBackpropagationQuantizer):
            codes = given["quantize.embedding.weight"].detach()
            if not codes.is_meta:
                changed.quantize.place_codes(codes.T[None, :, :, None])
            placed = ("quantize.embedding.weight", "quantize.distance_unit")
            given.update({name: own[name] for name in placed if name in own})
        begun = {name: own[name] for name in ("quantize.log_scale",) if name in own and name not in given}
        try:
            changed.load_state_dict({**given, **begun}, assign=True)
        except RuntimeError as error:
            names = ", ".join(f"{where}.{name}" for name in changes)
            raise RecipeError(
                f"{names}: the saved tokenizer's weights have another shape. Over a saved tokenizer only settings that leave "
                "its weights as they are can be changed, for example temperature."
            ) from error
        return changed.train(self.training)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {"model_type": "ett_vision_tokenizer", **self.config_mapping()}
        (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Load what `save_pretrained` wrote, in evaluation mode, weights exactly as stored.

        Raises:
            ModelError: no such directory, not a vision tokenizer, a damaged file, or weights of another architecture.
        """
        directory = Path(directory)
        config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
        for path in (config_path, weights_path):
            if not path.is_file():
                raise ModelError(f"{directory} is not a saved vision tokenizer: it has no {path.name}.")
        try:
            mapping = json.loads(config_path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{config_path} is not valid JSON: {error}.") from error
        if not isinstance(mapping, dict) or mapping.pop("model_type", None) != "ett_vision_tokenizer":
            raise ModelError(f"{config_path} does not describe a vision tokenizer saved by ett.")
        tokenizer = VisionTokenizer.from_config(mapping, where=str(config_path))
        if not isinstance(tokenizer, cls):
            raise ModelError(f"{directory} holds a {type(tokenizer).__name__}, not a {cls.__name__}.")
        try:
            tensors = load_file(weights_path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{weights_path} cannot be read: {error}. Is the file complete?") from error
        load_strictly(tokenizer, tensors, str(weights_path))
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ModelError(
                    f"{weights_path}: {name} holds numbers that are not finite. The file is damaged or diverged."
                )
        return tokenizer.eval()


def channels_last(module: nn.Module) -> None:
    """Lay the convolutions' weights out as `VisionTokenizer` lays out activations, in place; values stay the same."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load `tensors` into `module`: every name and shape must agree.

    Raises:
        ModelError: naming the first few tensors that are missing, unexpected or of another shape.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    reshaped = [
        f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise ModelError(f"{source} holds weights of another architecture: {'; '.join(problems)}.")
    module.load_state_dict(tensors, strict=True)

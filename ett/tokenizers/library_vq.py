"""Tokenizers of other libraries behind our interface: their encoder and decoder, our quantizer over their codebook."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from ett.config import from_mapping, require, to_mapping
from ett.errors import RecipeError, unknown
from ett.tokenizers.base import Precision, VisionTokenizer, channels_last
from ett.tokenizers.quantizer import Gradient, IndexBackpropagationQuantizer


@dataclass(frozen=True)
class LibraryConfig:
    """Another library's tokenizer.

    Attributes:
        config: the library's own configuration values by name; missing ones take the library's defaults. K and D are among
            them.
        gradient: of the embeddings: "index_backprop", or "straight_through" as these tokenizers were trained
            (`IndexBackpropagationQuantizer`).
        normalize: compare and return l2-normalised features and codes, as LlamaGen's and the original Janus tokenizer do;
            the index softmax then has a learned scale. Otherwise the index is the nearest code's, as in the library.
        temperature, entropy_temperature: of `IndexBackpropagationQuantizer`.
        precision: type that encoder and decoder compute in, in training and evaluation alike; the quantizer is float32.
    """

    config: dict[str, Any] = field(default_factory=dict)
    gradient: Gradient = "index_backprop"
    normalize: bool = False
    temperature: float = 1.0
    entropy_temperature: float = 0.01
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.entropy_temperature > 0, "entropy_temperature", self.entropy_temperature, "above 0")


class LibraryTokenizer(VisionTokenizer):
    """encoder -> quant_conv -> quantize -> post_quant_conv -> decoder, parts and parameter names as the library has them.

    So the library's weights are this tokenizer's, name by name; the quantizer alone is ours. Its codebook is the library's,
    as a parameter. Normalisation by statistics of the batch stays in evaluation mode: indices may depend on their own
    picture alone, in training too.

    Args:
        config: the library's values and ours; the tokenizer's own `config` holds every value, defaults included.
        module: the library's module, whose parts are taken over in float32; None builds one with fresh weights.
    """

    config_class: ClassVar[type] = LibraryConfig
    unit_embeddings: ClassVar[bool] = False
    """Whether the library searches among the codes as they are and decodes them l2-normalised."""

    def __init__(self, config: LibraryConfig, module: nn.Module | None = None) -> None:
        super().__init__()
        if module is None:
            module = self._build(config.config)
        module = module.float()
        values = to_mapping(self._values(module))
        self.config: LibraryConfig = replace(config, config=values)
        self._check(values)
        self.encoder, self.quant_conv = _part(module, "encoder"), _part(module, "quant_conv")
        self.post_quant_conv, self.decoder = _part(module, "post_quant_conv"), self._decoder(module)
        codes = module.get_parameter("quantize.embedding.weight")
        self.quantize = IndexBackpropagationQuantizer(
            *codes.shape,
            temperature=config.temperature,
            normalize=config.normalize,
            entropy_temperature=config.entropy_temperature,
            similarity="dot" if config.normalize else "distance",
            gradient=config.gradient,
            unit_embeddings=self.unit_embeddings and not config.normalize,
        )
        self.quantize.embedding.weight = nn.Parameter(codes.detach())
        channels_last(self)
        self.requires_grad_(True).train()

    @classmethod
    def from_module(cls, module: nn.Module, **settings: Any) -> Self:
        """A tokenizer around a loaded module of the library, in evaluation mode.

        Args:
            module: its parts become this tokenizer's, in float32; it is not copied.
            settings: fields of `LibraryConfig` but ``config``, which is the module's own.

        Raises:
            TypeError: another kind of module.
            RecipeError: an unknown setting, or an impossible value.
        """
        if type(module).__name__ != cls._module_name():
            raise TypeError(f"{cls.__name__} takes a {cls._module_name()}, got a {type(module).__name__}.")
        known = [own.name for own in fields(LibraryConfig) if own.name != "config"]
        given = known_values(settings, known, f"{cls.__name__}.from_module")
        return cls(from_mapping(LibraryConfig, given), module).eval()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @property
    def precision(self) -> Precision:
        return self.config.precision

    @property
    def encoder_output(self) -> Tensor:
        return self.quant_conv.get_parameter("weight")

    def _encode(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.quant_conv(self.encoder(pixel_values))
        return features

    def _decode(self, embeddings: Tensor) -> Tensor:
        pixel_values: Tensor = self.decoder(self.post_quant_conv(embeddings))
        return pixel_values

    # -- what an adapter says about its library ------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def _module_name(cls) -> str:
        """The library's class."""

    @classmethod
    @abstractmethod
    def _build(cls, values: Mapping[str, Any]) -> nn.Module:
        """The library's module with fresh weights."""

    @classmethod
    @abstractmethod
    def _values(cls, module: nn.Module) -> dict[str, Any]:
        """Every configuration value that `_build` needs."""

    def _check(self, values: Mapping[str, Any]) -> None:
        """Raise RecipeError for what the library allows and a tokenizer of pictures cannot be."""
        for name in ("in_channels", "out_channels"):
            if values.get(name, 3) != 3:
                raise RecipeError(f"config.{name} = {values[name]} is not possible: pictures have 3 channels.")
        if values.get("double_latent", False):
            raise RecipeError("config.double_latent = True is not possible: a quantizer reads one latent, not two.")

    def _decoder(self, module: nn.Module) -> nn.Module:
        return _part(module, "decoder")


def known_values(given: Mapping[str, Any], allowed: Collection[str], where: str) -> dict[str, Any]:
    """`given`, where its keys are among `allowed`'s.

    Raises:
        RecipeError: naming an unknown key and its nearest match.
    """
    for key in given:
        if key not in allowed:
            raise RecipeError(unknown(f"key of {where}", key, allowed))
    return dict(given)


def _part(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name)

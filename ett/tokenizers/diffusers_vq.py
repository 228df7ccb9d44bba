"""`VQModel` of diffusers, the VQGAN of taming transformers and its descendants. diffusers is imported when one is built."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ett.errors import ModelError, RecipeError
from ett.tokenizers.library_vq import LibraryTokenizer, known_values


class DiffusersVQTokenizer(LibraryTokenizer):
    """diffusers' `VQModel`. K is ``num_vq_embeddings``, D is ``vq_embed_dim`` (``latent_channels`` where that is null).

    Taming's codes are compared as they are; LlamaGen's are l2-normalised: ``normalize: true``.
    """

    tokenizer_type: ClassVar[str] = "diffusers_vq"

    @property
    def downsample(self) -> int:
        return int(2 ** (len(self.config.config["block_out_channels"]) - 1))

    def _decode(self, embeddings: Tensor) -> Tensor:
        guide = embeddings if self.config.config["norm_type"] == "spatial" else None
        pixel_values: Tensor = self.decoder(self.post_quant_conv(embeddings), guide)
        return pixel_values

    def _check(self, values: Mapping[str, Any]) -> None:
        super()._check(values)
        if values["norm_type"] == "spatial" and values["vq_embed_dim"] not in (None, values["latent_channels"]):
            raise RecipeError(
                f"config.vq_embed_dim = {values['vq_embed_dim']} must equal config.latent_channels = "
                f"{values['latent_channels']} where norm_type is spatial: those norms read the codes."
            )

    @classmethod
    def _module_name(cls) -> str:
        return "VQModel"

    @classmethod
    def _build(cls, values: Mapping[str, Any]) -> nn.Module:
        try:
            vq_model: Any = importlib.import_module("diffusers").VQModel
        except ImportError as error:
            raise ModelError(
                "The diffusers_vq tokenizer needs the package diffusers: pip install 'ett-tuning[diffusers]'."
            ) from error
        known = known_values(values, inspect.signature(vq_model).parameters, "diffusers' VQModel")
        try:
            module: nn.Module = vq_model(**known)
        except (TypeError, ValueError, IndexError) as error:
            raise RecipeError(f"diffusers cannot build a VQModel of these values: {error}") from error
        return module

    @classmethod
    def _values(cls, module: nn.Module) -> dict[str, Any]:
        own = inspect.signature(type(module)).parameters
        config: Any = module.config
        return {name: value for name, value in config.items() if name in own}

"""The VQ tokenizers of transformers: Emu3's, Chameleon's and Janus's.

Their modules load like any model of transformers, alone or inside the whole (``ChameleonForConditionalGeneration(...)
.model.vqmodel``), and go to ``from_module``. transformers is imported when one is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ett.errors import RecipeError
from ett.tokenizers.cnn import CNNConfig, Decoder
from ett.tokenizers.library_vq import LibraryTokenizer, known_values


class TransformersVQTokenizer(LibraryTokenizer):
    """A VQ module of transformers; `module_class` is its name there, its configuration's is that and "Config"."""

    module_class: ClassVar[str]

    @classmethod
    def from_module(cls, module: nn.Module, **settings: Any) -> Self:
        """As `LibraryTokenizer.from_module`; called on `TransformersVQTokenizer` itself, chooses by the module's class."""
        if cls is not TransformersVQTokenizer:
            return super().from_module(module, **settings)
        kinds = {kind.module_class: kind for kind in cls.__subclasses__()}
        if type(module).__name__ not in kinds:
            raise TypeError(f"Expected one of {', '.join(kinds)} of transformers, got a {type(module).__name__}.")
        return kinds[type(module).__name__].from_module(module, **settings)

    @property
    def downsample(self) -> int:
        return int(2 ** (len(self.config.config["channel_multiplier"]) - 1))

    @classmethod
    def _module_name(cls) -> str:
        return cls.module_class

    @classmethod
    def _build(cls, values: Mapping[str, Any]) -> nn.Module:
        import transformers
        from huggingface_hub.errors import StrictDataclassError

        config_class = getattr(transformers, cls.module_class + "Config")
        module_class = getattr(transformers, cls.module_class)
        known = known_values(values, _own(config_class()), f"transformers' {config_class.__name__}")
        try:
            module: nn.Module = module_class(config_class(**known))
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise RecipeError(f"transformers cannot build a {cls.module_class} of these values: {error}") from error
        return module

    @classmethod
    def _values(cls, module: nn.Module) -> dict[str, Any]:
        return _own(module.config)


class ChameleonTokenizer(TransformersVQTokenizer):
    """`ChameleonVQVAE`, f16 in its defaults.

    transformers ships its encoder and codebook without a decoder, so the own CNN decoder of the same shape (VQGAN's, as
    Chameleon's is) stands in with fresh weights. Train it before anything is drawn: the stage ``tokenizer`` does.
    """

    tokenizer_type: ClassVar[str] = "chameleon_vqvae"
    module_class: ClassVar[str] = "ChameleonVQVAE"

    def _decoder(self, module: nn.Module) -> nn.Module:
        values = self.config.config
        multipliers = tuple(values["channel_multiplier"])
        attention = values["attn_resolutions"] or () if values["attn_type"] == "vanilla" else ()
        return Decoder(
            CNNConfig(
                channels=values["base_channels"],
                channel_multipliers=multipliers,
                num_res_blocks=values["num_res_blocks"],
                attention_levels=tuple(i for i in range(len(multipliers)) if values["resolution"] // 2**i in attention),
                z_channels=values["latent_channels"],
                norm_groups=32,
            )
        )


class JanusTokenizer(TransformersVQTokenizer):
    """`JanusVQVAE`, f16 in its defaults. Codes are decoded l2-normalised, so their unit vectors are the embeddings.

    transformers searches among features and codes as they are; the original code normalises both first: ``normalize: true``.
    """

    tokenizer_type: ClassVar[str] = "janus_vqvae"
    module_class: ClassVar[str] = "JanusVQVAE"
    unit_embeddings: ClassVar[bool] = True


class Emu3Tokenizer(TransformersVQTokenizer):
    """`Emu3VQVAE`, f8 in its defaults; a video tokenizer that sees a picture as a still clip, and shows its first frame.

    The clip has ``temporal_downsample_factor`` equal frames, which become one frame of tokens. What treats frames one by one
    runs on a single frame here: the same values as the library's, at 1 / factor of its work.
    """

    tokenizer_type: ClassVar[str] = "emu3_vqvae"
    module_class: ClassVar[str] = "Emu3VQVAE"

    @property
    def encoder_output(self) -> Tensor:
        return self.quant_conv.get_parameter("conv.weight")

    def _encode(self, pixel_values: Tensor) -> Tensor:
        encoder: Any = self.encoder
        hidden = encoder.middle_block(encoder.down_block(encoder.conv_in(pixel_values)))
        frame = encoder.conv_out(F.silu(encoder.norm_out(hidden)))
        frames = frame.unsqueeze(2).expand(-1, -1, self.config.config["temporal_downsample_factor"], -1, -1)
        for layer in encoder.time_conv:
            frames = F.silu(layer(frames))
        for layer in encoder.time_res_stack:
            frames = layer(frames)
        features: Tensor = self.quant_conv(frames)  # [I, D, 1, h, w]
        return features.squeeze(2)

    def _decode(self, embeddings: Tensor) -> Tensor:
        decoder: Any = self.decoder
        guide = embeddings.unsqueeze(2)
        # the decoder's spatial norms read the codes beside the features, and both pass the temporal layers
        both = torch.cat([self.post_quant_conv(guide), guide])
        for layer in decoder.time_res_stack:
            both = layer(both)
        for layer in decoder.time_conv:
            both = F.silu(layer(both))
        hidden, guide = both[:, :, 0].chunk(2)
        hidden = decoder.middle_block(decoder.conv_in(hidden), guide)
        hidden = decoder.norm_out(decoder.up_block(hidden, guide), guide)
        pixel_values: Tensor = decoder.conv_out(F.silu(hidden))
        return pixel_values

    def _check(self, values: Mapping[str, Any]) -> None:
        super()._check(values)
        frames, width = values["temporal_downsample_factor"], values["base_channels"] * values["channel_multiplier"][-1]
        if frames < 1 or frames & (frames - 1):
            raise RecipeError(
                f"config.temporal_downsample_factor = {frames} is not possible: it must be a power of two."
            )
        if values["embed_dim"] != values["latent_channels"]:
            raise RecipeError(
                f"config.embed_dim = {values['embed_dim']} must equal config.latent_channels = {values['latent_channels']}: "
                "Emu3's decoder joins the two."
            )
        if values["hidden_size"] != width:
            raise RecipeError(
                f"config.hidden_size = {values['hidden_size']} must be the width of the last level, base_channels * "
                f"channel_multiplier[-1] = {width}: it is its attention's."
            )


def _own(config: Any) -> dict[str, Any]:
    """The values of a configuration of transformers that its class adds to those of every model."""
    from transformers import PretrainedConfig

    general = PretrainedConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if name not in general}

"""A vision tokenizer as the vision tower of a LLaVA-style model of transformers.

`LlavaForConditionalGeneration` stays what it is: its own projector, an MLP with GELU, reads the codebook embeddings, and the
caption gradient reaches codebook and encoder through them. What it does not know is L_vq, which `tokenizer_loss` adds.
Importing this module registers the tower with the Auto classes, so that such a model saves and loads like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ett.losses.joint import LossConfig, tokenizer_loss, tokenizer_losses
from ett.tokenizers import VisionTokenizer
from ett.types import Quantized


class EttVisionConfig(PreTrainedConfig):
    """Configuration of `EttVisionTower`.

    Args:
        vision_tokenizer: `VisionTokenizer.config_mapping()`.
        hidden_size: D, what the language model's projector reads.
        image_size, patch_size: side of a picture and of a token [pixels], as processors of transformers look for them.
    """

    model_type = "ett_vision"
    has_no_defaults_at_init = True

    def __init__(
        self,
        vision_tokenizer: dict[str, Any] | None = None,
        hidden_size: int = 0,
        image_size: int = 0,
        patch_size: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vision_tokenizer = dict(vision_tokenizer or {})
        self.hidden_size, self.image_size, self.patch_size = hidden_size, image_size, patch_size
        super().__init__(**kwargs)


@dataclass
class Seen:
    """The pictures of the last forward in training and what became of them: what L_vq is made from."""

    pixel_values: Tensor
    quantized: Quantized


class EttVisionTower(PreTrainedModel):
    """float[I, 3, H, W] in [-1, 1] -> codebook embeddings float[I, N, D] in reading order, differentiable.

    Indices are computed in float32 whatever type the rest of the model is loaded in.
    """

    config_class = EttVisionConfig
    config: EttVisionConfig
    main_input_name = "pixel_values"
    _keep_in_fp32_modules_strict = ["vision_tokenizer"]  # noqa: RUF012  # read by transformers as a plain class attribute

    def __init__(self, config: EttVisionConfig) -> None:
        super().__init__(config)
        self.vision_tokenizer = VisionTokenizer.from_config(config.vision_tokenizer)
        self.seen: Seen | None = None
        # follows every cast of the model, which the tokenizer does not: its type is what the projector computes in
        self.outside: Tensor
        self.register_buffer("outside", torch.zeros(()), persistent=False)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: the tokenizer initialises itself."""

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Both ``last_hidden_state`` and the only entry of ``hidden_states`` are the embeddings."""
        tokenizer = self.vision_tokenizer
        quantized = tokenizer.quantize(tokenizer.encode(pixel_values), entropy=self.training)
        self.seen = Seen(pixel_values, quantized) if self.training else None
        rows = quantized.embeddings.flatten(2).transpose(1, 2).to(self.outside.dtype)
        embeddings = cast(torch.FloatTensor, rows)
        return BaseModelOutputWithPooling(last_hidden_state=embeddings, hidden_states=(embeddings,))

    def tokenizer_loss(self, weights: LossConfig | None = None) -> Tensor:
        """L_vq, float[], of the pictures of the last forward, to be added with a weight (ETT: 0.25) to the model's loss.

        Raises:
            RuntimeError: nothing was seen in training mode since the last call.
        """
        if self.seen is None:
            raise RuntimeError("There was no forward with pictures in training mode since the last tokenizer_loss().")
        seen, self.seen = self.seen, None
        weights = weights or LossConfig()
        reconstruction = self.vision_tokenizer.decode(seen.quantized.embeddings)
        return tokenizer_loss(tokenizer_losses(seen.pixel_values, reconstruction, seen.quantized, weights), weights)


def use_vision_tokenizer(
    model: LlavaForConditionalGeneration, vision_tokenizer: VisionTokenizer, image_size: int
) -> EttVisionTower:
    """Swap the vision side of a LLaVA-style model for a vision tokenizer and a fresh projector, in place.

    Prompts then hold ``(image_size / downsample) ** 2`` image tokens a picture; a `LlavaProcessor` finds the number with
    ``patch_size=vision_tokenizer.downsample, vision_feature_select_strategy="full", num_additional_image_tokens=0`` and an
    `EttImageProcessor` of this size.

    Args:
        model: its language model stays as it is; its projector's class and settings too.
        vision_tokenizer: used as it is, not copied. image_size: H = W [pixels], a multiple of its downsampling.

    Returns:
        The tower, now ``model.model.vision_tower``.

    Raises:
        ValueError: a size that the tokenizer cannot divide.
    """
    side = vision_tokenizer.downsample
    if image_size < side or image_size % side:
        raise ValueError(
            f"Pictures of {image_size} pixels do not divide into tokens of {side}. Choose a multiple of it."
        )
    vision = EttVisionConfig(
        vision_tokenizer.config_mapping(), vision_tokenizer.codebook_dim, image_size=image_size, patch_size=side
    )
    with torch.device("meta"):
        tower = EttVisionTower(vision)
    tower.vision_tokenizer = vision_tokenizer
    config, inner = model.config, model.model
    config.vision_config = vision
    config.vision_feature_layer, config.vision_feature_select_strategy = -1, "full"
    config.image_seq_length = (image_size // side) ** 2
    words = cast(torch.nn.Embedding, inner.get_input_embeddings()).weight
    tower.outside = torch.zeros((), dtype=words.dtype)
    inner.vision_tower = cast(Any, tower).to(words.device)
    inner.multi_modal_projector = type(inner.multi_modal_projector)(config).to(words.device, words.dtype)
    return tower.train(model.training)


AutoConfig.register("ett_vision", EttVisionConfig, exist_ok=True)
AutoModel.register(EttVisionConfig, EttVisionTower, exist_ok=True)

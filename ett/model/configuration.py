"""`EttConfig`: everything needed to rebuild the model, the language model's own configuration inside."""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from ett.config import from_mapping, require, to_mapping
from ett.losses.joint import LossConfig
from ett.model.image_head import ImageHeadConfig, check_drawable
from ett.model.projector import ProjectorConfig

VisualInput = Literal["embedding", "index"]


class EttConfig(PreTrainedConfig):
    """Configuration of `EttForConditionalGeneration`.

    Args:
        vision_tokenizer: `VisionTokenizer.config_mapping()`.
        text_config: the language model's configuration, or its mapping with ``model_type``.
        projector: `ProjectorConfig` as a mapping.
        losses: `LossConfig` as a mapping; what `forward(labels=...)` sums into ``loss``.
        visual_input: "embedding" reads codebook embeddings (ETT); "index" looks indices up in a trainable K x D table.
        image_token_id: the placeholder of one visual position in ``input_ids``. It may lie outside the text vocabulary.
        lora: keyword arguments of ``peft.LoraConfig`` for adapters inside the language model, or None.
        image_head: `ImageHeadConfig` as a mapping, of a model that draws; None for one that only reads.
    """

    model_type = "ett"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # transformers reads a plain class attribute
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["losses", "past_key_values", "quantized", "reconstruction"]  # noqa: RUF012

    def __init__(
        self,
        vision_tokenizer: dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        projector: dict[str, Any] | None = None,
        losses: dict[str, Any] | None = None,
        visual_input: VisualInput = "embedding",
        image_token_id: int = -1,
        lora: dict[str, Any] | None = None,
        image_head: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        require(visual_input in ("embedding", "index"), "visual_input", visual_input, '"embedding" or "index"')
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.vision_tokenizer = dict(vision_tokenizer or {})
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        self.projector = to_mapping(from_mapping(ProjectorConfig, projector or {}, "projector"))
        self.losses = to_mapping(from_mapping(LossConfig, losses or {}, "losses"))
        self.visual_input = visual_input
        self.image_token_id = image_token_id
        self.lora = lora
        self.image_head = None
        if image_head is not None:
            self.image_head = to_mapping(from_mapping(ImageHeadConfig, image_head, "image_head"))
            check_drawable(self.projector_config)
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    @property
    def projector_config(self) -> ProjectorConfig:
        return from_mapping(ProjectorConfig, self.projector)

    @property
    def image_head_config(self) -> ImageHeadConfig | None:
        return None if self.image_head is None else from_mapping(ImageHeadConfig, self.image_head)

    @property
    def loss_config(self) -> LossConfig:
        return from_mapping(LossConfig, self.losses)

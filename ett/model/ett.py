"""`EttForConditionalGeneration`: vision tokenizer -> projector -> language model, trained on one joint loss."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from ett.losses.caption import (
    caption_loss,
    linear_caption_loss,
    next_token_labels,
    supervised_columns,
    text_labels,
)
from ett.losses.joint import LossConfig, tokenizer_loss, tokenizer_losses
from ett.model.configuration import EttConfig
from ett.model.drawing import Drawing
from ett.model.head import has_linear_head
from ett.model.hub import share_model, split_options
from ett.model.image_head import ImageHead
from ett.model.lora import inject_lora
from ett.model.projector import Projector
from ett.tokenizers import VisionTokenizer
from ett.tokenizers.quantizer import spans_ranks
from ett.types import IGNORE_INDEX, Quantized

PICTURES = ("pixel_values", "image_indices")
"""The two forms in which `forward` takes pictures."""


@dataclass
class EttOutput(ModelOutput):
    """What `forward` returns; fields that a call does not compute are None.

    Attributes:
        loss: float[], ``caption_weight * L_cap + image_weight * L_image + tokenizer_weight * L_vq`` over the terms that were
            computed.
        logits: float[B, T', V], T' as `logits_to_keep` says; None where the loss was taken at `loss_positions`.
        losses: every term by name, unweighted, float[] each.
        past_key_values: the language model's cache.
        quantized: `Quantized` of the batch's images.
        reconstruction: float[I', 3, H, W], about [-1, 1], of the first I' = ceil(reconstruction_share * I) images (all of
            them in evaluation).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    quantized: Quantized | None = None
    reconstruction: Tensor | None = None


class EttForConditionalGeneration(Drawing, PreTrainedModel, GenerationMixin):
    """ETT around any causal language model of transformers (ETT figure 2).

    Parts: ``vision_tokenizer`` (`VisionTokenizer`), ``projector``, ``language_model`` (a complete causal LM with its own
    embedding and head), ``index_embedding`` (K x D) where ``visual_input`` is "index", and ``image_head`` (`ImageHead`) where
    the model draws.
    """

    config_class = EttConfig
    config: EttConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012  # read by transformers as a plain class attribute
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012  # read by transformers as a plain class attribute
    # codes must not be rounded, and the tokenizer has its own precision setting
    _keep_in_fp32_modules_strict = ["vision_tokenizer", "index_embedding"]  # noqa: RUF012  # likewise

    def __init__(self, config: EttConfig) -> None:
        super().__init__(config)
        self.vision_tokenizer = VisionTokenizer.from_config(config.vision_tokenizer)
        self.language_model = self._fresh_language_model(config)
        self.projector = Projector(
            config.projector_config,
            self.vision_tokenizer.codebook_dim,
            config.text_config.get_text_config().hidden_size,
        )
        self.index_embedding: nn.Embedding | None = None
        if config.visual_input == "index":
            self.index_embedding = nn.Embedding(self.vision_tokenizer.codebook_size, self.vision_tokenizer.codebook_dim)
        self.image_head: ImageHead | None = None
        if config.image_head is not None:
            self.image_head = self._fresh_image_head()
        self._head_is_linear: bool | None = None
        self.post_init()

    def _fresh_language_model(self, config: EttConfig) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config.text_config)
        if config.lora is not None:
            inject_lora(model, config.lora)
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the tokenizer, projector and table initialise themselves, and the language model is its own
        `PreTrainedModel`. The library's default would overwrite them with N(0, 0.02)."""

    @classmethod
    def from_parts(cls, config: EttConfig, vision_tokenizer: VisionTokenizer, language_model: PreTrainedModel) -> Self:
        """A model around given parts, used as they are, with a fresh projector.

        The index table, where there is one, starts as a copy of the codebook, so that "index" and "embedding" compute the
        same function at step 0 (docs/method.md, controls).
        """
        config.vision_tokenizer = vision_tokenizer.config_mapping()
        config.text_config = language_model.config
        config.tie_word_embeddings = getattr(language_model.config, "tie_word_embeddings", False)
        with torch.device("meta"):
            model = cls(config)
        model.vision_tokenizer = vision_tokenizer
        model.language_model = language_model
        if config.lora is not None:
            inject_lora(language_model, config.lora)
        model.projector = Projector(
            config.projector_config, vision_tokenizer.codebook_dim, config.text_config.get_text_config().hidden_size
        )
        embeddings = cast(nn.Embedding, language_model.get_input_embeddings())
        if not embeddings.weight.is_meta:
            model.projector.fit(vision_tokenizer.quantize.codebook.detach(), embeddings.weight.detach())
        if config.visual_input == "index":
            model.index_embedding = nn.Embedding.from_pretrained(
                vision_tokenizer.quantize.codebook.detach().clone(), freeze=False
            )
        if config.image_head is not None:
            model.add_image_head()
        model.generation_config = language_model.generation_config
        if config.image_token_id < config.text_config.get_text_config().vocab_size:
            # a placeholder is never an answer, and could not be read back as one
            model.generation_config.suppress_tokens = [config.image_token_id]
        return model

    # -- the parts that transformers asks for --------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.language_model.get_output_embeddings())

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    # -- the figure ----------------------------------------------------------------------------------------------------

    def visual_embeddings(self, quantized: Quantized | Tensor, reaches_tokenizer: bool = True) -> Tensor:
        """Projected visual positions, float[I, P, C] (see `Projector`), of quantized images or of int64[I, h, w] indices; from
        indices nothing reaches the tokenizer."""
        if self.index_embedding is not None:
            indices = quantized if isinstance(quantized, Tensor) else quantized.indices
            embeddings = self.index_embedding(indices).permute(0, 3, 1, 2)
        elif isinstance(quantized, Tensor):
            embeddings = self.vision_tokenizer.quantize.lookup(quantized).detach()
        elif reaches_tokenizer:
            embeddings = quantized.embeddings
        else:
            embeddings = quantized.embeddings.detach()
        return cast(Tensor, self.projector(embeddings.to(self.projector.layers[0].weight.dtype)))

    def embed(self, input_ids: Tensor, visual: Tensor | None) -> Tensor:
        """float[B, T, C]: text embeddings with `visual` (float[I, P, C]) in place of the image placeholders.

        Raises:
            ValueError: the placeholders are not as many as the visual positions.
        """
        is_image = input_ids == self.config.image_token_id
        # the placeholder may lie outside the vocabulary, so it is looked up as token 0 and overwritten
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if visual is None:
            if bool(is_image.any()):
                raise ValueError("input_ids hold image placeholders, but no pixel_values or image_indices were given.")
            return cast(Tensor, embeds)
        if int(is_image.sum()) != visual.shape[0] * visual.shape[1]:
            raise ValueError(
                f"input_ids hold {int(is_image.sum())} image placeholders, but {visual.shape[0]} images give "
                f"{visual.shape[0] * visual.shape[1]} visual positions. Prepare inputs with EttProcessor, for pictures of "
                "this size."
            )
        return cast(Tensor, embeds.masked_scatter(is_image.unsqueeze(-1), visual.to(embeds.dtype)))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | float | None = None,
        tokenizer_share: float | None = None,
        loss_config: LossConfig | None = None,
        image_indices: Tensor | None = None,
        num_drawn_in_batch: Tensor | float | None = None,
        loss_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> EttOutput:
        """One step of ETT.

        Args:
            input_ids: int64[B, T], image placeholders where visual positions go.
            pixel_values: float[I, 3, H, W] in [-1, 1], in reading order over the batch.
            attention_mask: int64[B, T], 1 where real; padding on either side.
            labels: int64[B, T], ``IGNORE_INDEX`` where no loss is taken; gives `loss`. A model with an image head also learns
                the image tokens at ``DRAWN_INDEX``.
            logits_to_keep: as in transformers: 0 all, n the last n, or int64[U] the positions to compute logits for. With
                labels, the loss is taken over those positions. "supervised" positions: `supervised_columns(labels)`.
            num_items_in_batch: divisor of the caption loss (see `caption_loss`); None counts this batch's own. Losses of the
                micro-batches of a step are then *added*.
            tokenizer_share: of this call's pictures among those of the step, the factor of L_vq under accumulation; None takes
                1, or the share of supervised tokens where `num_items_in_batch` tells that there are more micro-batches.
            loss_config: weights; None takes the saved configuration's.
            image_indices: int64[I, h, w] in [0, K), `vision_tokenizer.tokenize(pixel_values)` of a frozen tokenizer in place of
                `pixel_values` (`ett.data.codes`): the same embeddings, without the encoder. There is then no L_vq.
            num_drawn_in_batch: divisor of the image loss, as `num_items_in_batch`; None takes that one, where it is given.
            loss_positions: `supervised_positions(labels)`, int64[S]: with labels the caption loss is taken there, a chunk of
                logits at a time, and `logits` is None. `logits_to_keep` then counts for nothing.
        """
        weights = loss_config or self.config.loss_config
        if image_indices is not None:
            _check_indices(pixel_values, labels is not None and weights.tokenizer_weight > 0)
        quantized = reconstruction = None
        # ranks wait for each other in the quantizer and for gradients: one without pictures takes part with none
        takes_part = image_indices is None and spans_ranks(self)
        if pixel_values is not None and (pixel_values.shape[0] > 0 or takes_part):
            features = self.vision_tokenizer.encode(pixel_values)
            quantized = self.vision_tokenizer.quantize(features, entropy=labels is not None and weights.uses_entropy)
        draws = labels is not None and self.image_head is not None and weights.image_weight > 0
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Give input_ids or inputs_embeds.")
            seen = image_indices if quantized is None else quantized
            if draws and self.training and weights.image_noise > 0 and seen is not None:
                assert labels is not None
                indices = seen if isinstance(seen, Tensor) else seen.indices
                seen = self.with_wrong_tokens(indices, input_ids, labels, weights.image_noise)
            visual = None if seen is None else self.visual_embeddings(seen, weights.caption_reaches_tokenizer)
            inputs_embeds = self.embed(input_ids, visual)
        if (
            position_ids is None
            and past_key_values is None
            and attention_mask is not None
            and attention_mask.dim() == 2
        ):
            position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
        if draws:
            kwargs["output_hidden_states"] = True
        fused = labels is not None and loss_positions is not None and self._loss_applies_head(draws)
        reader = self.language_model.get_decoder() if fused else self.language_model
        if labels is not None and loss_positions is not None and not fused:
            logits_to_keep = supervised_columns(labels)
        outputs = reader(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=True,
            **({} if fused else {"logits_to_keep": logits_to_keep}),
            **kwargs,
        )
        loss, losses = None, None
        if labels is not None:
            losses = {}
            targets = next_token_labels(text_labels(labels))
            if draws:
                hidden = outputs.hidden_states[-1]
                seen = image_indices if quantized is None else quantized.indices
                divisor = num_items_in_batch if num_drawn_in_batch is None else num_drawn_in_batch
                losses["image_loss"] = self.image_loss(hidden, input_ids, labels, seen, divisor)
            if weights.caption_weight > 0 or not draws:
                if fused:
                    states = outputs.last_hidden_state.flatten(0, 1)[loss_positions]
                    text_head = cast(nn.Linear, self.get_output_embeddings())
                    wanted = targets.flatten()[loss_positions]
                    losses["caption_loss"] = linear_caption_loss(states, text_head, wanted, num_items_in_batch)
                else:
                    logits = outputs.logits
                    if draws:
                        logits = self.with_image_logits(logits, _keep(hidden, logits_to_keep))
                    wanted = _keep(targets, logits_to_keep)
                    losses["caption_loss"] = caption_loss(logits, wanted, num_items_in_batch)
            loss = cast(Tensor, sum(weights.text_weights[name] * term for name, term in losses.items()))
            if quantized is not None and weights.tokenizer_weight > 0 and pixel_values is not None:
                share = weights.reconstruction_share if self.training else 1.0
                decoded = math.ceil(share * len(pixel_values))
                reconstruction = self.vision_tokenizer.decode(quantized.embeddings[:decoded])
                losses |= tokenizer_losses(pixel_values, reconstruction, quantized, weights)
                if tokenizer_share is None and num_items_in_batch is not None:
                    tokenizer_share = float((targets != IGNORE_INDEX).sum() / num_items_in_batch)
                tokenizer_share = 1.0 if tokenizer_share is None else tokenizer_share
                loss = loss + weights.tokenizer_weight * tokenizer_share * tokenizer_loss(losses, weights)
        return EttOutput(
            loss=loss,
            logits=None if fused else outputs.logits,
            losses=losses,
            past_key_values=getattr(outputs, "past_key_values", None),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            quantized=quantized,
            reconstruction=reconstruction,
        )

    def _loss_applies_head(self, draws: bool) -> bool:
        """Whether the caption loss can apply the language model's head by itself, chunk by chunk."""
        if self._head_is_linear is None:
            self._head_is_linear = has_linear_head(self.language_model)
        return self._head_is_linear and not (draws and self.image_head is not None and self.image_head.shares_softmax)

    # -- sharing -------------------------------------------------------------------------------------------------------

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:  # type: ignore[override]  # theirs is wrapped
        """Upload the model with processor, inference code and model card, to load where this package is not installed.

        Options are transformers' (``private``, ``token``, ``commit_message`` ...) and those of `ett.export.hub.share_model`:
        ``license_name``, ``metrics`` and ``processor``.
        """
        return share_model(self, repo_id, **options)

    def save_pretrained(  # type: ignore[override]  # the rest goes through kwargs
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers; with `push_to_hub` what is then uploaded is that of `push_to_hub`."""
        repo_id, sharing, saving = split_options(save_directory, kwargs) if push_to_hub else ("", {}, kwargs)
        super().save_pretrained(save_directory, is_main_process, state_dict, **saving)
        if push_to_hub and is_main_process:
            share_model(self, repo_id, saved=save_directory, **sharing)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        # beams repeat rows; pictures belong to rows, of which each may have any number
        pictures = {name: kwargs.pop(name, None) for name in PICTURES}
        expanded, rest = super()._expand_inputs_for_generation(  # type: ignore[misc]  # typed for a protocol
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=cast(torch.LongTensor, input_ids),
            **kwargs,
        )
        for name, given in pictures.items():
            if given is not None and len(given) > 0 and input_ids is not None and expand_size > 1:
                pictures[name] = _repeat_pictures(given, input_ids == self.config.image_token_id, expand_size)
        return expanded, {**rest, **pictures}

    def prepare_inputs_for_generation(  # type: ignore[override]  # arguments more; the rest goes through kwargs
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        pixel_values: Tensor | None = None,
        image_indices: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]  # typed for a protocol
            cast(torch.LongTensor, input_ids),
            past_key_values=past_key_values,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # pictures are read once, with the prompt; later steps find them in the cache
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs |= {"pixel_values": pixel_values, "image_indices": image_indices}
        return inputs


def _check_indices(pixel_values: Tensor | None, with_tokenizer_loss: bool) -> None:
    """Raise ValueError where indices cannot stand in for pixels."""
    if pixel_values is not None and len(pixel_values) > 0:
        raise ValueError("Both pixel_values and image_indices are given. Give pictures in one form.")
    if with_tokenizer_loss:
        raise ValueError(
            "L_vq needs the pictures: give pixel_values, or with image_indices a loss_config whose tokenizer_weight is 0."
        )


def _repeat_pictures(pictures: Tensor, is_image: Tensor, times: int) -> Tensor:
    """Each conversation's pictures, `times` over, conversation by conversation.

    Args:
        pictures: [I, ...] in reading order. is_image: bool[B, T], the placeholders.

    Returns:
        [I * times, ...], as rows that were each repeated `times` over read them.
    """
    positions = int(is_image.sum()) // len(pictures)
    counts = (is_image.sum(dim=1) // positions).tolist()
    return torch.cat([own for each in pictures.split(counts) for own in [each] * times])


def _keep(rows: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The columns of [B, T, ...] that transformers' `logits_to_keep` selects."""
    if isinstance(logits_to_keep, Tensor):
        return rows[:, logits_to_keep]
    return rows[:, -logits_to_keep:] if logits_to_keep else rows


__all__ = ["EttForConditionalGeneration", "EttOutput", "supervised_columns"]

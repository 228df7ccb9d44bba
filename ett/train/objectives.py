"""What a stage minimises, as one module that DDP can wrap: the terms that need nothing but the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ett.generate.fidelity import psnr
from ett.losses.caption import supervised_positions
from ett.losses.joint import LossConfig, reconstruction_loss, tokenizer_loss, tokenizer_losses
from ett.model.ett import EttForConditionalGeneration, EttOutput
from ett.tokenizers import VisionTokenizer
from ett.tokenizers.quantizer import spans_ranks
from ett.types import Batch

Losses = dict[str, Tensor]


class ObjectiveOutput(NamedTuple):
    """What an objective's forward gives; a tuple, for wrappers look for tensors in it.

    Attributes:
        loss: float[], of this micro-batch's share of the step.
        losses: every term by name, unweighted, float[] each.
        reconstruction: float[R, 3, H, W], about [-1, 1], of the first R pictures, or None where nothing was decoded.
    """

    loss: Tensor
    losses: Losses
    reconstruction: Tensor | None


@dataclass(frozen=True)
class Shares:
    """How a micro-batch counts in its step, so that losses of micro-batches are added and gradients of ranks averaged.

    Attributes:
        num_supervised: divisor of the summed caption loss: supervised tokens of the step / number of ranks.
        images: this micro-batch's pictures / (pictures of the step / number of ranks).
        num_drawn: divisor of the summed image loss: image tokens of the step / number of ranks.
    """

    num_supervised: float
    images: float
    num_drawn: float = 1.0


def run_model(model: EttForConditionalGeneration, batch: Batch, loss_config: LossConfig, **options: Any) -> EttOutput:
    """`model` on a whole batch with its labels; the head runs on supervised positions alone.

    Args:
        options: the forward's other arguments.
    """
    output: EttOutput = model(
        input_ids=batch.input_ids,
        pixel_values=batch.pixel_values,
        image_indices=batch.image_indices,
        labels=batch.labels,
        loss_config=loss_config,
        use_cache=False,
        **reading(batch),
        **options,
    )
    return output


def reading(batch: Batch) -> dict[str, Any]:
    """Arguments of the model's forward that say who reads what, and where the caption loss is taken.

    Conversations that share a row are told apart by their positions, from which transformers masks.
    """
    positions = batch.loss_positions
    found = {"loss_positions": supervised_positions(batch.labels) if positions is None else positions}
    packed = batch.position_ids is not None
    return found | ({"position_ids": batch.position_ids} if packed else {"attention_mask": batch.attention_mask})


class TokenizerObjective(nn.Module):
    """L_vq of a batch's pictures without the critics' terms: stage 0, where there is no language model."""

    def __init__(self, vision_tokenizer: VisionTokenizer) -> None:
        super().__init__()
        self.vision_tokenizer = vision_tokenizer

    def forward(
        self, batch: Batch, loss_config: LossConfig, shares: Shares, *, quantized: bool = True
    ) -> ObjectiveOutput:
        """The loss is L_vq; alpha plays no part where there is no other loss.

        In evaluation the terms come with ``psnr`` [dB], the mean over pictures. With `quantized` False the decoder reads the
        features, and the reconstruction is all that counts.
        """
        pixels = batch.pixel_values
        if len(pixels) == 0 and not spans_ranks(self):
            return ObjectiveOutput(torch.zeros((), device=pixels.device), {}, None)
        tokenizer = self.vision_tokenizer
        if quantized:
            reconstruction, found = tokenizer(pixels, entropy=loss_config.entropy_weight > 0)
            losses = tokenizer_losses(pixels, reconstruction, found, loss_config)
            loss = tokenizer_loss(losses, loss_config)
        else:
            reconstruction = tokenizer.decode(tokenizer.encode(pixels))
            losses = {"reconstruction_loss": reconstruction_loss(reconstruction, pixels, loss_config.reconstruction)}
            # every rank's every parameter must take part in backward, the idle quantizer's too
            idle = sum(parameter.sum() for parameter in tokenizer.quantize.parameters())
            if len(pixels) == 0:
                losses = {name: term.nan_to_num() for name, term in losses.items()}
            loss = loss_config.reconstruction_weight * losses["reconstruction_loss"] + 0.0 * idle
        if not self.training:
            pairs = zip(reconstruction.clamp(-1, 1), pixels, strict=True)
            losses["psnr"] = torch.tensor([psnr(*pair) for pair in pairs], device=pixels.device).mean()
        return ObjectiveOutput(loss * shares.images, losses, reconstruction)


class JointObjective(nn.Module):
    """L_cap + alpha * L_vq of a batch, or the loss of drawing: every stage that has a language model."""

    def __init__(self, model: EttForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, loss_config: LossConfig, shares: Shares) -> ObjectiveOutput:
        """The loss is the model's own."""
        output = run_model(
            self.model,
            batch,
            loss_config,
            num_items_in_batch=shares.num_supervised,
            num_drawn_in_batch=shares.num_drawn,
            tokenizer_share=shares.images,
        )
        assert output.loss is not None
        assert output.losses is not None
        shown = batch.num_images > 0
        if loss_config.soft_caption_weight == 0 or batch.image_indices is not None or not (shown or _several()):
            return ObjectiveOutput(output.loss, output.losses, output.reconstruction)
        soft = soft_caption_loss(self.model, batch, loss_config.soft_temperature, shares.num_supervised)
        if not shown:
            # ranks wait for each other in the language model: one without pictures runs it too, and it counts nothing
            soft = soft * 0.0
        loss = output.loss + loss_config.soft_caption_weight * soft
        return ObjectiveOutput(loss, output.losses | {"soft_caption_loss": soft}, output.reconstruction)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def soft_caption_loss(
    model: EttForConditionalGeneration, batch: Batch, temperature: float, num_supervised: float | None = None
) -> Tensor:
    """float[]: L_cap where the language model reads ``softmax(l / temperature) @ E`` in place of the chosen codes.

    Args:
        num_supervised: divisor, as in `Shares`; None takes the batch's own.

    Raises:
        RecipeError: the tokenizer has no index softmax.
    """
    tokenizer = model.vision_tokenizer
    embeddings = tokenizer.quantize.soft(tokenizer.encode(batch.pixel_values), temperature)
    visual = model.projector(embeddings.to(next(model.projector.parameters()).dtype))
    output: EttOutput = model(
        inputs_embeds=model.embed(batch.input_ids, visual),
        labels=batch.labels,
        num_items_in_batch=num_supervised,
        loss_config=LossConfig(tokenizer_weight=0.0, image_weight=0.0),
        use_cache=False,
        **reading(batch),
    )
    assert output.losses is not None
    return output.losses["caption_loss"]


def caption_part(losses: Losses, config: LossConfig) -> Tensor:
    """float[]: what of `JointObjective`'s loss is no L_vq, from its terms."""
    soft = losses.get("soft_caption_loss")
    captions = config.caption_weight * losses["caption_loss"]
    return captions if soft is None else captions + config.soft_caption_weight * soft


class DecoderObjective(nn.Module):
    """The reconstruction of codes that stay as they are: only the way from indices to pixels can learn."""

    def __init__(self, vision_tokenizer: VisionTokenizer) -> None:
        super().__init__()
        self.vision_tokenizer = vision_tokenizer

    def forward(self, batch: Batch, loss_config: LossConfig, shares: Shares) -> ObjectiveOutput:
        """The loss is L_rec; in evaluation ``psnr`` [dB] comes with it, the mean over pictures."""
        pixels, tokenizer = batch.pixel_values, self.vision_tokenizer
        if len(pixels) == 0 and not spans_ranks(self):
            return ObjectiveOutput(torch.zeros((), device=pixels.device), {}, None)
        with torch.no_grad():
            embeddings = tokenizer.quantize.lookup(tokenizer.tokenize(pixels))
        reconstruction = tokenizer.decode(embeddings)
        losses = {"reconstruction_loss": reconstruction_loss(reconstruction, pixels, loss_config.reconstruction)}
        if len(pixels) == 0:
            losses = {name: term.nan_to_num() for name, term in losses.items()}
        loss = loss_config.reconstruction_weight * losses["reconstruction_loss"]
        if not self.training:
            pairs = zip(reconstruction.clamp(-1, 1), pixels, strict=True)
            losses["psnr"] = torch.tensor([psnr(*pair) for pair in pairs], device=pixels.device).mean()
        return ObjectiveOutput(loss * shares.images, losses, reconstruction)

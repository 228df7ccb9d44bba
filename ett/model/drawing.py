"""What `EttForConditionalGeneration` needs to draw: the loss of image tokens, and their generation one by one.

While a picture is drawn, the keys and values of the prompt and of what was drawn are kept in a cache that is allocated once
(ett.model.decoding); the rows with and without the prompt (guidance) go through the language model as one batch; at image
positions the image head alone is applied, once for both; and no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ett.errors import ModelError
from ett.losses.caption import next_token_labels
from ett.losses.image import image_token_loss
from ett.model.configuration import EttConfig
from ett.model.decoding import reader_for
from ett.model.image_head import ImageHead
from ett.model.image_sampling import ImageSampling, draw_tokens, uniform_numbers
from ett.model.projector import Projector
from ett.tokenizers import VisionTokenizer
from ett.types import DRAWN_INDEX


@dataclass(frozen=True)
class GeneratedImages:
    """Drawn pictures.

    Attributes:
        indices: int64[B, h, w] in [0, K). pixel_values: float[B, 3, H, W] in [-1, 1].
    """

    indices: Tensor
    pixel_values: Tensor


class Drawing:
    """The part of the model that draws; mixed into `EttForConditionalGeneration`."""

    config: EttConfig
    vision_tokenizer: VisionTokenizer
    language_model: PreTrainedModel
    projector: Projector
    index_embedding: nn.Embedding | None
    image_head: ImageHead | None

    def add_image_head(self) -> None:
        """A fresh head, as ``config.image_head`` says, in the scale of the codebook."""
        self.image_head = self._fresh_image_head()
        self.image_head.fit(self.codes())

    def codes(self) -> Tensor:
        """float[K, D]: the codebook as the projector reads it; nothing reaches the tokenizer through it."""
        return self.projector.read(self.vision_tokenizer.quantize.codebook.detach())

    def _fresh_image_head(self) -> ImageHead:
        settings, tokenizer = self.config.image_head_config, self.vision_tokenizer
        assert settings is not None
        hidden_size = self.config.text_config.get_text_config().hidden_size
        return ImageHead(settings, hidden_size, tokenizer.codebook_size, tokenizer.codebook_dim)

    # -- learning to draw ----------------------------------------------------------------------------------------------

    def image_loss(
        self,
        hidden: Tensor,
        input_ids: Tensor | None,
        labels: Tensor,
        indices: Tensor | None,
        num_items: Tensor | float | None = None,
    ) -> Tensor:
        """Next-image-token cross-entropy, float[] in nats, at the positions before ``DRAWN_INDEX``.

        Args:
            hidden: float[B, T, C], the language model's last. input_ids, labels: as `forward` takes them.
            indices: int64[I, h, w] of the pictures, in reading order; None where there is none.
            num_items: the divisor; None counts the tokens.
        """
        if input_ids is None:
            raise ValueError("Learning to draw needs input_ids: they say where image tokens are.")
        rows = (next_token_labels(labels) == DRAWN_INDEX).flatten().nonzero().squeeze(1)
        tokens = torch.zeros_like(labels)
        if indices is not None:
            # an end of a row is no token, and nothing is to be predicted there
            placed = indices if self.projector.row_end is None else F.pad(indices, (0, 1))
            tokens = tokens.masked_scatter(input_ids == self.config.image_token_id, placed.flatten())
        targets = next_token_labels(tokens).flatten()[rows] + self._first_image_logit
        return image_token_loss(hidden.flatten(0, 1)[rows], targets, self._shared_logits(), self._num_logits, num_items)

    def with_wrong_tokens(self, indices: Tensor, input_ids: Tensor, labels: Tensor, share: float) -> Tensor:
        """int64[I, h, w]: `indices`, of which each token of a picture that is drawn is by chance another picture's at the same
        place, as wrong as what a model reads back of its own drawing.

        Args:
            indices: int64[I, h, w] of the pictures, in reading order. input_ids, labels: as `forward` takes them. share: the
                chance, in [0, 1).
        """
        if len(indices) < 2:
            return indices
        drawn = (labels[input_ids == self.config.image_token_id] == DRAWN_INDEX).view(len(indices), -1).any(dim=1)
        others = indices[torch.randperm(len(indices), device=indices.device)]
        wrong = torch.rand(indices.shape, device=indices.device) < share
        return torch.where(wrong & drawn[:, None, None], others, indices)

    def with_image_logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Text logits float[B, U, V], with those of the codes behind them where text and pictures share a softmax.

        Args:
            hidden: float[B, U, C], of the same positions.
        """
        head = self.drawing_head
        if not head.shares_softmax:
            return logits
        return torch.cat([logits, head(hidden, self.codes()).to(logits.dtype)], dim=-1)

    @property
    def drawing_head(self) -> ImageHead:
        if self.image_head is None:
            raise ModelError(
                "This model has no image head, so it reads pictures and cannot draw them. Set model.image_head in its recipe "
                "and train a `gen` or `joint` stage."
            )
        return self.image_head

    def _shared_logits(self) -> Callable[[Tensor], Tensor]:
        """float[R, C] -> the logits that an image token is normalised over, float[R, K] or float[R, V + K]."""
        head, codes = self.drawing_head, self.codes()
        if not head.shares_softmax:
            return lambda rows: head(rows, codes)
        text_head = cast(nn.Module, self.language_model.get_output_embeddings())
        return lambda rows: torch.cat([text_head(rows), head(rows, codes)], dim=-1)

    @property
    def _first_image_logit(self) -> int:
        if not self.drawing_head.shares_softmax:
            return 0
        return int(cast(nn.Linear, self.language_model.get_output_embeddings()).weight.shape[0])

    @property
    def _num_logits(self) -> int:
        return self._first_image_logit + self.vision_tokenizer.codebook_size

    # -- drawing -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        grid: tuple[int, int],
        seeds: Sequence[int],
        sampling: ImageSampling = ImageSampling(),
        on_token: Callable[[int], object] | None = None,
    ) -> GeneratedImages:
        """Draw B pictures, token by token; `EttProcessor.drawing_inputs` prepares the first two arguments.

        Args:
            input_ids: int64[B, T], prompts that end where a picture begins, padded on the left. With guidance int64[2 B, T]:
                the prompts, then for each its counterpart without words.
            attention_mask: of the same shape, 1 where real.
            grid: (h, w) of the pictures in tokens, h * w of which are drawn each.
            seeds: B of them; a picture depends on its own alone (but for the rounding of batches of another size).
            sampling: how tokens are chosen. on_token: called with the number of tokens drawn so far, after each.

        Raises:
            ModelError: no image head, or more positions than the language model has.
            ValueError: numbers of rows and seeds that do not fit, or a grid larger than the projector's.
        """
        indices = self.generate_image_indices(input_ids, attention_mask, grid, seeds, sampling, on_token)
        return GeneratedImages(indices, self.vision_tokenizer.detokenize(indices))

    @torch.no_grad()
    def generate_image_indices(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        grid: tuple[int, int],
        seeds: Sequence[int],
        sampling: ImageSampling = ImageSampling(),
        on_token: Callable[[int], object] | None = None,
    ) -> Tensor:
        """int64[B, h, w] in [0, K): what `generate_images` draws, not decoded."""
        branches = 2 if sampling.guided else 1
        if len(input_ids) != branches * len(seeds):
            raise ValueError(
                f"{len(seeds)} pictures {'with' if sampling.guided else 'without'} guidance need {branches * len(seeds)} rows "
                f"of input_ids, got {len(input_ids)}. Prepare them with EttProcessor.drawing_inputs(guided={sampling.guided})."
            )
        steps = DrawingSteps(self, input_ids, attention_mask, grid)
        uniforms = uniform_numbers(seeds, steps.num_tokens, input_ids.device)
        drawn: list[Tensor] = []
        hidden = steps.first()
        for token in range(steps.num_tokens):
            if sampling.guided:
                # heads are linear: guidance of hidden states is guidance of logits, for one head instead of two
                conditional, plain = hidden.float().chunk(2)
                hidden = plain + sampling.scale(token, steps.num_tokens) * (conditional - plain)
            drawn.append(draw_tokens(steps.logits(hidden), sampling, uniforms[token]))
            if token + 1 < steps.num_tokens:
                hidden = steps.next(drawn[-1])
            if on_token is not None:
                on_token(token + 1)
        return torch.stack(drawn, dim=1).unflatten(1, grid)

    def token_embeddings(self, indices: Tensor, number: int, width: int) -> Tensor:
        """float[R, 1, C]: int64[R] tokens, each token `number` (0-based) of its picture of `width` columns, as the language
        model reads them back; float[R, 2, C] where the end of a row follows."""
        if self.index_embedding is not None:
            embeddings = self.index_embedding(indices)[:, :, None, None]
        else:
            embeddings = self.vision_tokenizer.quantize.lookup(indices[:, None, None])
        embeddings = embeddings.to(self.projector.layers[0].weight.dtype)
        return cast(Tensor, self.projector(embeddings, start=number, width=width))


class DrawingSteps:
    """The language model's side of drawing: prompts in, then token after token, each time the hidden state before the next.

    Args:
        model: in evaluation mode. input_ids, attention_mask: int64[R, T], padded on the left. grid: (h, w).

    Attributes:
        num_tokens: h * w. logits: float[B, C] -> float[B, K], the image head alone.

    Raises:
        ModelError, ValueError: as `Drawing.generate_images`.
    """

    def __init__(self, model: Drawing, input_ids: Tensor, attention_mask: Tensor, grid: tuple[int, int]) -> None:
        self.model, self.input_ids, self.width = model, input_ids, grid[1]
        self.num_tokens = grid[0] * grid[1]
        self.logits = model.drawing_head.fixed(model.codes())
        rows, length = input_ids.shape
        room = getattr(model.config.text_config.get_text_config(), "max_position_embeddings", None)
        positions = self.num_tokens + (grid[0] if model.projector.row_end is not None else 0)
        if isinstance(room, int) and length + positions > room:
            raise ModelError(
                f"The prompt takes {length} positions and the picture {positions}, but the language model has {room}. "
                "Shorten the prompt, or draw a smaller picture."
            )
        table = model.projector.rows
        if table is not None and max(grid) > table.num_embeddings:
            raise ValueError(
                f"A grid of {grid[0]} x {grid[1]} tokens is larger than the projector's grid_positions "
                f"({table.num_embeddings}). Draw a smaller picture."
            )
        decoder = model.language_model.get_decoder()
        real = torch.cat([attention_mask, attention_mask.new_ones(rows, positions)], dim=1).bool()
        self.reader = reader_for(decoder, model.config.text_config, real)
        self.dtype = decoder.dtype
        self.drawn = 0

    def first(self) -> Tensor:
        """float[R, C]: the hidden state before the first token."""
        embeds = self.model.language_model.get_input_embeddings()(self.input_ids)
        return self.reader.read(embeds.to(self.dtype))

    def next(self, indices: Tensor) -> Tensor:
        """float[R, C]: the hidden state behind int64[B] `indices`, B = R, or R / 2 where rows come with and without prompt."""
        embeds = self.model.token_embeddings(indices, self.drawn, self.width).to(self.dtype)
        self.drawn += 1
        return self.reader.read(embeds.repeat(len(self.input_ids) // len(indices), 1, 1))

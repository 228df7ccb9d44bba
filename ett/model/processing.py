"""`EttProcessor`: pictures and conversations -> the model's tensors, with labels on the assistant's words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import PIL.Image
import torch
from huggingface_hub import CommitInfo
from jinja2 import TemplateError
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from ett.errors import DataError, ModelError, unknown
from ett.images import FIT_MODES, Box, FitMode, fit, load_image, to_array
from ett.losses.caption import supervised_positions
from ett.model.hub import share_processor, split_options
from ett.model.packing import packed_rows
from ett.model.text import CHAT_TEMPLATES, IMAGE_TOKEN, add_image_token
from ett.types import DRAWN_INDEX, IGNORE_INDEX, Batch, Example, Message


class EttImageProcessor(BaseImageProcessor):
    """Pictures of any mode and size -> float32[I, 3, H, W] in [-1, 1], without torchvision.

    Args:
        height, width: H and W [pixels], multiples of the tokenizer's downsampling times the merge size.
        mode: "pad" keeps the whole picture on a white ground, "crop" cuts its middle, "stretch" ignores its aspect.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  # transformers reads a plain class attribute

    def __init__(self, height: int = 256, width: int = 256, mode: FitMode = "pad", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if mode not in FIT_MODES:
            raise ValueError(unknown("mode of fitting a picture", mode, FIT_MODES))
        self.height, self.width, self.mode = height, width, mode

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """`images`: a picture or a list of them (`ett.images.load_image` says what is accepted)."""
        pictures = images if isinstance(images, list | tuple) else [images]
        arrays = [self.fit(load_image(picture))[0] for picture in pictures]
        stacked = np.stack(arrays) if arrays else np.zeros((0, 3, self.height, self.width), dtype=np.float32)
        return BatchFeature(data={"pixel_values": stacked}, tensor_type=return_tensors)

    def fit(self, image: PIL.Image.Image) -> tuple[np.ndarray, Box]:
        """(float32[3, H, W] in [-1, 1], where the picture lies in it) of an RGB picture."""
        fitted = fit(image, self.height, self.width, self.mode)
        return to_array(fitted.image), fitted.box


@dataclass(frozen=True)
class Encoded:
    """One conversation as ids: int lists of equal length, and its pictures, float32[3, H, W] or as int[h, w] indices."""

    input_ids: list[int]
    labels: list[int]
    pixel_values: list[np.ndarray]
    id: str
    image_indices: list[np.ndarray] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        return len(self.pixel_values) + len(self.image_indices)


class EttProcessor(ProcessorMixin):
    """Image processor and text tokenizer of one model.

    Args:
        image_processor: fixes the pictures' size.
        tokenizer: the language model's; gets `IMAGE_TOKEN` if it lacks it.
        num_image_positions: visual positions a picture takes, (H / (downsample * n)) * (W / (downsample * n)), and one more
            for each row where rows have ends.
        chat_template: a Jinja template over messages whose ``content`` is text with `IMAGE_TOKEN` for each picture; None
            takes the tokenizer's own, or the plain captioning format if it has none.
        draws: of a model with an image head: pictures in the assistant's turns are labelled, to be drawn.
        positions_per_row: of a picture, the row's end included; 0 where rows have none.
    """

    def __init__(
        self,
        image_processor: EttImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        num_image_positions: int = 0,
        chat_template: str | None = None,
        draws: bool = False,
        positions_per_row: int = 0,
        **kwargs: Any,
    ) -> None:
        self.num_image_positions = num_image_positions
        self.draws, self.positions_per_row = draws, positions_per_row
        self.image_token = IMAGE_TOKEN
        self.image_token_id = add_image_token(tokenizer)
        template = chat_template or getattr(tokenizer, "chat_template", None) or CHAT_TEMPLATES["plain"]
        super().__init__(image_processor, tokenizer, chat_template=template)
        self.image_processor: EttImageProcessor = image_processor
        self.tokenizer: PreTrainedTokenizerBase = tokenizer

    # -- for our own loop ----------------------------------------------------------------------------------------------

    def encode(self, example: Example, max_length: int | None = None) -> Encoded:
        """One example as ids with labels on the assistant's words and the token that ends them.

        `max_length` cuts text at the end of the conversation.

        Raises:
            DataError: pictures and image parts do not match, a text contains the placeholder, the chat template refuses the
                turns, or the cut would lose a picture or every supervised token.
        """
        input_ids, labels = self._tokenize_turns(example.messages, example.id)
        num_pictures = sum(part["type"] == "image" for message in example.messages for part in _parts(message))
        if num_pictures != example.num_images:
            raise DataError(f"Example {example.id!r} mentions {num_pictures} pictures and brings {example.num_images}.")
        if max_length is not None and len(input_ids) > max_length:
            cut, lost = labels[:max_length], input_ids[max_length:]
            if self.image_token_id in lost or all(label == IGNORE_INDEX for label in cut):
                raise DataError(
                    f"Example {example.id!r} has {len(input_ids)} positions; cut to max_length = {max_length} it would lose "
                    "a picture or its whole answer. Raise max_length, or shorten or drop the example."
                )
            input_ids, labels = input_ids[:max_length], cut
        pixels = [self.image_processor.fit(image)[0] for image in example.images]
        return Encoded(input_ids, labels, pixels, example.id, list(example.image_indices or ()))

    def collate(self, items: Sequence[Encoded], padding_side: str = "right", *, packing: bool = False) -> Batch:
        """Pad encoded examples to the longest and stack them.

        Args:
            packing: put several into a row where they fit (`packed_rows`), pictures and ids in the order of the rows. Nothing
                predicts the first token of a conversation, whatever stands before it.
        """
        longest = max(len(item.input_ids) for item in items)
        rows = packed_rows([len(item.input_ids) for item in items]) if packing else [[i] for i in range(len(items))]
        items = [items[number] for row in rows for number in row]
        starts = np.cumsum([0, *(len(row) for row in rows)])
        shared = [items[start:stop] for start, stop in pairwise(starts)]

        def padded(values: list[int], fill: int) -> list[int]:
            padding = [fill] * (longest - len(values))
            return values + padding if padding_side == "right" else padding + values

        def joined(row: Sequence[Encoded], fill: int, name: str) -> list[int]:
            return padded([value for item in row for value in getattr(item, name)], fill)

        pad_id = self.pad_token_id
        pixels = [pixel for item in items for pixel in item.pixel_values]
        size = (0, 3, self.image_processor.height, self.image_processor.width)
        indices = [each for item in items for each in item.image_indices]
        labels = torch.tensor([joined(row, IGNORE_INDEX, "labels") for row in shared])
        position_ids = None
        if packing:
            counted = [[t for item in row for t in range(len(item.input_ids))] for row in shared]
            position_ids = torch.tensor([row + list(range(longest - len(row))) for row in counted])
            labels[position_ids == 0] = IGNORE_INDEX
        return Batch(
            pixel_values=torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros(size),
            input_ids=torch.tensor([joined(row, pad_id, "input_ids") for row in shared]),
            attention_mask=torch.tensor([padded([1] * sum(len(item.input_ids) for item in row), 0) for row in shared]),
            labels=labels,
            ids=[item.id for item in items],
            image_indices=torch.from_numpy(np.stack(indices).astype(np.int64)) if indices else None,
            # counted here: on an accelerator the loop would have to wait for it
            loss_positions=supervised_positions(labels),
            drawn_tokens=int((labels[:, 1:] == DRAWN_INDEX).sum()),
            position_ids=position_ids,
        )

    def prompt(self, examples: Sequence[Example]) -> Batch:
        """The examples up to the first assistant turn, left-padded, ready for `generate`.

        Raises:
            DataError: a text contains the placeholder, or the chat template refuses the turns.
        """
        items = []
        for example in examples:
            turns = []
            for message in example.messages:
                if message["role"] == "assistant":
                    break
                turns.append(message)
            ids, _ = self._tokenize_turns(turns, example.id, add_generation_prompt=True)
            asked = sum(part["type"] == "image" for message in turns for part in _parts(message))
            pixels = [self.image_processor.fit(image)[0] for image in example.images[:asked]]
            items.append(Encoded(ids, [IGNORE_INDEX] * len(ids), pixels, example.id))
        return self.collate(items, padding_side="left")

    def drawing_inputs(self, prompts: Sequence[str], guided: bool = True) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` for `generate_images`, padded on the left.

        Args:
            prompts: what to draw. guided: behind them the rows that say nothing, as many again.

        Raises:
            DataError: a prompt that contains the picture placeholder.
        """
        texts = [*prompts, *[""] * len(prompts)] if guided else prompts
        turns = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts]
        ids = [self.tokenize_conversation(each, add_generation_prompt=True)[0] for each in turns]
        batch = self.collate([Encoded(each, [IGNORE_INDEX] * len(each), [], "") for each in ids], padding_side="left")
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

    @property
    def pad_token_id(self) -> int:
        """The id that fills padding; masked everywhere, so the end-of-sequence token serves where there is no other."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(token_id, int):
                return token_id
        return 0

    def tokenize_conversation(
        self, messages: Sequence[Message], where: str = "conversation", add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of equal length; labels are the ids of assistant turns and ``IGNORE_INDEX`` elsewhere.

        Where the model draws, a picture in an assistant turn has ``DRAWN_INDEX``; of a turn that is nothing but a picture, what
        the template writes around it is not supervised.

        The rendered text is cut where supervision begins and ends, and each piece is tokenized by itself: a prompt then has
        the same ids in training and in generation, whatever the tokenizer would merge across the border.
        """
        flat = [{"role": message["role"], "content": self._flatten(message, where)} for message in messages]
        input_ids: list[int] = []
        labels: list[int] = []

        def append(text: str, supervised: bool, drawn: bool = False) -> None:
            pieces = text.split(IMAGE_TOKEN)
            for i, piece in enumerate(pieces):
                if i > 0:
                    input_ids.extend([self.image_token_id] * self.num_image_positions)
                    labels.extend(self._picture_labels(drawn))
                ids: list[int] = self.tokenizer(piece, add_special_tokens=False).input_ids if piece else []
                input_ids.extend(ids)
                labels.extend(ids if supervised else [IGNORE_INDEX] * len(ids))

        done = ""
        for k, message in enumerate(flat):
            if message["role"] != "assistant":
                continue
            prompt, full = self._render(flat[:k], True), self._render(flat[: k + 1], False)
            if not (full.startswith(prompt) and prompt.startswith(done)):
                raise ModelError(
                    "This chat template rewrites earlier turns, so answers cannot be told from prompts. Choose another "
                    'with model.chat_template (for example "plain").'
                )
            answer = full[len(prompt) :]
            stripped = answer.rstrip()
            append(prompt[len(done) :], False)
            silent = IMAGE_TOKEN in message["content"] and not message["content"].replace(IMAGE_TOKEN, "").strip()
            append(stripped, not (self.draws and silent), drawn=self.draws)
            append(answer[len(stripped) :], False)
            done = full
        append(self._render(flat, add_generation_prompt)[len(done) :], False)
        start = self._leading_ids(input_ids)
        return start + input_ids, [IGNORE_INDEX] * len(start) + labels

    def _tokenize_turns(
        self, turns: Sequence[Message], example_id: str, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """`tokenize_conversation`; a template that raises (roles must alternate, no system turn) is the example's fault."""
        try:
            return self.tokenize_conversation(turns, example_id, add_generation_prompt)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in turns[:8])
            raise DataError(
                f"Example {example_id!r}: the chat template refuses its turns ({roles}): {error}. Mend or remove it, or choose "
                'another template with model.chat_template (for example "plain").'
            ) from error

    def _picture_labels(self, drawn: bool) -> list[int]:
        """Of a picture's positions: the tokens of one that is drawn are predicted, the ends of its rows are not."""
        row = self.positions_per_row
        tokens = (not row or (position + 1) % row for position in range(self.num_image_positions))
        return [DRAWN_INDEX if drawn and token else IGNORE_INDEX for token in tokens]

    def _flatten(self, message: Message, where: str) -> str:
        parts = _parts(message)
        for part in parts:
            if part["type"] == "text" and IMAGE_TOKEN in part["text"]:
                raise DataError(f"{where}: a text contains {IMAGE_TOKEN}, which is reserved for pictures. Take it out.")
        return "".join(IMAGE_TOKEN if part["type"] == "image" else part["text"] for part in parts)

    def _render(self, flat: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if not flat:
            return ""
        assert isinstance(self.chat_template, str)
        rendered = self.tokenizer.apply_chat_template(
            flat, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(rendered, str)
        return rendered

    def _leading_ids(self, input_ids: list[int]) -> list[int]:
        """What the tokenizer puts in front of every text (a BOS token), unless the template wrote it already."""
        wanted = [i for i in self.tokenizer("").input_ids if i != self.tokenizer.eos_token_id]
        return [] if input_ids[: len(wanted)] == wanted else wanted

    # -- for pipelines and foreign trainers ----------------------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        return_tensors: str | None = None,
        padding: bool | str = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """transformers' convention: `text` with one `IMAGE_TOKEN` for each picture, and the pictures in order."""
        data: dict[str, Any] = {}
        if images is not None:
            nested = (
                [image for group in images for image in (group if isinstance(group, list | tuple) else [group])]
                if (isinstance(images, list | tuple))
                else [images]
            )
            data.update(self.image_processor(nested))
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            wanted = sum(t.count(IMAGE_TOKEN) for t in texts)
            brought = len(data.get("pixel_values", ()))
            if wanted != brought:
                raise ValueError(f"The texts mention {wanted} pictures ({IMAGE_TOKEN}), but {brought} were given.")
            expanded = [t.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.num_image_positions) for t in texts]
            data.update(self.tokenizer(expanded, padding=padding, **kwargs))
        return BatchFeature(data=data, tensor_type=return_tensors)

    def apply_chat_template(  # type: ignore[override]  # strings or tensors, as the library itself does
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; contents may be text or lists of parts. A `chat_template` given here is used for this call.

        Text, or with `tokenize` or `return_dict` tensors, always in a `BatchFeature`; with `return_assistant_tokens_mask` also
        ``assistant_masks`` int64[B, T], 1 where `tokenize_conversation` puts labels. Of `processor_kwargs`, ``padding_side``
        counts ("left" by default, for generation). `continue_final_message` leaves the last turn open, to be continued.
        """
        if chat_template is not None:
            kept, self.chat_template = self.chat_template, chat_template
        try:
            single = bool(conversation) and isinstance(conversation[0], dict)
            conversations = [conversation] if single else conversation
            if not tokenize and not return_dict:
                texts = [
                    self._chat_text(turns, add_generation_prompt, continue_final_message) for turns in conversations
                ]
                return texts[0] if single else texts
            items = [self._chat_item(turns, add_generation_prompt, continue_final_message) for turns in conversations]
        finally:
            if chat_template is not None:
                self.chat_template = kept
        batch = self.collate(items, padding_side=(processor_kwargs or {}).get("padding_side", "left"))
        data = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if return_assistant_tokens_mask:
            data["assistant_masks"] = (batch.labels != IGNORE_INDEX).long()
        return BatchFeature(data | ({"pixel_values": batch.pixel_values} if len(batch.pixel_values) else {}))

    def _chat_text(self, turns: Sequence[Message], add_generation_prompt: bool, open_end: bool) -> str:
        flat = [{"role": turn["role"], "content": self._flatten(turn, "conversation")} for turn in turns]
        if open_end:
            return self._render(flat[:-1], True) + flat[-1]["content"]
        return self._render(flat, add_generation_prompt)

    def _chat_item(self, turns: Sequence[Message], add_generation_prompt: bool, open_end: bool) -> Encoded:
        images = [
            part.get("image", part.get("url", part.get("path")))
            for turn in turns
            for part in _parts(turn)
            if part["type"] == "image"
        ]
        pixels = [self.image_processor.fit(load_image(image))[0] for image in images]
        closed = turns[:-1] if open_end else turns
        ids, labels = self.tokenize_conversation(closed, add_generation_prompt=add_generation_prompt or open_end)
        if open_end:
            begun = self.tokenizer(self._flatten(turns[-1], "conversation"), add_special_tokens=False).input_ids
            ids, labels = ids + begun, labels + begun
        return Encoded(ids, labels, pixels, "")

    # -- sharing -------------------------------------------------------------------------------------------------------

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Upload the processor with its code, to load where this package is not installed; options are transformers'."""
        return share_processor(self, repo_id, **options)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """As in transformers; with `push_to_hub` what is then uploaded is that of `push_to_hub`."""
        repo_id, sharing, saving = split_options(save_directory, kwargs) if push_to_hub else ("", {}, kwargs)
        files: list[str] = super().save_pretrained(save_directory, **saving)
        if push_to_hub:
            share_processor(self, repo_id, **sharing)
        return files

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _parts(message: Message) -> Sequence[Any]:
    """The content of a message as parts; a plain text is one."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content

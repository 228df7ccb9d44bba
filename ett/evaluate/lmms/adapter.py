"""What an lmms-eval request asks, as an `Example`, and the model's answer to it; lmms-eval itself is not needed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageFile
import torch

from ett.data.sources import conversation
from ett.errors import ModelError, UserError
from ett.evaluate.base import Subject
from ett.evaluate.run import load_for_evaluation
from ett.evaluate.run_folder import resolve_model_folder
from ett.evaluate.tasks.loss import teacher_forced
from ett.generate.chat import answers
from ett.images import load_image
from ett.types import Example, Message

MAX_NEW_TOKENS = 128
"""Where an answer stops at the latest, for tasks that do not say."""


class Answerer:
    """A saved model that answers conversations and tells how likely an answer is.

    Args:
        pretrained: the folder of a run or of a saved model, or the name of shipped weights.
        batch_size: conversations at a time, >= 1.
        device: torch's name of it; None stays on the CPU.

    Raises:
        UserError: there is no complete model, or `batch_size` is no such number.
    """

    def __init__(self, pretrained: str, batch_size: int | str = 1, device: str | None = None) -> None:
        try:
            self.batch_size = int(batch_size)
        except ValueError:
            raise UserError(f"batch_size = {batch_size!r} must be a whole number; it is not found out here.") from None
        if self.batch_size < 1:
            raise UserError(f"batch_size = {batch_size} must be at least 1.")
        folder = resolve_model_folder(pretrained)
        model, tokenizer, processor = load_for_evaluation(folder)
        if model is None:
            raise ModelError(f"{folder} holds a vision tokenizer alone, which answers nothing. Give a complete model.")
        model.to(torch.device(device or "cpu"))  # type: ignore[arg-type]  # transformers types it for a protocol
        self.subject = Subject(tokenizer, processor, model, self.batch_size)

    @torch.inference_mode()
    def say(self, examples: Sequence[Example], settings: Mapping[str, Any]) -> list[str]:
        """Greedy answers to examples that end in a user turn.

        Args:
            settings: lmms-eval's ``generation_kwargs``: ``max_new_tokens`` and ``until`` (texts before which to cut) count.

        Raises:
            UserError: they ask for anything but greedy answers.
        """
        refuse_sampling(settings)
        tokens = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        subject, said = self.subject, list[str]()
        for start in range(0, len(examples), self.batch_size):
            part = examples[start : start + self.batch_size]
            said += answers(subject.language_model, subject.processor, part, max_new_tokens=tokens)
        return [cut(text, settings.get("until")) for text in said]

    @torch.inference_mode()
    def likelihoods(self, examples: Sequence[Example], continuations: Sequence[str]) -> list[tuple[float, bool]]:
        """(mean of -log p per token, whether greedy decoding would say it) of each continuation as the answer to its example.

        The token that ends the answer counts.
        """
        found = []
        answered = [replied(*pair) for pair in zip(examples, continuations, strict=True)]
        for start in range(0, len(answered), self.batch_size):
            for nats, hits, tokens in teacher_forced(self.subject, answered[start : start + self.batch_size]):
                found.append((nats / tokens, hits == tokens))
        return found


def refuse_sampling(settings: Mapping[str, Any]) -> None:
    """Raise UserError where lmms-eval's generation settings are not greedy: other answers than asked for would be silent."""
    temperature = settings.get("temperature")
    sampled = bool(settings.get("do_sample")) and (temperature is None or float(temperature) > 0)
    beams = int(settings.get("num_beams") or 1)
    if sampled or beams > 1:
        raise UserError(
            f"This task asks for do_sample = {settings.get('do_sample')}, temperature = {settings.get('temperature')}, "
            f"num_beams = {beams}; ett answers lmms-eval greedily. Set --gen_kwargs do_sample=False,num_beams=1."
        )


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """`text` before the first of the texts in `until`, stripped; empty ones do not count."""
    ends = [until] if isinstance(until, str) else list(until or ())
    for end in ends:
        if end:
            text = text.split(end)[0]
    return text.strip()


def asked_simply(context: str, visuals: Sequence[Any] | None, name: str) -> Example:
    """The example of a simple request: pictures first, then the context; one without words is the picture alone.

    Raises:
        UserError: a visual that is no picture. DataError: a picture that cannot be read.
    """
    pictures = [_picture(visual) for visual in visuals or ()]
    messages = conversation(context or None, "", len(pictures))[:1]
    return Example(name, messages, _opened(pictures))


def asked_in_chat(messages: Sequence[Mapping[str, Any]], name: str) -> Example:
    """The example of a chat request, whose parts are ``{"type": "text", "text"}`` and ``{"type": "image", "url"}``.

    Empty texts are left out: a question without words is the picture alone.

    Raises:
        UserError: sound or film. DataError: a picture that cannot be read.
    """
    pictures: list[Any] = []
    turns: list[Message] = []
    for message in messages:
        content: list[dict[str, str]] = []
        for part in message["content"]:
            if part["type"] == "text":
                content += [{"type": "text", "text": part["text"]}] if part["text"] else []
            elif part["type"] == "image":
                pictures.append(_picture(part["url"]))
                content.append({"type": "image"})
            else:
                raise UserError(f"The task shows {part['type']}; ett reads pictures and text. Choose another task.")
        turns.append({"role": message["role"], "content": content})
    return Example(name, turns, _opened(pictures))


def replied(example: Example, answer: str) -> Example:
    """`example` with `answer` as the assistant's turn after it."""
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return replace(example, messages=[*example.messages, reply])


def grouped(settings: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], list[int]]]:
    """(settings, positions that have them) in order of first appearance: what can be answered together."""
    groups: list[tuple[Mapping[str, Any], list[int]]] = []
    for position, each in enumerate(settings):
        for known, positions in groups:
            if known == each:
                positions.append(position)
                break
        else:
            groups.append((each, [position]))
    yield from groups


def _opened(pictures: Sequence[Any]) -> list[PIL.Image.Image]:
    # lmms-eval switches this on for the whole process as it is imported, and half a picture would be read as a whole one
    kept, PIL.ImageFile.LOAD_TRUNCATED_IMAGES = PIL.ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        return [load_image(picture) for picture in pictures]
    finally:
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES = kept


def _picture(visual: Any) -> Any:
    if isinstance(visual, str | Path) or hasattr(visual, "convert"):
        return visual
    raise UserError(f"The task shows a {type(visual).__name__}; ett reads pictures and text. Choose another task.")

"""Answers to many conversations in one batch, each with settings of its own: length, temperature, seed, stops, stream.

What a row says does not depend on its neighbours: each has a source of randomness and limits of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import PIL.Image
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers import PreTrainedTokenizerBase as TextTokenizer

from ett.config import require
from ett.errors import DataError, ModelError
from ett.generate.chat import stop_ids
from ett.model.ett import EttForConditionalGeneration
from ett.model.image_sampling import kept
from ett.model.processing import Encoded, EttProcessor
from ett.types import IGNORE_INDEX, Message

Ending = Literal["stop", "length", "abandoned"]
"""Why an answer ended: by itself or at a stop text, at its longest, or because nobody waits for it any more."""

_BROKEN = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """How one answer is chosen, token by token.

    Attributes:
        max_new_tokens: where it ends at the latest, >= 1.
        temperature: of the softmax, >= 0; 0 takes the likeliest token.
        top_p: only the likeliest tokens whose mass together reaches this can be drawn, in (0, 1].
        seed: of this answer's draws; None takes one from torch's global random state.
        stop: texts that end the answer and are not part of it; none of them empty.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        require(self.temperature >= 0, "temperature", self.temperature, "0 (likeliest token) or above")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(all(self.stop), "stop", self.stop, "texts that are not empty")


@dataclass(frozen=True)
class Asked:
    """One row: a prompt, its settings, and who listens.

    Attributes:
        prompt: what `encode_prompt` returned.
        on_text: called with each piece of text once it is certain, in the thread that generates; the pieces together are
            `Answered.text`.
        abandoned: asked before each token; once it says True, the row ends.
    """

    prompt: Encoded
    sampling: Sampling = Sampling()
    on_text: Callable[[str], None] | None = None
    abandoned: Callable[[], bool] = bool


@dataclass(frozen=True)
class Answered:
    """What a row said: its text, stripped; why it ended; its length in tokens, the end token included."""

    text: str
    ending: Ending
    num_tokens: int


def encode_prompt(
    model: EttForConditionalGeneration,
    processor: EttProcessor,
    messages: Sequence[Message],
    images: Iterable[PIL.Image.Image],
) -> Encoded:
    """A conversation as the positions that its next answer follows.

    Args:
        messages: turns in order, answers among them; the i-th ``{"type": "image"}`` part stands for the i-th of `images`.
        images: mode RGB, any size; taken one at a time, once the texts are known to fit.

    Raises:
        DataError: a text that contains the picture placeholder, pictures that do not match, or nothing to answer to.
        ModelError: no position is left for an answer, or a chat template that cannot render these turns.
    """
    ids, _ = processor.tokenize_conversation(messages, add_generation_prompt=True)
    if not ids:
        raise DataError("The conversation is empty. Give a picture or a text.")
    room = positions(model)
    if room is not None and len(ids) >= room:
        raise ModelError(
            f"The prompt takes {len(ids)} positions, but the language model has {room}. Use fewer pictures or a shorter text."
        )
    pixels = [processor.image_processor.fit(image)[0] for image in images]
    asked = sum(part["type"] == "image" for message in messages for part in message["content"])
    if asked != len(pixels):
        raise DataError(f"The conversation mentions {asked} pictures and brings {len(pixels)}.")
    return Encoded(ids, [IGNORE_INDEX] * len(ids), pixels, "conversation")


def positions(model: EttForConditionalGeneration) -> int | None:
    """Positions that the language model has for prompt and answer together; None where it sets no limit."""
    room = getattr(model.config.text_config.get_text_config(), "max_position_embeddings", None)
    return room if isinstance(room, int) else None


def converse(model: EttForConditionalGeneration, processor: EttProcessor, rows: Sequence[Asked]) -> list[Answered]:
    """The answers to `rows`, in order, generated together.

    Args:
        model: in evaluation mode. An answer that would outgrow the language model's positions ends with "length".
    """
    if not rows:
        return []
    batch = processor.collate([row.prompt for row in rows], padding_side="left")
    batch = batch.to(model.vision_tokenizer.encoder_output.device)
    ends, room = stop_ids(model, processor), positions(model)
    sayings = [_Saying(row, processor.tokenizer, ends, room) for row in rows]
    settings = GenerationConfig(
        max_new_tokens=max(saying.limit for saying in sayings),
        do_sample=False,  # `_Drawing` draws
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=ends or None,
        pad_token_id=processor.pad_token_id,
        suppress_tokens=[processor.image_token_id],
    )
    pixels = {"pixel_values": batch.pixel_values} if len(batch.pixel_values) else {}
    generator: Any = model  # transformers types `generate` for its own protocol only
    with torch.inference_mode():
        generator.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Drawing([row.sampling for row in rows])]),
            stopping_criteria=StoppingCriteriaList([_Listening(sayings)]),
            **pixels,
        )
    return [saying.answered() for saying in sayings]


class _Drawing(LogitsProcessor):
    """Leaves rows of temperature 0 as they are, and makes a draw the largest score of the others.

    A draw from softmax(l) is the argmax of ``l - log e`` with e exponential (see `ett.model.image_sampling.draw_tokens`).
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self._drawn = [(i, each) for i, each in enumerate(samplings) if each.temperature > 0]
        self._sources = [torch.Generator() for _ in self._drawn]
        for (_, each), source in zip(self._drawn, self._sources, strict=True):
            source.manual_seed(each.seed if each.seed is not None else int(torch.randint(2**62, ())))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for (i, each), source in zip(self._drawn, self._sources, strict=True):
            noise = torch.empty(scores.shape[-1]).exponential_(generator=source).log().to(scores.device)
            scores[i] = kept(scores[i : i + 1].float() / each.temperature, None, each.top_p)[0] - noise
        return scores


class _Listening(StoppingCriteria):
    """Hands each row's new token to its `_Saying`; says which rows are done."""

    def __init__(self, sayings: Sequence[_Saying]) -> None:
        self._sayings = sayings

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tokens = input_ids[:, -1].tolist()
        done = [saying.hear(token) for saying, token in zip(self._sayings, tokens, strict=True)]
        return torch.tensor(done, device=input_ids.device)


class _Saying:
    """One row's tokens on their way to text.

    Text is certain once no later token can change it: not inside a character that is still incomplete, not white space that
    may turn out to be the answer's end, not the beginning of a stop text.
    """

    def __init__(self, row: Asked, tokenizer: TextTokenizer, ends: Sequence[int], room: int | None) -> None:
        self._row, self._tokenizer, self._ends = row, tokenizer, frozenset(ends)
        longest = row.sampling.max_new_tokens
        self.limit = longest if room is None else min(longest, room - len(row.prompt.input_ids))
        self._ids: list[int] = []
        self._num_tokens = self._start = self._decoded = 0
        self._pending = self._said = ""
        self._ending: Ending | None = None

    def hear(self, token: int) -> bool:
        """Take the next token; True once the row is done (later tokens are padding)."""
        if self._ending is not None:
            return True
        if self._row.abandoned():
            self._ending = "abandoned"
            return True
        self._num_tokens += 1
        if token in self._ends:
            self._finish("stop")
            return True
        self._ids.append(token)
        text, last = self._new_text(), self._num_tokens >= self.limit
        self._pending += text
        cut = min((at for stop in self._row.sampling.stop if (at := self._pending.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self._pending = self._pending[:cut]
            self._close("stop")
        elif last:
            self._finish("length")
        else:
            self._say(self._certain())
        return self._ending is not None

    def answered(self) -> Answered:
        if self._ending is None:  # the batch ended first, which its longest row decides
            self._finish("length")
        assert self._ending is not None
        return Answered(self._said, self._ending, self._num_tokens)

    def _finish(self, ending: Ending) -> None:
        self._pending += self._new_text(final=True)
        self._close(ending)

    def _close(self, ending: Ending) -> None:
        self._ending = ending
        self._say(len(self._pending.rstrip()))

    def _say(self, length: int) -> None:
        piece, self._pending = self._pending[:length], self._pending[length:]
        piece = piece if self._said else piece.lstrip()
        self._said += piece
        if piece and self._row.on_text is not None:
            self._row.on_text(piece)

    def _new_text(self, final: bool = False) -> str:
        """What the tokens since the last call add; the tokens of the piece before are decoded with them, since a tokenizer
        may write a word differently at the beginning of a text."""
        before = self._decode(self._ids[self._start : self._decoded])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith(_BROKEN) and not final):
            return ""
        self._start, self._decoded = self._decoded, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _certain(self) -> int:
        """Characters at the beginning of what is pending that no later token can take back."""
        held = 0
        for stop in self._row.sampling.stop:
            for length in range(min(len(stop) - 1, len(self._pending)), held, -1):
                if stop.startswith(self._pending[-length:]):
                    held = length
                    break
        return len(self._pending[: len(self._pending) - held].rstrip())


__all__ = ["Answered", "Asked", "Ending", "Sampling", "converse", "encode_prompt", "positions"]

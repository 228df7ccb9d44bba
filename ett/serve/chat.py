"""``/v1/chat/completions``: from a request to a prompt, from tokens to OpenAI's objects, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import PIL.Image
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError

from ett.errors import UserError
from ett.generate.conversations import Answered, Asked, Ending, Sampling, converse, encode_prompt
from ett.model.processing import Encoded
from ett.serve.engine import Engine, Work
from ett.serve.errors import ABANDONED, ApiError
from ett.serve.limits import Limits
from ett.serve.meters import Meters
from ett.serve.pictures import picture_from_url
from ett.serve.requests import ChatRequest, ImagePart, TextPart
from ett.serve.served import Served
from ett.types import Message

T = TypeVar("T")

DEFAULT_NEW_TOKENS = 128
_REASONS: dict[Ending, str] = {"stop": "stop", "length": "length", "abandoned": "stop"}


class Chat:
    """Answers chat requests.

    Args:
        preparing: one thread, so that pictures are decoded and texts tokenized one request at a time.
    """

    def __init__(
        self, served: Served, engine: Engine, limits: Limits, meters: Meters, preparing: ThreadPoolExecutor
    ) -> None:
        self._served, self._engine, self._limits, self._meters = served, engine, limits, meters
        self._preparing = preparing
        self._work: Work[Asked, Answered] = Work("chat", self._answer, limits.max_batch)

    async def respond(self, given: ChatRequest, request: Request) -> Response:
        """The completion, or an open stream of it.

        Raises:
            ApiError: the request is refused, or failed before its first text.
        """
        sampling = self._sampling(given)
        prompt = await asyncio.get_running_loop().run_in_executor(self._preparing, self._prompt, given)
        self._meters.prompt_tokens.inc(len(prompt.input_ids))
        answer = _Answer(self._engine, self._work, prompt, sampling)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self._served.name}
        if given.stream:
            await unless_gone(request, answer.begins())
            usage = given.stream_options is not None and given.stream_options.include_usage
            return StreamingResponse(
                self._stream(answer, head, usage),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        answered = await unless_gone(request, answer.whole())
        self._meters.completion_tokens.inc(answered.num_tokens)
        message = {"role": "assistant", "content": answered.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _REASONS[answered.ending]}
        return JSONResponse(
            {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(prompt, answered)}
        )

    async def _stream(self, answer: _Answer, head: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
        head = {**head, "object": "chat.completion.chunk"}
        extra = {"usage": None} if with_usage else {}

        def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return _event({**head, "choices": [choice], **extra})

        try:
            yield chunk({"role": "assistant", "content": ""})
            async for piece in answer.pieces():
                yield chunk({"content": piece})
            answered = await answer.whole()
            self._meters.completion_tokens.inc(answered.num_tokens)
            yield chunk({}, _REASONS[answered.ending])
            if with_usage:
                yield _event({**head, "choices": [], "usage": _usage(answer.prompt, answered)})
        except ApiError as error:
            yield _event(error.body())
        finally:
            answer.abandon()
        yield "data: [DONE]\n\n"

    def _sampling(self, given: ChatRequest) -> Sampling:
        wanted = given.max_completion_tokens or given.max_tokens
        most = self._limits.max_new_tokens
        if wanted is not None and wanted > most:
            param = "max_completion_tokens" if given.max_completion_tokens else "max_tokens"
            raise ApiError(400, f"{param} is {wanted}; this server gives at most {most}.", param=param)
        return Sampling(
            max_new_tokens=wanted or min(DEFAULT_NEW_TOKENS, most),
            temperature=given.temperature or 0.0,
            top_p=given.top_p if given.top_p is not None else 1.0,
            # torch's own would repeat after every start of the server
            seed=given.seed % 2**63 if given.seed is not None else secrets.randbits(62),
            stop=tuple(given.stop or ()),
        )

    def _prompt(self, given: ChatRequest) -> Encoded:
        """In the preparing thread: everything about a request that can be wrong is found here, before it waits."""
        self._served.check_name(given.model)
        model = self._served.chatting()
        parts = [part for turn in given.messages for part in turn.content]
        characters = sum(len(part.text) for part in parts if isinstance(part, TextPart))
        if characters > self._limits.max_characters:
            raise ApiError(
                400, f"messages hold {characters} characters; allowed: {self._limits.max_characters}.", param="messages"
            )
        count = sum(isinstance(part, ImagePart) for part in parts)
        if count > self._limits.max_images:
            raise ApiError(
                400, f"messages hold {count} pictures; allowed: {self._limits.max_images}.", param="messages"
            )
        if given.messages[-1].role == "assistant":
            raise ApiError(400, "The last message is the assistant's, so there is nothing to answer.", param="messages")
        try:
            return encode_prompt(model, self._served.processor, _messages(given), self._pictures(given))
        except ApiError:
            raise
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from error
        except TemplateError as error:
            raise ApiError(
                400, f"The model's chat template refuses these messages: {error}.", param="messages"
            ) from error

    def _pictures(self, given: ChatRequest) -> Iterator[PIL.Image.Image]:
        for i, turn in enumerate(given.messages):
            for k, part in enumerate(turn.content):
                if isinstance(part, ImagePart):
                    where = f"messages.{i}.content.{k}.image_url.url"
                    yield picture_from_url(part.image_url.url, self._limits.max_pixels, where)

    def _answer(self, rows: Sequence[Asked]) -> Sequence[Answered]:
        return converse(self._served.chatting(), self._served.processor, rows)


class _Answer:
    """One answer on its way: pieces of text as they come, then the whole."""

    def __init__(self, engine: Engine, work: Work[Asked, Answered], prompt: Encoded, sampling: Sampling) -> None:
        self.prompt = prompt
        self._abandoned = threading.Event()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def say(piece: str) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        asked = Asked(prompt, sampling, say, self._abandoned.is_set)
        self._task = loop.create_task(engine.submit(work, asked))
        self._task.add_done_callback(lambda _: self._ended())
        self._first: str | None = None
        self._begun = False

    def _ended(self) -> None:
        self._abandoned.set()  # after a timeout the row would go on
        self._pieces.put_nowait(None)

    def abandon(self) -> None:
        """Nobody listens any more: the row ends at its next token, or leaves the queue."""
        self._abandoned.set()
        self._task.cancel()

    async def begins(self) -> None:
        """Return at the first text, or the end of a silent answer. Raises ApiError where it failed before."""
        try:
            self._first = await self._pieces.get()
        except asyncio.CancelledError:
            self.abandon()
            raise
        self._begun = True
        if self._first is None:
            self._task.result()

    async def pieces(self) -> AsyncIterator[str]:
        """The text, piece by piece, after `begins`."""
        assert self._begun
        piece = self._first
        while piece is not None:
            yield piece
            piece = await self._pieces.get()

    async def whole(self) -> Answered:
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            self.abandon()
            raise


async def unless_gone(request: Request, awaited: Awaitable[T]) -> T:
    """The result of what is awaited, which is cancelled when the client goes away. Raises ApiError (499) then."""
    task = asyncio.ensure_future(awaited)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(ABANDONED, "The client went away.")
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _messages(given: ChatRequest) -> list[Message]:
    """As the processor takes them: the developer speaks for the system."""
    return [
        {
            "role": "system" if turn.role == "developer" else turn.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                for part in turn.content
            ],
        }
        for turn in given.messages
    ]


def _usage(prompt: Encoded, answered: Answered) -> dict[str, int]:
    read, said = len(prompt.input_ids), answered.num_tokens
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"

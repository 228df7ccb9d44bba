"""The requests that are understood, as OpenAI shapes them. What is not supported and would change an answer is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

_NEUTRAL: Mapping[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
}
"""Parameters that OpenAI knows and this server does not, with the value at which they change nothing."""

_IDLE = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
"""OpenAI's parameters about the caller, which no answer depends on."""


def _speakable(text: str) -> str:
    """JSON can escape half of a surrogate pair, which no text tokenizer takes."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("this text holds half of a surrogate pair, which is no character.") from None
    return text


Text = Annotated[str, AfterValidator(_speakable)]


class Request(BaseModel):
    """A request's body: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(max_length=256)] | None = None
    """The served name (``GET /v1/models``), or left out."""


class TextPart(BaseModel):
    """``{"type": "text", "text": "..."}``"""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    """A data URL. OpenAI's ``detail`` is accepted; a model has one size of picture."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(BaseModel):
    """``{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}``"""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Turn(BaseModel):
    """One message. Pictures may stand in any turn but the assistant's; text alone may come as a string."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(min_length=1)]
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, given: Any) -> Any:
        return [{"type": "text", "text": given}] if isinstance(given, str) else given

    @model_validator(mode="after")
    def _no_drawn_answers(self) -> Turn:
        if self.role == "assistant" and any(isinstance(part, ImagePart) for part in self.content):
            raise ValueError("an assistant's turn cannot hold pictures.")
        return self


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(Request):
    """``POST /v1/chat/completions``. Left out, `temperature` is 0: the likeliest token each time."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=256)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[Annotated[Text, Field(min_length=1, max_length=64)]], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        return without_neutral(given)

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or max_tokens, not both.")
        return self


class DrawingRequest(Request):
    """``POST /v1/images/generations``; `seed`, `temperature`, `top_k`, `top_p` and `guidance` are not OpenAI's (the `openai`
    client sends them as ``extra_body``). Left out, they are as the model was saved with, and the seed is random."""

    prompt: Annotated[Text, Field(min_length=1)]
    n: Annotated[int, Field(ge=1)] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_idle(cls, given: Any) -> Any:
        return _without(given, _IDLE)


class ReconstructionRequest(Request):
    """``POST /v1/images/reconstructions``, which OpenAI does not have.

    Attributes:
        image: a data URL. initial: also through the tokenizer before tuning, where the server has it (``--initial``).
    """

    image: str
    initial: bool = False


def without_neutral(given: Any) -> Any:
    """A chat request without OpenAI's parameters that change nothing here.

    Raises:
        ValueError: one of them would have to change the answer.
    """
    given = _without(given, _IDLE)
    if not isinstance(given, dict):
        return given
    for name, value in given.items():
        if name in _NEUTRAL and value is not None and value != _NEUTRAL[name]:
            raise ValueError(f"{name} is not supported by this server. Leave it out.")
    return {name: value for name, value in given.items() if name not in _NEUTRAL}


def _without(given: Any, names: set[str]) -> Any:
    return {k: v for k, v in given.items() if k not in names} if isinstance(given, dict) else given

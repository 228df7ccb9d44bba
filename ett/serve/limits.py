"""What one request, and all of them together, may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ett.config import require


@dataclass(frozen=True)
class Limits:
    """Every number is at least 1. What is over a limit is refused with a 4xx that names it.

    Attributes:
        max_requests: in flight at a time, queued ones among them; more are told to come back (429). With `max_body` it bounds
            the memory that strangers can occupy.
        max_batch: answered together.
        max_body: of a request [bytes].
        max_pixels: of a picture, as its header claims them before it is decoded.
        max_images: in a conversation, or drawn by a request.
        max_characters: of text in a request.
        max_new_tokens: of an answer.
        seconds: that a request may take, in the queue and in the model.
        body_seconds: that a request's body may take to arrive.
    """

    max_requests: int = 64
    max_batch: int = 8
    max_body: int = 8 * 2**20
    max_pixels: int = 2**24
    max_images: int = 8
    max_characters: int = 32_768
    max_new_tokens: int = 1024
    seconds: int = 120
    body_seconds: int = 30

    def __post_init__(self) -> None:
        for each in fields(self):
            require(getattr(self, each.name) >= 1, each.name, getattr(self, each.name), "at least 1")

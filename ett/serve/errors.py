"""Errors as OpenAI's clients read them: a status, and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

logger = logging.getLogger("ett.serve")

_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    421: "unknown_host",
    429: "too_many_requests",
    499: "client_closed_request",
    500: "internal_error",
    501: "not_implemented",
    504: "timeout",
}
_KINDS = ("text", "image_url")
ABANDONED = 499
"""Nobody reads this status: the client went away. It is for the log and the metrics."""


class ApiError(HTTPException):
    """A request that is refused, or that failed.

    Args:
        status: HTTP's. message: what was wrong, what is allowed, what to do. param: where in the request, dotted.
        code: for programs; the status's own by default. headers: more of them.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code or _CODES.get(status)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status_code, kind)
        error = {"message": clean(self.detail), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def clean(text: str) -> str:
    """`text` with what UTF-8 cannot hold (half of a surrogate pair, from a JSON escape) replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def add_error_handlers(app: FastAPI) -> None:
    """Every error of `app`, the framework's own among them, in OpenAI's shape."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error, ApiError):
            return error.response()
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    async def malformed(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return malformed_request(error.errors()).response()

    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "The server failed at this request; its log says why.").response()

    app.add_exception_handler(HTTPException, known)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(Exception, unexpected)


def malformed_request(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error of a request that its schema refuses, from Pydantic's list: the first one, and where it is."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"The body is not JSON: {first.get('ctx', {}).get('error', 'damaged')}.", code="invalid_json"
        )
    where = _place(first["loc"])
    param = clean(".".join(where))[:200] or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: {param}. Leave it out.", param=param, code="unknown_parameter")
    if not where and first["type"] in ("missing", "model_attributes_type", "dict_type"):
        return ApiError(400, "The body must be a JSON object.")
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def _place(loc: Sequence[str | int]) -> list[str]:
    """Pydantic's way to a value without the framework's "body" and without the kind of part that follows its number."""
    named = [part for i, part in enumerate(loc) if part != "body" or i > 0]
    return [
        str(part) for i, part in enumerate(named) if not (part in _KINDS and i > 0 and isinstance(named[i - 1], int))
    ]

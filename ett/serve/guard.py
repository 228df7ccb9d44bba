"""What stands before the application: who may ask, how much, and how long a body may take. It also counts every response."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Collection, Sequence
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ett.serve.errors import ABANDONED, ApiError
from ett.serve.limits import Limits
from ett.serve.meters import Meters

OPEN = ("/", "/health", "/page/")
"""Paths that need no key: the page is public, what it asks for is not. One that ends with a slash stands for all below it."""

_DRAINED = 4
"""Of a refused body, this many times the limit is read and thrown away: a client that is cut off while it sends may never read
why it was refused."""


class Guard:
    """ASGI middleware around the whole application.

    Args:
        keys: of which a request must bring one (``Authorization: Bearer KEY``); empty lets everybody in.
        hosts: names that the server answers to (the Host header without port), lower case; None answers to any. A page of
            another origin, whose name was pointed at this machine, is so kept out.
        routes: paths that the metrics tell apart; others are counted together.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        meters: Meters,
        keys: Sequence[str],
        hosts: Collection[str] | None,
        routes: Collection[str],
    ) -> None:
        self._app, self._limits, self._meters = app, limits, meters
        self._keys = [_digest(key.encode()) for key in keys]
        self._hosts, self._routes = hosts, frozenset(routes)
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), ABANDONED
        route = scope["path"] if scope["path"] in self._routes else "other"

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._meters.in_flight.inc()
        try:
            await self._guarded(scope, receive, counted)
        finally:
            self._meters.in_flight.dec()
            self._meters.requests.labels(route, str(status)).inc()
            self._meters.seconds.labels(route).observe(time.monotonic() - started)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
        except ApiError as refusal:
            await self._drain(receive, headers)
            await refusal.response()(scope, receive, send)
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._in_flight += 1
        try:
            await self._app(scope, self._limited(receive), send)
        finally:
            self._in_flight -= 1

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise ApiError for a request that is refused by its head alone."""
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self._hosts is not None and name not in self._hosts:
            raise ApiError(
                421,
                f"This server does not answer to the name {name[:100]!r}. Behind a proxy, start it with --allow-host NAME.",
            )
        if self._keys and not self._is_open(scope["path"]):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # compared by digest: no difference in time tells how much of a key was right
            given = _digest(key.strip().encode("latin-1", "replace"))
            if scheme.lower() != "bearer" or not any(hmac.compare_digest(given, known) for known in self._keys):
                raise ApiError(
                    401,
                    "No valid API key. Send the header `Authorization: Bearer KEY`.",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if scope["method"] != "POST":
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # also keeps out other sites' forms: a browser sends this type across origins only if the server allows it
            raise ApiError(415, "Send JSON, with the header `Content-Type: application/json`.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._limits.max_body:
            raise self._too_large()
        if self._in_flight >= self._limits.max_requests:
            raise ApiError(
                429,
                f"{self._in_flight} requests are in flight, as many as allowed. Come back in a moment.",
                headers={"Retry-After": "1"},
            )

    @staticmethod
    def _is_open(path: str) -> bool:
        return any(path == each or (each.endswith("/") and each != "/" and path.startswith(each)) for each in OPEN)

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, refusing a body that grows over the limit (413) or is late (408)."""
        read, complete = 0, False
        deadline = time.monotonic() + self._limits.body_seconds

        async def limited() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"The body did not arrive within {self._limits.body_seconds} seconds.") from None
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if read > self._limits.max_body:
                    raise self._too_large()
            return message

        return limited

    async def _drain(self, receive: Receive, headers: Headers) -> None:
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            return
        left = _DRAINED * self._limits.max_body
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.body_seconds):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._limits.max_body} bytes. Send a smaller picture.")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

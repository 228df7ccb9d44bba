"""From an application to a process that answers: the socket, its names, signals, an end that loses no request."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from ett.errors import UserError
from ett.serve.limits import Limits
from ett.signals import noted_signals

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
MIN_KEY = 16
"""Characters of the shortest key accepted: shorter ones can be guessed."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a port that is taken is known before a model is loaded.

    Args:
        port: 0 takes a free one.

    Raises:
        UserError: no such address here, or the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(
            f"There is no address {host!r} with port {port} here: {error}. Choose another --host."
        ) from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(
            f"{host} port {port} cannot be used: {error.strerror}. Choose another --port or --host."
        ) from error
    return bound


def address(bound: socket.socket) -> str:
    """``http://host:port`` of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def host_names(bound: socket.socket, more: Sequence[str]) -> Collection[str] | None:
    """Names that the server answers to: on loopback this machine's and `more`; elsewhere `more`, or any (None)."""
    if is_loopback(bound):
        return LOOPBACK | {name.lower() for name in more}
    return {name.lower() for name in more} or None


def read_keys(path: Path | None, environment: str | None) -> list[str]:
    """API keys: one a line in a file (empty lines and ``#`` skipped), and the one from the environment.

    Raises:
        UserError: the file cannot be read or holds no key, or a key is too short or not plain ASCII.
    """
    keys = [environment] if environment else []
    if path is not None:
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The keys in {path} cannot be read: {error}.") from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UserError(f"{path} holds no key. Write one a line.")
        keys += found
    for key in keys:
        if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"An API key must have at least {MIN_KEY} ASCII characters and no spaces. `openssl rand -hex 32` makes one."
            )
    return keys


def serve(app: FastAPI, bound: socket.socket, limits: Limits, *, access_log: bool = False) -> None:
    """Answer until SIGINT or SIGTERM; then no new connection is taken, every request in flight is answered, and this returns.

    A second SIGINT ends at once; after `limits.seconds` and a little, what still is not answered is given up.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_level="info" if access_log else "warning",
        access_log=access_log,
        server_header=False,
        timeout_graceful_shutdown=limits.seconds + 5,
    )
    # uvicorn raises the signal again once it is done, for whoever handled it before: that is us, and we are done too
    with noted_signals(second_one_stops=False):
        uvicorn.Server(config).run(sockets=[bound])

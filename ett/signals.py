"""Signals that ask a process to stop, noted instead of obeyed at once, so that it can save first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def noted_signals(*, second_one_stops: bool) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; nothing is collected where signals are another's (not the main thread).

    Args:
        second_one_stops: after the first, the next one takes its usual way; False notes them all.
    """
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if second_one_stops:
            restore()

    def restore() -> None:
        for each, handler in previous.items():
            signal.signal(each, handler)

    previous: dict[signal.Signals, Callable[..., Any] | int | None] = {}
    try:
        for each in (signal.SIGINT, signal.SIGTERM):
            previous[each] = signal.signal(each, note)
    except ValueError:
        # not the main thread: whoever runs us there handles signals
        previous.clear()
    try:
        yield received
    finally:
        restore()


def leave_signals_to_the_parent() -> None:
    """For a process that serves another. Ctrl-C reaches every process of the terminal, a scheduler's SIGTERM every process of
    the job. The parent answers both by saving, which needs its workers to the end of the step; a worker ends when the parent
    tells it to or is gone."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)

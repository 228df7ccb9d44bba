"""`map` over processes: in order, with few tasks under way, and no process that outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from ett.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_work: Callable[[Any], Any] | None = None
"""What this worker process does."""


def mapped(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """``map(work, tasks)`` with the tasks spread over `workers` processes; one worker is this process itself.

    At most twice as many tasks as workers are under way or waiting to be taken, so memory does not grow with the tasks.

    Raises:
        DataError: a worker ended by itself; and whatever `work` raises.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    # a fork brings the imports and `work` along; elsewhere the platform's own way
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, context, _start, (work,))
    waiting: deque[Future[R]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_run, task))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "A worker process ended by itself: memory ran out, or a file crashed its decoder. Run again with --workers 1 to "
            "see where."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    # Ctrl-C reaches every process of the terminal; the parent answers it and lets tasks under way end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot say so, and a worker would wait for its next task for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(task: Any) -> Any:
    assert _work is not None
    return _work(task)

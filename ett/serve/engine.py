"""The queue before the model: requests that arrive together are answered together, in one thread that owns the model."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ett.serve.errors import ApiError, logger
from ett.serve.meters import Meters

J = TypeVar("J")
R = TypeVar("R")

GATHERING = 0.005
"""How long the first request of a batch waits for company [seconds]: what one burst of clients needs to arrive in."""


@dataclass(frozen=True)
class Work(Generic[J, R]):
    """One kind of request that the model answers in batches.

    Attributes:
        name: for the metrics.
        run: called in the model's thread with up to `most` jobs; returns their results in order.
        alike: jobs of different values are not answered together.
    """

    name: str
    run: Callable[[Sequence[J]], Sequence[R]]
    most: int
    alike: Callable[[J], object] = lambda _: None


@dataclass(frozen=True, eq=False)
class _Waiting:
    work: Work[Any, Any]
    job: Any
    result: asyncio.Future[Any]

    @property
    def kind(self) -> tuple[str, object]:
        return self.work.name, self.work.alike(self.job)


class Engine:
    """Runs `Work`. Its methods belong to the event loop's thread.

    Args:
        seconds: that a job may take from `submit` to its result.
    """

    def __init__(self, seconds: float, meters: Meters) -> None:
        self._seconds, self._meters = seconds, meters
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ett-model")
        self._dispatching: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._dispatching = asyncio.get_running_loop().create_task(self._dispatch())

    async def stop(self) -> None:
        """End after the batch that is running; whoever still waits gets an error."""
        assert self._dispatching is not None
        self._dispatching.cancel()
        with suppress(asyncio.CancelledError):
            await self._dispatching
        for waiting in self._queue:
            if not waiting.result.done():
                waiting.result.set_exception(ApiError(503, "The server is stopping.", code="stopping"))
        self._queue.clear()
        await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, work: Work[J, R], job: J) -> R:
        """The job's result.

        A caller that is cancelled leaves the queue; a batch that is running goes on, so a job that can end early needs its own
        way to be told.

        Raises:
            ApiError: it took too long (504), or the model failed (500).
        """
        waiting = _Waiting(work, job, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._count()
        self._arrived.set()
        try:
            async with asyncio.timeout(self._seconds):
                result: R = await waiting.result
        except TimeoutError:
            raise ApiError(
                504,
                f"No answer within {self._seconds:g} seconds. Ask for less, or come back when the server is less busy.",
                headers={"x-should-retry": "false"},
            ) from None
        finally:
            if waiting in self._queue:
                self._queue.remove(waiting)
                self._count()
        return result

    async def _dispatch(self) -> None:
        while True:
            await self._arrived.wait()
            if not self._queue:
                self._arrived.clear()
                continue
            if len(self._queue) < self._queue[0].work.most:
                await asyncio.sleep(GATHERING)
            if batch := self._take():
                await self._run(batch)

    def _take(self) -> list[_Waiting]:
        """The first in the queue and those behind it that can be answered with it; the rest keep their order."""
        batch: list[_Waiting] = []
        rest: deque[_Waiting] = deque()
        for waiting in self._queue:
            fits = not batch or (len(batch) < batch[0].work.most and waiting.kind == batch[0].kind)
            (batch if fits else rest).append(waiting)
        self._queue = rest
        self._count()
        return batch

    async def _run(self, batch: Sequence[_Waiting]) -> None:
        work, started = batch[0].work, time.monotonic()
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        outcome: Future[Sequence[Any]] = self._thread.submit(work.run, [waiting.job for waiting in batch])
        outcome.add_done_callback(lambda _: loop.call_soon_threadsafe(done.set))
        await done.wait()
        self._meters.batch_size.labels(work.name).observe(len(batch))
        self._meters.model_seconds.labels(work.name).observe(time.monotonic() - started)
        error = outcome.exception()
        if error is not None:
            logger.error("The model failed at a batch of %d (%s).", len(batch), work.name, exc_info=error)
        for i, waiting in enumerate(batch):
            if waiting.result.done():  # nobody waits any more
                continue
            if error is None:
                waiting.result.set_result(outcome.result()[i])
            else:
                waiting.result.set_exception(
                    ApiError(500, "The model failed at this request; the server's log says why.")
                )

    def _count(self) -> None:
        self._meters.queued.set(len(self._queue))

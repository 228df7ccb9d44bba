"""The queue before the model: what is answered together, what waits, what fails alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from ett.serve.engine import Engine, Work
from ett.serve.errors import ApiError
from ett.serve.meters import Meters


def with_engine(test: Callable[[Engine], Coroutine[Any, Any, None]], seconds: float = 10.0) -> None:
    async def run() -> None:
        engine = Engine(seconds, Meters())
        engine.start()
        try:
            await test(engine)
        finally:
            await engine.stop()

    asyncio.run(run())


class Recorder:
    """Work that doubles numbers and remembers its batches."""

    def __init__(self, most: int = 4, pause: float = 0.0) -> None:
        self.batches: list[list[int]] = []
        self.pause = pause
        self.work: Work[int, int] = Work("doubling", self.run, most, lambda job: job % 2)

    def run(self, jobs: Sequence[int]) -> Sequence[int]:
        assert threading.current_thread().name.startswith("ett-model")
        self.batches.append(list(jobs))
        time.sleep(self.pause)
        if 13 in jobs:
            raise RuntimeError("thirteen")
        return [2 * job for job in jobs]


def test_alike_requests_are_answered_together_in_order() -> None:
    recorder = Recorder()

    async def test(engine: Engine) -> None:
        found = await asyncio.gather(*(engine.submit(recorder.work, i) for i in (0, 1, 2, 3, 4, 6, 8, 5)))
        assert found == [0, 2, 4, 6, 8, 12, 16, 10]

    with_engine(test)
    assert recorder.batches == [[0, 2, 4, 6], [1, 3, 5], [8]]


def test_a_failing_batch_fails_alone() -> None:
    recorder = Recorder(most=1)

    async def test(engine: Engine) -> None:
        found = await asyncio.gather(*(engine.submit(recorder.work, i) for i in (1, 13, 2)), return_exceptions=True)
        assert found[0] == 2
        assert found[2] == 4
        assert isinstance(found[1], ApiError)
        assert found[1].status_code == 500
        assert "thirteen" not in str(found[1].detail), "what is inside stays inside"

    with_engine(test)


def test_late_answers_are_not_waited_for() -> None:
    recorder = Recorder(most=1, pause=0.3)

    async def test(engine: Engine) -> None:
        first = asyncio.ensure_future(engine.submit(recorder.work, 1))
        second = asyncio.ensure_future(engine.submit(recorder.work, 2))
        with pytest.raises(ApiError, match=r"within 0\.2 seconds") as caught:
            await first
        assert caught.value.status_code == 504
        with pytest.raises(ApiError):
            await second
        await asyncio.sleep(0.3)

    with_engine(test, seconds=0.2)
    assert recorder.batches == [[1]], "what nobody waits for any more is not begun"


def test_who_leaves_the_queue_is_not_answered() -> None:
    recorder = Recorder(most=1, pause=0.1)

    async def test(engine: Engine) -> None:
        tasks = [asyncio.ensure_future(engine.submit(recorder.work, i)) for i in (1, 2, 3)]
        await asyncio.sleep(0.05)
        tasks[1].cancel()
        assert await tasks[2] == 6

    with_engine(test)
    assert recorder.batches == [[1], [3]]


def test_what_waits_at_the_end_is_told() -> None:
    recorder = Recorder(most=1, pause=0.2)

    async def run() -> None:
        engine = Engine(10.0, Meters())
        engine.start()
        tasks = [asyncio.ensure_future(engine.submit(recorder.work, i)) for i in (1, 2)]
        await asyncio.sleep(0.1)
        await engine.stop()
        with pytest.raises(ApiError, match="stopping"):
            await tasks[1]
        tasks[0].cancel()

    asyncio.run(run())

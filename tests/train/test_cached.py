"""Codes that several processes encode together."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from ett.data.codes import CodeCache
from ett.data.mixture import Mixture, SourceConfig
from ett.train.cached import MEETING, _fill
from ett.train.log import RunLog
from ett.train.loop import Interrupted


class Cache:
    """Writes when it is closed, as `CodeCache.fill` does with what is left over."""

    def __init__(self) -> None:
        self.written = 0

    def fill(self, _config: object, _source: object, positions: np.ndarray, **_: Any) -> Iterator[int]:
        try:
            for _position in positions:
                yield 1
        finally:
            self.written += 1


class Meetings:
    """One process of two; notes what was written each time that they met."""

    process_index, num_processes, is_main_process = 0, 2, False
    device = torch.device("cpu")

    def __init__(self, cache: Cache, stopped_at: int | None = None) -> None:
        self.cache, self.seen, self.stopped_at = cache, list[int](), stopped_at

    def reduce(self, stopped: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.cache.written)
        return stopped + (len(self.seen) == self.stopped_at)


def fill(cache: Cache, accelerator: Meetings, counts: list[int]) -> None:
    _fill(
        cast(CodeCache, cache),
        [SourceConfig(source="scenes")] * len(counts),
        cast(Mixture, SimpleNamespace(sources=[None] * len(counts))),
        [np.arange(count) for count in counts],
        "chat",
        1,
        0,
        cast(Accelerator, accelerator),
        cast(RunLog, SimpleNamespace(encoding=lambda *_: None)),
    )


def test_processes_meet_after_the_last_codes_are_written() -> None:
    cache = Cache()
    accelerator = Meetings(cache)
    # each has half: more than one meeting on the way, none, nothing to do
    fill(cache, accelerator, [4 * MEETING + 2, 3, 0])
    assert accelerator.seen == [0, 0, 1, 2]
    assert cache.written == 2


def test_a_signal_to_another_process_stops_this_one_and_keeps_its_codes() -> None:
    for stopped_at in (1, 3):
        cache = Cache()
        with pytest.raises(Interrupted):
            fill(cache, Meetings(cache, stopped_at), [4 * MEETING + 2])
        assert cache.written == 1

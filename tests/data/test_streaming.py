"""An epoch through loader processes and a resume: each example once, memory flat. benchmarks/streaming.py does it at length."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "streaming.py"
    spec = importlib.util.spec_from_file_location("streaming", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "streaming", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(300)
def test_an_epoch_and_a_resume_read_every_example_once(streaming: ModuleType, tmp_path: Path) -> None:
    streaming.write_tars(tmp_path, 2000, per_shard=300)
    epoch = streaming.read_epoch(tmp_path, 2000, batch_size=20, workers=2, stop_at=0.37)
    assert epoch.resumed_at == 740
    assert (epoch.seen == 1).all()
    assert len(epoch.readings) >= 20
    assert epoch.growth < 0.05

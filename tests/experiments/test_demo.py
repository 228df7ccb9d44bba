"""`ett demo` end to end at toy size: stages, evaluation on the recipe's own kind of data, report, and running it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ett.experiments import demo
from ett.experiments.recipe import load_recipe
from tests.conftest import LANGUAGE_MODELS, TOKENIZER

TOY = [
    f"model.vision_tokenizer={json.dumps(TOKENIZER)}",
    f"model.language_model={json.dumps({'config': LANGUAGE_MODELS['llama']})}",
    "stages.align.steps=2",
    "stages.semantic.steps=2",
    "stages.semantic.validate_every=1",
    "evaluation.limit=3",
    "precision=fp32",
    "trackers=[]",
]


def test_demo_writes_its_report_and_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = demo.run_demo(tmp_path / "demo", TOY)
    page = report.read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 2 * 2 * demo.SHOWN_PICTURES
    result = json.loads((tmp_path / "demo" / "evaluation.json").read_text(encoding="utf-8"))
    assert {"drawn_text.caption_loss", "names.caption_loss", "names.psnr"} <= set(result["metrics"])
    text = [p["reference"] for p in result["predictions"] if p["id"].startswith("drawn_text/")]
    assert len(text) == 3
    assert all(" " in reference for reference in text), "spelled, as the recipe trains it"

    def never(*_: object) -> None:
        raise AssertionError("finished work was done again")

    monkeypatch.setattr(demo, "evaluate", never)
    assert demo.run_demo(tmp_path / "demo", TOY, resume=True) == report
    assert demo.recipe_of(tmp_path / "demo") == load_recipe(demo.RECIPE, TOY)
    assert demo.recipe_of(tmp_path / "demo" / "stages" / "1-semantic") is None

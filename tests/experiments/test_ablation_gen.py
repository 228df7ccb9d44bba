"""The comparison of tokenizers by what is drawn with them, in toy size: two steps an arm, from tuning to the report."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ett.errors import RecipeError
from ett.evaluate.comparison_evidence import drawings
from ett.evaluate.drawing_report import DrawingsConfig, asked_examples
from ett.experiments import ablate as ablate_module
from ett.experiments import comparison_report as report_module
from ett.experiments.ablate import ablate, run_only
from ett.experiments.comparison import load_comparison
from ett.experiments.recipe import SHIPPED
from ett.experiments.run import load_model
from ett.model.image_sampling import ImageSampling
from tests.conftest import LANGUAGE_MODELS
from tests.model.test_drawing import build

TUNED = ("reconstruction_only", "ett")
DRAWING = ("draws_embedding_frozen", "draws_index_frozen", "draws_reconstruction_only", "draws_ett")
NUM_SCENES = 6


def small(value: Any, start: str) -> Any:
    """The recipe with a toy start, toy language models, pictures of 32 pixels and two steps a stage."""
    if isinstance(value, list):
        return [small(each, start) for each in value]
    if not isinstance(value, dict):
        return start if value == "reader_64px" else value
    found = {key: small(each, start) for key, each in value.items()}
    for key, toy in (("size", 32), ("image_size", 32), ("limit", 4), ("report_limit", 2), ("report_pictures", 2)):
        if key in found:
            found[key] = toy
    if "model_type" in found:
        return LANGUAGE_MODELS["llama"]
    if "steps" in found:
        found |= {"steps": 2, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "validate_every": 2}
    return found


@pytest.fixture
def recipe(toy_run: Path, tmp_path: Path) -> Path:
    start = shutil.copytree(toy_run / "stages" / "1-align", tmp_path / "start")
    given = small(yaml.safe_load((SHIPPED / "ablation_gen.yaml").read_text(encoding="utf-8")), str(start))
    # ranks among a hundred names take long
    given["evaluation"]["report_data"] = [
        each for each in given["evaluation"]["report_data"] if each["source"] != "names"
    ]
    given["evaluation"]["drawings"] |= {"judges": ["scenes"], "limit": NUM_SCENES}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**given, "seeds": [0]}, sort_keys=False), encoding="utf-8")
    return path


def test_the_shipped_recipe_compares_tokenizers_alone() -> None:
    """The arms that draw differ in the tokenizer and in what is read back, and in nothing else."""
    comparison = load_comparison("ablation_gen")
    assert comparison.names == [*TUNED, *DRAWING]
    assert comparison.seeds == [0, 1, 2]
    for seed in comparison.seeds:
        arms = {arm.name: arm.recipe for arm in comparison.arms if arm.seed == seed}
        first = arms[DRAWING[0]]
        for name in DRAWING:
            own = arms[name]
            assert (own.stages, own.data, own.evaluation, own.seed) == (
                first.stages,
                first.data,
                first.evaluation,
                first.seed,
            )
            assert own.model.language_model == first.model.language_model
            assert own.model.image_head == first.model.image_head
            assert own.starts_from == {"draws_reconstruction_only": "reconstruction_only", "draws_ett": "ett"}.get(name)
            assert (own.model.visual_input == "index") == (name == "draws_index_frozen")


@pytest.mark.slow
def test_every_arm_is_trained_drawn_with_and_reported(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    # in this process: what is tested is what they leave behind
    def run_all(pending: Sequence[Any], *_: object) -> None:
        for job in sorted(pending, key=lambda job: job.needs is not None):
            run_only(out, job.key)

    monkeypatch.setattr(ablate_module, "_run_all", run_all)
    page = ablate(recipe, out).read_text(encoding="utf-8")
    summary = json.loads((out / "report.json").read_text(encoding="utf-8"))
    right = "drawn_scenes.drawn_scenes_right"
    for name in DRAWING:
        metrics = summary["arms"][name]["metrics"]
        assert metrics[right]["num_examples"] == metrics[f"{right}_of_reconstructions"]["num_examples"] == NUM_SCENES
        assert {"psnr", "indices_changed"} <= set(metrics)
        assert not any("caption" in metric or "naming" in metric for metric in metrics)
        if name != "draws_ett":
            found = summary["differences"][f"{name} - draws_ett"]
            assert found[right]["num_examples"] == NUM_SCENES
    for name in TUNED:
        metrics = summary["arms"][name]["metrics"]
        assert "caption_loss" in metrics
        assert right not in metrics
        assert "psnr" in summary["differences"][f"{name} - draws_ett"]
    # the tokenizer is the one that was tuned, or the initial one, to the bit
    weights = {name: load_model(out / arm["model"])[0] for name, arm in summary["arms"].items()}
    start = load_model(tmp_path / "start")[0].vision_tokenizer
    for name, source in (
        ("draws_ett", weights["ett"].vision_tokenizer),
        ("draws_reconstruction_only", weights["reconstruction_only"].vision_tokenizer),
        ("draws_embedding_frozen", start),
        ("draws_index_frozen", start),
    ):
        own = weights[name].vision_tokenizer.state_dict()
        assert all(torch.equal(tensor, own[key]) for key, tensor in source.state_dict().items()), name
    assert not torch.equal(weights["ett"].vision_tokenizer.quantize.codebook, start.quantize.codebook)
    assert "Scenes drawn right" in page
    assert "What was drawn" in page
    assert page.count("a photo of a") >= 4
    assert "scenes drawn right" in (out / "table.md").read_text(encoding="utf-8").lower()


def test_the_report_shows_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every judge's prompts, the real pictures, and the drawings of the arms that can draw."""
    model, processor = build(image_size=32)
    blind = build(image_size=32)[0]
    blind.image_head = None
    folders = {Path("out/ett"): (blind, None, processor), Path("out/draws_ett"): (model, None, processor)}
    monkeypatch.setattr(report_module, "resolve_model_folder", lambda path: path)
    monkeypatch.setattr(report_module, "load_for_evaluation", folders.__getitem__)
    monkeypatch.setattr(report_module, "SHOWN_PICTURES", 3)
    config = DrawingsConfig(split="pair", sampling=ImageSampling(guidance=1.0))
    comparison = load_comparison("ablation_gen", ["seeds=[0]"])
    firsts = {
        arm.name: replace(arm, recipe=replace(arm.recipe, evaluation=replace(arm.recipe.evaluation, drawings=config)))
        for arm in comparison.arms
        if arm.name in ("ett", "draws_ett")
    }
    found = report_module._drawings(firsts, Path("out"))
    asked = asked_examples(config, 32, 3)
    assert [each.caption for each in found] == [prompt for prompt, _ in asked]
    assert re.fullmatch(r'[^"]+, [\w-]+', found[0].caption)
    assert re.fullmatch(r'the text "\w{3,4}"', found[1].caption)
    assert found[2].caption.startswith("a photo of")
    assert [list(each.reconstructions) for each in found] == [["draws_ett"]] * 3
    assert all(each.original.size == each.reconstructions["draws_ett"].size == (32, 32) for each in found)
    section = drawings(found, "draws_ett")
    assert section.count("<img") == 6
    assert found[2].caption in section
    assert drawings([], "draws_ett") == ""


def test_what_is_judged_is_checked() -> None:
    for bad, said in (("judges: [sounds]", "judges"), ("judge: [names]", "judges"), ("limit: 0", "at least 1")):
        with pytest.raises(RecipeError, match=said):
            load_comparison("ablation_gen", [f"evaluation.drawings={{{bad}}}"])

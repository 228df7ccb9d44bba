"""The study of the index softmax: every score has a start, a frozen control and a tuned arm; one family runs in toy sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ett.experiments.ablate import run_only
from ett.experiments.comparison import ComparisonFolder, load_comparison, read_evaluation
from ett.experiments.recipe import read_values
from ett.model.loading import find_weights, load_vision_tokenizer
from ett.tokenizers.quantizer import IndexBackpropagationQuantizer
from ett.train.log import read_log

STARTS = {"distance": "distance", "normalized": "normalized", "dot": "normalized"}
"""Score -> whose start and frozen arm are its own too."""


def test_scores_are_compared_on_equal_terms() -> None:
    temperatures = {arm.name: arm.recipe for arm in load_comparison("index_softmax").arms}
    arms = {arm.name: arm.recipe for arm in load_comparison("index_scores").arms}
    for score, begun in STARTS.items():
        start, frozen, tuned = arms[f"{begun}_start"], arms[f"{begun}_frozen"], arms[f"{score}_tuned"]
        assert (frozen.starts_from, tuned.starts_from) == (f"{begun}_start", f"{begun}_start")
        assert start.stages == arms["distance_start"].stages
        assert tuned.stages == temperatures["ett"].stages
        assert frozen.stages == temperatures["embedding_frozen"].stages
        # stage 0 of its own: no caption is learned by the tokenizer before the arms part
        assert start.stages[0].parts == ("vision_tokenizer",)
        assert start.stages[0].loss_config.caption_weight == 0
        assert "vision_tokenizer" not in start.stages[1].parts


def test_a_family_of_arms(tmp_path: Path) -> None:
    """Start, control and tuned arms, one after another as `ett ablate` runs them, two steps and two examples each."""
    score = "normalized"
    values = read_values("index_scores")
    family = {name: arm for name, arm in values["arms"].items() if name.startswith((f"{score}_", "dot_"))}
    for stage in (*values["stages"], *family[f"{score}_start"]["stages"]):
        stage |= {"steps": 2, "batch_size": 2, "validate_every": None, "log_every": 1, "health": {"pictures": 2}}
    values["evaluation"] |= {"limit": 2, "report_limit": 2, "report_pictures": 2}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**values, "arms": family}, sort_keys=False), encoding="utf-8")
    comparison, out = load_comparison(tmp_path / "toy.yaml"), tmp_path / "out"
    ComparisonFolder(out, comparison, resume=False, overwrite=False).open()
    for name in family:
        run_only(out, f"{name}:0")
        assert read_evaluation(out / name / "evaluation.json")["metrics"]
    stages = [stage for stage in (out / f"{score}_start" / "stages").iterdir() if not stage.name.startswith(".")]
    assert {stage.name for stage in stages} == {"0-semantic", "1-align"}
    quantizer = load_vision_tokenizer(out / f"{score}_tuned" / "stages" / "0-semantic").quantize
    assert isinstance(quantizer, IndexBackpropagationQuantizer)
    assert quantizer.normalize
    assert quantizer.codebook.detach().norm(dim=1).sub(12.7).abs().max() < 1e-4
    dot = load_vision_tokenizer(out / "dot_tuned" / "stages" / "0-semantic").quantize
    assert isinstance(dot, IndexBackpropagationQuantizer)
    assert not dot.normalize
    # two steps from codes of that length
    assert dot.codebook.detach().norm(dim=1).sub(12.7).abs().max() < 0.1
    reaches = {}
    for name in (f"{score}_tuned", "dot_tuned", f"{score}_frozen"):
        (reach,) = (e for e in read_log(out / name / "log.jsonl") if e["event"] == "reach")
        reaches[name] = reach["caption_gradient_norms"]
    assert reaches[f"{score}_tuned"]["encoder"] > 0
    assert reaches["dot_tuned"]["encoder"] > 0
    assert reaches[f"{score}_frozen"]["encoder"] == 0
    # the same function before the first step, under either score
    assert reaches["dot_tuned"]["language_model"] == pytest.approx(
        reaches[f"{score}_frozen"]["language_model"], rel=1e-4
    )


def test_scores_begin_as_sharp_as_the_distances() -> None:
    """What the recipe's comments say of the shipped tokenizer: the slopes of the three logits along z . e are equal."""
    arms = {arm.name: arm.recipe.model.vision_tokenizer for arm in load_comparison("index_scores").arms}
    shipped = load_vision_tokenizer(find_weights("reader_64px"))
    quantizer = shipped.quantize
    assert isinstance(quantizer, IndexBackpropagationQuantizer)
    assert quantizer.distance_unit is not None
    length = float(quantizer.codebook.detach().norm(dim=1).mean())
    slope = 2 / (float(quantizer.distance_unit) * quantizer.temperature)
    assert 1 / arms["dot_tuned"]["temperature"] == pytest.approx(slope, rel=0.1)
    settings = arms["normalized_start"]
    assert settings["radius"] == pytest.approx(length, rel=0.01)
    changed = shipped.reconfigured(settings).quantize
    assert isinstance(changed, IndexBackpropagationQuantizer)
    assert changed.log_scale is not None
    sharpness = float(changed.log_scale.detach().exp()) / settings["temperature"]
    assert sharpness == pytest.approx(slope * length**2, rel=0.1)

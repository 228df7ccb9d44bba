"""The stages that learn to draw: what they train, what they refuse, and that code caches and prompts are handled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ett.config import from_mapping
from ett.data.drawing import Drawings, drawing, is_drawing, without_prompt
from ett.data.manifest import Manifest
from ett.data.mixture import SourceConfig
from ett.data.sources import conversation
from ett.errors import DataError, RecipeError
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run, load_model
from ett.losses.joint import LossConfig
from ett.train.log import read_log
from ett.train.stages import StageConfig, set_trainable
from ett.types import Example
from tests.model.test_drawing import build


@pytest.fixture
def recipe(toy_recipe: dict[str, Any]) -> dict[str, Any]:
    """Two steps of gen on the toy pictures, from a fresh tokenizer."""
    toy_recipe["model"]["projector"] = {"grid_positions": 8}
    toy_recipe["model"]["image_head"] = {"kind": "tied"}
    toy_recipe["data"][0]["draws"] = True
    toy_recipe["stages"] = [
        {"stage": "tokenizer", "steps": 1, "batch_size": 4},
        {"stage": "gen", "steps": 3, "batch_size": 4, "micro_batch_size": 2, "log_every": 1, "drop_prompt": 0.3},
    ]
    return toy_recipe


def train(given: dict[str, Any], out: Path) -> Path:
    return Run(from_mapping(Recipe, given), out).train()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_gen_trains_what_draws_on_pictures_and_on_cached_codes_alike(recipe: dict[str, Any], tmp_path: Path) -> None:
    plain = train(recipe, tmp_path / "plain")
    recipe["stages"][1]["cached_codes"] = True
    cached = train(recipe, tmp_path / "cached")
    after, other = weights(plain), weights(cached)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6, msg=name)
    before = load_file(tmp_path / "plain" / "stages" / "0-tokenizer" / "model.safetensors")
    assert all(torch.equal(tensor, after[f"vision_tokenizer.{name}"]) for name, tensor in before.items())
    steps = [e for e in read_log(tmp_path / "plain" / "log.jsonl") if e["event"] == "step" and e["stage"] == "gen"]
    assert set(steps[0]["losses"]) == {"loss", "image_loss"}
    # a fresh head is nearly uniform over the 64 codes
    assert steps[0]["losses"]["image_loss"] == pytest.approx(4.16, abs=0.1)
    assert set(steps[0]["learning_rates"]) == {"projector", "language_model", "image_head"}
    reach = next(e for e in read_log(tmp_path / "plain" / "log.jsonl") if e["event"] == "reach")
    norms = reach["caption_gradient_norms"]
    assert all(norms[part] > 0 for part in ("projector", "language_model", "image_head"))
    assert norms["encoder"] == norms["codebook"] == 0
    model, processor = load_model(tmp_path / "plain")
    assert model.config.loss_config.image_weight == 1
    made = model.generate_images(**processor.drawing_inputs(["number 1"]), grid=(8, 8), seeds=[0])
    assert made.pixel_values.shape == (1, 3, 32, 32)


def test_a_joint_stage_learns_words_and_pictures(recipe: dict[str, Any], tmp_path: Path) -> None:
    source = recipe["data"][0]
    recipe["data"] = [dict(source, weight=0.5), dict(source, weight=0.5, draws=False)]
    recipe["stages"][1] |= {"stage": "joint", "cached_codes": True, "batch_size": 6, "micro_batch_size": 3}
    train(recipe, tmp_path / "run")
    steps = [e for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "step" and e["stage"] == "joint"]
    assert set(steps[-1]["losses"]) == {"loss", "image_loss", "caption_loss"}
    losses = steps[-1]["losses"]
    assert losses["loss"] == pytest.approx(losses["image_loss"] + losses["caption_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"image_head": None}}, "set model.image_head"),
        ({"data": {"draws": False}}, "set `draws: true` on each"),
        ({"stage": {"stage": "chat"}}, "learns answers in words"),
        ({"stage": {"stage": "joint"}}, "some must do without"),
        ({"stage": {"trains": ["vision_tokenizer", "projector"]}}, "must stay as it is"),
        ({"stage": {"stage": "chat", "trains": ["image_head"]}}, "Only the stages gen and joint"),
        ({"stage": {"stage": "chat", "losses": {"image_noise": 0.2}}}, "image_noise is for pictures that are drawn"),
        ({"stage": {"losses": {"image_noise": 1.0}}}, "image_noise"),
        ({"stage": {"drop_prompt": 1.5}}, "drop_prompt"),
        ({"model": {"projector": {"merge_size": 2}}}, "one token a position"),
    ],
    ids=str,
)
def test_recipes_that_cannot_draw_are_refused(
    recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    recipe["model"] |= changes.get("model", {})
    recipe["data"][0] |= changes.get("data", {})
    recipe["stages"][1] |= changes.get("stage", {})
    with pytest.raises(RecipeError, match=said):
        Run(from_mapping(Recipe, recipe), tmp_path / "run")


def test_weights_of_what_a_stage_does_not_learn_are_zero() -> None:
    losses = LossConfig(caption_weight=0.5, image_weight=0.7)
    found = {
        stage: StageConfig(stage=stage, steps=1, batch_size=1, losses=losses).loss_config  # type: ignore[arg-type]  # all are stages
        for stage in ("semantic", "chat", "gen", "joint")
    }
    got = {stage: (each.caption_weight, each.image_weight, each.tokenizer_weight) for stage, each in found.items()}
    assert got == {
        "semantic": (0.5, 0.0, 0.25),
        "chat": (0.5, 0.0, 0.0),
        "gen": (0.0, 0.7, 0.0),
        "joint": (0.5, 0.7, 0.0),
    }


def test_an_output_layer_for_words_stays_as_it_is_where_none_are_learned() -> None:
    model, _ = build({"kind": "linear"})
    set_trainable(model, ("projector", "language_model", "image_head"), words=False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name in frozen if not name.startswith("vision_tokenizer")} == {"language_model.lm_head.weight"}
    for tied, _ in (build({"kind": "linear"}, "qwen2"), build({"kind": "vocabulary"})):
        set_trainable(tied, ("projector", "language_model", "image_head"), words=False)
        assert tied.get_output_embeddings().weight.requires_grad


# -- data ----------------------------------------------------------------------------------------------------------------


def test_pictures_become_answers(pictures: Path) -> None:
    path = str(pictures / "manifest.jsonl")
    source = SourceConfig(source="manifest", path=path, draws=True, prompt="draw {answer}!").build()
    example = source[3]
    assert example.messages == drawing("draw number 3!")
    assert len(example.images) == 1
    assert len(source) == 12
    read = SourceConfig(source="names", prompt="{answer}, {style}", draws=True).build()[0]
    words = read.messages[0]["content"][0]["text"]
    assert words == f"{read.metadata['name']}, {read.metadata['style']}"


def test_examples_that_draw_already_stay(pictures: Path) -> None:
    line = {
        "id": "d",
        "image": "0.png",
        "conversations": [{"from": "human", "value": "Draw a cat."}, {"from": "gpt", "value": "<image>"}],
    }
    path = pictures / "drawn.jsonl"
    path.write_text(json.dumps(line), encoding="utf-8")
    example = Drawings(Manifest(path))[0]
    assert is_drawing(example)
    assert example.messages[0]["content"] == [{"type": "text", "text": "Draw a cat."}]


@pytest.mark.parametrize(
    ("prompt", "error", "said"),
    [
        ("{colour}", DataError, "has no 'colour'"),
        ("{", RecipeError, "is not a text with names in braces"),
        ("{0}", RecipeError, "must name what it uses"),
    ],
)
def test_prompts_that_cannot_be_made(pictures: Path, prompt: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Drawings(Manifest(pictures / "manifest.jsonl"), prompt)[0]


def test_prompts_are_dropped_by_draw_alone() -> None:
    example = Example("x", drawing("a cat"), [])
    dropped = [without_prompt(example, 0.3, seed=1, draw=draw) for draw in range(1000)]
    share = sum(not each.messages[0]["content"] for each in dropped) / 1000
    assert 0.25 < share < 0.35
    assert [each.messages for each in dropped] == [without_prompt(example, 0.3, 1, d).messages for d in range(1000)]
    assert all(each.messages[1] == example.messages[1] for each in dropped)
    read = Example("r", conversation("What?", "a cat"), [])
    assert without_prompt(read, 1.0, 0, 0) is read
    assert without_prompt(example, 0.0, 0, 0) is example

"""Settings searched per arm, and arms that start from other arms: chosen, kept, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ett.cli import main
from ett.errors import RecipeError, UserError
from ett.experiments import ablate as ablate_module
from ett.experiments.ablate import ablate, run_only
from ett.experiments.comparison import load_comparison, open_comparison
from ett.experiments.recipe import load_recipe
from ett.experiments.run import Run, load_model
from ett.experiments.search import Search, read_choices

RATE, OWN = "stages.semantic.optimizer.learning_rate", "stages.semantic.optimizer.learning_rates.vision_tokenizer"
REFRESH = {"model.init": "arm:ett", "stages": [{"stage": "decoder", "steps": 2, "batch_size": 2}]}
FRESH = {
    "model.init": None,
    "model.vision_tokenizer": {"path": "arm:ett"},
    "model.projector": {"merge_size": 2},
    "stages": [{"stage": "chat", "steps": 2, "batch_size": 2}],
}


@pytest.fixture
def recipe(toy_run: Path, tmp_path: Path) -> Path:
    language_model = load_recipe(toy_run / "recipe.yaml").model.language_model
    assert language_model is not None
    fresh = {**FRESH, "model.language_model": {"config": language_model.config}}
    given = {
        "name": "searched",
        "arms": {
            "embedding_frozen": {"stages.semantic.trains": ["projector", "language_model"]},
            "ett": {},
            "decoder_refresh": REFRESH,
            "fresh_on_ett": fresh,
        },
        "reference": "decoder_refresh",
        "seeds": [5],
        "model": {"init": str(toy_run), "image_size": 32},
        "data": [{"source": "drawn_text", "size": 32, "difficulty": 0.3}],
        "stages": [{"stage": "semantic", "steps": 2, "batch_size": 2, "validate_every": 1, "health": {"pictures": 0}}],
        "evaluation": {
            "limit": 2,
            "report_limit": 2,
            "report_data": [{"source": "drawn_text", "size": 32, "difficulty": 0.3}, {"source": "facts"}],
        },
        "precision": "fp32",
        "num_workers": 0,
        "trackers": [],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    return path


def test_every_combination_that_means_something_to_the_arm(recipe: Path) -> None:
    grid = {RATE: [1e-4, 1e-3], OWN: [1e-2, 1e-1]}
    comparison = load_comparison(recipe, search={"grid": grid, "changes": {"stages.semantic.steps": 1}})
    tried = {arm: [dict(t.values) for t in comparison.trials if t.arm == arm] for arm in comparison.names}
    assert tried["ett"] == [{RATE: a, OWN: b} for a in (1e-4, 1e-3) for b in (1e-2, 1e-1)]
    assert tried["embedding_frozen"] == [{RATE: 1e-4}, {RATE: 1e-3}], "a frozen part has no rate"
    assert tried["decoder_refresh"] == tried["fresh_on_ett"] == [], "what starts from an arm is run as it is"
    trial = comparison.trials[-1]
    assert trial.key == "search:ett:3"
    assert (trial.recipe.stages[0].steps, comparison.find("ett:5").recipe.stages[0].steps) == (1, 2)
    assert trial.recipe.stages[0].optimizer.learning_rate == 1e-3
    chosen = load_comparison(recipe, chosen={"ett": {RATE: 7e-4}})
    assert chosen.find("ett:5").recipe.stages[0].optimizer.learning_rate == 7e-4
    assert chosen.find("embedding_frozen:5").recipe.stages[0].optimizer.learning_rate != 7e-4


@pytest.mark.parametrize("given", [{}, {"grid": {}}, {"grid": {RATE: 1e-4}}, {"grid": {RATE: []}}, {"over": {}}, [1]])
def test_a_search_of_another_form_is_refused(given: Any) -> None:
    with pytest.raises(RecipeError, match="search needs"):
        Search.of(given)


def test_words_of_the_command_line() -> None:
    found = Search.from_words([f"{RATE}=1.0e-4,3.0e-4"], ["stages.semantic.steps=20"])
    assert found == {"grid": {RATE: [1e-4, 3e-4]}, "changes": {"stages.semantic.steps": 20}}
    for word in ("", "rate", "=3", "rate="):
        with pytest.raises(RecipeError, match="key=values"):
            Search.from_words([word], [])
    assert main(["ablate", "quickstart", "--search-with", "a=1"]) == 2


def test_what_arms_start_from_must_be_there(recipe: Path, tmp_path: Path) -> None:
    comparison = load_comparison(recipe)
    arm = comparison.find("decoder_refresh:5")
    assert arm.needs == "ett:5"
    assert comparison.root(arm).name == "ett"
    with pytest.raises(RecipeError, match="in a comparison alone"):
        Run(arm.recipe, tmp_path / "alone")
    with pytest.raises(RecipeError, match="one of those above it"):
        load_comparison(recipe, ["reference=null", "arms={first: {model.init: arm:ett}, ett: {}}"])
    with pytest.raises(RecipeError, match="as reference"):
        load_comparison(recipe, ["reference=eet"])
    with pytest.raises(RecipeError, match="plain word"):
        load_comparison(recipe, ["reference=null", "arms={search: {}, ett: {}}"])


def test_searched_chosen_started_from_and_reported(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, job by job: the search, its choice, arms with that choice, arms that start from them, the report."""
    ran: list[str] = []

    def run_all(pending: Any, out: Path, _jobs: int) -> None:
        waiting = list(pending)
        while waiting:
            job = ablate_module._next(waiting, [])
            assert job is not None
            ran.append(job.key)
            run_only(out, job.key)

    monkeypatch.setattr(ablate_module, "_run_all", run_all)
    out = tmp_path / "out"
    search = Search.from_words([f"{RATE}=1.0e-4,1.0e-2"], ["stages.semantic.steps=1"])
    ablate(recipe, out, search=search)
    assert ran[:4] == [f"search:{arm}:{i}" for arm in ("embedding_frozen", "ett") for i in range(2)]
    assert ran.index("ett:5") < min(ran.index("decoder_refresh:5"), ran.index("fresh_on_ett:5"))
    found = json.loads((out / "search.json").read_text(encoding="utf-8"))
    for arm, each in found.items():
        best = min(each["trials"], key=lambda trial: trial["caption_loss"])
        assert read_choices(out)[arm] == each["chosen"] == best["values"]
        recipe_run = load_recipe(out / arm / "recipe.yaml")
        assert recipe_run.stages[0].optimizer.learning_rate == best["values"][RATE]
    assert not list((out / "search").rglob("*.safetensors")), "trials leave figures alone"
    assert open_comparison(out).trials[0].values == {RATE: 1e-4}

    ett, _ = load_model(out / "ett")
    refreshed, _ = load_model(out / "decoder_refresh")
    fresh, _ = load_model(out / "fresh_on_ett")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    for other in (refreshed, fresh):
        assert torch.equal(ett.vision_tokenizer.tokenize(pixels), other.vision_tokenizer.tokenize(pixels))
    assert torch.equal(ett.projector.layers[0].weight, refreshed.projector.layers[0].weight)
    assert not torch.equal(ett.projector.layers[0].weight, fresh.projector.layers[0].weight)
    assert not torch.equal(
        ett.vision_tokenizer.decoder.conv_out.weight, refreshed.vision_tokenizer.decoder.conv_out.weight
    )

    summary = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert summary["reference"] == "decoder_refresh"
    assert summary["search"] == found
    assert {"facts.text_loss", "drawn_text.caption_loss"} <= set(summary["arms"]["ett"]["metrics"])
    assert "facts.caption_loss" not in summary["arms"]["ett"]["metrics"], "words alone are no captions"
    assert "facts.text_loss" in summary["start"]["metrics"]
    moved = summary["arms"]["fresh_on_ett"]["metrics"]["indices_changed"]["value"]
    assert moved == summary["arms"]["ett"]["metrics"]["indices_changed"]["value"], "drift is from the common start"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Settings searched on validation data" in page
    assert "At equal time" in page
    assert (out / "table.md").read_text(encoding="utf-8").count("\n|") == 2 + 1 + 4
    assert (out / "pareto.svg").read_text(encoding="utf-8").startswith("<svg")

    ran.clear()
    ablate(recipe, out, search=search, resume=True)
    assert ran == []
    with pytest.raises(UserError, match="another recipe"):
        ablate(recipe, out, resume=True)
    ablate(recipe, out, overwrite=True)
    assert not any(key.startswith("search:") for key in ran)
    assert not (out / "search.json").exists()

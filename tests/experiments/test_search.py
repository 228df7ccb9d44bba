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
from ett.experiments import search as search_module
from ett.experiments.ablate import ablate, run_only
from ett.experiments.comparison import load_comparison, open_comparison
from ett.experiments.recipe import load_recipe
from ett.experiments.run import Run, load_model
from ett.experiments.search import Search, choose, read_choices, run_trial

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


def test_what_makes_an_arm_is_not_searched() -> None:
    """The search that the head of recipes/ablation.yaml proposes."""
    search = Search.from_words([f"{RATE}=1e-4,1.5e-4,3e-4", f"{OWN}=2.5e-4,5e-4"], ["stages.semantic.steps=200"])
    comparison = load_comparison("ablation", search=search)
    tried = {arm: [set(t.values) for t in comparison.trials if t.arm == arm] for arm in comparison.names}
    assert tried["ett"] == [{RATE, OWN}] * 6
    for arm in ("slow_tokenizer", "straight_through"):
        assert tried[arm] == [{RATE}] * 3, "its tokenizer's own rate is the difference"
    assert tried["embedding_frozen_longer"] == [{RATE}] * 3
    assert tried["decoder_refresh"] == []
    rates = {
        t.recipe.stages[0].optimizer.learning_rates["vision_tokenizer"]
        for t in comparison.trials
        if t.arm == "slow_tokenizer"
    }
    assert rates == {1.5e-4}
    # a key around an arm's own, by number or by name, and an arm without any key that is left
    around = {"grid": {"stages.0.losses": [{"tokenizer_weight": 0.1}]}, "changes": {}}
    arms = {trial.arm for trial in load_comparison("ablation", search=around).trials}
    assert "ett" in arms
    assert not arms & {"alpha_0", "alpha_0.5", "reconstruction_only", "distillation", "soft_readout"}


def test_stages_that_an_arm_has_not() -> None:
    """ablation_gen: two arms have a stage semantic, the others a stage gen in its place."""
    gen = "stages.gen.optimizer.learning_rate"
    search = Search.from_words([f"{RATE}=1.0e-4,3.0e-4", f"{gen}=1.0e-3,3.0e-3"], ["stages.semantic.steps=20"])
    comparison = load_comparison("ablation_gen", search=search)
    tried = {arm: [dict(t.values) for t in comparison.trials if t.arm == arm] for arm in comparison.names}
    assert tried["ett"] == tried["reconstruction_only"] == [{RATE: 1e-4}, {RATE: 3e-4}]
    assert tried["draws_embedding_frozen"] == tried["draws_index_frozen"] == [{gen: 1e-3}, {gen: 3e-3}]
    assert tried["draws_ett"] == [], "it starts from an arm"
    assert {(t.arm.startswith("draws"), t.recipe.stages[0].steps) for t in comparison.trials} == {
        (False, 20),
        (True, 3000),
    }
    with pytest.raises(RecipeError, match=r"stages\.semantc\.steps"):
        load_comparison("ablation_gen", search={**search, "changes": {"stages.semantc.steps": 2}})
    with pytest.raises(RecipeError, match="searched for no arm"):
        load_comparison("ablation_gen", search={"grid": {"stages.align.steps": [1]}})


@pytest.mark.parametrize(
    ("losses", "measure"),
    [
        ({"image_loss": 2.0, "caption_loss": 1.0, "reconstruction_loss": 0.5}, "caption_loss"),
        ({"image_loss": 2.0}, "image_loss"),
        ({"commitment_loss": 3.0, "reconstruction_loss": 0.5}, "reconstruction_loss"),
    ],
)
def test_what_a_trial_is_measured_by(
    losses: dict[str, float], measure: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = load_comparison(recipe, search={"grid": {RATE: [1e-4, 1e-3, 1e-2]}}).trials[:3]
    values = iter([losses[measure], float("nan"), losses[measure] / 2])
    monkeypatch.setattr(Run, "train", lambda self: self.folder.open())
    monkeypatch.setattr(
        search_module, "read_log", lambda _: [{"event": "validation", "losses": {**losses, measure: next(values)}}]
    )
    for trial in trials:
        run_trial(trial, tmp_path)
    found = choose(trials, tmp_path)["embedding_frozen"]
    assert [set(trial) for trial in found["trials"]] == [{"values", measure}] * 3
    assert found["chosen"] == {RATE: 1e-2}
    monkeypatch.setattr(search_module, "read_log", lambda _: [])
    with pytest.raises(UserError, match="none of caption_loss, image_loss"):
        run_trial(trials[0], tmp_path / "new")


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

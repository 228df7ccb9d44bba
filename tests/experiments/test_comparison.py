"""Comparisons of arms at toy size: what is equal, what is kept, what is reported, what stops them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ett.errors import ModelError, RecipeError, UserError
from ett.evaluate.comparison import compare, difference, pooled
from ett.experiments import ablate as ablate_module
from ett.experiments.ablate import ablate, run_only
from ett.experiments.comparison import is_comparison, load_comparison
from ett.experiments.comparison_report import write_comparison_report
from ett.experiments.recipe import load_recipe
from ett.experiments.run import load_model, resolve_model_folder
from ett.model.build import start_from
from ett.train.log import read_log

ARMS: dict[str, dict[str, Any]] = {
    "index_frozen": {"model.visual_input": "index", "stages.semantic.trains": ["projector", "language_model"]},
    "embedding_frozen": {"stages.semantic.trains": ["projector", "language_model"]},
    "reconstruction_only": {"stages.semantic.losses.caption_reaches_tokenizer": False},
    "ett": {},
}


@pytest.fixture(scope="module")
def recipe(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All arms, ten steps from a model that has seen a few."""
    folder = tmp_path_factory.mktemp("recipe")
    start = Path(shutil.copytree(toy_run / "stages" / "1-align", folder / "start"))
    config = (start / "config.json").read_text(encoding="utf-8")
    assert '"attention_dropout": 0.1' in config
    # arms are compared from their first step on, where dropout would tell them apart
    (start / "config.json").write_text(config.replace('"attention_dropout": 0.1', '"attention_dropout": 0.0'))
    given = {
        "name": "arms",
        "precision": "fp32",
        "num_workers": 0,
        "trackers": [],
        "arms": ARMS,
        "model": {"init": str(start), "image_size": 32},
        "data": [
            {"source": "drawn_text", "size": 32, "difficulty": 0.3, "weight": 0.5},
            {"source": "names", "weight": 0.5},
        ],
        "stages": [
            {
                "stage": "semantic",
                "steps": 10,
                "batch_size": 4,
                "log_every": 1,
                "checkpoint_every": 1,
                "validate_every": 4,
                "optimizer": {"learning_rate": 1e-3, "learning_rates": {"vision_tokenizer": 1e-2}},
            }
        ],
        "evaluation": {"limit": 4, "report_split": "heldout", "report_limit": 3},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compared(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished comparison, its arms trained in processes of their own."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    assert ablate(recipe, out, jobs=2) == out / "report.html"
    return out


def test_a_comparison_is_no_model_but_its_arms_are(compared: Path) -> None:
    with pytest.raises(ModelError, match=r"is a comparison\. Give one of its arms: .*embedding_frozen, .*ett"):
        resolve_model_folder(compared)
    assert resolve_model_folder(compared / "ett") == compared / "ett" / "stages" / "0-semantic"
    assert resolve_model_folder("reader_64px").name == "reader_64px"
    with pytest.raises(ModelError, match=r"There is no folder 'nowhere'.* a shipped one: reader_64px"):
        resolve_model_folder(Path("nowhere"))


def test_arms_start_as_the_same_function_on_the_same_data(recipe: Path) -> None:
    comparison = load_comparison(recipe)
    models = {arm.name: start_from(Path(arm.recipe.model.init or ""), arm.recipe.model) for arm in comparison.arms}
    assert [arm.name for arm in comparison.arms] == list(ARMS)
    ids = torch.tensor([[*[models["ett"][0].config.image_token_id] * 16, 65, 66, 67]])
    with torch.no_grad():
        logits = {
            name: model(input_ids=ids, pixel_values=torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).logits
            for name, (model, _) in models.items()
        }
    for name, found in logits.items():
        assert torch.equal(found, logits["ett"]), name
    assert len({str((arm.recipe.data, arm.recipe.seed, arm.recipe.stages[0].steps)) for arm in comparison.arms}) == 1


def test_all_arms_are_trained_measured_and_reported(recipe: Path, compared: Path) -> None:
    out, report = compared, compared / "report.html"
    summary = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert list(summary["arms"]) == list(ARMS)
    assert set(summary["differences"]) == {f"{name} - ett" for name in ARMS if name != "ett"}
    for name, arm in summary["arms"].items():
        model, _ = load_model(out / arm["model"])
        assert model.config.visual_input == ("index" if name == "index_frozen" else "embedding")
        assert {"caption_loss", "drawn_text.character_error_rate", "names.naming_rank", "psnr"} <= set(arm["metrics"])
        moved = arm["metrics"]["indices_changed"]["value"]
        assert (moved > 0) == (name in ("ett", "reconstruction_only")), name
        kinds = [e["losses"] for e in read_log(out / name / "log.jsonl") if e["event"] == "step"]
        assert len(kinds) == 10
    assert summary["start"]["metrics"]["indices_changed"]["value"] == 0
    found = summary["differences"]["embedding_frozen - ett"]["caption_loss"]
    values = [summary["arms"][name]["metrics"]["caption_loss"]["value"] for name in ("embedding_frozen", "ett")]
    assert found["value"] == pytest.approx(values[0] - values[1], abs=1e-6)
    assert found["interval"][0] <= found["value"] <= found["interval"][1]
    assert found["num_examples"] == 3 * 5, "two held-out splits of drawn text and three of names"
    page = report.read_text(encoding="utf-8")
    assert all(name in page or name.replace("_", " ") in page for name in ARMS)
    # again: nothing is trained anew, the report is written anew
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert ablate(recipe, out, resume=True) == report
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    assert write_comparison_report(out) == report
    # the first step of every arm sees the same pictures and, before any update, the same caption loss
    first = {name: read_log(out / name / "log.jsonl")[1]["losses"]["caption_loss"] for name in ARMS}
    assert max(first.values()) - min(first.values()) < 1e-6


def test_seeds_have_folders_of_their_own(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    done: list[str] = []

    def run_all(pending: list[Any], *_: Any) -> None:
        """In this process: what is tested is what they leave behind."""
        for job in pending:
            run_only(out, job.key)
            done.append(job.key)

    monkeypatch.setattr(ablate_module, "_run_all", run_all)
    arms = "arms={reconstruction_only: {}, ett: {stages.semantic.steps: 2}}"
    overrides = ["seeds=[3, 4]", "stages.semantic.steps=3", arms]
    ablate(recipe, out, overrides)
    assert [key.rpartition(":")[2] for key in done] == ["3", "3", "4", "4", *(["start"] if "start" in done else [])]
    summary = json.loads((out / "report.json").read_text(encoding="utf-8"))
    arm = summary["arms"]["ett"]
    assert list(arm["seeds"]) == ["3", "4"]
    assert arm["model"] == "ett/seed-3/stages/0-semantic"
    losses = [arm["seeds"][seed]["metrics"]["caption_loss"]["value"] for seed in ("3", "4")]
    assert losses[0] != losses[1]
    assert arm["metrics"]["caption_loss"]["value"] == pytest.approx(sum(losses) / 2, abs=1e-6)
    assert summary["differences"]["reconstruction_only - ett"]["caption_loss"]["num_seeds"] == 2
    assert summary["unfinished_seeds"] == []
    # stopped within the second seed: the first is reported, and the other named
    (out / "ett" / "seed-4" / "evaluation.json").unlink()
    page = write_comparison_report(out).read_text(encoding="utf-8")
    summary = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert summary["arms"]["ett"]["metrics"]["caption_loss"]["value"] == pytest.approx(losses[0], abs=1e-6)
    assert summary["unfinished_seeds"] == [4]
    for said in (page, (out / "table.md").read_text(encoding="utf-8")):
        assert "ot yet finished, and not in any figure" in said
    (out / "reconstruction_only" / "seed-3" / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"No seed .* has all its arms yet.*--resume"):
        write_comparison_report(out)


def test_stopped_and_resumed_equals_uninterrupted(recipe: Path, compared: Path, tmp_path: Path) -> None:
    names = ("reconstruction_only", "ett")
    arms = f"arms={json.dumps({name: ARMS[name] for name in names})}"
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "ett.cli", "ablate", str(recipe), arms, "--jobs", "2", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = out / "reconstruction_only" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and len(read_log(log)) > 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" in said
    ablate(recipe, out, [arms], resume=True, jobs=2)
    for name in names:
        weights = Path(name) / "stages" / "0-semantic" / "model.safetensors"
        assert (out / weights).read_bytes() == (compared / weights).read_bytes(), name
    metrics = [
        json.loads((folder / "report.json").read_text(encoding="utf-8"))["arms"]["ett"]["metrics"]
        for folder in (out, compared)
    ]
    assert metrics[0] == metrics[1]


def test_a_failing_arm_is_named_and_the_rest_is_kept(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bad = "{stages.semantic.optimizer.learning_rate: 1.0e+30, stages.semantic.optimizer.max_grad_norm: null}"
    with pytest.raises(UserError, match=r"broken:0 ended with exit code 2.*gradient norm.*--resume"):
        ablate(recipe, out, [f"arms={{broken: {bad}, ett: {{}}}}"], jobs=1)
    assert is_comparison(out)


def test_one_arm_alone(recipe: Path, tmp_path: Path) -> None:
    assert load_recipe(recipe, ["arm=index_frozen"]).model.visual_input == "index"
    with pytest.raises(RecipeError, match=r"arm=NAME.*reconstruction_only"):
        load_recipe(recipe)
    with pytest.raises(RecipeError, match="arm=NAME"):
        load_recipe(recipe, ["arm=etta"])
    with pytest.raises(UserError, match="no comparison"):
        run_only(tmp_path / "nowhere", "ett:0")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arms=null", "compares nothing"),
        ("arms={ett: {}}", "compares nothing"),
        ("arms.start={}", "other than 'start'"),
        ("arms.a/b={}", "plain word"),
        ("arms.typo={stages.semantic.step: 3}", "arms.typo.*steps"),
        ("arms.typo=3", "arms.typo"),
        ("seeds=[]", "seeds"),
        ("seeds=[1, 1]", "seeds"),
        ("seeds=[x]", "seed"),
    ],
)
def test_what_cannot_be_compared_is_refused(override: str, message: str, recipe: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_comparison(recipe, [override])


def test_arms_are_left_out_where_they_are_false(recipe: Path) -> None:
    names = load_comparison(recipe).names
    fewer = load_comparison(recipe, ["arms.index_frozen=false"])
    assert fewer.names == [name for name in names if name != "index_frozen"]
    assert "index_frozen" not in fewer.values["arms"]
    assert load_comparison(recipe, ["arms.index_frozen=null"]).names == names, "nothing changed is an arm"
    with pytest.raises(RecipeError, match="arm as reference"):
        load_comparison(recipe, ["arms.ett=false", "reference=ett"])


def test_folders_are_safe(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate_module, "_run_all", lambda *_: None)
    monkeypatch.setattr(ablate_module, "write_comparison_report", lambda out: out)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine", encoding="utf-8")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RecipeError, match="not a comparison"):
            ablate(recipe, foreign, **options)
    out = tmp_path / "out"
    ablate(recipe, out)
    (out / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RecipeError, match="already exists"):
        ablate(recipe, out)
    with pytest.raises(RecipeError, match="another recipe"):
        ablate(recipe, out, ["seeds=[5]"], resume=True)
    ablate(recipe, out, ["seeds=[5]"], overwrite=True)
    assert (out / "thesis.txt").read_text(encoding="utf-8") == "mine"
    assert load_comparison(out / "recipe.yaml").seeds == [5]


# -- the arithmetic ----------------------------------------------------------------------------------------------------


def test_pooling_joins_sources_by_prefix() -> None:
    table = pooled({"a.x.loss": [[1, 1]], "a.y.loss": [[2, 1], [3, 2]], "b.loss": [[4, 1]], "b.rank": [[5, 1]]})
    assert table["a.loss"].tolist() == [[1, 1], [2, 1], [3, 2]]
    assert table["loss"].tolist() == [[1, 1], [2, 1], [3, 2], [4, 1]]
    assert table["rank"].tolist() == [[5, 1]]


def test_pairing_finds_what_a_plain_comparison_cannot() -> None:
    """A small advantage on examples of very different difficulty."""
    rng = np.random.default_rng(0)
    hard, weights = rng.normal(5, 3, 400), rng.integers(1, 9, 400)
    gain = rng.normal(0.1, 0.05, 400)
    frozen, tuned = (np.stack([values * weights, weights], axis=1) for values in (hard, hard - gain))
    found = difference([frozen], [tuned])
    assert found.interval is not None
    assert 0.05 < found.interval[0] < found.value < found.interval[1] < 0.15
    exact = (frozen[:, 0].sum() - tuned[:, 0].sum()) / weights.sum()
    assert found.value == pytest.approx(exact)
    null = difference([frozen], [np.stack([(hard - gain + 0.1) * weights, weights], axis=1)])
    assert null.interval is not None
    assert null.interval[0] < 0 < null.interval[1]


def test_seeds_that_disagree_widen_the_interval() -> None:
    base = np.stack([np.full(200, 2.0), np.ones(200)], axis=1)
    agree = [base - [0.1, 0]] * 3
    differ = [base - [step, 0] for step in (-0.3, 0.1, 0.5)]
    narrow, wide = (difference([base] * 3, arm) for arm in (agree, differ))
    assert narrow.value == pytest.approx(wide.value) == pytest.approx(0.1)
    assert narrow.interval is not None
    assert wide.interval is not None
    assert narrow.interval[0] > 0 > wide.interval[0]
    assert (wide.num_seeds, wide.num_examples) == (3, 200)


def test_interval_agrees_with_the_normal_approximation() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(1.0, 1.0, 500), rng.normal(0.9, 1.0, 500)
    found = difference(*([np.stack([values, np.ones(500)], axis=1)] for values in (first, second)))
    spread = 1.96 * (first - second).std() / 500**0.5
    assert found.interval is not None
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * spread, rel=0.06)


def test_different_examples_cannot_be_paired() -> None:
    with pytest.raises(UserError, match="same examples"):
        compare({"a": [{"loss": [[1, 1]]}], "ett": [{"loss": [[1, 1], [2, 1]]}]}, "ett")
    assert compare({"a": [{"loss": [[1, 1]]}], "ett": [{"rank": [[1, 1]]}]}, "ett") == {"a - ett": {}}

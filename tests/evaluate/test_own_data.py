"""What is measured of a run on someone's own data: what is held back, and never what nobody asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ett.config import from_mapping
from ett.data.mixture import SourceConfig
from ett.errors import DataError, UserError
from ett.evaluate.run_folder import kept_pictures
from ett.evaluate.sources import configured_sources, held_back, stored_sources
from ett.experiments.comparison import ComparisonFolder, load_comparison, report_sources
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run, evaluation_sources
from ett.experiments.run_report import VALIDATION_DATA, write_run_report
from ett.train.log import read_log
from tests.conftest import CommandLine
from tests.evaluate.test_report import Page

TRAINING = "evaluation_of_training_data"
SHORT = {"stage": "tokenizer", "steps": 2, "batch_size": 2, "validate_every": 1}


@pytest.fixture
def held(pictures: Path) -> SourceConfig:
    """Three pictures in a manifest of their own."""
    lines = (pictures / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    (pictures / "held.back.jsonl").write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")
    return SourceConfig(source="manifest", path=str(pictures / "held.back.jsonl"))


def given(recipe: dict[str, Any], held: SourceConfig, **evaluation: Any) -> dict[str, Any]:
    data = [{"source": held.source, "path": held.path}]
    return {**recipe, "stages": [SHORT], "evaluation": {"data": data, **evaluation}}


def test_stored_data_are_taken_whole_and_named(held: SourceConfig, pictures: Path) -> None:
    shutil.copy(pictures / "manifest.jsonl", pictures / "names.jsonl")
    more = [
        SourceConfig(source="manifest", path=str(pictures / "names.jsonl"), limit=5, draws=True),
        SourceConfig(source="names"),
    ]
    found = configured_sources([held, *more, held], "validation")
    assert [name for name, _ in found] == ["names", "held_back.1", "names_manifest", "held_back.2"]
    assert [len(source) for _, source in found[1:]] == [3, 5, 3]
    assert found[2][1][0].messages[0]["role"] == "user"
    (name, _), *_ = stored_sources([held])
    assert name == "held_back", "a dot would group the figures"
    assert held_back(None, [held, more[1]]) == [more[1]]
    assert held_back([held], [more[1]]) == [held]


def test_validation_reads_a_manifest_that_is_named_for_it(
    toy_recipe: dict[str, Any], held: SourceConfig, tmp_path: Path
) -> None:
    Run(from_mapping(Recipe, given(toy_recipe, held)), tmp_path / "held").train()
    events = [e for e in read_log(tmp_path / "held" / "log.jsonl") if e["event"] == "validation"]
    assert [event["step"] for event in events] == [1, 2]
    recipe = from_mapping(Recipe, given(toy_recipe, held))
    assert [(name, len(source)) for name, source in evaluation_sources(recipe, "validation")] == [("held_back", 3)]
    Run(from_mapping(Recipe, {**toy_recipe, "stages": [SHORT]}), tmp_path / "none").train()
    assert not [e for e in read_log(tmp_path / "none" / "log.jsonl") if e["event"] == "validation"]


def test_a_missing_manifest_is_found_before_anything_trains(
    toy_recipe: dict[str, Any], held: SourceConfig, tmp_path: Path
) -> None:
    Path(held.path or "").unlink()
    with pytest.raises(DataError, match=r"held\.back\.jsonl"):
        Run(from_mapping(Recipe, given(toy_recipe, held)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_arms_are_measured_on_what_is_held_back(toy_recipe: dict[str, Any], held: SourceConfig, tmp_path: Path) -> None:
    def opened(values: dict[str, Any]) -> Recipe:
        path = tmp_path / "arms.yaml"
        path.write_text(yaml.safe_dump({**values, "arms": {"one": {}, "ett": {"seed": 0}}}), encoding="utf-8")
        comparison = load_comparison(path)
        ComparisonFolder(tmp_path / "out", comparison, resume=False, overwrite=False).open()
        return comparison.arms[0].recipe

    alone = {**toy_recipe, "stages": [SHORT]}
    with pytest.raises(DataError, match=r"nothing to measure on.*evaluation\.data="):
        opened(alone)
    assert not (tmp_path / "out").exists()
    named = [{"source": "manifest", "path": held.path}, {"source": "names"}]
    recipe = opened({**alone, "evaluation": {"report_data": named, "report_split": "pair"}})
    assert [name for name, _ in report_sources(recipe)] == ["names", "held_back"]


def test_a_run_without_held_back_data_is_not_measured_on_other_pictures(toy_run: Path, run: CommandLine) -> None:
    code, out, err = run("evaluate", toy_run)
    assert (code, out) == (2, "")
    assert "nothing to measure on" in err


def test_the_report_shows_answers_and_pictures_of_the_runs_own_data(
    toy_run: Path, tmp_path: Path, run: CommandLine
) -> None:
    folder = Path(shutil.copytree(toy_run, tmp_path / "run"))
    assert run("report", folder, "--kept")[0] == 0
    assert "<img" not in (folder / "report.html").read_text(encoding="utf-8")
    code, out, err = run("report", folder)
    assert (code, err) == (0, "")
    page = Page(Path(out.strip()).read_text(encoding="utf-8"))
    for word in ("Right: ", "Wrong: ", "number 0", "manifest: p0, right: number 0, said: ", "was trained on these"):
        assert word in page.text, word
    shown = kept_pictures(folder)
    assert len(shown) == 12
    assert page.tags.count("img") == 2 * len(shown), "the tokenizer was made by the run: nothing came before"
    figures = folder / f"{TRAINING}.json"
    assert json.loads(figures.read_text(encoding="utf-8"))["metrics"]["caption_loss"]["num_examples"] == 12
    assert not (folder / f"{VALIDATION_DATA}.json").exists()
    figures.write_text(figures.read_text(encoding="utf-8").replace("number 0", "kept"), encoding="utf-8")
    assert run("report", folder)[0] == 0
    assert "kept" in (folder / "report.html").read_text(encoding="utf-8"), "measured once"
    assert run("report", folder, "--limit", 2)[0] == 0
    assert json.loads(figures.read_text(encoding="utf-8"))["metrics"]["caption_loss"]["num_examples"] == 2


def test_a_report_without_a_model_or_its_data_has_curves(toy_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_run, tmp_path / "run"))
    shutil.rmtree(folder / "stages" / "3-chat")
    path, why = write_run_report(folder)
    assert "has not finished its last stage" in why
    assert "<svg" in path.read_text(encoding="utf-8")
    shutil.copytree(toy_run / "stages" / "3-chat", folder / "stages" / "3-chat")
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe.replace("manifest.jsonl", "gone.jsonl"), encoding="utf-8")
    _, why = write_run_report(folder)
    assert "gone.jsonl" in why
    with pytest.raises(UserError, match="no folder"):
        write_run_report(tmp_path / "nothing")

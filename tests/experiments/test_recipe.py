"""Recipes: strict keys, overrides, shipped files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ett.errors import RecipeError
from ett.experiments.recipe import SHIPPED, dump_recipe, load_recipe
from ett.model.build import check_model


@pytest.fixture
def recipe_file(toy_recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toy_recipe), encoding="utf-8")
    return path


def test_overrides(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "stages.semantic.steps=7",
            "stages.1.optimizer.learning_rate=1e-4",
            "stages.semantic.losses.tokenizer_weight=0.5",
            "evaluation.limit=3",
            "data.manifest.limit=5",
            "model.image_size=[32, 64]",
            "trackers=[]",
        ],
    )
    assert recipe.stages[2].steps == 7
    assert recipe.stages[1].optimizer.learning_rate == 1e-4
    assert recipe.stages[2].loss_config.tokenizer_weight == 0.5
    assert recipe.evaluation.limit == 3
    assert recipe.data[0].limit == 5
    assert recipe.model.size == (32, 64)
    assert load_recipe_text(dump_recipe(recipe), recipe_file) == recipe


def load_recipe_text(text: str, beside: Path) -> object:
    path = beside.with_name("again.yaml")
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.imagesize=3", r"model\.imagesize.*Did you mean 'model\.image_size'"),
        ("stages.semantic.step=3", r"stages\[2\]\.step'.*Did you mean 'stages\[2\]\.steps'"),
        ("stages.sematic.steps=3", r"stages\.sematic names no entry.*tokenizer, align, semantic, chat"),
        ("stages.9.steps=3", "Allowed: 0 to 3"),
        ("stages.0.steps=0", r"stages\[0\]: steps = 0 is not possible: it must be at least 1"),
        ("stages.0.steps=ten", r"stages\[0\]\.steps must be a whole number, got 'ten'"),
        ("stages.0.stage=tokeniser", r"'tokeniser'. Did you mean 'tokenizer'"),
        ("stages.1.optimizer.learning_rate=-1", "learning_rate = -1.0 is not possible"),
        ("stages.1.optimizer.learning_rate=.nan", "finite number"),
        ("stages.1.optimizer.learning_rates.decoder=1", "Unknown part in learning_rates 'decoder'"),
        ("stages.1.losses.tokenizer_weight=-0.1", "0 or more"),
        ("data.0.source=manifestt", "Did you mean 'manifest'"),
        ("data.0.difficulty=2", r"in \[0, 1\]"),
        ("data.0.path=null", "A manifest source needs a path"),
        ("data=[]", "non-empty list of sources"),
        ("stages=[]", "non-empty list"),
        ("model.language_model=null", "set model.language_model"),
        ("model.language_model.path=x", "either a path or a config"),
        ("model.projector.depth=0", "at least 1"),
        ("precision=fp16", "Allowed: fp32, bf16"),
        ("seed=true", "must be a whole number"),
        ("name=a/b", "a name that can be a folder's"),
        ("model.image_size.x.y=3", "plain value"),
        ("nonsense", "key=value"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_impossible_overrides_name_the_place(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file, [override])


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'quikstart'.*Did you mean 'quickstart'"):
        load_recipe("quikstart")
    broken = tmp_path / "r.yaml"
    broken.write_text("name: [1\nmodel: {", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"r\.yaml, line \d+ is not valid YAML"):
        load_recipe(broken)
    broken.write_text("- a\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="must hold a mapping"):
        load_recipe(broken)
    broken.write_bytes(b"name: \xff\n")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(broken)
    broken.write_text("name: !!python/object/apply:os.system ['true']\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="could not determine a constructor"):
        load_recipe(broken)
    broken.write_text("name: x\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="lacks the required key 'model'"):
        load_recipe(broken)


def test_two_stages_of_a_kind_get_names_of_their_own(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["stages.0.stage=align"])
    assert recipe.stage_names == ["align", "align-2", "semantic", "chat"]
    with pytest.raises(RecipeError, match="can only come first"):
        load_recipe(recipe_file, ["stages.1.stage=tokenizer"])


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_parse_and_say_what_they_cost(path: Path) -> None:
    arms = yaml.safe_load(path.read_text(encoding="utf-8")).get("arms")
    for chosen in [[f"arm={arm}"] for arm in arms] if arms else [[]]:
        assert dump_recipe(load_recipe(path.stem, chosen)) == dump_recipe(load_recipe(path, chosen))
    head = path.read_text(encoding="utf-8").split("name:")[0]
    for word in ("command", "hardware", "duration", "expected"):
        assert f"#   {word}" in head, f"{path.name} does not state its {word}"


def test_overrides_do_not_leak_through_yaml_anchors(recipe_file: Path) -> None:
    text = recipe_file.read_text(encoding="utf-8")
    given = yaml.safe_load(text)
    shared = {"learning_rate": 1e-3}
    given["stages"][1]["optimizer"] = given["stages"][2]["optimizer"] = shared
    recipe_file.write_text(yaml.safe_dump(given), encoding="utf-8")
    assert "&id" in recipe_file.read_text(encoding="utf-8")
    recipe = load_recipe(recipe_file, ["stages.semantic.optimizer.learning_rate=5e-5"])
    assert [stage.optimizer.learning_rate for stage in recipe.stages[1:3]] == [1e-3, 5e-5]
    recipe_file.write_text("name: &a [*a]\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"contains itself|not valid YAML"):
        load_recipe(recipe_file)


def test_the_documented_recipe_is_one(tmp_path: Path) -> None:
    """docs/recipes.md: the example parses as printed."""
    text = (SHIPPED.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    recipe = load_recipe(path, ["stages.semantic.steps=40", "model.projector.depth=3"])
    assert recipe.stages[2].steps == 40
    assert check_model(recipe.model) is None

"""The documents are true: commands parse, snippets run, the way through "own data" is walked, and the site builds strictly."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml

from ett.cli import build_parser, main
from ett.errors import UserError
from ett.evaluate.run_folder import kept_pictures
from ett.experiments.recipe import Recipe, load_recipe, recipe_of_arm
from ett.images import load_image
from ett.train.log import read_log
from tests.conftest import LANGUAGE_MODELS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
SKIPPED = {"LOG.md"}
"""A log tells what was run then."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The words of each `ett` command in the page's shell blocks, continued lines joined, comments dropped."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"^\w+=\$\((.*?)\)", r"\1", line), comments=True)
            if "ett.cli" in words:
                found.append(words[words.index("ett.cli") + 1 :])
            elif words[:1] == ["ett"]:
                found.append(words[1:])
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in SKIPPED], ids=lambda p: p.name)
def test_every_command_parses(page: Path) -> None:
    """Options and subcommands exist; shipped recipes take the overrides that stand behind them."""
    parser = build_parser()
    for words in commands(page):
        try:
            arguments, rest = parser.parse_known_args(words)
        except SystemExit as error:
            raise AssertionError(f"{page.name}: ett {shlex.join(words)}") from error
        assert not [word for word in rest if word.startswith("-")], f"{page.name}: ett {shlex.join(words)}"
        recipe = getattr(arguments, "recipe", None)
        shipped = recipe in {p.stem for p in (ROOT / "recipes").glob("*.yaml")}
        if shipped and "--hardware" not in words:
            given = [word for word in [*getattr(arguments, "overrides", []), *rest] if "=" in word]
            arms = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")).get("arms", {})
            if words[0] == "ablate":
                given.append(f"arm={next(iter(arms))}")
            try:
                load_recipe(recipe, given)
            except UserError as error:
                raise AssertionError(f"{page.name}: ett {shlex.join(words)}: {error}") from error


def test_pages_lead_somewhere() -> None:
    """Every link to a file of the repository, from the pages that the site does not check."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for link in re.findall(r"\]\(((?!http)[^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    nav = yaml.unsafe_load(re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))["nav"]
    for target in re.findall(r"'([\w/]+\.md)'", str(nav)):
        assert (DOCS / target).is_file(), target
    # what promises are kept by, in every page
    for page in PAGES:
        for path in re.findall(r"`(tests/[\w/]+\.py)", page.read_text(encoding="utf-8")):
            assert page.name in SKIPPED or (ROOT / path).is_file(), f"{page.name}: {path}"


def test_other_files_are_what_they_say() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "authors", "message", "version"} <= set(citation)
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert path.name == "config.yml" or {"name", "description", "body"} <= set(form)
    light, dark = (ET.parse(DOCS / "figures" / f"concepts-{mode}.svg").getroot() for mode in ("light", "dark"))
    assert light[0].tag.endswith("style")
    assert [ET.tostring(part) for part in light[1:]] == [ET.tostring(part) for part in dark[1:]], (
        "one drawing, two inks"
    )


def make_pictures(folder: Path) -> None:
    """Ten pictures as a newcomer has them: named after what they show, of any size and kind."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    colours, suffixes = ("red", "green", "blue", "grey", "brown"), ("jpg", "PNG", "JPG", "webp", "jpeg")
    for i, name in enumerate(f"{colour}-{thing}" for thing in ("bicycle", "cat") for colour in colours):
        pixels = rng.integers(0, 255, (5 + i, 8, 3), dtype=np.uint8)
        picture = PIL.Image.fromarray(pixels).resize((90 + 7 * i, 60 + 11 * i))
        picture.save(folder / f"{name}.{suffixes[i % 5]}")
    (folder / "notes.txt").write_text("no picture", encoding="utf-8")


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which docs/own_data.md was followed, with two training steps of two pictures; the mixture and the comparison,
    which take the same way, were left out."""
    folder = tmp_path_factory.mktemp("newcomer")
    make_pictures(folder / "mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        page = DOCS / "own_data.md"
        (code,) = blocks(page, "python")
        exec(compile(code, page.name, "exec"), {})
        done = []
        for words in commands(page):
            if any(part in word for word in words for part in ("runs/compared", "runs/mixed")):
                continue
            assert main([*words, *(toy_overrides(words[1]) if words[0] == "train" else [])]) == 0, words
            done.append(words[0])
        looked = ["report", "evaluate", "chat", "reconstruct", "tokenizer-report"]
        assert done == ["data", "data", "train", *looked, "train", "tokenizer-report", "train"]
    return folder


def toy_overrides(recipe: str) -> list[str]:
    """What makes two steps of two pictures of a shipped recipe, with a language model of a few thousand weights."""
    stages = {"quickstart": ["semantic"], "tokenizer_64px": ["tokenizer"], "smollm2_64px": ["align", "semantic"]}[
        recipe
    ]
    short = {"steps": 2, "batch_size": 2, "validate_every": 1, "checkpoint_every": "null", "health.pictures": 2}
    found = [f"stages.{stage}.{key}={value}" for stage in stages for key, value in short.items()]
    if recipe == "tokenizer_64px":
        found += ["stages.tokenizer.quantize_after=1", "model.vision_tokenizer.codebook_size=64"]
    if recipe == "smollm2_64px":
        found += [f"model.language_model={{config: {json.dumps(LANGUAGE_MODELS['llama'])}}}", "precision=fp32"]
    return found


@pytest.mark.slow
def test_a_newcomer_gets_a_tuned_model_and_a_report(walked: Path) -> None:
    trained, held = ((walked / "mine" / name).read_text(encoding="utf-8") for name in ("mine.jsonl", "held.jsonl"))
    assert (len(trained.splitlines()), len(held.splitlines())) == (8, 2), "upper case and .jpeg too, and nothing else"
    assert json.loads(trained.splitlines()[0])["conversations"][1]["value"] == "blue bicycle"
    own = [json.loads(line)["id"] for line in held.splitlines()]
    assert not set(own) & {json.loads(line)["id"] for line in trained.splitlines()}
    figures = json.loads((walked / "figures.json").read_text(encoding="utf-8"))["metrics"]
    assert figures["caption_loss"]["num_examples"] == 2
    assert (walked / "reports" / "mine" / "report.html").is_file()
    assert list((walked / "reconstructions").glob("red-bicycle*"))
    assert (walked / "reports" / "tokenizer" / "report.html").is_file()
    for run in ("mine", "tokenizer", "own"):
        events = read_log(walked / "runs" / run / "log.jsonl")
        assert [e["step"] for e in events if e["event"] == "validation"][:2] == [1, 2], (
            f"{run}: held-back pictures are measured"
        )


@pytest.mark.slow
def test_a_newcomers_report_shows_their_pictures_and_answers(walked: Path) -> None:
    """Of what was held back and of what was trained on, each picture as it is, before tuning and after."""
    folder = walked / "runs" / "mine"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    held = [json.loads(line) for line in (walked / "mine" / "held.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in held:
        right = line["conversations"][1]["value"]
        assert f"held: {line['id']}, right: {right}, said: " in page
    for word in ("before tuning", "after tuning", "mine: blue-bicycle", "was trained on these", "Right: ", "Wrong: "):
        assert word in page, word
    shown = kept_pictures(folder)
    assert len(shown) == len(held) + 6
    assert page.count("<img") == 3 * len(shown)
    for each in shown:
        assert each.before is not None
        assert each.before.tobytes() != each.reconstruction.tobytes(), "two steps of tuning are seen"
    original = load_image(walked / "mine" / held[0]["image"])
    ratio = original.width / original.height
    assert shown[0].original.width / shown[0].original.height == pytest.approx(ratio, rel=0.1), "their own picture"
    answers = json.loads((folder / "evaluation_of_validation_data.json").read_text(encoding="utf-8"))["predictions"]
    assert [(each["id"], each["reference"]) for each in answers] == [
        (line["id"], line["conversations"][1]["value"]) for line in held
    ]


def test_snippets_of_the_pages_run(toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those about a language model, a loss, a task and other trainers, one after another on a toy model."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(toy_run / "stages" / "2-semantic")
    (tmp_path / "mine").symlink_to(toy_run.parent / "pictures")
    (tmp_path / "mine.jsonl").symlink_to(toy_run.parent / "pictures" / "manifest.jsonl")
    (tmp_path / "docs").symlink_to(DOCS)
    monkeypatch.chdir(tmp_path)

    def run(page: str, number: int, names: dict[str, Any], old: str = "", new: str = "") -> dict[str, Any]:
        code = blocks(DOCS / page, "python")[number]
        code = code.replace(old, new) if old else code
        exec(compile(code, f"{page}[{number}]", "exec"), names)
        return names

    trained = run("trainers.md", 0, {})
    assert trained["output"].loss.requires_grad
    assert {"caption_loss", "reconstruction_loss"} <= set(trained["output"].losses)

    edges = run("own_loss.md", 0, {})["WithEdges"].from_pretrained(tmp_path / "runs" / "mine")
    output = edges(**trained["batch"])
    assert output.losses["edge_loss"] > 0
    weight = edges.config.loss_config.tokenizer_weight
    plain = trained["model"](**trained["batch"]).loss
    added = float((output.loss - plain).detach())
    assert added == pytest.approx(float(weight * output.losses["edge_loss"].detach()), rel=1e-3)

    from ett.evaluate.tasks import TASKS

    monkeypatch.setattr("ett.evaluate.tasks.TASKS", TASKS)
    try:
        run("own_task.md", 0, {"__name__": "own_task"})
        found = run("own_task.md", 1, {}, "mine/mine.jsonl", "mine/manifest.jsonl")["result"].metrics
        assert [name for name in found if name.endswith("answer_words")]
    finally:
        TASKS.pop("brevity", None)

    parts = {
        "text_tokenizer": trained["processor"].tokenizer,
        "vision_tokenizer": trained["model"].vision_tokenizer,
        "language_model": trained["model"].language_model,
    }
    model = run("own_language_model.md", 0, dict(parts))["model"]
    assert model.projector.merge_size == 2
    assert (tmp_path / "models" / "own_parts" / "processor_config.json").is_file()


def test_python_in_the_pages_compiles() -> None:
    """Every block, those too that need weights which no test has."""
    for page in PAGES:
        for number, code in enumerate(blocks(page, "python")):
            compile(code, f"{page.name}[{number}]", "exec")


RECIPE_KEYS = {each.name for each in fields(Recipe)}
WHOLE = {
    "model": {"vision_tokenizer": {"path": "reader_64px"}, "language_model": {"path": "smollm2"}},
    "data": [{"source": "names"}],
    "stages": [{"stage": "semantic", "steps": 1, "batch_size": 2}],
}
"""A recipe for a page's part to stand in."""
NO_RECIPE = {"scrape_configs"}
"""Keys by which a block is known as another program's."""


def read_as_recipe(given: dict[str, Any]) -> None:
    """A whole recipe as it is; a part of one within `WHOLE`, and each of its arms."""
    own = {key: value for key, value in given.items() if key not in ("arms", "seeds", "reference", "search")}
    assert set(own) <= RECIPE_KEYS, set(own) - RECIPE_KEYS
    whole = {"name": "page", **WHOLE, **own, "model": {**WHOLE["model"], **own.get("model", {})}}
    for name, changes in (given.get("arms") or {"page": {}}).items():
        recipe_of_arm(whole, name, changes)


def test_recipes_in_the_pages_are_read() -> None:
    """Every YAML block, parts of recipes too: keys that do not exist, values that are refused."""
    read = 0
    for page in PAGES:
        for block in [] if page.name in SKIPPED else blocks(page, "yaml"):
            given = yaml.safe_load(block)
            if set(given) & NO_RECIPE:
                continue
            try:
                read_as_recipe(given)
            except UserError as error:
                raise AssertionError(f"{page.name}: {error}\n{block}") from error
            read += 1
    assert read >= 10
    with pytest.raises(UserError, match="Did you mean"):
        read_as_recipe({"evaluation": {"report_date": []}})


def test_every_block_says_what_it_is() -> None:
    """A fence without a language is checked by nobody."""
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert page.name in SKIPPED or all(fences[::2]), page.name


def test_scripts_that_the_pages_run_exist() -> None:
    """Behind python, torchrun and srun, and where a page speaks of an example, a benchmark or a tool."""
    found = set()
    for page in PAGES:
        text = "" if page.name in SKIPPED else page.read_text(encoding="utf-8")
        for path in re.findall(
            r"(?<![\w/.-])((?:examples|benchmarks|tools|recipes)/[\w/]+\.(?:py|md|yaml|sbatch|sh))\b", text
        ):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"
            found.add(path)
    assert {"examples/deepspeed_zero.py", "examples/hf_trainer.py", "benchmarks/cached_codes.py"} <= found


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "site" / "reference" / "training.html").read_text(encoding="utf-8")
    assert "tokenizer_weight" in page
    assert "fonts.googleapis" not in page, "nothing is fetched from elsewhere"

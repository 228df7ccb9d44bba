"""The report: complete, self-contained, and safe whatever the data say."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ett.errors import UserError
from ett.evaluate.charts import MAX_POINTS, Series, line_chart, number, thinned, ticks
from ett.evaluate.report import write_report
from ett.evaluate.run_folder import Shown, kept_pictures
from tests.evaluate.conftest import picture

HOSTILE = "<script>alert('x')</script>\"&\x00\ud83d"
VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects text, tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def events() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    norms = {"encoder": 0.05, "codebook": 0.0, "projector": 0.2, "language_model": 1.5}
    for stage in ("tokenizer", "semantic"):
        if stage == "semantic":
            found.append({"event": "reach", "stage": stage, "step": 0, "time": 1.0, "caption_gradient_norms": norms})
        for step in range(1, 31):
            losses = {"loss": 5.0 / step, "reconstruction_loss": 0.5 / step}
            if stage == "semantic":
                losses["caption_loss"] = float("nan") if step == 3 else 3.0 / step
            rates = {"projector": step * 1e-3, "language_model": 1e-4}
            found.append({"event": "step", "stage": stage, "step": step, "time": float(step), "losses": losses,
                          "grad_norm": 1.0, "learning_rates": rates, "images_per_second": 9.0})  # fmt: skip
        found.append({"event": "validation", "stage": stage, "step": 30, "time": 40.0, "losses": {"loss": 0.25}})
    return found


def evaluation(**predictions: str) -> dict[str, Any]:
    return {
        "metrics": {
            "names.exact_match": {"value": 0.5, "num_examples": 64, "interval": [0.375, 0.625]},
            "drawn_text.psnr": {"value": None, "num_examples": 2, "interval": None},
        },
        "predictions": [
            {"id": "names/1", "prediction": "Red fox.", "reference": "red fox"},
            {"id": "names/2", "prediction": HOSTILE, "reference": "a bat"},
            {"id": "names/3", "prediction": "", "reference": "an owl"},
            {"id": "names/4", "prediction": "free text", "reference": None},
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [json.dumps(event) for event in events()]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"event": "st')
    (tmp_path / "recipe.yaml").write_text(
        "name: 'a <b>bold</b> & run'\nseed: 3\nmodel: {image_size: 64, language_model: {path: smollm2}}\n"
        "stages: [{stage: tokenizer, steps: 30, batch_size: 8}, {stage: semantic, steps: 40, batch_size: 8}]\n"
    )
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    return tmp_path


def test_everything_is_on_the_page(folder: Path) -> None:
    path = write_report(folder, [Shown("a picture <1>", picture(0), picture(1))])
    assert path == folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    expected = [
        "a <b>bold</b> & run",
        "smollm2",
        "30 of 40",
        "0.03",
        "Exact match",
        "0.375 to 0.625",
        "n = 64",
        "drawn_text",
        "Right: 1 of 3",
        "Wrong: 2 of 3",
        "Red fox.",
        "an owl",
        "(nothing)",
        "a picture <1>",
        "Caption loss",
        "Reconstruction loss",
        "Gradient norm",
        "training",
        "validation",
        "frozen",
        "1.5",
    ]
    for word in expected:
        assert word in page.text, word
    assert page.tags.count("img") == 2


def test_it_stands_alone_and_runs_nothing(folder: Path) -> None:
    html = write_report(folder, [Shown(HOSTILE, picture(0), picture(1))]).read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "http" not in html
    assert "alert(" in page.text
    assert "\x00" not in html
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_summary(folder: Path) -> None:
    write_report(folder)
    found = json.loads((folder / "report.json").read_text())
    assert found["stages"]["semantic"]["steps"] == 30
    assert found["stages"]["semantic"]["seconds"] == 39.0
    assert found["stages"]["semantic"]["training"]["caption_loss"] == pytest.approx(0.1)
    assert found["stages"]["semantic"]["validation"] == {"loss": 0.25}
    assert found["stages"]["semantic"]["caption_gradient_norms"]["language_model"] == 1.5
    assert found["evaluations"]["evaluation"]["names.exact_match"]["value"] == 0.5


def test_pictures_are_kept(folder: Path) -> None:
    first = write_report(folder, [Shown("one", picture(0), picture(1), picture(2))]).read_text(encoding="utf-8")
    assert write_report(folder).read_text(encoding="utf-8") == first
    assert first.count("<img") == 3
    assert "before tuning" in first
    (shown,) = kept_pictures(folder)
    assert shown.before is not None
    assert shown.before.tobytes() == picture(2).tobytes()
    (folder / "samples.json").write_text('[{"caption": "no pictures"}]')
    with pytest.raises(UserError, match=r"samples\.json"):
        write_report(folder)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: new\nstages: [{stage: align, steps: 5, batch_size: 2}]\n")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "0 of 5" in page.text
    assert "Results" not in page.text


def test_odd_recipes(tmp_path: Path) -> None:
    for text in ("name: x\nmodel: 3\nstages: no\n", "[]\n", "name: x\nstages: [1, {}]\nmodel: {language_model: a}\n"):
        (tmp_path / "recipe.yaml").write_text(text)
        Page(write_report(tmp_path).read_text(encoding="utf-8"))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        write_report(tmp_path / "missing")
    with pytest.raises(UserError, match="not a run's folder"):
        write_report(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        write_report(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    for content in ("{", "[]", '{"metrics": {"a": 1}}', '{"metrics": {}, "predictions": {}}'):
        (tmp_path / "evaluation.json").write_text(content)
        with pytest.raises(UserError, match=r"evaluation\.json"):
            write_report(tmp_path)


# -- charts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 4, [0, 1, 2, 3, 4]), (0.13, 0.41, [0.1, 0.2, 0.3, 0.4, 0.5]), (-7.95, 0, [-8, -6, -4, -2, 0])],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 4) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(3, 3), (0, 0), (1e-9, 2e-9), (-1e6, 1e6), (1e12, 1e12 + 1)])
def test_ticks_enclose(low: float, high: float) -> None:
    found = ticks(low, high, 4)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8


def test_numbers() -> None:
    assert [number(x) for x in (0.0, 1.0, 0.123456, 1e-7, 123456.0, -0.0)] == [
        "0",
        "1",
        "0.1235",
        "1e-7",
        "1.235e5",
        "0",
    ]


def test_long_lines_are_thinned() -> None:
    points = [(float(i), 0.0) for i in range(10_000)]
    assert len(thinned(points)) == MAX_POINTS
    assert thinned(points)[0] == points[0]
    assert thinned(points)[-1] == points[-1]


def test_charts() -> None:
    assert line_chart("x", [Series("a", [(1.0, float("nan"))])], "step", "") == ""
    Page(line_chart("one point", [Series("a", [(1.0, 2.0)])], "step", "nats"))
    html = line_chart("<t>", [Series("<a>", [(0, 1), (1, 2)]), Series("b", [(0, 2), (1, 1)])], "step", "nats")
    page = Page(html)
    assert page.tags.count("polyline") == 4
    assert 'stroke-dasharray="6 3"' in html
    assert "<t>" in page.text

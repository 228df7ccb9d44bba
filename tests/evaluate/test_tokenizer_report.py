"""The tokenizer report: the same pictures for everyone, figures that agree with the evaluation's, a self-contained page."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ett.cli import main
from ett.data.sources import conversation
from ett.errors import DataError, ModelError, UserError
from ett.evaluate import reading
from ett.evaluate.base import Selection
from ett.evaluate.run import evaluate
from ett.evaluate.sources import named_sources
from ett.evaluate.tokenizer_measures import measure_tokenizer, usage_curve
from ett.evaluate.tokenizer_report import labels, write_tokenizer_report
from ett.model import EttImageProcessor
from ett.types import Example
from tests.evaluate.conftest import Listed, Toy, build_toy, picture
from tests.evaluate.test_report import HOSTILE, Page
from tests.losses import lpips_stand_in

SPOKEN = "toy text"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two tokenizers at 32 x 32 and one at 24 x 16, cropped."""
    found = {}
    for seed, (name, images) in enumerate(
        {
            "a": EttImageProcessor(32, 32),
            "b": EttImageProcessor(32, 32),
            "wide": EttImageProcessor(16, 24, "crop"),
        }.items()
    ):
        folder = tmp_path / "saved" / name
        build_toy(seed)[0].vision_tokenizer.save_pretrained(folder)
        images.save_pretrained(folder)
        found[name] = folder
    return found


@pytest.fixture
def texts(examples: list[Example]) -> list[Example]:
    return [replace(each, metadata={"text": word}) for each, word in zip(examples, SPOKEN.split() * 3, strict=False)]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """An OCR judge that always reads `SPOKEN`, second line first; returns the shapes of what it was shown."""
    shown: list[tuple[int, ...]] = []

    class Fake:
        def __init__(self, **_: Any) -> None: ...

        def __call__(self, array: Any) -> tuple[list[Any], list[float]]:
            shown.append(array.shape)
            return [([[0, 9], [5, 9]], "text", 0.9), ([[0, 1], [5, 2]], "toy", 0.8)], []

    module = ModuleType("rapidocr_onnxruntime")
    module.RapidOCR = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", module)
    monkeypatch.setattr(reading, "why_missing", lambda: "")
    return shown


def report(folders: dict[str, Path], sources: Sequence[tuple[str, Any]], out: Path, **options: Any) -> dict[str, Any]:
    path, notes = write_tokenizer_report(folders, sources, out, batch_size=3, **options)
    assert path == out / "report.html"
    found: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert found["notes"] == list(notes)
    return found


def test_lpips_where_it_can_be_had(
    folders: dict[str, Path], examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column of its own name beside Lite0's, with intervals and paired differences; where it cannot be had, the reason."""
    given, sources = {name: folders[name] for name in "ab"}, [("plain", Listed(examples))]

    def unreachable(**_: Any) -> Any:
        raise OSError("no route")

    with monkeypatch.context() as patch:
        lpips_stand_in.install(patch, vgg16=unreachable)
        found = report(given, sources, tmp_path / "without")
    assert not any("lpips" in name for name in found["tokenizers"]["a"]["metrics"])
    (why,) = [note for note in found["notes"] if "LPIPS" in note]
    assert "no route" in why

    lpips_stand_in.install(monkeypatch)
    found = report(given, sources, tmp_path / "with")
    measured = found["tokenizers"]["a"]["metrics"]["lpips_vgg"]
    assert measured["value"] > 0
    assert measured["interval"] is not None
    assert measured["num_examples"] == found["tokenizers"]["a"]["metrics"]["lite0_distance"]["num_examples"]
    values = [found["tokenizers"][name]["metrics"]["lpips_vgg"]["value"] for name in "ba"]
    assert found["differences"]["b"]["lpips_vgg"]["value"] == pytest.approx(values[0] - values[1])
    page = (tmp_path / "with" / "report.html").read_text(encoding="utf-8")
    assert "LPIPS (VGG)" in page
    assert not any("LPIPS" in note for note in found["notes"])


def test_report(
    folders: dict[str, Path],
    examples: list[Example],
    texts: list[Example],
    judge: list[tuple[int, ...]],
    tmp_path: Path,
) -> None:
    hostile = replace(examples[0], id=HOSTILE)
    sources = [("plain", Listed([hostile, *examples])), ("texts", Listed(texts))]
    found = report(folders, sources, tmp_path / "out")
    assert list(found["tokenizers"]) == ["a", "b", "wide"]
    assert [each["image_size"] for each in found["tokenizers"].values()] == [[32, 32], [32, 32], [16, 24]]
    metrics = found["tokenizers"]["a"]["metrics"]
    plain = {"psnr", "ssim", "l1", "lite0_distance", "lite0_frechet_distance", "codebook_usage", "index_perplexity"}
    read = {"ocr_character_error_rate", "ocr_character_error_rate_of_originals"}
    assert {name for name in metrics if "." not in name} == plain | read
    assert {name for name in metrics if name.startswith("plain.")} == {f"plain.{name}" for name in plain}
    assert {name for name in metrics if name.startswith("texts.")} == {f"texts.{name}" for name in plain | read}
    assert metrics["psnr"]["num_examples"] == 11
    assert metrics["psnr"]["interval"] is not None
    pooled = (6 * metrics["plain.psnr"]["value"] + 5 * metrics["texts.psnr"]["value"]) / 11
    assert metrics["psnr"]["value"] == pytest.approx(pooled)
    book = found["tokenizers"]["a"]["codebook"]
    assert book["num_indices"] == 11 * 64
    assert book["in_use"] == round(book["usage"] * 64)

    # only tokenizers that see the same pictures are subtracted
    assert set(found["differences"]) == {"b"}
    change = found["differences"]["b"]["psnr"]
    both = [found["tokenizers"][name]["metrics"]["psnr"]["value"] for name in "ba"]
    assert change["value"] == pytest.approx(both[0] - both[1])
    notes = " ".join(found["notes"])
    assert "sizes" in notes
    assert "at least 321 pictures" in notes
    assert "plain: 6, texts: 5, all sources: 11" in notes

    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    shown = Page(html)
    assert "script" not in shown.tags
    assert all(address.startswith("data:image/png;base64,") for address in shown.addresses)
    # of each of the 11 pictures: the original at two sizes, three reconstructions
    assert len(shown.addresses) == 11 * 5
    for word in (
        "32 x 32 px, pad",
        "16 x 24 px, crop",
        "EfficientNet-Lite0 Fréchet distance",
        "Differences from a",
        "RapidOCR",
    ):
        assert word in shown.text, word
    assert "★" not in shown.text
    for never in ("FID", "LPIPS", "CLIPScore"):
        assert never not in shown.text
    assert str(tmp_path) not in html + (tmp_path / "out" / "report.json").read_text(encoding="utf-8")


def test_figures_are_the_evaluations(toy: Toy, examples: list[Example]) -> None:
    model, processor = toy
    wanted = evaluate(model, processor, [("listed", Listed(examples))], ["reconstruction"]).metrics
    found = measure_tokenizer(model.vision_tokenizer, processor, [Selection("listed", Listed(examples))])
    for name, metric in wanted.items():
        assert found.metrics[f"listed.{name}"] == metric
        assert found.metrics[name] == metric
    assert torch.equal(found.index_counts.sum(), torch.tensor(5 * 64))
    shown = found.sheet["listed"]
    assert [caption for caption, _ in shown] == [each.id for each in examples]
    mean = sum(each.psnr for _, each in shown) / len(shown)
    assert mean == pytest.approx(wanted["psnr"].value, rel=1e-5)


def test_reading(toy: Toy, texts: list[Example], judge: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = toy
    reader = reading.Reader()
    with_text = [*texts[:2], Example("pair", conversation(None, "x", 2), [picture(1), picture(2)], {"text": "two"})]
    found = measure_tokenizer(model.vision_tokenizer, processor, [Selection("x", Listed(with_text))], reader=reader)
    rate = found.metrics["x.ocr_character_error_rate"]
    # "toy text" for "toy" and for "text": five and four letters too many; of two pictures nobody knows which one it is
    assert rate.num_examples == 2
    assert rate.value == pytest.approx((5 + 4) / (3 + 4))
    assert len(judge) == 4
    assert all(min(shape[:2]) == 256 for shape in judge)
    # originals are known already
    measure_tokenizer(build_toy(7)[0].vision_tokenizer, processor, [Selection("x", Listed(with_text))], reader=reader)
    assert len(judge) == 6

    monkeypatch.setattr("ett.evaluate.tokenizer_measures.READ_LIMIT", 2)
    few = measure_tokenizer(model.vision_tokenizer, processor, [Selection("x", Listed(texts))], reader=reader)
    assert few.metrics["x.ocr_character_error_rate"].num_examples == 2
    assert few.metrics["x.psnr"].num_examples == 5


def test_no_judge(
    folders: dict[str, Path], texts: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "DISTRIBUTION", "no-such-package")
    with pytest.raises(ModelError, match=r"no-such-package.*not installed.*\[ocr\]"):
        reading.Reader()
    monkeypatch.setattr("ett.losses.perceptual.DISTRIBUTION", "no-such-package")
    found = report({"a": folders["a"]}, [("texts", Listed(texts))], tmp_path / "out")
    assert not any("ocr" in name or "lite0" in name for name in found["tokenizers"]["a"]["metrics"])
    assert "Reading is not measured" in " ".join(found["notes"])
    assert "Lite0 distances are not measured" in " ".join(found["notes"])
    assert found["differences"] == {}
    monkeypatch.setattr(reading, "DISTRIBUTION", "pytest")
    assert "Install 1.4.4" in reading.why_missing()


def test_the_real_judge() -> None:
    pytest.importorskip("rapidocr_onnxruntime")
    (_, source), *_ = named_sources(["drawn_text"])
    example = next(example for example in source if example.metadata["question_kind"] == "number")
    assert reading.Reader().read(example.images[0]) == example.metadata["text"]


def test_upscaled() -> None:
    assert reading.upscaled(picture(0, 40, 30)).size == (342, 256)
    large = picture(0, 300, 256)
    assert reading.upscaled(large) is large


def test_usage_curve() -> None:
    curve = usage_curve(torch.tensor([0, 6, 3, 1]))
    assert curve == [(0.0, 0.0), (0.25, 0.6), (0.5, 0.9), (0.75, 1.0), (1.0, 1.0)]
    many = usage_curve(torch.ones(1000, dtype=torch.int64))
    assert len(many) == 101
    assert all(x == pytest.approx(y) for x, y in many)


def test_output_folder(folders: dict[str, Path], examples: list[Example], tmp_path: Path) -> None:
    one, sources, out = {"a": folders["a"]}, [("x", Listed(examples[:1]))], tmp_path / "out"
    report(one, sources, out)
    with pytest.raises(UserError, match="--overwrite"):
        report(one, sources, out)
    (out / "mine.txt").write_text("stays", encoding="utf-8")
    report(one, sources, out, overwrite=True)
    assert (out / "mine.txt").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text('{"name": "a run"}', encoding="utf-8")
    with pytest.raises(UserError, match="no tokenizer report"):
        report(one, sources, tmp_path / "run", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        report(one, sources, out / "mine.txt")
    silent = Example("t", conversation("two and two?", "four", num_images=0), [])
    with pytest.raises(DataError, match="picture"):
        report(one, [("x", Listed([silent]))], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_labels() -> None:
    assert labels(["runs/a", "b", "/x/y/c/"]) == ["a", "b", "c"]
    assert labels(["/x/a/model", "/x/b/model"]) == ["a/model", "b/model"]
    assert labels(["a", "./a", "x/a"]) == ["a", "a-2", "x/a"]
    assert len(set(labels(["a-2", "a", "a"]))) == 3


def test_named_sources(pictures: Path) -> None:
    manifest = str(pictures / "manifest.jsonl")
    assert [name for name, _ in named_sources([])] == ["names", "drawn_text"]
    assert [name for name, _ in named_sources(["questions", manifest])] == ["questions", "manifest"]
    assert [name for name, _ in named_sources(["names"], "heldout")] == ["names.pair", "names.style", "names.concept"]
    with pytest.raises(DataError, match="Did you mean 'names'"):
        named_sources(["name"])
    with pytest.raises(DataError, match="no splits"):
        named_sources([manifest], "heldout")
    with pytest.raises(DataError, match="'manifest'"):
        named_sources([manifest, manifest])


def test_command(folders: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, out = str(pictures / "manifest.jsonl"), tmp_path / "out"
    words = ["tokenizer-report", str(folders["a"]), str(folders["wide"]), "--data", f"{manifest}, names"]
    assert main([*words, "--limit", "3", "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(out / "report.html")
    assert "sizes" in told.err
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [(each["name"], each["num_examples"]) for each in found["sources"]] == [("names", 3), ("manifest", 3)]
    assert main([*words, "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["tokenizer-report", "reader_63px"]) == 2
    assert "reader_64px" in capsys.readouterr().err

"""All judges of drawings together: their calibration, what is missing, and figures as a comparison takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from ett.cli import main
from ett.data.drawn_scenes import TAGS, DrawnScenes, Thing, paint
from ett.data.drawn_text import DrawnText
from ett.errors import DataError, ModelError
from ett.evaluate import drawing_report as report_module
from ett.evaluate import reading
from ett.evaluate.drawing_report import DrawingsConfig, judge_all
from ett.evaluate.drawing_scenes import judge_scene_folder, write_prompts
from ett.evaluate.drawing_words import CHARACTERS, judge_words
from ett.evaluate.t2i.layouts import layout
from ett.images import from_array
from ett.losses import perceptual
from ett.model import EttForConditionalGeneration, EttProcessor
from ett.model.image_sampling import ImageSampling
from tests.model.test_drawing import build

SAMPLING = ImageSampling(guidance=1.0)
Parts = tuple[EttForConditionalGeneration, EttProcessor]


@pytest.fixture
def parts() -> Iterator[Parts]:
    """A toy model at 64 pixels whose tokenizer changes nothing, as long as nobody draws."""
    with pytest.MonkeyPatch.context() as patch:
        model, processor = build(image_size=64, projector={"whiten": True, "grid_positions": 16})
        kind = type(model.vision_tokenizer)
        plain = kind.detokenize
        patch.setattr(kind, "tokenize", lambda _, pixels: pixels)
        patch.setattr(kind, "detokenize", lambda self, x: x if x.is_floating_point() else plain(self, x))
        yield model, processor


@pytest.fixture
def _no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "DISTRIBUTION", "no-such-package")
    monkeypatch.setattr(perceptual, "DISTRIBUTION", "no-such-package")


@pytest.mark.usefixtures("_no_packages")
def test_a_judge_that_is_missing_is_named_and_the_others_go_on(parts: Parts) -> None:
    tokens: list[int] = []
    found = judge_all(*parts, DrawingsConfig(limit=4, sampling=SAMPLING), on_token=tokens.append)
    assert found.names is None
    assert [each.judge for each in found.sets] == ["scenes"]
    assert len(found.notes) == 2
    assert "ett-tuning[perceptual]" in found.notes[0]
    assert "ett-tuning[ocr]" in found.notes[1]
    assert sum(tokens) == 4 * 256
    with pytest.raises(ModelError, match=r"No judge of drawings is there.*ett-tuning\[ocr\]"):
        judge_all(*parts, DrawingsConfig(judges=("words",), sampling=SAMPLING))
    with pytest.raises(DataError, match="split of the built-in artwork"):
        judge_all(*parts, DrawingsConfig(split="heldout"))


@pytest.mark.usefixtures("_no_packages")
def test_scenes_are_calibrated(parts: Parts) -> None:
    """Real pictures are right, all of them, and so is what a tokenizer without loss makes of them; noise is not."""
    found = judge_all(*parts, DrawingsConfig(judges=("scenes",), split="pair", limit=12, sampling=SAMPLING))
    (scenes,) = found.sets
    assert scenes.split == "heldout"
    assert scenes.rows["real"]["scenes_right"].value == scenes.rows["reconstructed"]["scenes_right"].value == 1
    assert scenes.rows["drawn"]["scenes_right"].value < 0.2
    tags = [tag for tag in TAGS if tag in scenes.rows["real"]]
    assert sum(scenes.rows["real"][tag].num_examples for tag in tags) == 12
    assert 0 < scenes.chance["scenes_right"] < 0.3
    metrics = found.metrics()
    names = [f"drawn_scenes.{tag}.drawn_scenes_right" for tag in tags]
    assert set(metrics) == {*names, *(f"{name}_of_reconstructions" for name in names)}
    assert sum(len(metrics[name].parts) for name in names) == 12
    values = json.loads(json.dumps(found.to_json()))
    assert values["scenes"]["rows"]["real"]["scenes_right"]["num_examples"] == 12


class Knowing:
    """Reads what it was shown before with its text, and nothing else."""

    def __init__(self, known: dict[bytes, str]) -> None:
        self.known = known

    def read(self, picture: PIL.Image.Image) -> str:
        return self.known.get(picture.tobytes(), "")


def test_words_are_calibrated(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    source = DrawnText("word", size=64, difficulty=0.0, kinds=("word",), characters=CHARACTERS)
    fit = parts[1].image_processor.fit
    # one of six is misread by a letter; case and spaces make no difference
    said = {
        from_array(fit(example.images[0])[0]).tobytes(): " ".join(example.metadata["text"].upper())
        for example in map(source.__getitem__, range(6))
    }
    first = next(iter(said))
    said[first] = f"{said[first]}x"
    reader: Any = Knowing(said)
    rows = judge_words(*parts, reader, "word", limit=6, sampling=SAMPLING).rows
    for who in ("real", "reconstructed"):
        assert rows[who]["words_read"].value == pytest.approx(5 / 6)
        letters = sum(len(source[i].metadata["text"]) for i in range(6))
        assert rows[who]["reading_errors"].value == pytest.approx(1 / letters)
    assert (rows["drawn"]["words_read"].value, rows["drawn"]["reading_errors"].value) == (0, 1)
    monkeypatch.setattr(report_module, "Reader", lambda: reader)
    config = DrawingsConfig(judges=("words",), split="pair", limit=6, sampling=SAMPLING)
    metrics = judge_all(*parts, config).metrics()
    assert metrics["drawn_text.drawn_words_read"].value == 0
    assert metrics["drawn_text.drawn_words_read_of_reconstructions"].value == pytest.approx(5 / 6)


def test_the_real_judge_reads_the_words() -> None:
    pytest.importorskip("rapidocr_onnxruntime")
    source = DrawnText("validation", size=64, difficulty=0.0, kinds=("word",), characters=CHARACTERS)
    reader = reading.Reader()
    right = [reader.read(example.images[0]).lower() == example.metadata["text"].lower() for example in list(source)[:8]]
    assert sum(right) >= 4


def test_prompts_in_geneval_s_format_and_the_folder_of_their_drawings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "prompts" / "scenes.jsonl", tmp_path / "drawn"
    assert main(["t2i", "scenes", str(file), "--split", "heldout", "--num", "7"]) == 0
    assert "7 prompts of split 'heldout'" in capsys.readouterr().out
    written = file.read_bytes()
    assert main(["t2i", "scenes", str(file), "--num", "3"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert file.read_bytes() == written
    found = layout("geneval", file)
    lines = [json.loads(text) for _, text in found.texts]
    assert len({each["prompt"] for each in lines}) == 7
    source = DrawnScenes("heldout", length=100)
    assert lines[0] == source.facts(0)
    pictures = {example.metadata["prompt"]: example.images[0] for example in source}
    for (place, text), each in zip(found.texts, lines, strict=True):
        (folder / place).parent.joinpath("samples").mkdir(parents=True)
        (folder / place).write_text(text, encoding="utf-8")
        pictures[each["prompt"]].save(folder / place.parent / "samples" / "0000.png")
    metrics = judge_scene_folder(folder)
    assert (metrics["scenes_right"].value, metrics["scenes_right"].num_examples) == (1, 7)
    paint([Thing("circle", "red", (0.5, 0.5), 0.01)], 64).save(folder / "00000" / "samples" / "0000.png")
    assert main(["t2i", "scenes", str(folder)]) == 0
    assert f"{6 / 7:.4f}" in capsys.readouterr().out
    for name, said in (("samples/0000.png", "samples holds 0 pictures"), ("metadata.jsonl", "has no metadata")):
        content = (folder / "00005" / name).read_bytes()
        (folder / "00005" / name).unlink()
        with pytest.raises(DataError, match=rf"00005.*{said}"):
            judge_scene_folder(folder)
        (folder / "00005" / name).write_bytes(content)
    bench = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    for text, said in (('{"tag": "single_object"}', "no scene of shapes"), (json.dumps(bench), "ring"), ("{", "read")):
        (folder / "00003" / "metadata.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=rf"00003.*{said}"):
            judge_scene_folder(folder)
    with pytest.raises(DataError, match="holds no pictures"):
        judge_scene_folder(tmp_path / "prompts")
    assert write_prompts(file, "validation", 10_000, overwrite=True) < 512
    with pytest.raises(DataError, match="holds no pictures"):
        judge_scene_folder(tmp_path / "nowhere")


def test_settings_are_checked() -> None:
    for bad in ({"judges": ()}, {"limit": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match="not possible"):
            DrawingsConfig(**bad)  # type: ignore[arg-type]  # on purpose

"""Folders for public text-to-image scorers: what is written, that nothing is drawn twice, and what the check finds."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ett.cli import main
from ett.errors import DataError, ModelError
from ett.evaluate.t2i import write as write_module
from ett.evaluate.t2i.check import check_benchmark
from ett.evaluate.t2i.layouts import layout
from ett.evaluate.t2i.write import manifest_path, write_benchmark
from ett.generate.drawings import manifest_facts
from ett.images import load_image
from ett.model import EttForConditionalGeneration, EttProcessor
from ett.model.image_sampling import ImageSampling
from tests.model.test_drawing import build

SAMPLING = ImageSampling(guidance=1.0)
FACTS = manifest_facts("toy", "hash", SAMPLING, (8, 8), None)
KINDS = ("geneval", "dpg", "t2i-compbench")


@pytest.fixture(scope="module")
def parts() -> tuple[EttForConditionalGeneration, EttProcessor]:
    """A toy model of 2 x 2 tokens a picture."""
    return build(image_size=8)


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[[str], Path]:
    """Two prompts in the form of each benchmark."""

    def write(kind: str) -> Path:
        if kind == "geneval":
            path = tmp_path / "evaluation_metadata.jsonl"
            lines = [
                {"tag": "single_object", "include": [{"class": name}], "prompt": f"a {name}"} for name in ("cat", "dog")
            ]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        elif kind == "dpg":
            path = tmp_path / "prompts"
            path.mkdir()
            for name in ("COCOval2014000000081336", "whoops12"):
                (path / f"{name}.txt").write_text(f"A picture of\n{name}.\n", encoding="utf-8")
        else:
            path = tmp_path / "color_val.txt"
            path.write_text("a green bench and a blue bowl\na red car\n", encoding="utf-8")
        return path

    return write


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def scorer_reads(kind: str, out: Path) -> list[tuple[str, np.ndarray]]:
    """(prompt, picture) as each public scorer goes through its folder; written from their formats, not from our layouts."""
    found: list[tuple[str, np.ndarray]] = []
    if kind == "geneval":
        for folder in sorted(out.iterdir()):
            assert re.fullmatch(r"\d{5}", folder.name)
            (line,) = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
            samples = sorted((folder / "samples").iterdir())
            assert [path.name for path in samples] == [f"{i:04d}.png" for i in range(4)]
            found += [(json.loads(line)["prompt"], np.asarray(load_image(path))) for path in samples]
    elif kind == "dpg":
        for path in sorted(out.iterdir()):
            whole = np.asarray(load_image(path))
            half = whole.shape[0] // 2
            quarters = [whole[r : r + half, c : c + half] for r in (0, half) for c in (0, half)]
            found += [(path.stem, quarter) for quarter in quarters]
    else:
        for number, path in enumerate(sorted((out / "samples").iterdir(), key=lambda p: p.stem[-6:])):
            prompt, separator, identity = path.stem.rpartition("_")
            assert separator
            assert int(identity) == number
            found.append((prompt, np.asarray(load_image(path))))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_scorers_read(
    kind: str, parts: tuple[EttForConditionalGeneration, EttProcessor], prompts: Callable[[str], Path], tmp_path: Path
) -> None:
    found, out = layout(kind, prompts(kind)), tmp_path / "out"
    drawn = write_benchmark(*parts, found, out, FACTS, SAMPLING, seed=3, batch_size=8)
    read = scorer_reads(kind, out)
    each = {"geneval": 4, "dpg": 4, "t2i-compbench": 10}[kind]
    assert drawn == len(found.units)
    assert len(read) == 2 * each
    assert all(picture.shape == (8, 8, 3) and picture.dtype == np.uint8 for _, picture in read)
    expected = {
        "geneval": ["a cat", "a dog"],
        "dpg": ["COCOval2014000000081336", "whoops12"],
        "t2i-compbench": ["a green bench and a blue bowl", "a red car"],
    }
    assert [prompt for prompt, _ in read] == [prompt for prompt in expected[kind] for _ in range(each)]
    assert check_benchmark(found, out) == []
    # seeds differ within a prompt, and the manifest beside the folder tells them
    assert len({picture.tobytes() for _, picture in read[:each]}) > 1
    manifest = json.loads(manifest_path(out).read_text(encoding="utf-8"))
    assert [seed for image in manifest["images"] for seed in image["seeds"]] == [*range(3, 3 + each)] * 2
    assert manifest["checkpoint_sha256"] == "hash"
    if kind == "dpg":
        assert manifest["images"][0]["prompt"] == "A picture of COCOval2014000000081336."
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(("out", ".out"))} == {
        "out",
        "out.manifest.json",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_interruptions_give_the_same_folder(
    kind: str,
    parts: tuple[EttForConditionalGeneration, EttProcessor],
    prompts: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = layout(kind, prompts(kind))

    def write(out: Path, **options: Any) -> int:
        return write_benchmark(*parts, found, out, FACTS, SAMPLING, batch_size=1, **options)

    whole = write(tmp_path / "whole")
    # the first of two ranks is killed at its second file (of dpg it has but one), and started again
    plain, published, fatal = write_module._publish, 0, 1 if kind == "dpg" else 2

    def dying(part: Path, target: Path) -> None:
        nonlocal published
        if target.suffix == ".png":
            published += 1
            if published == fatal:
                raise KeyboardInterrupt
        plain(part, target)

    with monkeypatch.context() as patch:
        patch.setattr(write_module, "_publish", dying)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "parts", rank=0, world_size=2)
    second = write(tmp_path / "parts", rank=1, world_size=2)
    problems = check_benchmark(found, tmp_path / "parts")
    assert len(problems) == whole - (fatal - 1) - second
    assert all(problem.endswith("is missing") for problem in problems)
    first = write(tmp_path / "parts", rank=0, world_size=2)
    assert fatal - 1 + first + second == whole
    assert write(tmp_path / "parts") == 0
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_other_settings_are_not_mixed_into_a_folder(
    parts: tuple[EttForConditionalGeneration, EttProcessor], prompts: Callable[[str], Path], tmp_path: Path
) -> None:
    found, out = layout("dpg", prompts("dpg")), tmp_path / "out"
    write_benchmark(*parts, found, out, FACTS, SAMPLING)
    with pytest.raises(DataError, match="another images"):
        write_benchmark(*parts, found, out, FACTS, SAMPLING, seed=1)
    with pytest.raises(DataError, match="another checkpoint_sha256"):
        write_benchmark(*parts, found, out, {**FACTS, "checkpoint_sha256": "x"}, SAMPLING)
    with pytest.raises(DataError, match="another images"):
        write_benchmark(*parts, found, out, FACTS, SAMPLING, rewrite=lambda prompt: f"{prompt} Big.")
    picture = out / "whoops12.png"
    picture.write_bytes(picture.read_bytes()[:100])
    with pytest.raises(DataError, match="is not a whole PNG"):
        write_benchmark(*parts, found, out, FACTS, SAMPLING)
    picture.unlink()
    assert write_benchmark(*parts, found, out, FACTS, SAMPLING) == 1


def test_a_name_that_the_scorer_of_dpg_would_cut(tmp_path: Path) -> None:
    (tmp_path / "a.cat.txt").write_text("a cat", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.cat\.txt has a dot in its name"):
        layout("dpg", tmp_path)


def test_prompts_that_are_sampled_are_rewritten_once(
    parts: tuple[EttForConditionalGeneration, EttProcessor],
    prompts: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rewriter that never says the same twice; of three ranks the second comes first, and the first is interrupted."""
    found, out = layout("geneval", prompts("geneval")), tmp_path / "out"
    said: list[str] = []

    def sampled(prompt: str) -> str:
        said.append(f"{prompt}, take {len(said)}")
        return said[-1]

    def write(**options: Any) -> int:
        return write_benchmark(*parts, found, out, FACTS, SAMPLING, rewrite=sampled, **options)

    monkeypatch.setattr(write_module, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(write_module, "POLL_SECONDS", 0.01)
    with pytest.raises(DataError, match="the first rank"):
        write(rank=1, world_size=3)
    with monkeypatch.context() as patch:
        patch.setattr(write_module, "_publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(rank=0, world_size=3)
    assert said == ["a cat, take 0", "a dog, take 1"]
    before = manifest_path(out).read_bytes()
    assert sum(write(rank=rank, world_size=3) for rank in (1, 2, 0)) == len(found.units)
    assert write() == 0
    assert len(said) == 2
    assert manifest_path(out).read_bytes() == before
    assert check_benchmark(found, out) == []
    assert {each["rewritten_prompt"] for each in json.loads(before)["images"]} == set(said)
    # what was drawn is what the manifest says
    again = tmp_path / "again"
    write_benchmark(*parts, found, again, FACTS, SAMPLING, rewrite=dict(zip(("a cat", "a dog"), said, strict=True)).get)
    assert files_of(again) == files_of(out)
    with pytest.raises(DataError, match="another images"):
        write_benchmark(*parts, found, out, FACTS, SAMPLING)
    with pytest.raises(DataError, match="another images"):
        write(seed=1)
    manifest_path(out).write_text("{}")
    with pytest.raises(DataError, match="is no manifest of a benchmark"):
        write()


def interrupted(part: Path, target: Path) -> None:
    if target.suffix == ".png":
        raise KeyboardInterrupt
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)


def test_what_cannot_be_drawn_is_said_before_the_first_picture(
    parts: tuple[EttForConditionalGeneration, EttProcessor], prompts: Callable[[str], Path], tmp_path: Path
) -> None:
    found, out = layout("geneval", prompts("geneval")), tmp_path / "out"

    def long(prompt: str) -> str:
        return prompt * (500 if prompt == "a dog" else 1)

    with pytest.raises(
        ModelError, match=r"00001/samples/0000\.png: the prompt 'a doga dog.*\.\.\.' takes \d+ positions"
    ):
        write_benchmark(*parts, found, out, FACTS, SAMPLING, rewrite=long)
    assert list(out.iterdir()) == []
    assert not manifest_path(out).exists()
    for silent in (None, 3):
        with pytest.raises(DataError, match=f"returned {silent} for the prompt 'a cat'"):
            write_benchmark(*parts, found, out, FACTS, SAMPLING, rewrite=lambda _, silent=silent: silent)
    wide = build(image_size=(8, 16))
    with pytest.raises(ModelError, match="8 x 16 pixels, and the scorer of dpg"):
        write_benchmark(*wide, layout("dpg", prompts("dpg")), out, FACTS, SAMPLING)


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    """JSON may hold what str.splitlines takes for the end of a line."""
    prompt = "a cat\u2028and\u0085a dog"
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    text = json.dumps({"prompt": prompt}, ensure_ascii=False)
    file.write_bytes(f"{text}\r\n\n{text}\n".encode())
    found = layout("geneval", file)
    assert [unit.prompt for unit in found.units] == [prompt] * 8
    for unit in found.units:
        (out / unit.file).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8)).save(out / unit.file)
    for place, line in found.texts:
        (out / place).write_text(line + "\n", encoding="utf-8")
    assert check_benchmark(found, out) == []
    plain = tmp_path / "plain.txt"
    plain.write_text("a\x0ccat\na dog\n")
    assert [unit.prompt for unit in layout("t2i-compbench", plain).units] == ["a\x0ccat"] * 10 + ["a dog"] * 10


def test_a_scorer_that_crops_knows_one_size(prompts: Callable[[str], Path], tmp_path: Path) -> None:
    folder = prompts("dpg")
    (folder / "third.txt").write_text("third", encoding="utf-8")
    dpg, out = layout("dpg", folder), tmp_path / "dpg"
    out.mkdir()
    for size, unit in zip(((8, 8), (16, 16), (8, 8)), dpg.units, strict=True):
        PIL.Image.new("RGB", size).save(out / unit.file)
    assert check_benchmark(dpg, out) == ["third.png is 16 x 16 pixels, but most files here are 8 x 8"]
    PIL.Image.new("RGB", (16, 8)).save(out / "third.png")
    assert check_benchmark(dpg, out) == ["third.png is 16 x 8 pixels, which is no grid of squares"]


def test_the_check_names_every_fault(prompts: Callable[[str], Path], tmp_path: Path) -> None:
    image = PIL.Image.new("RGB", (8, 8))
    geneval = layout("geneval", prompts("geneval"))
    out = tmp_path / "geneval"
    for unit in geneval.units:
        (out / unit.file).parent.mkdir(parents=True, exist_ok=True)
        image.save(out / unit.file)
    for file, text in geneval.texts:
        (out / file).write_text(text, encoding="utf-8")
    assert check_benchmark(geneval, out) == []
    (out / "00000/samples/0001.png").unlink()
    image.convert("RGBA").save(out / "00000/samples/0002.png")
    image.save(out / "00001/samples/0004.png")
    (out / "00001/metadata.jsonl").write_text((out / "00000/metadata.jsonl").read_text())
    assert check_benchmark(geneval, out) == [
        "00000/samples/0001.png is missing",
        "00000/samples/0002.png has mode RGBA instead of RGB",
        "00001/metadata.jsonl is not its line of the prompt file",
        "00001/samples/0004.png does not belong here",
    ]
    dpg = layout("dpg", prompts("dpg"))
    folder = tmp_path / "dpg"
    folder.mkdir()
    PIL.Image.new("RGB", (9, 8)).save(folder / "whoops12.png")
    (folder / "manifest.json").write_text("{}")
    assert check_benchmark(dpg, folder) == [
        "COCOval2014000000081336.png is missing",
        "whoops12.png is 9 x 8 pixels, which does not divide into a 2 x 2 grid",
        "manifest.json does not belong here",
    ]
    with pytest.raises(DataError, match="There is no folder"):
        check_benchmark(dpg, tmp_path / "none")


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("geneval", "{", "line 1 is not JSON"),
        ("geneval", '{"prompt": 3}', "a text under 'prompt'"),
        ("dpg", "x", "is not a folder"),
        ("t2i-compbench", "a car\na / b", "line 2 contains a slash"),
        ("t2i-compbench", "a car\na snake_case sign", "line 2 contains an underscore"),
        ("t2i-compbench", "x" * 250, "too long for a file's name"),
        ("t2i-compbench", " \n", "holds no prompt"),
        ("coco", "x", "Unknown text-to-image benchmark"),
    ],
)
def test_prompts_that_no_scorer_has(tmp_path: Path, kind: str, text: str, said: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        layout(kind, path)
    with pytest.raises(DataError):
        layout("geneval", tmp_path / "none.jsonl")


def longer(prompt: str) -> str:
    """A rewriter for the command line."""
    return f"{prompt}, in colour"


def test_a_rewriter_of_the_working_folder(tmp_path: Path) -> None:
    """The installed script has no working folder among its places of modules; a missing model ends it after the import."""
    (tmp_path / "my_prompts.py").write_text("print('imported')\ndef longer(prompt):\n    return prompt + '!'\n")
    script = shutil.which("ett", path=str(Path(sys.executable).parent))
    command = [script] if script else [sys.executable, "-I", "-m", "ett.cli"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [*command, "draw", "nowhere", "a cat", "--out", "out", "--rewrite", "my_prompts:longer"]
    ended = subprocess.run(
        words, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2
    assert ended.stdout == "imported\n"
    assert "nowhere" in ended.stderr
    assert "cannot be had" not in ended.stderr


def test_the_command_line(
    parts: tuple[EttForConditionalGeneration, EttProcessor],
    prompts: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    for part in parts:
        part.save_pretrained(folder)
    file, out = tmp_path / "prompts.txt", tmp_path / "drawn"
    file.write_text("a dog\n", encoding="utf-8")
    words = ["draw", str(folder), "a cat", "--prompts", str(file), "--out", str(out), "--num", "2", "--seed", "5"]
    rewrite = ["--rewrite", "tests.evaluate.test_t2i:longer", "--guidance-schedule", "cosine"]
    places = list(sys.path)
    assert main([*words, *rewrite]) == 0
    assert "'a cat, in colour'  seed 5" in capsys.readouterr().out
    before = files_of(out)
    assert len(before) == 4 + 2
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert [(image["prompt"], image["rewritten_prompt"], image["seeds"]) for image in manifest["images"]] == [
        ("a cat", "a cat, in colour", [5]),
        ("a cat", "a cat, in colour", [6]),
        ("a dog", "a dog, in colour", [5]),
        ("a dog", "a dog, in colour", [6]),
    ]
    assert main([*words, *rewrite]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, *rewrite, "--overwrite"]) == 0
    assert files_of(out) == before
    assert sys.path == places
    long = tmp_path / "long.txt"
    long.write_text("a" * 9999, encoding="utf-8")
    for bad, said in (
        (["--size", "a"], "is not a size"),
        (["--size", "9x8"], "do not divide"),
        (["--top-p", "2"], "top_p"),
        (["--rewrite", "nowhere:f"], "cannot be had"),
        (["--rewrite", "json"], "MODULE:FUNCTION"),
        (["--seed", "-1"], "must be 0 or more"),
        (["--guidance", "inf"], "finite"),
        (["--prompts", str(long)], "positions"),
    ):
        assert main(["draw", str(folder), "a cat", "--out", str(tmp_path / "bad"), *bad]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
    assert main(["draw", "reader_64px", "a cat", "--out", str(tmp_path / "bad")]) == 2

    given = str(prompts("geneval"))
    target = str(tmp_path / "scored")
    assert main(["t2i", "geneval", str(folder), "--prompts", given, "--out", target, "--guidance", "1"]) == 0
    assert "8 files drawn" in capsys.readouterr().out
    assert main(["t2i", "check", "geneval", target, "--prompts", given]) == 0
    (Path(target) / "00001/samples/0003.png").unlink()
    assert main(["t2i", "check", "geneval", target, "--prompts", given]) == 2
    assert "00001/samples/0003.png is missing" in capsys.readouterr().out

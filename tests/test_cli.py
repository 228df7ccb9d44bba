"""The command line as a user meets it: examples in the help, one clear message and exit code 2 for bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml
from safetensors.torch import load_file, save_file

from ett.cli import build_parser, main
from ett.images import load_image
from ett.train.log import read_log
from tests.conftest import CommandLine


@pytest.fixture
def recipe(toy_recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toy_recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ett train` leaves; to be read alone."""
    out = tmp_path_factory.mktemp("cli") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["train", str(toy_run / "recipe.yaml"), "--out", str(out)]) == 0
    assert said.getvalue().strip() == str(out / "stages" / "3-chat")
    return out


def bomb(path: Path) -> Path:
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0" * 64
    )
    return path


def test_every_command_shows_an_example() -> None:
    (commands,) = [a for a in build_parser()._actions if isinstance(a.choices, dict)]
    assert set(commands.choices) >= {"train", "evaluate", "chat", "reconstruct", "tokenize", "report", "demo"}  # type: ignore[arg-type]
    for name, sub in commands.choices.items():  # type: ignore[union-attr]
        assert f"example:\n  ett {name}" in sub.format_help()


def test_help_is_immediate() -> None:
    """No heavy import: what makes it slow is torch, so torch must not be there."""
    code = "import sys, ett.cli; ett.cli.build_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_model_from_training_to_answers(trained: Path, pictures: Path, run: CommandLine, tmp_path: Path) -> None:
    odd = tmp_path / "odd.tif"
    PIL.Image.fromarray(np.full((7, 300, 4), 90, dtype=np.uint8), mode="CMYK").save(odd)
    code, out, _ = run("chat", trained, odd, "--max-new-tokens", 4, "What is this?")
    assert code == 0
    assert out.endswith("\n")
    code, out, _ = run("tokenize", trained, odd, "--json")
    grid = json.loads(out)
    assert code == 0
    assert np.array(grid["indices"]).shape == (8, 8)
    for model in (trained, trained / "stages" / "0-tokenizer"):
        code, out, _ = run("reconstruct", model, odd, pictures / "3.png", "--out", tmp_path / "rec")
        assert code == 0
        assert load_image(tmp_path / "rec" / "odd.png").size == (32, 1)
        assert load_image(tmp_path / "rec" / "3.png").size == (32, 20)
        assert out.count("PSNR") == 2
    figures = tmp_path / "figures.json"
    code, out, _ = run(
        "evaluate", trained, "--data", pictures / "manifest.jsonl", "--json", figures, "--max-new-tokens", 8
    )
    assert code == 0
    result = json.loads(figures.read_text(encoding="utf-8"))
    assert {"caption_loss", "exact_match", "character_error_rate", "psnr", "ssim"} <= set(result["metrics"])
    assert result["metrics"]["psnr"]["num_examples"] == 12
    assert [p["id"] for p in result["predictions"]] == [f"p{i}" for i in range(12)]
    assert all(
        p["reference"] == f"number {i}" and isinstance(p["prediction"], str)
        for i, p in enumerate(result["predictions"])
    )
    code, out, _ = run("report", trained)
    assert code == 0
    assert Path(out.strip()).read_text(encoding="utf-8").startswith("<!doctype html>")


def test_bad_input_ends_in_one_message(
    trained: Path, recipe: Path, pictures: Path, run: CommandLine, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((pictures / "0.png").read_bytes()[:60])
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"id": 1,\n', encoding="utf-8")
    line = {"id": "a", "conversations": [{"from": "human", "value": "<image>"}]}
    (tmp_path / "lacks.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    other = Path(shutil.copytree(trained / "stages" / "3-chat", tmp_path / "other"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["vision_tokenizer"]["codebook_size"] = 65
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, turns in (
        ("silent", [{"from": "human", "value": "<image>"}]),
        ("words", [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]),
    ):
        line = {"id": "a", "conversations": turns} | ({"image": "0.png"} if name == "silent" else {})
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    shutil.copy(pictures / "0.png", tmp_path / "0.png")
    truncated, emptied, halved = (
        Path(shutil.copytree(trained / "stages" / "3-chat", tmp_path / name))
        for name in ("truncated", "emptied", "halved")
    )
    alone = Path(shutil.copytree(trained / "stages" / "3-chat", tmp_path / "alone"))
    (alone / "processor_config.json").unlink()
    with (truncated / "model.safetensors").open("r+b") as file:
        file.truncate(20000)
    (emptied / "tokenizer.json").write_text("{}", encoding="utf-8")
    tensors = load_file(halved / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if not n.startswith("vision_tokenizer.decoder")},
        halved / "model.safetensors",
        metadata={"format": "pt"},
    )
    cases: list[tuple[tuple[object, ...], str]] = [
        (("train", "nowhere.yaml"), "There is no recipe 'nowhere.yaml'"),
        (("train", recipe, "stages.semantic.stepz=3", "--out", tmp_path / "x"), "Did you mean"),
        (("train", recipe, "stages.semantic.steps=-3", "--out", tmp_path / "x"), "steps = -3"),
        (("train", recipe, "model.image_size=33", "--out", tmp_path / "x"), "multiple of 8"),
        (("train", recipe, "stages.0.batch_size=3", "--out", tmp_path / "x"), "batch_size = 3 does not divide"),
        (("train", recipe, "data.0.path=missing.jsonl", "--out", tmp_path / "x"), "missing.jsonl"),
        (("train", recipe, "model.vision_tokenizer={path: nowhere}", "--out", tmp_path / "x"), "'nowhere'"),
        (("train", recipe, "--out", trained), "--resume"),
        (("train", recipe, "--out", recipe / "x"), "cannot be written"),
        (("train", recipe, "model.vision_tokenizer={path: 5}", "--out", tmp_path / "x"), "no folder 5"),
        (("train", recipe, "model.vision_tokenizer.tokenizer_type=[a]", "--out", tmp_path / "x"), "tokenizer_type"),
        (("train", recipe, "trackers=[foo]", "--out", tmp_path / "x"), "trackers"),
        (("train", recipe, "model.language_model={path: /nonexistent}", "--out", tmp_path / "x"), "/nonexistent"),
        (
            ("train", recipe, "model.language_model={path: /nonexistent}", "--out", trained, "--overwrite"),
            "/nonexistent",
        ),
        (
            ("train", recipe, "model.language_model.config.num_attention_heads=0", "--out", tmp_path / "x"),
            "language_model",
        ),
        (("train", recipe, "model.language_model.config.hidden_size=abc", "--out", tmp_path / "x"), "language_model"),
        (("train", recipe, "model.language_model.config.vocab_size=100", "--out", tmp_path / "x"), "language_model"),
        (("train", recipe, "model.chat_template=plian", "--out", tmp_path / "x"), "Did you mean 'plain'"),
        (("train", recipe, "model.chat_template={{ bad", "--out", tmp_path / "x"), "chat_template"),
        (("train", recipe, "model.lora={r: 2, target_modules: [nothing]}", "--out", tmp_path / "x"), "LoRA"),
        (
            (
                "train",
                recipe,
                "data.0.path=" + str(tmp_path / "silent.jsonl"),
                "stages=[{stage: align, steps: 1, batch_size: 2}]",
                "--out",
                tmp_path / "x",
            ),
            "has an answer",
        ),
        (("train", recipe, "data.0.path=" + str(tmp_path / "words.jsonl"), "--out", tmp_path / "x"), "has a picture"),
        (("chat", truncated, pictures / "0.png"), "cannot be loaded"),
        (("chat", emptied, pictures / "0.png"), "cannot be loaded"),
        (("evaluate", halved), "or not all of them"),
        (("evaluate", trained, "--data", pictures / "manifest.jsonl", "--split", "pair"), "not both"),
        (("chat", alone, pictures / "0.png"), "has no processor_config.json"),
        (("chat", trained, tmp_path / "no.png"), "no.png"),
        (("chat", trained, broken), "broken.png"),
        (("chat", trained, bomb(tmp_path / "bomb.png")), "bomb.png"),
        (("chat", trained / "stages" / "0-tokenizer", pictures / "0.png"), "needs a model with a language model"),
        (("chat", tmp_path / "nothing", pictures / "0.png"), "nothing"),
        (("reconstruct", trained, broken, "--out", tmp_path / "r"), "broken.png"),
        (("evaluate", trained, "--data", tmp_path / "empty.jsonl"), "empty.jsonl"),
        (("evaluate", trained, "--data", tmp_path / "bad.jsonl"), "bad.jsonl:1"),
        (("evaluate", trained, "--data", tmp_path / "lacks.jsonl"), "lacks.jsonl:1"),
        (("evaluate", trained), "evaluation.data="),
        (("evaluate", trained, "--split", "validation", "--tasks", "anwsers"), "Did you mean 'answers'"),
        (("evaluate", trained, "--split", "test"), "validation"),
        (("evaluate", other), "another"),
        (("report", tmp_path / "nothing"), "nothing"),
    ]
    for words, message in cases:
        code, out, err = run(*words)
        assert code == 2, (words, err)
        assert message in err, (words, err)
        assert "Traceback" not in err
        assert err.startswith("ett: "), err
        assert len(err.strip().splitlines()) == 1, err
        assert out == ""
    assert not (tmp_path / "x").exists(), "nothing is left behind by a refused run"
    assert run("chat", trained, pictures / "0.png", "--max-new-tokens", 2)[0] == 0, (
        "the run that was there is still there"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_from_outside(number: signal.Signals, toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """They save, say how to go on and end with the usual code, whichever processes they hit."""
    toy_recipe["stages"] = [dict(toy_recipe["stages"][2], steps=5000, checkpoint_every=None)]
    toy_recipe["num_workers"] = 1
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toy_recipe), encoding="utf-8")
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "ett.cli", "train", str(path), "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not ((out / "log.jsonl").exists() and len(read_log(out / "log.jsonl")) > 3):
        time.sleep(0.05)
    # both reach the loader's worker too: Ctrl-C in a terminal, a scheduler's SIGTERM to the job
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"ett train {path} --out {out} --resume" in err
    assert "Traceback" not in err
    assert list((out / "checkpoints").glob("semantic-*"))

"""Another model's vision tokenizer under a language model, by the tool that writes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from ett.model.loading import load_model
from tests.conftest import TOKENIZER
from tests.model.test_drawing import build

TOOL = Path(__file__).parents[2] / "tools" / "swap_tokenizer.py"


def swapped(*words: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, words)], check=False, capture_output=True, text=True)


def test_the_second_models_tokenizer_under_the_first_ones_language_model(tmp_path: Path) -> None:
    first, second, larger, out = (tmp_path / name for name in ("first", "second", "larger", "out"))
    for step, (folder, codes) in enumerate(((first, 64), (second, 64), (larger, 128))):
        model, processor = build(vision_tokenizer={**TOKENIZER, "codebook_size": codes})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.full_like(parameter, 0.001 * step))
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    done = swapped(first, second, out)
    assert done.returncode == 0, done.stderr
    found = load_model(out)[0].state_dict()
    own, brought = (load_model(folder)[0].state_dict() for folder in (first, second))
    differing = {name.split(".")[0] for name, tensor in own.items() if not torch.equal(tensor, brought[name])}
    assert differing >= {"vision_tokenizer", "language_model", "projector"}
    for name, tensor in found.items():
        expected = brought if name.startswith("vision_tokenizer.") else own
        assert torch.equal(tensor, expected[name]), name
    assert "is there already" in swapped(first, second, out).stderr
    refused = swapped(first, larger, tmp_path / "none")
    assert refused.returncode != 0
    assert "codebook_size is 64" in refused.stderr
    assert not (tmp_path / "none").exists()

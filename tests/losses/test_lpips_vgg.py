"""LPIPS by the packages' own calls: a frozen distance with a gradient, in training and where it is missing."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from ett.config import from_mapping
from ett.errors import ModelError
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run
from ett.losses.lpips_vgg import PACKAGES, LpipsVGG, lpips_is_installed
from ett.losses.perceptual import load_perceptual
from ett.train.log import read_log
from tests.losses.lpips_stand_in import install


def pictures(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32) * 2 - 1


def test_a_distance_with_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert lpips_is_installed()
    distance = load_perceptual("lpips_vgg")
    assert isinstance(distance, LpipsVGG)
    first, second = pictures().requires_grad_(), pictures().requires_grad_()
    found = distance(first, second)
    assert found.shape == (3,)
    assert found.dtype == torch.float32
    assert torch.equal(found, distance.network(first, second).flatten())
    assert distance(first, first).tolist() == [0.0] * 3
    found.sum().backward()
    assert first.grad is not None
    assert (first.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert second.grad is None
    assert all(not p.requires_grad and p.grad is None for p in distance.parameters())


def test_it_stays_frozen_and_precise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training mode would bring the package's dropout; autocast would round."""
    install(monkeypatch)
    distance = LpipsVGG()
    pair = pictures(), pictures()
    expected = distance(*pair)
    assert distance.train() is distance
    assert not any(part.training for part in distance.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distance(*pair), expected)


def test_loading_draws_no_random_numbers_and_can_train(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    before = torch.get_rng_state()
    with torch.inference_mode():
        distance = LpipsVGG()
    assert torch.equal(torch.get_rng_state(), before)
    first = pictures(1).requires_grad_()
    distance(first, pictures(1)).sum().backward()
    assert first.grad is not None


def test_impossible_pictures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    distance = LpipsVGG()
    for first, second in (((1, 3, 32, 32), (1, 3, 32, 16)), ((1, 1, 32, 32),) * 2, ((1, 3, 8, 32),) * 2):
        with pytest.raises(ValueError, match=r"cannot be compared.*at least 16 pixels"):
            distance(torch.zeros(first), torch.zeros(second))


@pytest.mark.parametrize("stage", ["tokenizer", "semantic"])
def test_a_stage_trains_on_it(
    stage: str, toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The term is logged by its name, reaches the encoder, and changes the weights."""
    install(monkeypatch)
    weights = {}
    for weight in (0.0, 1.0):
        own = {
            "stage": stage,
            "steps": 1,
            "batch_size": 4,
            "losses": {"perceptual": "lpips_vgg", "perceptual_weight": weight},
        }
        run = tmp_path / str(weight)
        Run(from_mapping(Recipe, {**toy_recipe, "stages": [own]}), run).train()
        weights[weight] = (run / "stages" / f"0-{stage}" / "model.safetensors").read_bytes()
    events = read_log(tmp_path / "1.0" / "log.jsonl")
    (step,) = [e["losses"] for e in events if e["event"] == "step"]
    assert step["perceptual_loss"] > 0
    (health,) = [e["gradient_norms"] for e in events if e["event"] == "health"]
    assert health["encoder"]["perceptual_loss"] > 0
    assert weights[0.0] != weights[1.0]


def _unreachable(**_: Any) -> Any:
    raise OSError("no route to the weights")


def _of_another_hash(**_: Any) -> Any:
    raise RuntimeError("invalid hash value")


@pytest.mark.parametrize(("vgg16", "reason"), [(_unreachable, "no route"), (_of_another_hash, "invalid hash")])
def test_weights_that_cannot_be_had(vgg16: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, vgg16=vgg16)
    with pytest.raises(ModelError, match=rf"LPIPS is not available here \({reason}.*VGG-16 weights"):
        LpipsVGG()


@pytest.mark.parametrize("missing", PACKAGES)
def test_without_a_package(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, missing, None)
    assert not lpips_is_installed()
    with pytest.raises(ModelError, match=r'pip install "ett-tuning\[lpips\]".*perceptual: lite0'):
        load_perceptual("lpips_vgg")


def test_the_extra_names_the_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    names = [line.split(">=")[0] for line in project["project"]["optional-dependencies"]["lpips"]]
    assert tuple(names) == PACKAGES

"""The recipe of stage 0 for a GPU: every term of L_vq plays in toy sizes, and the plan says that it fits the card it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ett.config import from_mapping, to_mapping
from ett.experiments.plan import HARDWARE, Target, plan
from ett.experiments.recipe import SHIPPED, Recipe, load_recipe
from ett.experiments.run import Run
from ett.tokenizers import VisionTokenizer
from ett.train.inheritance import find_discriminator
from ett.train.log import read_log
from tests.losses.lpips_stand_in import install

LPIPS = [
    "stages.tokenizer.losses.perceptual=lpips_vgg",
    "stages.tokenizer.losses.perceptual_weight=1.0",
    "stages.tokenizer.losses.adversarial_weight=0.1",
    "stages.tokenizer.losses.reconstruction=l1",
    "stages.tokenizer.losses.reconstruction_weight=1.0",
]
"""What the recipe's header says to add for LPIPS."""


def shrunk(manifest: Path, *overrides: str) -> dict[str, Any]:
    """The recipe with every size made small and data that are here; which terms play, and how, stays."""
    given = to_mapping(load_recipe("tokenizer_256px", overrides))
    tokenizer = given["model"]["vision_tokenizer"]
    tokenizer |= {"channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1, "z_channels": 8, "norm_groups": 4}
    tokenizer |= {"codebook_size": 16, "codebook_dim": 4}
    given["model"]["image_size"] = 32
    given["data"] = [{"source": "manifest", "path": str(manifest)}, {**given["data"][2], "size": 32}]
    given |= {"num_workers": 0, "trackers": [], "precision": "fp32"}
    given["evaluation"] |= {"limit": 2}
    (stage,) = given["stages"]
    stage |= {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "quantize_after": 1, "log_every": 1}
    stage["discriminator"] |= {"channels": 4, "generator_start": 2}
    stage["health"] |= {"every": 1, "pictures": 2, "min_usage": 0.0}
    return given


@pytest.mark.parametrize("overrides", [[], LPIPS], ids=["lite0", "lpips_vgg"])
def test_every_term_plays(
    overrides: list[str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step before codes are placed, one with them, one that hears the discriminator."""
    install(monkeypatch)
    recipe = from_mapping(Recipe, shrunk(pictures / "manifest.jsonl", *overrides))
    Run(recipe, tmp_path / "run").train()
    first, second, third = (e["losses"] for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "step")
    game = {"discriminator_loss", "lecam_loss", "perceptual_loss", "reconstruction_loss"}
    assert set(first) - {"loss"} == game
    assert set(second) - set(first) == {"quantization_loss", "entropy_loss"}
    assert set(third) - set(second) == {"adversarial_loss"}
    assert all(torch.tensor(list(terms.values())).isfinite().all() for terms in (first, second, third))
    folder = tmp_path / "run" / "stages" / "0-tokenizer"
    assert VisionTokenizer.from_pretrained(folder).codebook_size == 16
    assert find_discriminator(folder) is not None
    (loss,) = (stage.loss_config for stage in recipe.stages)
    assert loss.perceptual == ("lpips_vgg" if overrides else "lite0")


def test_the_header_says_what_was_not_run() -> None:
    header = (SHIPPED / "tokenizer_256px.yaml").read_text(encoding="utf-8").split("name:")[0]
    assert "not trained here" in header
    for override in LPIPS:
        assert override in header
    for licence in ("CC0", "CDLA-Permissive-2.0", "CC BY 2.0", "CC BY 4.0"):
        assert licence in header


def test_a_plan_knows_the_perceptual_network(pictures: Path) -> None:
    """Its weights are read while nothing has values: they count as weights, and a step goes through them."""
    given = shrunk(pictures / "manifest.jsonl")
    given["stages"][0] |= {"batch_size": 1, "micro_batch_size": 1, "quantize_after": 0}
    given["stages"][0]["losses"]["adversarial_weight"] = 0.0
    (stage,) = plan(from_mapping(Recipe, given), Target("cpu-2core", HARDWARE["cpu-2core"]))
    assert stage.memory["weights"] > 11_000_000, "the tokenizer has a quarter of a million bytes"


@pytest.mark.slow
def test_it_fits_the_card_that_its_header_names() -> None:
    (stage,) = plan(load_recipe("tokenizer_256px"), Target("h100-80gb", HARDWARE["h100-80gb"]))
    assert stage.warning is None
    assert 50 * 2**30 < stage.peak < 75 * 2**30
    assert 20 < stage.hours < 45

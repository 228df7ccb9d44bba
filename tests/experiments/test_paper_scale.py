"""The recipe of the paper's size: its plan from real shapes, its stages in toy sizes, and both families of language models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ett.config import from_mapping, to_mapping
from ett.experiments.plan import HARDWARE, Target, plan, recipes_of
from ett.experiments.recipe import Recipe, load_recipe
from ett.experiments.run import Run, load_model
from ett.train.log import read_log
from tests.conftest import LANGUAGE_MODELS, TOKENIZER

EMU3_5 = {
    "model_type": "ett_vision_tokenizer",
    "tokenizer_type": "ibq",
    "channels": 256,
    "channel_multipliers": [1, 1, 2, 2, 4],
    "num_res_blocks": 4,
    "z_channels": 256,
    "codebook_size": 131072,
    "codebook_dim": 256,
}
"""The shape of the Emu3.5 vision tokenizer, as its `config.json` after `ett import-tokenizer` has it."""
QWEN2_5_1_5B = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
LLAMA_3_2_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
PUBLISHED = {"qwen2": 1_543_714_304, "llama": 1_235_814_400}
"""Parameters that the makers' checkpoints have, embeddings once."""
H100S = Target("h100-80gb", HARDWARE["h100-80gb"], world_size=8)


def shrunk(arm: str, manifest: Path, **model: Any) -> dict[str, Any]:
    """The recipe with every size made small, two steps a stage; what stages there are, and how they train, stays."""
    given = to_mapping(load_recipe("qwen2_5_1_5b", [f"arm={arm}"]))
    given["model"] |= {"image_size": 32, **model}
    given["data"] = [{"source": "manifest", "path": str(manifest)}]
    given |= {"num_workers": 0, "trackers": [], "precision": "fp32", "max_bad_samples": 0}
    given["evaluation"] |= {"limit": 2, "data": None}
    for stage in given["stages"]:
        stage |= {"steps": 2, "batch_size": 2, "micro_batch_size": 1, "data": None, "cached_codes": False}
        # 32 pixels are the least that three strided layers judge; the network of LPIPS is no part of this package
        stage["losses"] = stage["losses"] and {**stage["losses"], "perceptual": None}
        stage["discriminator"] |= {"channels": 4, "generator_start": 1}
        stage["health"] |= {"pictures": 2}
    return given


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_every_stage_takes_two_steps_on_toy_parts(kind: str, pictures: Path, tmp_path: Path) -> None:
    toy = {"vision_tokenizer": dict(TOKENIZER), "language_model": {"config": LANGUAGE_MODELS[kind]}}
    manifest = pictures / "manifest.jsonl"
    chat = from_mapping(Recipe, shrunk("chat", manifest, **toy))
    Run(chat, tmp_path / "chat").train()
    events = read_log(tmp_path / "chat" / "log.jsonl")
    steps = {(e["stage"], e["step"]) for e in events if e["event"] == "step"}
    assert steps == {(stage, step) for stage in ("align", "semantic", "chat") for step in (1, 2)}
    semantic = next(e["losses"] for e in events if e["event"] == "step" and (e["stage"], e["step"]) == ("semantic", 2))
    assert {"caption_loss", "reconstruction_loss", "adversarial_loss", "entropy_loss", "lecam_loss"} <= set(semantic)
    model, _ = load_model(tmp_path / "chat")
    assert model.config.text_config.model_type == kind

    given = shrunk("gen", manifest, init=str(tmp_path / "chat" / "stages" / "1-semantic"))
    given["data"][0] |= {"draws": True, "prompt": "{answer}"}
    Run(from_mapping(Recipe, given), tmp_path / "gen").train()
    drawn = [e["losses"] for e in read_log(tmp_path / "gen" / "log.jsonl") if e["event"] == "step"]
    assert len(drawn) == 2
    assert all("image_loss" in losses for losses in drawn)


@pytest.mark.slow
@pytest.mark.parametrize("config", [QWEN2_5_1_5B, LLAMA_3_2_1B], ids=lambda config: str(config["model_type"]))
def test_the_plan_knows_the_real_shapes(config: dict[str, Any], tmp_path: Path) -> None:
    """Full size from configurations alone; the words of byte-level text stand in for the tokenizer's."""
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "config.json").write_text(json.dumps(EMU3_5), encoding="utf-8")
    language_model = yaml.safe_dump({"config": config, "text_tokenizer": "bytes"}, default_flow_style=True, width=10**6)
    recipe = load_recipe(
        "qwen2_5_1_5b",
        [
            "arm=chat",
            f"model.vision_tokenizer.path={tmp_path / 'emu'}",
            f"model.language_model={language_model}",
            "model.chat_template=plain",
            # its network is no part of this package
            "stages.semantic.losses.perceptual=null",
        ],
    )
    stages = {stage.name: stage for stage in plan(recipe, H100S)}
    assert list(stages) == ["align", "semantic", "chat"]
    for stage in stages.values():
        assert stage.parameters["language_model"] == PUBLISHED[str(config["model_type"])]
        assert stage.batch[1] > 1024, "512 pixels at 16 a token are 1,024 positions"
    assert stages["align"].trainable["language_model"] == stages["align"].trainable["vision_tokenizer"] == 0
    assert stages["semantic"].trainable == stages["semantic"].parameters
    codebook = 131072 * 256
    assert stages["semantic"].parameters["vision_tokenizer"] > 4 * 100_000_000 + codebook
    assert stages["semantic"].micro_batches == 1024 // (2 * 8)
    assert stages["semantic"].peak > stages["align"].peak
    assert stages["semantic"].warning is None, "meant for 80 GB a GPU"


def test_arms_that_start_from_arms_are_planned_from_their_root(tmp_path: Path) -> None:
    (refresh,) = recipes_of("ablation", ["arm=decoder_refresh"])
    assert refresh.model.init == "reader_64px"
    (stage,) = plan(refresh, Target("cpu-2core", HARDWARE["cpu-2core"]))
    assert stage.peak > 0
    assert stage.trainable["projector"] == stage.trainable["language_model"] == 0
    given = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    own = {"model.init": None, "model.language_model": {"config": {"model_type": "llama"}}}
    given["arms"] = {"ett": {}, "fresh": {**own, "model.vision_tokenizer": {"path": "arm:ett"}}}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    (fresh,) = recipes_of(str(tmp_path / "chain.yaml"), ["arm=fresh", "seed=1"])
    assert (fresh.model.vision_tokenizer["path"], fresh.seed) == ("reader_64px", 1)

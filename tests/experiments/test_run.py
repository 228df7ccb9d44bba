"""Runs end to end on toy parts: every stage, resuming, faults, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ett.config import from_mapping, to_mapping
from ett.data.mixture import SourceConfig
from ett.errors import ModelError, RecipeError, UserError
from ett.experiments.plan.skeleton import skeleton
from ett.experiments.recipe import SHIPPED, Recipe, dump_recipe, load_recipe
from ett.experiments.run import Interrupted, Run, load_model, resolve_model_folder
from ett.model import EttForConditionalGeneration
from ett.tokenizers import VisionTokenizer
from ett.train import loop as loop_module
from ett.train.checkpoint import list_checkpoints
from ett.train.log import read_log
from tests.conftest import LANGUAGE_MODELS, Killed, killed_at


def recipe_from(given: dict[str, Any]) -> Recipe:
    return from_mapping(Recipe, given)


def digests(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.glob("stages/*/model.safetensors"))
    }


def test_all_stages_train_and_hand_over(toy_run: Path, toy_recipe: dict[str, Any]) -> None:
    out = toy_run
    assert resolve_model_folder(out) == out / "stages" / "3-chat"
    tokenizer = VisionTokenizer.from_pretrained(out / "stages" / "0-tokenizer")
    aligned, _ = load_model(out / "stages" / "1-align")
    semantic, _ = load_model(out / "stages" / "2-semantic")
    chat, processor = load_model(out)

    def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

    # stage by stage: what was frozen is bit for bit what it was, what trained is not
    assert same(tokenizer, aligned.vision_tokenizer)
    assert not same(aligned.vision_tokenizer, semantic.vision_tokenizer)
    assert not same(aligned.language_model, semantic.language_model)
    assert same(semantic.vision_tokenizer, chat.vision_tokenizer)
    assert not same(semantic.language_model, chat.language_model)
    assert processor.num_image_positions == 16
    # the resolved recipe reads back as itself
    toy_recipe["data"][0]["path"] = str(out.parent / "pictures" / "manifest.jsonl")
    assert load_recipe(out / "recipe.yaml") == recipe_from(toy_recipe)

    events = read_log(out / "log.jsonl")
    steps = [(e["stage"], e["step"]) for e in events if e["event"] == "step"]
    assert steps == [(stage, step) for stage in ("tokenizer", "align", "semantic", "chat") for step in (1, 2, 3)]
    semantic_losses = next(e for e in events if e["event"] == "step" and e["stage"] == "semantic")["losses"]
    assert set(semantic_losses) == {
        "loss", "caption_loss", "reconstruction_loss", "quantization_loss", "entropy_loss",
    }  # fmt: skip
    reach = {e["stage"]: e["caption_gradient_norms"] for e in events if e["event"] == "reach"}
    assert reach["align"]["encoder"] == 0 < reach["semantic"]["encoder"]
    assert list_checkpoints(out / "checkpoints", "chat") == []


def test_training_lowers_both_losses(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["stages"] = [
        {
            "stage": "semantic",
            "steps": 80,
            "batch_size": 12,
            "log_every": 1,
            "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
        }
    ]
    Run(recipe_from(toy_recipe), tmp_path / "run").train()
    losses = [e["losses"] for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "step"]
    for name, factor in (("caption_loss", 0.6), ("reconstruction_loss", 0.8)):
        first = sum(step[name] for step in losses[:5])
        last = sum(step[name] for step in losses[-5:])
        assert last < factor * first, name


@pytest.mark.parametrize("seed", range(3))
def test_a_crash_anywhere_then_resume_gives_the_same_weights(
    seed: int, toy_run: Path, toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Died inside a step, a save or a hand-over, again and again: the resumed run equals the uninterrupted one."""
    if seed == 1:
        for stage in (toy_recipe["stages"][0], toy_recipe["stages"][2]):
            stage["losses"] = {"adversarial_weight": 0.1}
            stage["discriminator"] = {"channels": 4, "generator_start": 1, "strided_layers": 2}
            stage["ema_decay"] = 0.9
    if seed == 2:
        toy_recipe["stages"][0]["quantize_after"] = 1
        toy_recipe["model"]["vision_tokenizer"]["similarity"] = "distance"
    recipe, reference = recipe_from(toy_recipe), toy_run if seed == 0 else tmp_path / "whole"
    if seed > 0:
        Run(recipe, reference).train()
    rng = random.Random(seed)
    calls = {"left": 0}

    def dying(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls["left"] -= 1
            if calls["left"] == 0:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    from ett.experiments import run as run_module
    from ett.train import checkpoint as checkpoint_module

    for objective in (loop_module.TokenizerObjective, loop_module.JointObjective):
        monkeypatch.setattr(objective, "forward", dying(objective.forward))
    monkeypatch.setattr(checkpoint_module, "save_file", dying(checkpoint_module.save_file))
    monkeypatch.setattr(checkpoint_module, "publish", dying(checkpoint_module.publish))
    monkeypatch.setattr(run_module, "publish", dying(run_module.publish))
    deaths = 0
    while True:
        calls["left"] = rng.randint(4, 14)
        try:
            Run(recipe, tmp_path / "killed", resume=True).train()
            break
        except Killed:
            deaths += 1
    assert deaths >= 2
    assert digests(tmp_path / "killed") == digests(reference)
    whole, killed = (read_log(run / "log.jsonl") for run in (reference, tmp_path / "killed"))

    def steps(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return [(e["stage"], e["step"], e["losses"]) for e in events if e["event"] == "step"]

    assert steps(killed) == steps(whole)


def test_kill_9_then_resume_from_the_command_line(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """The real thing: `ett train` killed at a seeded random moment, then --resume."""
    for stage in toy_recipe["stages"]:
        stage["steps"] = 8
    toy_recipe["num_workers"] = 1
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toy_recipe), encoding="utf-8")
    Run(recipe_from(toy_recipe), tmp_path / "whole").train()
    command = [sys.executable, "-m", "ett.cli", "train", str(path), "--out", str(tmp_path / "killed"), "--resume"]
    rng = random.Random(7)
    log = tmp_path / "killed" / "log.jsonl"
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = len(read_log(log)) if log.exists() else 0
        target = seen + rng.randint(3, 12)
        deadline = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and len(read_log(log)) >= target:
                break
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        assert process.poll() is None, "the run ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert finished.stdout.strip() == str(tmp_path / "killed" / "stages" / "3-chat")
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_resume(
    number: int, toy_run: Path, toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = recipe_from(toy_recipe)
    out = tmp_path / "run"
    run = Run(recipe, out)
    plain = loop_module.Stage._train_step
    taken = {"steps": 0}
    handler = signal.getsignal(number)

    def step(self: Any, batches: Any) -> Any:
        taken["steps"] += 1
        if taken["steps"] == 5:
            os.kill(os.getpid(), number)
        return plain(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.Stage, "_train_step", step)
        with pytest.raises(Interrupted) as caught:
            run.train()
    assert caught.value.signal_number == number
    assert caught.value.step == 1, "the step under way, of two micro-batches, is given up"
    assert [c.step for c in list_checkpoints(out / "checkpoints", "align")][-1] == 1
    assert signal.getsignal(number) is handler
    assert Run(recipe, out, resume=True).train() == out / "stages" / "3-chat"
    assert digests(out) == digests(toy_run)


def test_damaged_checkpoint_is_named(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = Run(recipe_from(toy_recipe), out)
    plain = loop_module.Stage.save

    def save_and_die(self: Any, *arguments: Any) -> None:
        plain(self, *arguments)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.Stage, "save", save_and_die)
        with pytest.raises(Killed):
            run.train()
    (checkpoint,) = list_checkpoints(out / "checkpoints", "tokenizer")
    weights = checkpoint.path / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ModelError, match=r"weights\.safetensors is damaged"):
        Run(recipe_from(toy_recipe), out, resume=True).train()


def test_accumulation_does_not_change_the_result(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """One micro-batch of 4 and two of 2 take the same step (entropy, a batch statistic, off)."""
    toy_recipe["stages"] = [
        {
            "stage": "semantic",
            "steps": 2,
            "batch_size": 4,
            "losses": {"entropy_weight": 0},
            "optimizer": {"learning_rate": 1e-3},
        }
    ]
    toy_recipe["model"]["language_model"]["config"]["attention_dropout"] = 0.0
    models = []
    for micro in (4, 2):
        toy_recipe["stages"][0]["micro_batch_size"] = micro
        Run(recipe_from(toy_recipe), tmp_path / str(micro)).train()
        models.append(load_model(tmp_path / str(micro))[0])
    logs = [
        [e["losses"]["caption_loss"] for e in read_log(tmp_path / m / "log.jsonl") if e["event"] == "step"]
        for m in ("4", "2")
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    for (name, a), b in zip(
        models[0].language_model.named_parameters(), models[1].language_model.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4, msg=name)


def test_a_nan_stops_before_the_step(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["stages"] = [{"stage": "semantic", "steps": 5, "batch_size": 4, "checkpoint_every": 1}]
    run = Run(recipe_from(toy_recipe), tmp_path / "run")
    plain = loop_module.JointObjective.forward
    calls = {"steps": 0}

    def poisoned(self: Any, *arguments: Any) -> Any:
        output = plain(self, *arguments)
        calls["steps"] += 1
        return output._replace(loss=output.loss * float("nan")) if calls["steps"] == 3 else output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.JointObjective, "forward", poisoned)
        with pytest.raises(UserError, match="step 3: the gradient norm is nan"):
            run.train()
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints", "semantic")] == [1, 2]


def expected_loss(terms: dict[str, float]) -> float:
    """L_vq with the weights that a stage has unless it is told others."""
    return terms["reconstruction_loss"] + terms.get("quantization_loss", 0.0) + 0.05 * terms.get("entropy_loss", 0.0)


def test_quantization_can_begin_later(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """First the decoder reads the features; then the codes are placed where the features are, and most of them are used."""
    toy_recipe["model"]["vision_tokenizer"] |= {
        "similarity": "distance",
        "temperature": 0.5,
        "entropy_temperature": 0.1,
    }
    stage = {**toy_recipe["stages"][0], "steps": 6, "quantize_after": 4, "validate_every": 1, "checkpoint_every": None}
    toy_recipe["stages"] = [{**stage, "ends_with": "best", "ema_decay": 0.5}]
    recipe = recipe_from(toy_recipe)
    recipe = replace(recipe, data=(SourceConfig(source="drawn_text", size=32, difficulty=0.3),))
    folder = Run(recipe, tmp_path / "run").train()
    events = read_log(tmp_path / "run" / "log.jsonl")
    (placed,) = [event for event in events if event["event"] == "codes_placed"]
    assert placed["step"] == 4
    assert placed["mean_squared_distance"] > 0
    losses = {e["step"]: e["losses"] for e in events if e["event"] == "step"}
    assert ["quantization_loss" in losses[step] for step in range(1, 7)] == [False] * 4 + [True] * 2
    assert not any("psnr" in each for each in losses.values()), "training goes on in training mode after a validation"
    validations = {e["step"]: e["losses"] for e in events if e["event"] == "validation"}
    assert ["quantization_loss" in validations[step] for step in range(1, 7)] == [False] * 4 + [True] * 2
    assert all(values["loss"] == pytest.approx(expected_loss(values)) for values in validations.values())
    (best,) = [event["best_step"] for event in events if event["event"] == "ends_with"]
    assert best in (5, 6), "weights without codes are no result, however low their loss"
    psnr = {step: values["psnr"] for step, values in validations.items()}
    assert psnr[5] > psnr[4] - 1.0, "placed codes cost little"
    tokenizer = VisionTokenizer.from_pretrained(folder)
    assert tokenizer.quantize.distance_unit is not None
    assert tokenizer.quantize.distance_unit.item() == pytest.approx(placed["mean_squared_distance"])
    with pytest.raises(RecipeError, match="quantize_after"):
        recipe_from({**toy_recipe, "stages": [{"stage": "align", "steps": 3, "batch_size": 4, "quantize_after": 1}]})


def test_folders_are_not_overwritten_by_accident(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["stages"] = [{"stage": "tokenizer", "steps": 1, "batch_size": 2}]
    recipe, out = recipe_from(toy_recipe), tmp_path / "run"
    Run(recipe, out).train()
    with pytest.raises(RecipeError, match=r"--resume, replace it with --overwrite"):
        Run(recipe, out)
    toy_recipe["seed"] = 5
    with pytest.raises(RecipeError, match=r"started with another recipe .*seed: 5"):
        Run(recipe_from(toy_recipe), out, resume=True)
    before = digests(out)
    Run(recipe_from(toy_recipe), out, overwrite=True).train()
    assert digests(out) != before
    (out / "thesis.txt").write_text("mine", encoding="utf-8")
    Run(recipe_from(toy_recipe), out, overwrite=True).train()
    assert (out / "thesis.txt").exists(), "only what a run writes is deleted"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x", encoding="utf-8")
    (tmp_path / "other" / "recipe.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(RecipeError, match="is not a run's folder"):
        Run(recipe, tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "precious.txt").exists()


def test_starting_from_a_saved_model(toy_run: Path, toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """`model.init` takes a finished model; an index arm gets its table from that model's codebook."""
    arm = {**toy_recipe, "model": {"image_size": 32, "init": str(toy_run / "stages" / "1-align")}}
    arm["model"]["visual_input"] = "index"
    arm["stages"] = [
        {
            "stage": "semantic",
            "steps": 2,
            "batch_size": 4,
            "trains": ["projector", "language_model"],
            "losses": {"tokenizer_weight": 0},
        }
    ]
    Run(recipe_from(arm), tmp_path / "arm").train()
    model, _ = load_model(tmp_path / "arm")
    base, _ = load_model(toy_run / "stages" / "1-align")
    assert model.index_embedding is not None
    codebook = base.vision_tokenizer.quantize.codebook
    assert torch.equal(model.vision_tokenizer.quantize.codebook, codebook)
    assert not torch.equal(model.index_embedding.weight, codebook)
    torch.testing.assert_close(model.index_embedding.weight, codebook, rtol=0, atol=1e-2)


def test_a_runs_folder_brings_its_tokenizer(toy_run: Path, toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """`model.vision_tokenizer.path` takes what `model.init` takes: of a run, what its last stage ended with."""
    toy_recipe["model"]["vision_tokenizer"] = {"path": str(toy_run)}
    toy_recipe["stages"] = [{"stage": "align", "steps": 1, "batch_size": 2}]
    recipe = recipe_from(toy_recipe)
    model, _ = skeleton(recipe, 0)
    Run(recipe, tmp_path / "run").train()
    ended, found = load_model(toy_run)[0].vision_tokenizer, load_model(tmp_path / "run")[0].vision_tokenizer
    assert isinstance(model, EttForConditionalGeneration)
    assert model.vision_tokenizer.config == found.config
    for name, tensor in ended.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    (tmp_path / "empty").mkdir()
    toy_recipe["model"]["vision_tokenizer"] = {"path": str(tmp_path / "empty")}
    with pytest.raises(ModelError, match=r"not a saved vision tokenizer: it has no config\.json"):
        Run(recipe_from(toy_recipe), tmp_path / "other")


def test_recipe_json_of_a_run_is_plain_yaml(toy_recipe: dict[str, Any]) -> None:
    text = dump_recipe(recipe_from(toy_recipe))
    assert yaml.safe_load(text)["stages"][2]["stage"] == "semantic"
    assert json.dumps(yaml.safe_load(text))


def _shipped_recipes() -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for path in sorted(SHIPPED.glob("*.yaml")):
        arms = yaml.safe_load(path.read_text(encoding="utf-8")).get("arms")
        # what has to be fetched first runs in tests of its own: test_paper_scale.py, test_tokenizer_256px.py
        found += [(path.stem, arm) for arm in (arms or [None]) if path.stem not in ("qwen2_5_1_5b", "tokenizer_256px")]
    return found


@pytest.mark.parametrize(("name", "arm"), _shipped_recipes())
def test_shipped_recipes_take_two_steps(name: str, arm: str | None, tmp_path: Path) -> None:
    """Every stage of every arm of every shipped recipe on its own data, with a toy language model and small batches."""
    given = to_mapping(load_recipe(name, [f"arm={arm}"] if arm else []))
    given |= {"evaluation": {**given["evaluation"], "limit": 2}, "num_workers": 0, "trackers": []}
    model = given["model"]
    if model["language_model"] is not None and model["language_model"].get("path"):
        model["language_model"] = {"config": LANGUAGE_MODELS["qwen2"]}
    if str(model["vision_tokenizer"].get("path")).startswith(("runs/", "arm:")):
        model["vision_tokenizer"] = {"path": "reader_64px"}
    if str(model["init"]).startswith(("runs/", "arm:")):
        model["init"] = "reader_64px"
    for sources in (given["data"], given["evaluation"]["data"], given["evaluation"]["report_data"]):
        for source in sources or []:
            if source["source"] == "manifest":  # someone's own files, which are not there
                source |= {"source": "names", "path": None}
    for stage in given["stages"]:
        stage |= {"steps": 2, "batch_size": 2, "quantize_after": min(1, stage["quantize_after"])}
        stage["health"] |= {"pictures": 2}
    recipe = recipe_from(given)
    Run(recipe, tmp_path / "run").train()
    finished = {e["stage"] for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "validation"}
    assert finished == set(recipe.stage_names)


def test_gradient_checkpointing_changes_nothing(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["model"]["language_model"]["config"]["attention_dropout"] = 0.0
    losses = []
    for checkpointing in (False, True):
        toy_recipe["stages"] = [
            {"stage": "semantic", "steps": 3, "batch_size": 4, "log_every": 1, "gradient_checkpointing": checkpointing}
        ]
        out = tmp_path / str(checkpointing)
        Run(recipe_from(toy_recipe), out).train()
        losses.append([e["losses"] for e in read_log(out / "log.jsonl") if e["event"] == "step"])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_visual_index_and_lora_survive_a_resume(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """The parts that only some recipes have are in the checkpoints too."""
    toy_recipe["model"] |= {
        "visual_input": "index",
        "lora": {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.1},
    }
    toy_recipe["stages"] = [
        {"stage": stage, "steps": 4, "batch_size": 4, "checkpoint_every": 1, "trains": trains}
        for stage, trains in (("align", ["projector"]), ("semantic", ["projector", "language_model"]))
    ]
    for stage in toy_recipe["stages"]:
        stage["losses"] = {"tokenizer_weight": 0}
    recipe = recipe_from(toy_recipe)
    Run(recipe, tmp_path / "whole").train()
    with killed_at(7):
        Run(recipe, tmp_path / "killed").train()
    Run(recipe, tmp_path / "killed", resume=True).train()
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    model, _ = load_model(tmp_path / "killed")
    assert any(".lora_B" in name and p.abs().sum() > 0 for name, p in model.named_parameters())


def test_resume_refuses_changed_data_and_lets_the_loader_change(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["stages"] = toy_recipe["stages"][:1]
    Run(recipe_from(toy_recipe), tmp_path / "run").train()
    toy_recipe["num_workers"] = 1
    Run(recipe_from(toy_recipe), tmp_path / "run", resume=True)
    manifest = Path(toy_recipe["data"][0]["path"])
    manifest.write_text(manifest.read_text(encoding="utf-8").replace("number 3", "number 4"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"manifest\.jsonl has changed"):
        Run(recipe_from(toy_recipe), tmp_path / "run", resume=True)


def test_an_emptied_stage_is_done_again(toy_run: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(toy_run, tmp_path / "run"))
    for path in (out / "stages" / "2-semantic").iterdir():
        path.unlink()
    Run(load_recipe(out / "recipe.yaml"), out, resume=True).train()
    assert digests(out) == digests(toy_run)


def test_text_only_examples_among_pictures(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """A micro-batch without any picture trains what text reaches, in every stage, and crashes none."""
    manifest = Path(toy_recipe["data"][0]["path"])
    lines = manifest.read_text(encoding="utf-8").splitlines()
    turns = [{"from": "human", "value": "Say hi"}, {"from": "gpt", "value": "hi"}]
    lines[::2] = [json.dumps({"id": f"t{i}", "conversations": turns}) for i in range(len(lines[::2]))]
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for stage in toy_recipe["stages"]:
        stage |= {"batch_size": 2, "micro_batch_size": 1, "steps": 6}
    Run(recipe_from(toy_recipe), tmp_path / "run").train()
    events = read_log(tmp_path / "run" / "log.jsonl")
    assert {e["stage"] for e in events if e["event"] == "step" and e["step"] == 6} == {
        "tokenizer",
        "align",
        "semantic",
        "chat",
    }


def test_the_saved_model_carries_the_objective_it_was_trained_on(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["stages"] = [dict(toy_recipe["stages"][2], losses={"tokenizer_weight": 0.5, "entropy_weight": 0.01})]
    Run(recipe_from(toy_recipe), tmp_path / "run").train()
    model, _ = load_model(tmp_path / "run")
    assert model.config.loss_config.tokenizer_weight == 0.5
    assert model.config.loss_config.entropy_weight == 0.01


def test_init_refuses_what_it_cannot_change(toy_run: Path, toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    stages = [dict(toy_recipe["stages"][1])]
    lora = {"r": 2, "target_modules": ["q_proj"]}
    given = {**toy_recipe, "stages": stages, "model": {"init": str(toy_run), "lora": lora}}
    given["stages"][0]["trains"] = ["projector", "language_model"]
    Run(recipe_from(given), tmp_path / "lora").train()
    model, _ = load_model(tmp_path / "lora")
    assert model.config.lora == lora
    given["model"] = {"init": str(toy_run), "projector": {"depth": 3}, "image_size": 64}
    with pytest.raises(RecipeError, match=r"brings its own model\.image_size, model\.projector"):
        Run(recipe_from(given), tmp_path / "x").train()
    assert not (tmp_path / "x").exists()


def test_settings_of_a_saved_tokenizer_change_as_far_as_its_weights_allow(
    toy_run: Path, toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    stage = dict(toy_recipe["stages"][2], optimizer={"learning_rate": 1e-9})
    given = {**toy_recipe, "stages": [stage]}
    given["model"] = {"init": str(toy_run), "vision_tokenizer": {"temperature": 3.0, "gradient": "straight_through"}}
    Run(recipe_from(given), tmp_path / "warm").train()
    before, after = load_model(toy_run)[0].vision_tokenizer, load_model(tmp_path / "warm")[0].vision_tokenizer
    assert (after.config.temperature, after.config.gradient) == (3.0, "straight_through")
    torch.testing.assert_close(after.quantize.codebook, before.quantize.codebook, rtol=0, atol=1e-6)
    for settings in ({"codebook_size": 7_000}, {"tokenizer_type": "lfq"}):
        given["model"] = {"init": str(toy_run), "vision_tokenizer": settings}
        with pytest.raises(RecipeError, match=r"model\.vision_tokenizer"):
            Run(recipe_from(given), tmp_path / "x").train()
    assert not (tmp_path / "x").exists()


def test_two_processes_train_as_one(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """torchrun with two CPU processes takes the steps of one: same examples, same losses, entropy over both ranks."""
    for stage in toy_recipe["stages"]:
        # a small rate: the entropy term at T = 0.01 magnifies the rounding of an update, and only sums are compared here
        stage |= {"batch_size": 4, "micro_batch_size": None, "optimizer": {"learning_rate": 1e-6}}
    toy_recipe["model"]["language_model"]["config"]["attention_dropout"] = 0.0
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toy_recipe), encoding="utf-8")
    Run(recipe_from(toy_recipe), tmp_path / "one").train()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "ett.cli",
        "train",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(path), "--out", str(tmp_path / "two")],
        check=True,
        capture_output=True,
        timeout=180,
        env=environment,
    )
    one, two = (
        [
            (e["stage"], e["step"], {**e["losses"], "grad_norm": e["grad_norm"]})
            for e in read_log(tmp_path / name / "log.jsonl")
            if e["event"] == "step"
        ]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 12
    for ours, theirs in zip(one, two, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], rel=1e-4), ours[:2]

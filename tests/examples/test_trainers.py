"""The examples train with trainers of other libraries, and take the very steps of our own loop."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import ett
from ett.config import from_mapping
from ett.data.mixture import Mixture
from ett.losses.joint import LossConfig
from ett.model.loading import load_model
from ett.model.lora import inject_lora
from ett.train.health import HealthConfig
from ett.train.log import RunLog
from ett.train.loop import Stage, StageData
from ett.train.optim import OptimizerConfig
from ett.train.stages import StageConfig
from ett.types import Batch

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"hf_trainer": (), "trl_sft": ("trl", "datasets"), "peft_lora": ("peft",), "lightning_module": ("lightning",)}
LORA = {"peft_lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]}}
STEPS = 2

# other libraries' deprecations are theirs to mend
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _leave_no_state() -> Iterator[None]:
    """Trainers of transformers set up the process for themselves."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def start(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that trains on the joint loss, without dropout: steps are comparable."""
    folder = Path(shutil.copytree(toy_run / "stages" / "2-semantic", tmp_path_factory.mktemp("start") / "model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["attention_dropout"] = 0.0
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def own_losses(folder: Path, batches: list[Batch], lora: dict[str, Any] | None, out: Path) -> list[float]:
    """The joint loss at each step of our own loop on `batches`, the adversarial game off."""
    torch.manual_seed(0)
    model, processor = load_model(folder)
    if lora is not None:
        model.config.lora = lora
        inject_lora(model.language_model, lora)
    config = StageConfig(
        stage="semantic",
        steps=STEPS,
        batch_size=4,
        losses=from_mapping(LossConfig, model.config.losses),
        optimizer=OptimizerConfig(learning_rate=4e-5, betas=(0.9, 0.999), warmup_ratio=0.0),
        health=HealthConfig(pictures=0),
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    data = StageData(Mixture([ett.Manifest(folder / "manifest.jsonl")], [1.0], 0), [], processor, 0)
    stage = Stage(config, "semantic", model, data, accelerator, RunLog(out, accelerator), out)
    losses = []
    for batch in batches:
        losses.append(float(stage._train_step([batch.to(accelerator.device)])[0]["loss"]))
        stage.step += 1
    return losses


@pytest.mark.parametrize("name", NEEDS)
def test_two_steps_are_those_of_our_own_loop(
    name: str, start: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss before an update and the loss after it, on the batches that the other trainer drew."""
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'ett-tuning[{NEEDS[name][0]}]'")
    manifest = toy_run.parent / "pictures" / "manifest.jsonl"
    batches: list[Batch] = []
    losses: list[float] = []
    collate, forward = ett.EttCollator.__call__, ett.EttForConditionalGeneration.forward

    def collated(self: Any, items: Any) -> Any:
        found = collate(self, items)
        batches.append(Batch(**{key: value.clone() for key, value in found.items()}, ids=[]))
        return found

    @functools.wraps(forward)
    def forwarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        losses.append(float(found.loss.detach()))
        return found

    monkeypatch.setattr(ett.EttCollator, "__call__", collated)
    monkeypatch.setattr(ett.EttForConditionalGeneration, "forward", forwarded)
    monkeypatch.setattr(sys, "argv", [name, str(start), str(manifest), str(tmp_path / "out"), str(STEPS)])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    monkeypatch.undo()

    batches = batches[:STEPS]
    assert [len(batch.input_ids) for batch in batches] == [4, 4]
    if "trainer" in names:
        logged = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
        assert logged == pytest.approx(losses, rel=1e-6), "what it logs and minimises is the model's loss"
    shutil.copytree(manifest.parent, tmp_path / "own", dirs_exist_ok=True)
    shutil.copytree(start, tmp_path / "own", dirs_exist_ok=True)
    expected = own_losses(tmp_path / "own", batches, LORA.get(name), tmp_path)
    assert losses == pytest.approx(expected, rel=2e-6)
    (untrained,) = own_losses(tmp_path / "own", batches[1:], LORA.get(name), tmp_path)
    assert abs(untrained - losses[1]) > 1e-4 * losses[1], "the second loss depends on the first update"

    model, _ = load_model(start)
    tuned, _ = load_model(tmp_path / "out")
    for part in ("vision_tokenizer.encoder", "vision_tokenizer.quantize", "projector", "language_model"):
        before, after = (dict(each.get_submodule(part).named_parameters()) for each in (model, tuned))
        assert any(not torch.equal(before[key], after[key]) for key in before), f"{part} has moved"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed"
)
def test_zero_takes_the_steps_of_ddp(start: Path, toy_run: Path, tmp_path: Path) -> None:
    """Two processes with gradients divided, and with weights divided too, end with the weights of two whole copies."""
    manifest = toy_run.parent / "pictures" / "manifest.jsonl"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for name, script, more in (
        ("ddp", "hf_trainer", []),
        ("2", "deepspeed_zero", ["2"]),
        ("3", "deepspeed_zero", ["3"]),
    ):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        given = [str(EXAMPLES / f"{script}.py"), str(start), str(manifest), str(tmp_path / name), "3", *more]
        # its first use compiles an extension
        subprocess.run([*command, *given], check=True, env=environment, cwd=tmp_path, timeout=600)
    before, whole = (dict(load_model(folder)[0].named_parameters()) for folder in (start, tmp_path / "ddp"))
    assert any(not torch.equal(before[key], whole[key]) for key in before), "it has trained"
    for stage in ("2", "3"):
        divided = dict(load_model(tmp_path / stage)[0].named_parameters())
        torch.testing.assert_close(divided, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*NEEDS, "deepspeed_zero"])
def test_the_users_code_is_short(name: str) -> None:
    _, _, code = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split('"""', 2)
    lines = [line for line in code.splitlines() if line.strip()]
    own = [line for line in lines if not line.lstrip().startswith(("import ", "from ", "#"))]
    assert len(own) < 15, f"{len(own)} lines beside imports"

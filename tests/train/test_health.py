"""The tokenizer's health: statistics against plain forms, monitoring without a trace, faults that end as the recipe says."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from ett.config import from_mapping
from ett.errors import RecipeError
from ett.evaluate.report import write_report
from ett.experiments.recipe import Recipe, dump_recipe
from ett.experiments.run import Run
from ett.tokenizers import VisionTokenizer
from ett.tokenizers.quantizer import IndexBackpropagationQuantizer
from ett.tokenizers.softmax_statistics import softmax_statistics
from ett.train import loop as loop_module
from ett.train.checkpoint import list_checkpoints
from ett.train.critics import Critics
from ett.train.diagnosis import Situation, diagnose
from ett.train.health import BackOffs, CodebookCollapse, NonFiniteLoss
from ett.train.log import RunLog, read_log
from ett.train.loop import Interrupted
from ett.train.measures import (
    Codes,
    drift_values,
    gradient_norms,
    tokenizer_probes,
    undisturbed,
    usage_values,
)
from ett.train.objectives import ObjectiveOutput
from tests.conftest import TOKENIZER, killed_at

VALUES = {"codes_in_use", "usage", "index_perplexity", "top1_mass", "nearest_share", "softmax_perplexity", "row_entropy",
          "usage_entropy", "indices_changed", "reconstruction_drift", "reconstruction_drift_psnr"}  # fmt: skip


def recipe_of(toy: dict[str, Any], **stage: Any) -> Recipe:
    """One stage of five steps on the toy parts."""
    base = {"stage": "tokenizer", "steps": 5, "batch_size": 4, "checkpoint_every": 1, "log_every": 1}
    return from_mapping(Recipe, {**toy, "stages": [{**base, **stage}]})


def weights(run: Path) -> bytes:
    (path,) = run.glob("stages/0-*/model.safetensors")
    return path.read_bytes()


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_log(run / "log.jsonl") if event["event"] == kind]


def poison(monkeypatch: pytest.MonkeyPatch, objective: type[nn.Module], *steps: int) -> None:
    """The loss of these forwards (1-based) is not a number."""
    plain, calls = objective.forward, {"made": 0}

    def poisoned(self: Any, *arguments: Any, **named: Any) -> ObjectiveOutput:
        output: ObjectiveOutput = plain(self, *arguments, **named)
        calls["made"] += self.training
        return output._replace(loss=output.loss * float("nan")) if calls["made"] in steps else output

    monkeypatch.setattr(objective, "forward", poisoned)


# -- what is measured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_softmax_statistics_equal_the_dense_form(scale: float) -> None:
    query, keys = torch.randn(37, 6).double() * scale, torch.randn(23, 6).double()
    nearest = torch.cdist(query, keys).argmin(dim=1)
    logits = query @ keys.T
    p, p_t = logits.softmax(1), (logits / 0.3).softmax(1)

    def entropy(q: torch.Tensor) -> torch.Tensor:
        return -torch.xlogy(q, q).sum(-1)

    for rows in (None, 5, 37):
        found = softmax_statistics(query, keys, nearest, 0.3, chunk_rows=rows)
        assert found.top1_mass == pytest.approx(float(p.amax(1).mean()), rel=1e-12)
        assert found.nearest_share == pytest.approx(float((logits.argmax(1) == nearest).double().mean()), rel=1e-12)
        assert found.perplexity == pytest.approx(float(entropy(p).mean().exp()), rel=1e-10)
        assert found.row_entropy == pytest.approx(float(entropy(p_t).mean()), rel=1e-9, abs=1e-12)
        assert found.usage_entropy == pytest.approx(float(entropy(p_t.mean(0))), rel=1e-10)


@pytest.mark.parametrize(
    "settings",
    [{}, {"normalize": True}, {"similarity": "distance", "temperature": 0.5}, {"unit_embeddings": True}],
    ids=str,
)
def test_a_quantizer_measures_its_own_softmax(settings: dict[str, Any]) -> None:
    """The difference of the entropy terms is L_entropy; the nearest code is found among the codes that are compared."""
    quantizer = IndexBackpropagationQuantizer(16, 4, entropy_temperature=0.2, **settings)
    features = torch.randn(2, 4, 3, 3)
    found, entropy_loss = quantizer.softmax_statistics(features), quantizer(features).entropy_loss.item()
    assert found.row_entropy - found.usage_entropy == pytest.approx(entropy_loss, abs=1e-5)
    if settings.get("similarity") == "distance" or settings.get("normalize"):
        assert found.nearest_share == 1.0
    assert 1 / 16 <= found.top1_mass <= 1 <= found.perplexity <= 16


def test_usage_and_drift_by_hand() -> None:
    assert usage_values(torch.tensor([[0, 0], [3, 3]]), 8) == {
        "codes_in_use": 2.0,
        "usage": 0.5,  # four tokens cannot use more than four of the eight codes
        "index_perplexity": pytest.approx(2.0),
    }
    before = Codes(torch.tensor([[[0, 1]], [[2, 3]]]), torch.zeros(2, 3, 4, 4))
    now = Codes(torch.tensor([[[0, 1]], [[2, 2]]]), torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.2)]))
    found = drift_values(before, now)
    assert found["indices_changed"] == 0.25
    assert found["reconstruction_drift"] == pytest.approx(0.1)
    assert found["reconstruction_drift_psnr"] == pytest.approx((100 + 10 * math.log10(4 / 0.04)) / 2, rel=1e-5)


def test_gradient_norms_are_those_of_backward() -> None:
    tokenizer = VisionTokenizer.from_config(TOKENIZER)
    reconstruction, quantized = tokenizer(torch.rand(2, 3, 16, 16) * 2 - 1)
    terms = {
        "reconstruction_loss": reconstruction.abs().mean(),
        "entropy_loss": quantized.entropy_loss,
        "constant": torch.zeros(()),
    }
    found = gradient_norms(terms, tokenizer_probes(tokenizer))
    assert all(p.grad is None for p in tokenizer.parameters())
    assert set(found["encoder"]) == set(found["codebook"]) == {"reconstruction_loss", "entropy_loss"}
    for name in found["encoder"]:
        tokenizer.zero_grad(set_to_none=True)
        terms[name].backward(retain_graph=True)
        assert found["encoder"][name] == pytest.approx(float(tokenizer.quant_conv.weight.grad.norm()), rel=1e-6)
        assert found["codebook"][name] == pytest.approx(
            float(tokenizer.quantize.embedding.weight.grad.norm()), rel=1e-6
        )


def test_measuring_leaves_modes_and_random_states() -> None:
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout().eval()))
    modes = [each.training for each in module.modules()]
    state = torch.get_rng_state()
    with undisturbed(module):
        assert not any(each.training for each in module.modules())
        torch.rand(3)
    assert [each.training for each in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


# -- what is told ------------------------------------------------------------------------------------------------------

HEALTHY = {"usage": 0.8, "top1_mass": 0.4, "nearest_share": 0.9, "softmax_perplexity": 4.0, "indices_changed": 0.1,
           "reconstruction_drift_psnr": 25.0}  # fmt: skip
NORMS = {"encoder": {"caption_loss": 0.1, "reconstruction_loss": 0.2}}


@pytest.mark.parametrize(
    ("kind", "changes", "norms", "knob"),
    [
        ("saturated", {"top1_mass": 0.97}, NORMS, r"Raise vision_tokenizer\.temperature"),
        ("diffuse", {"top1_mass": 0.05, "nearest_share": 0.13}, NORMS, r"Lower .*temperature .*similarity"),
        ("diffuse", {"softmax_perplexity": 15.0}, NORMS, r"Lower vision_tokenizer\.temperature"),
        ("usage_falls", {"usage": 0.3}, NORMS, r"losses\.entropy_weight"),
        ("no_caption_gradient", {}, {"encoder": {"caption_loss": 0.0, "reconstruction_loss": 0.2}}, "temperature"),
        ("still", {"indices_changed": 0.0, "reconstruction_drift_psnr": 90.0}, NORMS, r"learning_rates\.vision_tokenizer"),
    ],
)  # fmt: skip
def test_warnings_name_the_knob(kind: str, changes: dict[str, float], norms: dict[str, Any], knob: str) -> None:
    quantizer = IndexBackpropagationQuantizer(16, 4)
    assert diagnose(Situation(500, quantizer, HEALTHY, NORMS, 0.7, True)) == {}
    found = diagnose(Situation(500, quantizer, HEALTHY | changes, norms, 0.7, True))
    assert set(found) == {kind}
    assert re.search(knob, found[kind])


def test_what_is_no_fault_is_not_told() -> None:
    values = HEALTHY | {"top1_mass": 0.99}
    straight_through = IndexBackpropagationQuantizer(16, 4, gradient="straight_through")
    assert diagnose(Situation(5, straight_through, values, {}, None, False)) == {}
    early = HEALTHY | {"indices_changed": 0.0, "reconstruction_drift_psnr": 100.0}
    blocked = {"encoder": {"caption_loss": 0.0}}
    assert diagnose(Situation(5, IndexBackpropagationQuantizer(16, 4), early, blocked, None, False)) == {}


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_monitoring_changes_no_weight(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Joint training with dropout, critics and averages: the same bits with and without, and after a resume the same log."""
    stage = {
        "stage": "semantic",
        "losses": {"adversarial_weight": 0.1},
        "discriminator": {"channels": 4, "generator_start": 1, "strided_layers": 2},
        "ema_decay": 0.9,
    }
    watched = recipe_of(toy_recipe, **stage, health={"every": 2, "pictures": 5})
    Run(recipe_of(toy_recipe, **stage, health={"pictures": 0}), tmp_path / "blind").train()
    Run(watched, tmp_path / "watched").train()
    assert weights(tmp_path / "blind") == weights(tmp_path / "watched")
    assert events(tmp_path / "blind", "health") == []
    found = events(tmp_path / "watched", "health")
    assert [event["step"] for event in found] == [2, 4, 5]
    for event in found:
        assert set(event["values"]) == VALUES
        terms = {"caption_loss", "reconstruction_loss", "quantization_loss", "entropy_loss", "adversarial_loss"}
        assert set(event["gradient_norms"]["encoder"]) == set(event["gradient_norms"]["codebook"]) == terms
        assert event["gradient_norms"]["encoder"]["caption_loss"] > 0

    with killed_at(4):
        Run(watched, tmp_path / "resumed").train()
    Run(watched, tmp_path / "resumed", resume=True).train()
    assert weights(tmp_path / "resumed") == weights(tmp_path / "watched")
    # drift is measured from the stage's own beginning, not from the checkpoint
    for name in ("values", "gradient_norms"):
        assert [e[name] for e in events(tmp_path / "resumed", "health")] == [e[name] for e in found]


def test_the_terminal_shows_health(
    toy_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In lines where there is no terminal, in the bar where there is one: codes, perplexity, top-1 mass, and what is wrong."""
    bars: list[str] = []
    monkeypatch.setattr(loop_module.tqdm, "set_postfix_str", lambda _, text: bars.append(text))
    recipe = recipe_of(toy_recipe, steps=3, health={"every": 2})
    toy_recipe["model"]["vision_tokenizer"]["temperature"] = 1e-3
    Run(recipe_of(toy_recipe, steps=3, health={"every": 2}), tmp_path / "run").train()
    shown = capsys.readouterr().err
    first = events(tmp_path / "run", "health")[0]["values"]
    words = (
        f"{first['codes_in_use']:.0f} codes, perplexity {first['index_perplexity']:.0f}, "
        f"top-1 {first['top1_mass']:.2f}, {first['indices_changed']:.0%} changed"
    )
    assert f"tokenizer 2  health: {words}" in shown
    (last,) = [line for line in shown.splitlines() if line.startswith("tokenizer 3/3")]
    assert f"  {words}  " in last, "the newest there is"
    assert [words in bar for bar in bars] == [False, False, True]
    saturated = r"Warning \(tokenizer, step 2\): The index softmax is saturated: .* Raise vision_tokenizer\.temperature"
    assert re.search(saturated, shown)

    bars.clear()
    Run(recipe, tmp_path / "other").train()
    assert "saturated" not in capsys.readouterr().err


def test_a_stage_begins_without_the_last_one_s_health(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    log = RunLog(tmp_path, Accelerator(cpu=True))
    log.health("tokenizer", 1, {"codes_in_use": 7.0, "index_perplexity": 3.2}, {})
    assert log.health_now == "7 codes, perplexity 3"
    log.start_stage(10)
    assert log.health_now == ""


def test_a_quantizer_without_a_softmax(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    given = {k: v for k, v in TOKENIZER.items() if not k.startswith("codebook")}
    toy_recipe["model"]["vision_tokenizer"] = {**given, "tokenizer_type": "fsq", "levels": [5, 5]}
    Run(recipe_of(toy_recipe, steps=1), tmp_path / "run").train()
    (event,) = events(tmp_path / "run", "health")
    assert "top1_mass" not in event["values"]
    assert event["values"]["codes_in_use"] >= 1
    assert list(event["gradient_norms"]) == ["encoder"]
    with pytest.raises(
        RecipeError, match="quantize_after places codes by k-means, which FiniteScalarQuantizer has not"
    ):
        Run(recipe_of(toy_recipe, steps=3, quantize_after=2), tmp_path / "refused").train()
    assert not (tmp_path / "refused" / "log.jsonl").exists(), "refused before the first step"


def test_nothing_is_measured_before_codes_are_placed(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(toy_recipe, quantize_after=2, health={"every": 1, "on_collapse": "stop"})
    Run(recipe, tmp_path / "run").train()
    found = events(tmp_path / "run", "health")
    assert [event["step"] for event in found] == [3, 4, 5]
    assert "indices_changed" not in found[0]["values"]


# -- faults ------------------------------------------------------------------------------------------------------------


def collapse(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """From step `after` on all codes but one are out of every feature's reach: it wins everywhere."""
    plain = loop_module.Stage._update_weights

    def shrinking(self: Any) -> None:
        plain(self)
        if self.step + 1 >= after:
            with torch.no_grad():
                codes = self.model.quantize.embedding.weight
                codes.mul_(1e-4)
                codes[1:] += 1e3

    monkeypatch.setattr(loop_module.Stage, "_update_weights", shrinking)


@pytest.mark.parametrize("every", [1, 5])
def test_a_collapse_stops(
    every: int, toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured or not at that step: no checkpoint holds the collapse, those before stay."""
    toy_recipe["model"]["vision_tokenizer"]["similarity"] = "distance"
    recipe = recipe_of(toy_recipe, health={"every": every, "on_collapse": "stop"})
    collapse(monkeypatch, 4)
    with pytest.raises(CodebookCollapse, match=r"step 4: .* 1 of 64 codes .*losses\.entropy_weight"):
        Run(recipe, tmp_path / "run").train()
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints", "tokenizer")] == [2, 3]
    monkeypatch.undo()
    Run(recipe, tmp_path / "run", resume=True).train()
    Run(recipe, tmp_path / "whole").train()
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize("every", [1, 5])
def test_a_collapse_backs_off(
    every: int, toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back to the last checkpoint, at lower rates; to the end, as a run does whose rates were lowered there."""
    toy_recipe["model"]["vision_tokenizer"]["similarity"] = "distance"
    health = {"every": every, "on_collapse": "back_off"}
    recipe = recipe_of(toy_recipe, health=health, ema_decay=0.9)
    plain = loop_module.Stage._update_weights
    fallen: list[int] = []

    def falls_once(self: Any) -> None:
        plain(self)
        if self.step + 1 == 4 and not fallen:
            fallen.append(4)
            with torch.no_grad():
                codes = self.model.quantize.embedding.weight
                codes.mul_(1e-4)
                codes[1:] += 1e3

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Stage, "_update_weights", falls_once)
        Run(recipe, tmp_path / "run").train()
    (told,) = (event for event in events(tmp_path / "run", "warning") if event["kind"] == "turned_back")
    assert told["step"] == 3
    for words in ("collapsed after step 4", "checkpoint of step 3", "0.5 of the recipe's", "back-off 1 of 3"):
        assert words in told["message"]
    # each step is told once, and the rates of those after it are halved
    steps = events(tmp_path / "run", "step")
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5]

    def halves(self: Any) -> None:
        if self.step == 3:
            self.back_offs.factor = 0.5
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Stage, "_update_weights", halves)
        Run(recipe, tmp_path / "halved").train()
    assert weights(tmp_path / "run") == weights(tmp_path / "halved")


def test_collapses_come_to_an_end(toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collapse that comes again and again stops after `max_back_offs`; one before any checkpoint stops at once."""
    toy_recipe["model"]["vision_tokenizer"]["similarity"] = "distance"
    recipe = recipe_of(toy_recipe, health={"every": 1, "on_collapse": "back_off", "max_back_offs": 2})
    collapse(monkeypatch, 3)
    with pytest.raises(CodebookCollapse, match="step 3"):
        Run(recipe, tmp_path / "run").train()
    told = [event["message"] for event in events(tmp_path / "run", "warning") if event["kind"] == "turned_back"]
    assert [message.split("(")[1].split(")")[0] for message in told] == ["back-off 1 of 2", "back-off 2 of 2"]
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints", "tokenizer")] == [1, 2]
    monkeypatch.undo()
    collapse(monkeypatch, 1)
    with pytest.raises(CodebookCollapse, match="step 1"):
        Run(recipe, tmp_path / "early").train()


def test_a_collapse_warns(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_recipe["model"]["vision_tokenizer"]["similarity"] = "distance"
    collapse(monkeypatch, 3)
    Run(recipe_of(toy_recipe, health={"every": 1}), tmp_path / "run").train()
    told = [event for event in events(tmp_path / "run", "warning") if event["kind"] == "collapse"]
    assert [event["step"] for event in told] == [3], "once"
    assert "Warning (tokenizer, step 3): The codebook has collapsed" in capsys.readouterr().err
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    for words in ("Health of the tokenizer", "Codes in use", "Gradient norms at the codebook", "has collapsed"):
        assert words in page


def test_tiny_codes_collapse(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Not staged: with codes of almost no length one of them wins, and training says so."""
    tokenizer = VisionTokenizer.from_config(TOKENIZER)
    with torch.no_grad():
        tokenizer.quantize.embedding.weight.normal_(std=1e-3)
        tokenizer.quantize.embedding.weight[0] = 0.5 * tokenizer.quant_conv.bias.sign()
    tokenizer.save_pretrained(tmp_path / "tiny")
    toy_recipe["model"]["vision_tokenizer"] = {"path": str(tmp_path / "tiny")}
    recipe = recipe_of(toy_recipe, health={"every": 1, "on_collapse": "stop", "min_usage": 0.2})
    with pytest.raises(CodebookCollapse, match="has collapsed"):
        Run(recipe, tmp_path / "run").train()
    assert "diffuse" in {event["kind"] for event in events(tmp_path / "run", "warning")}


@pytest.mark.parametrize("stage", ["tokenizer", "semantic"])
def test_a_nan_stops(stage: str, toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(toy_recipe, stage=stage)
    poison(monkeypatch, loop_module.TokenizerObjective if stage == "tokenizer" else loop_module.JointObjective, 3)
    with pytest.raises(NonFiniteLoss, match=r"step 3: the gradient norm is nan .*on_non_finite=back_off"):
        Run(recipe, tmp_path / "run").train()
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints", stage)] == [1, 2]
    monkeypatch.undo()
    Run(recipe, tmp_path / "run", resume=True).train()
    Run(recipe, tmp_path / "whole").train()
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_nan_backs_off_and_resumes_exactly(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is left out, rates are lowered for good, critics stay clean; a resume in between changes nothing."""
    optimizer = {"learning_rate": 1e-3, "schedule": "constant", "warmup_ratio": 0.0}
    recipe = recipe_of(
        toy_recipe,
        optimizer=optimizer,
        losses={"adversarial_weight": 0.1},
        discriminator={"channels": 4, "strided_layers": 2},
        health={"on_non_finite": "back_off", "back_off": 0.5, "max_back_offs": 2},
    )
    plain = loop_module.Stage._train_step

    def poisoned(die_at: int | None) -> Any:
        def step(self: Any, batches: Any) -> Any:
            if self.step + 1 == die_at:
                raise InterruptedError
            if self.step + 1 in (2, 4):
                for batch in batches:
                    batch.pixel_values[0, 0, 0, 0] = float("nan")
            return plain(self, batches)

        return step

    monkeypatch.setattr(loop_module.Stage, "_train_step", poisoned(None))
    Run(recipe, tmp_path / "whole").train()
    rates = [e["learning_rates"]["vision_tokenizer"] for e in events(tmp_path / "whole", "step")]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4])
    losses = [e["losses"] for e in events(tmp_path / "whole", "step")]
    assert [all(map(math.isfinite, terms.values())) for terms in losses] == [True, False, True, False, True]
    told = events(tmp_path / "whole", "warning")
    assert [(e["step"], e["kind"]) for e in told if e["kind"] == "non_finite"] == [(2, "non_finite"), (4, "non_finite")]
    assert "optimizer.learning_rate" in told[0]["message"]
    tokenizer = VisionTokenizer.from_pretrained(tmp_path / "whole" / "stages" / "0-tokenizer")
    assert all(bool(p.isfinite().all()) for p in tokenizer.parameters())

    monkeypatch.setattr(loop_module.Stage, "_train_step", poisoned(4))
    with pytest.raises(InterruptedError):
        Run(recipe, tmp_path / "resumed").train()
    monkeypatch.setattr(loop_module.Stage, "_train_step", poisoned(None))
    Run(recipe, tmp_path / "resumed", resume=True).train()
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")


def test_a_discriminator_whose_gradient_is_not_finite_is_not_lost(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and the tokenizer's gradient are well; only the other player's is not."""
    recipe = recipe_of(
        toy_recipe,
        losses={"adversarial_weight": 0.1},
        discriminator={"channels": 4, "strided_layers": 2},
        health={"on_non_finite": "back_off"},
    )
    plain, calls = Critics.learn, 0

    def poisoned(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        terms = plain(self, *arguments)
        if calls == 2:
            next(self.discriminator.parameters()).grad[0] = float("nan")
        return terms

    monkeypatch.setattr(Critics, "learn", poisoned)
    Run(recipe, tmp_path / "run").train()
    told = [e["step"] for e in events(tmp_path / "run", "warning") if e["kind"] == "non_finite"]
    assert told == [2]
    last = events(tmp_path / "run", "step")[-1]["losses"]
    assert all(map(math.isfinite, last.values()))


def test_no_checkpoint_of_weights_in_doubt(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While steps have to be left out the weights may be what is wrong: the good checkpoints before are not pushed out."""
    health = {"on_non_finite": "back_off", "max_back_offs": 3, "pictures": 0}
    poison(monkeypatch, loop_module.TokenizerObjective, 3, 4, 5)
    recipe = recipe_of(toy_recipe, health=health, steps=7)
    kept: dict[int, list[int]] = {}
    plain = loop_module.Stage._keep

    def watched(self: Any, *arguments: Any) -> None:
        plain(self, *arguments)
        self.saver.settle()
        kept[self.step] = [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints", "tokenizer")]

    monkeypatch.setattr(loop_module.Stage, "_keep", watched)
    Run(recipe, tmp_path / "run").train()
    assert (kept[2], kept[5], kept[6]) == ([1, 2], [1, 2], [2, 6])


def test_ruined_weights_stop_whatever_the_recipe_says(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Not staged: a learning rate far too high. Smaller steps from there mend nothing, and the reason is not a collapse."""
    optimizer = {"learning_rate": 1e18, "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": None}
    health = {"every": 3, "on_non_finite": "back_off", "on_collapse": "stop"}
    recipe = recipe_of(toy_recipe, optimizer=optimizer, health=health, checkpoint_every=2)
    with pytest.raises(NonFiniteLoss, match=r"step 3: .*features .* are not finite.*weights are ruined"):
        Run(recipe, tmp_path / "run").train()
    assert list_checkpoints(tmp_path / "run" / "checkpoints", "tokenizer") == []


def test_back_offs_come_to_an_end(toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    health = {"on_non_finite": "back_off", "max_back_offs": 1}
    poison(monkeypatch, loop_module.TokenizerObjective, 2, 4)
    with pytest.raises(NonFiniteLoss, match=r"step 4: .*lowered 1 times, to 0\.5 of the recipe's"):
        Run(recipe_of(toy_recipe, health=health), tmp_path / "run").train()
    # step 2 was left out: nothing is saved until a step is taken again
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints", "tokenizer")] == [1, 3]


def test_a_signal_saves_no_weights_in_doubt(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While steps are left out the last good checkpoint stays the newest; resumed, the run ends as if nothing had come."""
    recipe = recipe_of(toy_recipe, health={"on_non_finite": "back_off"})
    with monkeypatch.context() as patch:
        poison(patch, loop_module.TokenizerObjective, 3)
        Run(recipe, tmp_path / "whole").train()
    refuse = BackOffs.refuse

    def refused(self: BackOffs, *arguments: Any) -> None:
        refuse(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        poison(patch, loop_module.TokenizerObjective, 3)
        patch.setattr(BackOffs, "refuse", refused)
        with pytest.raises(Interrupted) as stopped:
            Run(recipe, tmp_path / "run").train()
    assert stopped.value.step == 2
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints", "tokenizer")] == [1, 2]
    with monkeypatch.context() as patch:
        poison(patch, loop_module.TokenizerObjective, 1)
        Run(recipe, tmp_path / "run", resume=True).train()
    for name in ("whole", "run"):
        assert [e["step"] for e in events(tmp_path / name, "warning") if e["kind"] == "non_finite"] == [3]
    ends = [load_file(tmp_path / name / "stages" / "0-tokenizer" / "model.safetensors") for name in ("whole", "run")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_stopped_run_may_go_on_with_other_health(
    toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A non-finite step that stopped the run is left out once the recipe backs off."""
    with monkeypatch.context() as patch:
        poison(patch, loop_module.TokenizerObjective, 3)
        with pytest.raises(NonFiniteLoss):
            Run(recipe_of(toy_recipe), tmp_path / "run").train()
    with monkeypatch.context() as patch:
        poison(patch, loop_module.TokenizerObjective, 1)
        Run(recipe_of(toy_recipe, health={"on_non_finite": "back_off"}), tmp_path / "run", resume=True).train()
    assert [e["step"] for e in events(tmp_path / "run", "warning") if e["kind"] == "non_finite"] == [3]


SCRIPT = """
import os, sys, torch
from ett.experiments.recipe import load_recipe
from ett.experiments.run import Run
from ett.train import loop

plain = loop.Stage._train_step
def step(self, batches):
    if self.step + 1 == 2 and os.environ["RANK"] == "1":
        batches[0].pixel_values[0, 0, 0, 0] = float("nan")
    return plain(self, batches)
loop.Stage._train_step = step
try:
    Run(load_recipe(sys.argv[1]), __import__("pathlib").Path(sys.argv[2])).train()
finally:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["back_off", "stop"])
def test_ranks_decide_the_same(answer: str, toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """One of two processes sees a picture that is not a number: both leave the step out, or both stop."""
    recipe = recipe_of(toy_recipe, health={"every": 1, "on_collapse": "stop", "on_non_finite": answer})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    arguments = [str(tmp_path / "script.py"), str(tmp_path / "recipe.yaml"), str(tmp_path / "run")]
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if answer == "stop":
        assert found.returncode != 0
        assert found.stderr.count("NonFiniteLoss: Stage tokenizer, step 2") == 2
        return
    assert found.returncode == 0, found.stderr
    assert [e["step"] for e in events(tmp_path / "run", "warning") if e["kind"] == "non_finite"] == [2]
    assert [e["step"] for e in events(tmp_path / "run", "health")] == [1, 2, 3, 4, 5]
    assert all(json.dumps(e, allow_nan=False) for e in events(tmp_path / "run", "health"))


def test_impossible_settings() -> None:
    for health in ({"every": 0}, {"pictures": -1}, {"min_usage": 2}, {"back_off": 1}, {"max_back_offs": 0}):
        given = {"stages": [{"stage": "tokenizer", "steps": 1, "batch_size": 1, "health": health}]}
        with pytest.raises(RecipeError, match=next(iter(health))):
            from_mapping(Recipe, {"name": "x", "model": {"image_size": 32}, **given})

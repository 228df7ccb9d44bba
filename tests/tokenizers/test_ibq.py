"""The CNN tokenizer: the reference's layout, any size, its own precision, strict saving and loading."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ett.errors import ModelError, RecipeError
from ett.tokenizers import IBQConfig, IBQTokenizer, IndexBackpropagationQuantizer, VisionTokenizer
from tests.conftest import TOKENIZER

REFERENCE = Path(__file__).parents[1] / "parity" / "ibq_keys.txt"


def toy() -> IBQTokenizer:
    tokenizer = VisionTokenizer.from_config(dict(TOKENIZER))
    assert isinstance(tokenizer, IBQTokenizer)
    return tokenizer


def test_reference_layout_name_by_name() -> None:
    """The defaults are the reference's 543 tensors, with its shapes at K = 262,144."""
    with torch.device("meta"):
        tokenizer = IBQTokenizer(IBQConfig(codebook_size=262144))
    expected = dict(line.split("\t") for line in REFERENCE.read_text(encoding="utf-8").splitlines())
    assert {name: str(tuple(tensor.shape)) for name, tensor in tokenizer.state_dict().items()} == expected
    assert len(expected) == 543
    assert tokenizer.downsample == 16


@pytest.mark.parametrize(
    ("multipliers", "blocks", "attention"),
    [((1,), 1, ()), ((1, 2), 2, (-1,)), ((2, 1, 3, 1), 1, (0, 2)), ((1, 1, 1, 1, 2), 1, (-1,))],
)
def test_any_depth_and_width(multipliers: tuple[int, ...], blocks: int, attention: tuple[int, ...]) -> None:
    config = IBQConfig(
        channels=8,
        channel_multipliers=multipliers,
        num_res_blocks=blocks,
        attention_levels=attention,
        z_channels=12,
        norm_groups=4,
        codebook_size=32,
        codebook_dim=6,
    )
    tokenizer = IBQTokenizer(config)
    side = tokenizer.downsample
    assert side == 2 ** (len(multipliers) - 1)
    pixels = torch.rand(2, 3, 3 * side, 5 * side) * 2 - 1
    reconstruction, quantized = tokenizer(pixels)
    assert reconstruction.shape == pixels.shape
    assert quantized.embeddings.shape == (2, 6, 3, 5)
    assert quantized.indices.shape == (2, 3, 5)
    assert quantized.indices.dtype == torch.int64
    (reconstruction.abs().mean() + quantized.quantization_loss + quantized.entropy_loss).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in tokenizer.parameters())


def test_indices_to_pixels_is_the_same_way_as_forward() -> None:
    tokenizer = toy().eval()
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    reconstruction, quantized = tokenizer(pixels)
    assert torch.equal(tokenizer.tokenize(pixels), quantized.indices)
    torch.testing.assert_close(tokenizer.detokenize(quantized.indices), reconstruction.detach().clamp(-1, 1))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"30 x 32 pixels .* multiples of 4"):
        toy().encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"\[I, 3, H, W\]"):
        toy().encode(torch.zeros(1, 1, 32, 32))


def test_precision_is_the_tokenizers_own() -> None:
    """float32 holds under autocast; bfloat16 holds without it."""
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    plain = toy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = plain.encode(pixels)
    assert torch.equal(inside, plain.encode(pixels))
    reduced = IBQTokenizer(IBQConfig(**{**plain.config.__dict__, "precision": "bfloat16"}))
    reduced.load_state_dict(plain.state_dict())
    difference = (reduced.encode(pixels) - plain.encode(pixels)).abs().max()
    assert 0 < difference < 0.1
    assert reduced.encode(pixels).dtype == torch.float32


def test_save_and_load_exactly(tmp_path: Path) -> None:
    tokenizer = toy()
    tokenizer.save_pretrained(tmp_path)
    again = VisionTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, IBQTokenizer)
    assert again.config == tokenizer.config
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_loading_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        VisionTokenizer.from_pretrained(tmp_path)
    tokenizer = toy()
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))

    (tmp_path / "config.json").write_text(json.dumps(config | {"num_res_blocks": 2}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"another architecture: \d+ missing"):
        VisionTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"codebook_size": 65}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"quantize.embedding.weight is \[64, 8\], expected \[65, 8\]"):
        VisionTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"codebok_size": 65}), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"codebok_size.* Did you mean .*codebook_size"):
        VisionTokenizer.from_pretrained(tmp_path)

    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        VisionTokenizer.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tokenizer = VisionTokenizer.from_config(TOKENIZER)
    with torch.no_grad():
        next(tokenizer.parameters())[0, 0, 0, 0] = math.nan
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not finite"):
        VisionTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ModelError, match="not valid JSON"):
        VisionTokenizer.from_pretrained(tmp_path)


def test_features_without_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[B, 4, h, w\]"):
        IndexBackpropagationQuantizer(16, 4).nearest(torch.randn(4, 3, 3))


def test_another_score_over_the_same_weights() -> None:
    """From distances to dot products or normalised codes: the unit goes, a learned scale comes, all else is shared."""
    saved = VisionTokenizer.from_config({**TOKENIZER, "similarity": "distance", "temperature": 0.5})
    saved.quantize.distance_unit.fill_(3.0)
    dot = saved.reconfigured({"similarity": "dot", "temperature": 1.5})
    assert isinstance(dot, IBQTokenizer)
    assert (dot.config.similarity, dot.quantize.distance_unit, dot.quantize.log_scale) == ("dot", None, None)
    assert dot.quantize.embedding.weight is saved.quantize.embedding.weight
    features = torch.randn(2, TOKENIZER["codebook_dim"], 3, 3)
    expected = (features.permute(0, 2, 3, 1) @ saved.quantize.embedding.weight.T).argmax(-1)
    assert torch.equal(dot.quantize.nearest(features), expected)

    unit = saved.reconfigured({"similarity": "dot", "normalize": True, "radius": 2.5})
    assert isinstance(unit, IBQTokenizer)
    fresh = VisionTokenizer.from_config({**TOKENIZER, "normalize": True})
    assert torch.equal(unit.quantize.log_scale, fresh.quantize.log_scale)
    assert "quantize.log_scale" in dict(unit.named_parameters())
    assert "distance_unit" not in unit.quantize.state_dict()
    # a unit of distance is measured on pictures and cannot begin from nothing
    with pytest.raises(RecipeError, match=r"similarity.*measured on pictures"):
        dot.reconfigured({"similarity": "distance"})
    with pytest.raises(RecipeError, match="weights have another shape"):
        saved.reconfigured({"codebook_size": TOKENIZER["codebook_size"] + 1})


@pytest.mark.parametrize("similarity", ["dot", "distance"])
def test_fewer_codes_are_centres_of_the_saved_ones(similarity: str) -> None:
    """Codes in eight clumps, of which the encoder knows nothing: eight codes find each of them; all else is shared."""
    saved = VisionTokenizer.from_config({**TOKENIZER, "similarity": similarity})
    size, dim = TOKENIZER["codebook_size"], TOKENIZER["codebook_dim"]
    centres = (
        4 * F.one_hot(torch.arange(8) % dim, dim).float() * torch.tensor([1.0, -1.0]).repeat_interleave(4)[:, None]
    )
    codes = centres.repeat_interleave(size // 8, dim=0) + 0.01 * torch.randn(size // 8 * 8, dim)
    saved.quantize.embedding.weight.data.copy_(codes)
    random_state = torch.get_rng_state()
    fewer = saved.reconfigured({"codebook_size": 8})
    assert torch.equal(torch.get_rng_state(), random_state)
    assert fewer.codebook_size == fewer.quantize.codebook_size == 8
    assert torch.cdist(centres, fewer.quantize.codebook).amin(dim=1).max() < 0.1
    if similarity == "distance":
        distance = torch.cdist(codes, fewer.quantize.codebook).amin(dim=1).pow(2).mean()
        torch.testing.assert_close(fewer.quantize.distance_unit, distance, rtol=1e-3, atol=1e-7)
    assert fewer.encoder_output is saved.encoder_output
    assert torch.equal(saved.reconfigured({"codebook_size": 8}).quantize.codebook, fewer.quantize.codebook)
    assert saved.codebook_size == size


def test_codes_that_were_normalised_go_on_at_their_length() -> None:
    """Without normalisation dot products choose the same indices, and the decoder is given the same embeddings."""
    saved = VisionTokenizer.from_config({**TOKENIZER, "normalize": True, "radius": 2.5})
    dot = saved.reconfigured({"normalize": False})
    assert isinstance(dot, IBQTokenizer)
    assert dot.quantize.log_scale is None
    features = torch.randn(2, TOKENIZER["codebook_dim"], 5, 5)
    before, after = saved.quantize(features), dot.quantize(features)
    assert torch.equal(before.indices, after.indices)
    torch.testing.assert_close(before.embeddings, after.embeddings)
    torch.testing.assert_close(
        dot.quantize.embedding.weight.norm(dim=1), torch.full((TOKENIZER["codebook_size"],), 2.5)
    )
    assert dict(dot.named_parameters())["quantize.embedding.weight"].requires_grad
    kept = saved.reconfigured({"temperature": 0.5})
    assert kept.quantize.embedding.weight is saved.quantize.embedding.weight


def test_the_radius_of_normalised_codes_changes_lengths_alone() -> None:
    one, far = (IndexBackpropagationQuantizer(16, 4, normalize=True, radius=radius) for radius in (1.0, 3.0))
    far.load_state_dict(one.state_dict())
    features, weight = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    gradients = []
    for quantizer in (one, far):
        z = features.clone().requires_grad_()
        found = quantizer(z)
        (found.embeddings / quantizer.radius * weight).sum().backward()
        gradients.append(z.grad)
    first, second = one(features), far(features)
    assert torch.equal(first.indices, second.indices)
    torch.testing.assert_close(second.embeddings, 3.0 * first.embeddings)
    torch.testing.assert_close(second.embeddings.norm(dim=1), torch.full((2, 3, 3), 3.0))
    torch.testing.assert_close(second.quantization_loss, 9.0 * first.quantization_loss)
    torch.testing.assert_close(second.entropy_loss, first.entropy_loss)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert far.softmax_statistics(features).nearest_share == 1.0
    assert far.softmax_statistics(features).top1_mass == pytest.approx(
        one.softmax_statistics(features).top1_mass, rel=1e-5
    )
    rows = torch.randn(1, 4, 40, 1)
    assert far.place_codes(rows) == pytest.approx(9.0 * one.place_codes(rows), rel=1e-4)
    torch.testing.assert_close(far.codebook, 3.0 * one.codebook)
    with pytest.raises(RecipeError, match="radius"):
        VisionTokenizer.from_config({**TOKENIZER, "radius": 0.0})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("channels", 10, "multiples of norm_groups"),
        ("num_res_blocks", 0, "at least 1"),
        ("attention_levels", [5], r"in \[-3, 2\]"),
        ("codebook_size", 1, "at least 2"),
        ("precision", "float16", "Allowed: float32, bfloat16"),
        ("channel_multipliers", [], "non-empty"),
        ("tokenizer_type", "vqq", "Allowed: .*ibq"),
    ],
)
def test_impossible_values_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        VisionTokenizer.from_config(dict(TOKENIZER) | {field: value})

"""The CNN tokenizer: the reference's layout, any size, its own precision, strict saving and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ett.errors import ModelError, RecipeError
from ett.tokenizers import IBQConfig, IBQTokenizer, VisionTokenizer
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

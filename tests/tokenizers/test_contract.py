"""The contract of every vision tokenizer: one suite over all of them. Add a case to `cases.py`, and nothing here."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ett.config import from_mapping
from ett.errors import RecipeError
from ett.experiments.run import Run
from ett.losses.joint import LossConfig, tokenizer_loss
from ett.model import EttForConditionalGeneration, EttProcessor
from ett.model.build import ModelSpec, build_model, build_vision_tokenizer
from ett.tokenizers import IndexBackpropagationQuantizer, VisionTokenizer
from ett.tokenizers.cnn import Decoder, Encoder
from ett.train.log import read_log
from ett.train.optim import OptimizerConfig, build_optimizer
from ett.train.stages import StageConfig, caption_reach, check_reach, set_trainable, train_mode
from tests.conftest import LANGUAGE_MODELS
from tests.experiments.test_run import recipe_from
from tests.model.test_ett import encoded, inputs
from tests.tokenizers.cases import CASES, WITHOUT_CODEBOOK_PARAMETER

every_tokenizer = pytest.mark.parametrize("name", CASES)


def make(name: str, **changes: Any) -> VisionTokenizer:
    torch.manual_seed(0)
    return VisionTokenizer.from_config(copy.deepcopy(CASES[name]) | changes)


def pixels(tokenizer: VisionTokenizer, count: int = 2) -> Tensor:
    """float[count, 3, 2 s, 3 s] in [-1, 1]; s is the downsampling."""
    side = tokenizer.downsample
    return torch.rand(count, 3, 2 * side, 3 * side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_every_registered_type_has_a_case() -> None:
    # other tests register toys of their own
    ours = {kind for kind, cls in VisionTokenizer.registry.items() if cls.__module__.startswith("ett.")}
    assert {case.get("tokenizer_type", "ibq") for case in CASES.values()} == ours


@every_tokenizer
@pytest.mark.parametrize("entropy", [True, False])
def test_shapes_types_and_ranges(name: str, entropy: bool) -> None:
    tokenizer = make(name)
    x = pixels(tokenizer)
    features = tokenizer.encode(x)
    reconstruction, quantized = tokenizer(x, entropy=entropy)
    size, dim = tokenizer.codebook_size, tokenizer.codebook_dim
    assert features.shape == quantized.embeddings.shape == (2, dim, 2, 3)
    assert features.dtype == quantized.embeddings.dtype == reconstruction.dtype == torch.float32
    assert reconstruction.shape == x.shape
    assert quantized.indices.shape == (2, 2, 3)
    assert quantized.indices.dtype == torch.int64
    assert 0 <= quantized.indices.min() <= quantized.indices.max() < size
    assert tokenizer.quantize.codebook.shape == (size, dim)
    assert tokenizer.quantize.codebook.dtype == torch.float32
    for term in (quantized.quantization_loss, quantized.entropy_loss):
        assert term.shape == ()
        assert torch.isfinite(term)
    assert quantized.quantization_loss >= 0
    assert -torch.tensor(size).log() - 1e-4 <= quantized.entropy_loss <= torch.tensor(size).log() + 1e-4
    if not entropy:
        assert quantized.entropy_loss == 0
        assert torch.equal(quantized.usage, torch.bincount(quantized.indices.flatten(), minlength=size).float())
    assert quantized.usage.shape == (size,)
    assert not quantized.usage.requires_grad
    assert float(quantized.usage.sum()) == pytest.approx(12, rel=1e-4)


@every_tokenizer
def test_what_reads_the_embeddings_teaches_encoder_and_codebook(name: str) -> None:
    tokenizer = make(name)
    quantized = tokenizer.quantize(tokenizer.encode(pixels(tokenizer)))
    weights = torch.randn(quantized.embeddings.shape)
    (quantized.embeddings * weights).sum().backward()
    first = next(tokenizer.encoder.parameters())
    for parameter in (first, tokenizer.encoder_output):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    codebook = list(tokenizer.quantize.parameters())
    if name in WITHOUT_CODEBOOK_PARAMETER:
        assert codebook == []
        return
    table = tokenizer.get_parameter("quantize.embedding.weight")
    assert table.shape == (tokenizer.codebook_size, tokenizer.codebook_dim)
    assert table.grad is not None
    used = quantized.indices.unique()
    assert (table.grad[used].abs().sum(dim=1) > 0).all()


@every_tokenizer
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    tokenizer = make(name)
    x = pixels(tokenizer)
    reconstruction, quantized = tokenizer(x)
    ((reconstruction - x).abs().mean() + quantized.quantization_loss + 0.05 * quantized.entropy_loss).backward()
    for parameter_name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
    outer = [tokenizer.encoder_output, *(p for n, p in tokenizer.named_parameters() if n.startswith("post_quant_conv"))]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in outer)


@every_tokenizer
def test_index_to_embedding_to_picture(name: str) -> None:
    """What forward decodes, an index alone decodes too, and the codebook says which embedding that is."""
    tokenizer = make(name).eval()
    x = pixels(tokenizer)
    reconstruction, quantized = tokenizer(x)
    assert torch.equal(tokenizer.tokenize(x), quantized.indices)
    looked_up = tokenizer.quantize.lookup(quantized.indices)
    assert torch.equal(looked_up, quantized.embeddings)
    assert torch.equal(tokenizer.quantize.codebook[quantized.indices].movedim(-1, 1), looked_up)
    drawn = tokenizer.detokenize(quantized.indices)
    torch.testing.assert_close(drawn, reconstruction.detach().clamp(-1, 1))
    other = (quantized.indices + 1) % tokenizer.codebook_size
    assert not torch.equal(tokenizer.detokenize(other), drawn)
    with pytest.raises(IndexError):
        tokenizer.detokenize(torch.full_like(quantized.indices, tokenizer.codebook_size))


@every_tokenizer
def test_indices_are_the_same_in_training_and_alone(name: str) -> None:
    tokenizer = make(name).train()
    x = pixels(tokenizer, 3)
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    together = tokenizer(x)[1].indices
    assert torch.equal(together, tokenizer.eval().tokenize(x))
    assert torch.equal(together[1:2], tokenizer.tokenize(x[1:2]))
    assert all(torch.equal(value, before[key]) for key, value in tokenizer.state_dict().items())


@every_tokenizer
def test_save_and_load_exactly(name: str, tmp_path: Path) -> None:
    tokenizer = make(name)
    tokenizer.save_pretrained(tmp_path)
    again = VisionTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert not again.training
    assert again.config == tokenizer.config
    assert again.config_mapping() == tokenizer.config_mapping()
    assert set(again.state_dict()) == set(tokenizer.state_dict())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in tokenizer.state_dict().items())
    x = pixels(tokenizer)
    assert torch.equal(again(x)[0], tokenizer.eval()(x)[0])


@every_tokenizer
def test_precision_and_sizes(name: str) -> None:
    tokenizer = make(name)
    x = pixels(tokenizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, quantized = tokenizer.encode(x), tokenizer(x)[1]
    assert torch.equal(inside, tokenizer.encode(x))
    assert torch.equal(quantized.indices, tokenizer.tokenize(x))
    reduced = make(name, precision="bfloat16")
    assert reduced.encode(x).dtype == torch.float32
    assert 0 < (reduced.encode(x) - inside).abs().max() < 0.2 * inside.abs().max()
    with pytest.raises(ValueError, match="multiples of"):
        tokenizer.encode(torch.zeros(1, 3, tokenizer.downsample + 1, tokenizer.downsample))


@every_tokenizer
def test_moving_to_a_narrow_type_rounds_no_code(name: str) -> None:
    tokenizer = make(name)
    codes = tokenizer.quantize.codebook.detach().clone()
    assert torch.equal(tokenizer.to(torch.bfloat16).quantize.codebook, codes)


@pytest.mark.parametrize("name", ["ibq", "fsq", "lfq"])
def test_a_seed_stands_for_the_same_fresh_weights(name: str) -> None:
    """Of the own CNN: the parts draw their weights in this order, under these names, whatever class assembles them."""
    tokenizer = make(name)
    config = tokenizer.config
    torch.manual_seed(0)
    parts = {"encoder": Encoder(config), "decoder": Decoder(config)}
    if name == "ibq":
        parts["quantize"] = IndexBackpropagationQuantizer(config.codebook_size, config.codebook_dim)
    parts["quant_conv"] = torch.nn.Conv2d(config.z_channels, tokenizer.codebook_dim, 1)
    parts["post_quant_conv"] = torch.nn.Conv2d(tokenizer.codebook_dim, config.z_channels, 1)
    wanted = {f"{part}.{key}": value for part in parts for key, value in parts[part].state_dict().items()}
    found = {key: value for key, value in tokenizer.state_dict().items() if key.partition(".")[0] in parts}
    assert list(found) == list(wanted)
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())
    assert {key.partition(".")[0] for key in tokenizer.state_dict()} <= {*parts, "quantize"}


@pytest.mark.parametrize("name", CASES)
def test_unknown_and_impossible_values_are_named(name: str) -> None:
    with pytest.raises(RecipeError, match=r"precison.* Did you mean .*precision"):
        make(name, precison="float32")
    if "config" in CASES[name]:
        with pytest.raises(RecipeError, match=r"'in_chanels'\. Did you mean 'in_channels'"):
            make(name, config=CASES[name]["config"] | {"in_chanels": 3})
        with pytest.raises(RecipeError, match="3 channels"):
            make(name, config=CASES[name]["config"] | {"in_channels": 4})


def model_around(name: str) -> tuple[EttForConditionalGeneration, EttProcessor]:
    spec = from_mapping(
        ModelSpec,
        {
            "image_size": 16,
            "vision_tokenizer": copy.deepcopy(CASES[name]),
            "language_model": {"config": LANGUAGE_MODELS["llama"]},
            "projector": {"merge_size": 2},
        },
    )
    torch.manual_seed(0)
    return build_model(spec, build_vision_tokenizer(spec))


@every_tokenizer
def test_semantic_steps_lower_both_losses(name: str) -> None:
    """L_cap and L_vq fall together, and the caption loss reaches what the stage trains."""
    model, processor = model_around(name)
    batch = encoded(processor)
    stage = StageConfig("semantic", steps=1, batch_size=3)
    set_trainable(model, stage.parts)
    train_mode(model, stage.parts)
    check_reach(caption_reach(model, batch, stage.loss_config), stage, "embedding")
    weights = stage.loss_config
    optimizer = build_optimizer({"all": model}, OptimizerConfig(learning_rate=1e-3))
    history: list[tuple[float, float]] = []
    for _ in range(6):
        out = model(**inputs(batch), loss_config=weights)
        terms = {term: value.detach() for term, value in out.losses.items()}
        history.append((float(terms["caption_loss"]), float(tokenizer_loss(terms, weights))))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert history[-1][0] < history[0][0]
    assert history[-1][1] < history[0][1]


@every_tokenizer
def test_a_frozen_tokenizer_gets_no_gradient(name: str) -> None:
    model, processor = model_around(name)
    stage = StageConfig("align", steps=1, batch_size=3)
    set_trainable(model, stage.parts)
    check_reach(caption_reach(model, encoded(processor), stage.loss_config), stage, "embedding")
    cut = replace(LossConfig(), caption_reaches_tokenizer=False)
    semantic = StageConfig("semantic", steps=1, batch_size=3)
    set_trainable(model, semantic.parts)
    with pytest.raises(AssertionError, match="does not reach the encoder"):
        check_reach(caption_reach(model, encoded(processor), cut), semantic, "embedding")


@every_tokenizer
def test_a_whole_model_saves_and_loads(name: str, tmp_path: Path) -> None:
    model, processor = model_around(name)
    model.save_pretrained(tmp_path)
    again = EttForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    model.eval()
    own = model.vision_tokenizer.state_dict()
    for key, value in again.vision_tokenizer.state_dict().items():
        assert value.dtype == own[key].dtype or key.endswith("num_batches_tracked"), key
        assert torch.equal(value, own[key]), key
    x = encoded(processor).pixel_values
    indices = model.vision_tokenizer.tokenize(x)
    assert torch.equal(again.vision_tokenizer.tokenize(x), indices)
    # close: transformers lays loaded convolutions out in another order
    torch.testing.assert_close(*(each.vision_tokenizer.detokenize(indices) for each in (again, model)))
    assert torch.equal(again.vision_tokenizer.quantize.codebook, model.vision_tokenizer.quantize.codebook)


@pytest.mark.parametrize("name", ["fsq", "emu3", "diffusers"])
def test_in_a_recipe(name: str, toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    chosen = copy.deepcopy(CASES[name])
    if name == "diffusers":
        make(name).save_pretrained(tmp_path / "saved")
        chosen = {"path": str(tmp_path / "saved")}
    toy_recipe["model"] |= {"image_size": 16, "vision_tokenizer": chosen}
    stage = {"steps": 1, "batch_size": 2, "log_every": 1}
    toy_recipe["stages"] = [stage | {"stage": "tokenizer"}, stage | {"stage": "semantic"}]
    Run(recipe_from(toy_recipe), tmp_path / "run").train()
    reach = [event for event in read_log(tmp_path / "run" / "log.jsonl") if event["event"] == "reach"]
    assert reach[0]["caption_gradient_norms"]["encoder"] > 0


def test_registering_imports_no_library() -> None:
    code = (
        "import sys, ett.tokenizers; print([m for m in ('transformers', 'diffusers', 'vector_quantize_pytorch') "
        "if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

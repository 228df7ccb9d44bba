"""The adapters against the libraries themselves, on random weights: indices, pictures, names of weights, refusals."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor, nn
from transformers import (
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    JanusVQVAE,
    JanusVQVAEConfig,
)

from ett.errors import ModelError, RecipeError
from ett.tokenizers import (
    ChameleonTokenizer,
    DiffusersVQTokenizer,
    Emu3Tokenizer,
    IndexBackpropagationQuantizer,
    JanusTokenizer,
    TransformersVQTokenizer,
    VisionTokenizer,
)
from tests.tokenizers.cases import CASES, CHAMELEON, DIFFUSERS, EMU3, JANUS, SPATIAL


def pictures() -> Tensor:
    return torch.rand(3, 3, 16, 16) * 2 - 1


def spread(module: nn.Module) -> nn.Module:
    """`module` with weights and codes large enough that pictures use many codes, and with statistics that are not trivial."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=1.0 if "embedding" in name else parameter[0].numel() ** -0.5)
        for name, buffer in module.named_buffers():
            if "running_mean" in name:
                buffer.normal_()
            elif "running_var" in name:
                buffer.uniform_(0.5, 2)
    return module.eval()


def test_emu3_is_the_library() -> None:
    library = spread(Emu3VQVAE(Emu3VQVAEConfig(**EMU3)))
    tokenizer = TransformersVQTokenizer.from_module(library)
    assert isinstance(tokenizer, Emu3Tokenizer)
    assert not tokenizer.training
    x = pictures()
    with torch.no_grad():
        # codes among the features, so that many are used
        rows = tokenizer.encode(x).movedim(1, -1).flatten(0, 2)
        library.quantize.embedding.weight.copy_(rows[:: len(rows) // 32][:32] + 0.01 * torch.randn(32, 8))
        expected = torch.stack(library.encode(x, image_sizes=[(16, 16)] * 3).image_tokens)
        drawn = library.decode(expected)
        reconstruction, quantized = tokenizer(x)
    assert len(expected.unique()) > 5
    assert torch.equal(quantized.indices, expected)
    assert torch.equal(tokenizer.tokenize(x), expected)
    torch.testing.assert_close(reconstruction, drawn, atol=1e-5, rtol=1e-4)


def test_janus_is_the_library() -> None:
    library = spread(JanusVQVAE(JanusVQVAEConfig(**JANUS)))
    tokenizer = TransformersVQTokenizer.from_module(library, temperature=2.0)
    assert isinstance(tokenizer, JanusTokenizer)
    assert tokenizer.quantize.temperature == 2.0
    x = pictures()
    with torch.no_grad():
        expected = library.encode(x).image_tokens.view(3, 8, 8)
        drawn = library(x).decoded_pixel_values
        reconstruction, quantized = tokenizer(x)
    assert len(expected.unique()) > 5
    assert torch.equal(quantized.indices, expected)
    torch.testing.assert_close(reconstruction, drawn, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokenizer.quantize.codebook.norm(dim=1), torch.ones(32))


def test_janus_normalized_searches_among_unit_vectors() -> None:
    """As the original code does: the code of the largest cosine, which is not always the nearest of the raw ones."""
    library = spread(JanusVQVAE(JanusVQVAEConfig(**JANUS)))
    tokenizer = JanusTokenizer.from_module(library, normalize=True)
    x = pictures()
    with torch.no_grad():
        z = F.normalize(library.quant_conv(library.encoder(x)), dim=1).permute(0, 2, 3, 1)
        cosine = (z @ F.normalize(library.quantize.embedding.weight, dim=1).T).argmax(dim=-1)
        assert torch.equal(tokenizer.tokenize(x), cosine)
        assert not torch.equal(cosine, library.encode(x).image_tokens.view(3, 8, 8))
        drawn = library.decode(cosine.flatten(1))
        torch.testing.assert_close(tokenizer(x)[0], drawn, atol=1e-5, rtol=1e-4)


def test_chameleon_is_the_library_up_to_its_missing_decoder() -> None:
    library = spread(ChameleonVQVAE(ChameleonVQVAEConfig(**CHAMELEON)))
    tokenizer = TransformersVQTokenizer.from_module(library)
    assert isinstance(tokenizer, ChameleonTokenizer)
    x = pictures()
    with torch.no_grad():
        found = library.encode(x)
        quantized = tokenizer(x)[1]
    assert len(found.image_tokens.unique()) > 5
    assert torch.equal(quantized.indices, found.image_tokens.view(3, 8, 8))
    torch.testing.assert_close(quantized.embeddings, found.quantized_last_hidden_state)
    shapes = {name.removeprefix("encoder."): tuple(t.shape) for name, t in library.state_dict().items()}
    twin = {name.removeprefix("decoder."): tuple(t.shape) for name, t in tokenizer.state_dict().items()}
    for name in ("mid.block_1.conv1.weight", "mid.attn_1.q.weight", "norm_out.weight"):
        assert shapes[name] == twin[name]
    # attention where the encoder has it: at 8 pixels a side, level 1
    assert len(tokenizer.get_submodule("decoder.up.1.attn")) == 2
    assert len(tokenizer.get_submodule("decoder.up.0.attn")) == 0


@pytest.mark.parametrize("values", [DIFFUSERS, SPATIAL])
def test_diffusers_is_the_library(values: dict[str, Any]) -> None:
    library = spread(VQModel(**values))
    tokenizer = DiffusersVQTokenizer.from_module(library)
    x = pictures()
    with torch.no_grad():
        features = library.encode(x).latents
        expected = library.quantize(features)[2][2].view(3, 8, 8)
        drawn = library(x).sample
        reconstruction, quantized = tokenizer(x)
    assert len(expected.unique()) > 5
    torch.testing.assert_close(tokenizer.encode(x), features)
    assert torch.equal(quantized.indices, expected)
    torch.testing.assert_close(reconstruction, drawn, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["chameleon", "diffusers"])
def test_straight_through_is_the_librarys_training(kind: str) -> None:
    """With this gradient L_quant and the gradient to the encoder are the library's own."""
    library: Any
    if kind == "chameleon":
        library = spread(ChameleonVQVAE(ChameleonVQVAEConfig(**CHAMELEON)))
        tokenizer: VisionTokenizer = ChameleonTokenizer.from_module(library, gradient="straight_through")
    else:
        library = spread(VQModel(**DIFFUSERS))
        tokenizer = DiffusersVQTokenizer.from_module(library, gradient="straight_through")
    z = torch.randn(2, 8, 4, 4)
    weights = torch.randn(2, 8, 4, 4)
    gradients = []
    for quantize in (tokenizer.quantize, library.quantize):
        features = z.clone().requires_grad_(True)
        found = quantize(features)
        embeddings, loss = (found[0], found[1]) if isinstance(found, tuple) else (
            found.embeddings, found.quantization_loss,
        )  # fmt: skip
        ((embeddings * weights).sum() + loss).backward()
        gradients.append((features.grad, loss.detach()))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("name", ["emu3", "janus", "chameleon", "diffusers"])
def test_weights_have_the_librarys_names(name: str) -> None:
    """A checkpoint of the library is one of the adapter: same names and shapes, but for the decoder that Chameleon lacks."""
    libraries: dict[str, Any] = {
        "emu3": lambda: Emu3VQVAE(Emu3VQVAEConfig(**EMU3)),
        "janus": lambda: JanusVQVAE(JanusVQVAEConfig(**JANUS)),
        "chameleon": lambda: ChameleonVQVAE(ChameleonVQVAEConfig(**CHAMELEON)),
        "diffusers": lambda: VQModel(**DIFFUSERS),
    }
    library = libraries[name]()
    theirs = {key: value.shape for key, value in library.state_dict().items()}
    own = {key: value.shape for key, value in VisionTokenizer.from_config(dict(CASES[name])).state_dict().items()}
    assert own.pop("quantize.distance_unit") == ()
    if name == "chameleon":
        own = {key: shape for key, shape in own.items() if not key.startswith("decoder.")}
    assert own == theirs


@pytest.mark.parametrize(
    ("kind", "downsample", "size", "dim"),
    [("emu3_vqvae", 8, 32768, 4), ("chameleon_vqvae", 16, 8192, 256), ("janus_vqvae", 16, 16384, 8)],
)
def test_defaults_are_the_published_tokenizers(kind: str, downsample: int, size: int, dim: int) -> None:
    with torch.device("meta"):
        tokenizer = VisionTokenizer.from_config({"tokenizer_type": kind})
        assert tokenizer._encode(torch.zeros(1, 3, 64, 64)).shape == (1, dim, 64 // downsample, 64 // downsample)
    assert (tokenizer.downsample, tokenizer.codebook_size, tokenizer.codebook_dim) == (downsample, size, dim)


def test_a_loaded_module_is_taken_over_in_float32() -> None:
    library = JanusVQVAE(JanusVQVAEConfig(**JANUS)).to(torch.bfloat16).requires_grad_(False)
    tokenizer = JanusTokenizer.from_module(library)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in tokenizer.parameters())
    assert tokenizer.config.config["num_embeddings"] == 32
    assert tokenizer.config.config["dropout"] == 0.0  # defaults are written down too
    with pytest.raises(RecipeError, match="Allowed: index_backprop"):
        JanusTokenizer.from_module(library, gradient="none")
    with pytest.raises(RecipeError, match=r"Unknown key of JanusTokenizer\.from_module 'config'"):
        JanusTokenizer.from_module(library, config={})
    with pytest.raises(TypeError, match="takes a Emu3VQVAE, got a JanusVQVAE"):
        Emu3Tokenizer.from_module(library)
    with pytest.raises(TypeError, match="Expected one of ChameleonVQVAE"):
        TransformersVQTokenizer.from_module(nn.Linear(1, 1))


def test_batch_statistics_stay_what_they_were() -> None:
    tokenizer = VisionTokenizer.from_config(dict(CASES["emu3"])).train()
    norms = [m for m in tokenizer.modules() if isinstance(m, nn.BatchNorm3d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert tokenizer.decoder.training


def test_the_unit_of_distance_fits_the_features() -> None:
    """A codebook that is kept gets the unit that k-means would have measured; indices do not depend on it."""
    tokenizer = DiffusersVQTokenizer.from_module(spread(VQModel(**DIFFUSERS)))
    quantizer, x = tokenizer.quantize, pictures()
    assert isinstance(quantizer, IndexBackpropagationQuantizer)
    quantizer.requires_grad_(False)
    features, before = tokenizer.encode(x).detach(), tokenizer.tokenize(x)
    unit = quantizer.fit_unit(features)
    distance = (features - quantizer.lookup(before)).pow(2).sum(dim=1).mean()
    assert unit == pytest.approx(float(distance), rel=1e-4)
    assert float(tokenizer.state_dict()["quantize.distance_unit"]) == pytest.approx(unit)
    assert torch.equal(tokenizer.tokenize(x), before)
    with pytest.raises(ValueError, match="has no unit"):
        IndexBackpropagationQuantizer(4, 2).fit_unit(torch.zeros(1, 2, 1, 1))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("emu3", {"embed_dim": 4}, "must equal config.latent_channels = 8"),
        ("emu3", {"hidden_size": 64}, r"channel_multiplier\[-1\] = 32"),
        ("emu3", {"temporal_downsample_factor": 3}, "power of two"),
        ("emu3", {"num_res_blocks": "two"}, "cannot build a Emu3VQVAE"),
        ("janus", {"double_latent": True}, "double_latent"),
        ("chameleon", {"base_channels": 20}, "cannot build a ChameleonVQVAE"),
        ("diffusers", {"down_block_types": ["Nothing"] * 2}, "cannot build a VQModel"),
        (
            "diffusers",
            {"norm_type": "spatial", "block_out_channels": [32, 32]},
            "must equal config.latent_channels = 12",
        ),
    ],
)
def test_impossible_values_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    given = CASES[name] | {"config": CASES[name]["config"] | changes}
    with pytest.raises(RecipeError, match=message):
        VisionTokenizer.from_config(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0}, "temperature = 0.0"),
        ({"entropy_temperature": -1}, "entropy_temperature"),
        ({"gradient": "reinforce"}, "Allowed: index_backprop, straight_through"),
    ],
)
def test_our_own_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        VisionTokenizer.from_config(CASES["janus"] | changes)


def test_without_diffusers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModelError, match=r"pip install 'ett-tuning\[diffusers\]'"):
        VisionTokenizer.from_config(CASES["diffusers"])

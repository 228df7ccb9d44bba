"""Foreign checkpoints, written here from the published names: imported bit for bit, exported back, refused when wrong.

The 543 published names are taken from the parity file with every width divided by 32. Diffusers' names are made by plain
text substitution, and its forward pass is written out on the file's own names, so that nothing here leans on the code
under test.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from ett.cli import main
from ett.errors import ModelError, UserError
from ett.losses.adversarial import DiscriminatorConfig, PatchDiscriminator
from ett.tokenizers import IBQConfig, IBQTokenizer, VisionTokenizer
from ett.tokenizers.layout_discriminator import DISCRIMINATOR_NAME
from ett.tokenizers.layouts import LayoutReport, export_tokenizer, import_tokenizer, read_tokenizer
from ett.train.inheritance import read_inheritance

KEYS = Path(__file__).parents[1] / "parity" / "ibq_keys.txt"
GROUPS = 4
TINY = IBQConfig(
    channels=4, num_res_blocks=4, z_channels=8, norm_groups=GROUPS, codebook_size=50, codebook_dim=8
)  # the reference's shape: five levels, multipliers 1, 1, 2, 2, 4
DDCONFIG = {
    "double_z": False,
    "z_channels": 8,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 4,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.0,
}
EMU_JSON = {"model_type": "Emu3p5VisionVQ", **DDCONFIG, "codebook_size": 50, "embed_dim": 8}
EMU_YAML = {"ddconfig": DDCONFIG, "n_embed": 50, "embed_dim": 8, "entropy_temperature": 0.01}
URSA_JSON = {
    "_class_name": "AutoencoderVQ",
    "_quantizer_name": "VQuantizer",
    "block_out_channels": [4, 4, 8, 8, 16],
    "layers_per_block": 4,
    "latent_channels": 8,
    "norm_num_groups": GROUPS,
    "num_vq_embeddings": 50,
    "vq_embed_dim": 8,
    "attn_down_block": True,
    "attn_up_block": True,
    "temporal_stride": 1,
}

Tensors = dict[str, Tensor]


def published(seed: int = 0) -> Tensors:
    """The published names with small random tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for line in KEYS.read_text(encoding="utf-8").splitlines():
        name, shape = line.split("\t")
        sizes = [{262144: 50}.get(n, n if n < 32 else n // 32) for n in map(int, re.findall(r"\d+", shape))]
        tensors[name] = torch.randn(sizes, generator=generator) / max(1, sizes[-1] * len(sizes)) ** 0.5
    return tensors


def as_diffusers(tensors: Mapping[str, Tensor]) -> Tensors:
    """The same tensors under diffusers' names, by substitution on the text."""
    out = {}
    for name, tensor in tensors.items():
        new = re.sub(r"\bup\.(\d)", lambda m: f"up_blocks.{4 - int(m[1])}", name)
        new = re.sub(r"\.down\.(\d)", r".down_blocks.\1", new)
        for old, replacement in (
            (".block.", ".resnets."),
            (".attn.", ".attentions."),
            (".downsample.", ".downsamplers.0."),
            (".upsample.", ".upsamplers.0."),
            ("mid.block_1", "mid_block.resnets.0"),
            ("mid.block_2", "mid_block.resnets.1"),
            ("mid.attn_1", "mid_block.attentions.0"),
            ("norm_out", "conv_norm_out"),
            ("nin_shortcut", "conv_shortcut"),
            ("quantize.", "quantizer."),
        ):
            new = new.replace(old, replacement)
        if ".attentions." in new:
            new = re.sub(r"\.norm\.", ".group_norm.", new)
            new = re.sub(r"\.([qkv])\.", r".to_\1.", new).replace("proj_out", "to_out.0")
            tensor = tensor.reshape(tensor.shape[:2]) if tensor.dim() == 4 else tensor
        out[new] = tensor.clone()
    assert len(out) == 543
    return out


def lightning(raw: Tensors, average: Tensors | None) -> dict[str, Any]:
    """A Lightning checkpoint with the parts that training leaves in it."""
    losses = {f"loss.discriminator.main.{i}.weight": torch.ones(2, 2) for i in (0, 2, 5, 8, 11)}
    state: dict[str, Any] = {**raw, **losses, "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1, 4, 1, 1)}
    if average is not None:
        state |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(1234, dtype=torch.int)}
        state |= {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in {**average, **losses}.items()}
    return {"epoch": 3, "global_step": 7, "state_dict": state, "optimizer_states": [{"state": {0: torch.ones(1)}}]}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def seed_voken(folder: Path, tensors: Tensors) -> Path:
    torch.save(lightning(published(seed=9), tensors), folder / "imagenet256.ckpt")
    return folder / "imagenet256.ckpt"


def emu_json(folder: Path, tensors: Tensors) -> Path:
    write_json(folder / "emu" / "config.json", EMU_JSON)
    save_file(tensors, folder / "emu" / "model.safetensors")
    return folder / "emu"


def emu_yaml(folder: Path, tensors: Tensors) -> Path:
    (folder / "emu").mkdir()
    (folder / "emu" / "config.yaml").write_text(yaml.safe_dump(EMU_YAML), encoding="utf-8")
    torch.save(tensors, folder / "emu" / "model.ckpt")
    return folder / "emu"


def ursa(folder: Path, tensors: Tensors) -> Path:
    write_json(folder / "vae" / "config.json", URSA_JSON)
    save_file(as_diffusers(tensors), folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder / "vae"


def ursa_bin(folder: Path, tensors: Tensors) -> Path:
    write_json(folder / "vae" / "config.json", URSA_JSON)
    torch.save(as_diffusers(tensors), folder / "vae" / "diffusion_pytorch_model.bin")
    return folder / "vae"


WRITERS: list[tuple[Callable[[Path, Tensors], Path], str]] = [
    (seed_voken, "seed-voken"),
    (emu_json, "emu3.5"),
    (emu_yaml, "emu3.5"),
    (ursa, "diffusers"),
    (ursa_bin, "diffusers"),
]


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def tensors() -> Tensors:
    return published()


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("write", "layout"), WRITERS, ids=lambda v: getattr(v, "__name__", v))
def test_import_reconstruct_and_export_back(
    write: Callable[[Path, Tensors], Path], layout: str, tensors: Tensors, pixels: Tensor, tmp_path: Path
) -> None:
    source = write(tmp_path, tensors)
    report = import_tokenizer(source, tmp_path / "ours")
    assert (report.layout, report.num_tensors, report.downsample) == (layout, 543, 16)
    assert report.num_parameters == sum(t.numel() for t in tensors.values())
    assert report.config == TINY

    imported = VisionTokenizer.from_pretrained(tmp_path / "ours")
    assert_same(imported.state_dict(), tensors)
    by_hand = IBQTokenizer(TINY)
    by_hand.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        assert torch.equal(imported(pixels)[0], by_hand.eval()(pixels)[0])
    assert torch.equal(imported.tokenize(pixels), by_hand.tokenize(pixels))
    assert imported.tokenize(pixels).unique().numel() > 1

    for target in ("seed-voken", "emu3.5", "diffusers"):
        out = tmp_path / target
        written = export_tokenizer(imported, out, target)
        assert (written.layout, written.num_tensors) == (target, 543)
        if target == "seed-voken":
            assert_same(torch.load(out / "tokenizer.ckpt", weights_only=True)["state_dict"], tensors)
        elif target == "emu3.5":
            assert_same(load_file(out / "model.safetensors"), tensors)
            assert_same(torch.load(out / "model.ckpt", weights_only=True), tensors)
            stated = json.loads((out / "config.json").read_text(encoding="utf-8"))
            assert {key: stated[key] for key in EMU_JSON} == EMU_JSON
            stated = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
            assert {key: stated[key] for key in EMU_YAML} == EMU_YAML
        else:
            assert_same(load_file(out / "diffusion_pytorch_model.safetensors"), as_diffusers(tensors))
            stated = json.loads((out / "config.json").read_text(encoding="utf-8"))
            assert {key: stated[key] for key in URSA_JSON} == URSA_JSON
        again, report = read_tokenizer(out)
        assert again.config == TINY
        assert_same(again.state_dict(), tensors)
        assert report.layout == target


def test_diffusers_forward_is_ours(tensors: Tensors, pixels: Tensor, tmp_path: Path) -> None:
    """Against AutoencoderVQ's computation written out on the file's own names."""
    theirs = as_diffusers(tensors)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, GROUPS, theirs[f"{name}.weight"], theirs[f"{name}.bias"], eps=1e-6)

    def conv(x: Tensor, name: str, **kwargs: Any) -> Tensor:
        return F.conv2d(x, theirs[f"{name}.weight"], theirs[f"{name}.bias"], **kwargs)

    def resnet(x: Tensor, name: str) -> Tensor:
        hidden = conv(F.silu(norm(x, f"{name}.norm1")), f"{name}.conv1", padding=1)
        hidden = conv(F.silu(norm(hidden, f"{name}.norm2")), f"{name}.conv2", padding=1)
        short = f"{name}.conv_shortcut"
        return hidden + (conv(x, short) if f"{short}.weight" in theirs else x)

    def attention(x: Tensor, name: str) -> Tensor:
        rows = norm(x, f"{name}.group_norm").flatten(2).transpose(1, 2)
        q, k, v = (F.linear(rows, theirs[f"{name}.to_{c}.weight"], theirs[f"{name}.to_{c}.bias"]) for c in "qkv")
        mixed = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1) @ v
        mixed = F.linear(mixed, theirs[f"{name}.to_out.0.weight"], theirs[f"{name}.to_out.0.bias"])
        return x + mixed.transpose(1, 2).reshape(x.shape)

    def blocks(x: Tensor, name: str, count: int) -> Tensor:
        for j in range(count):
            x = resnet(x, f"{name}.resnets.{j}")
            if f"{name}.attentions.{j}.to_q.weight" in theirs:
                x = attention(x, f"{name}.attentions.{j}")
        return x

    def middle(x: Tensor, name: str) -> Tensor:
        return resnet(attention(resnet(x, f"{name}.resnets.0"), f"{name}.attentions.0"), f"{name}.resnets.1")

    x = conv(pixels, "encoder.conv_in", padding=1)
    for i in range(5):
        x = blocks(x, f"encoder.down_blocks.{i}", 4)
        if i < 4:
            x = conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down_blocks.{i}.downsamplers.0.conv", stride=2)
    x = conv(F.silu(norm(middle(x, "encoder.mid_block"), "encoder.conv_norm_out")), "encoder.conv_out", padding=1)
    codes = theirs["quantizer.embedding.weight"]
    indices = (conv(x, "quant_conv").permute(0, 2, 3, 1) @ codes.T).argmax(-1)
    x = conv(conv(codes[indices].permute(0, 3, 1, 2), "post_quant_conv"), "decoder.conv_in", padding=1)
    x = middle(x, "decoder.mid_block")
    for i in range(5):
        x = blocks(x, f"decoder.up_blocks.{i}", 5)
        if i < 4:
            x = conv(F.interpolate(x, scale_factor=2.0), f"decoder.up_blocks.{i}.upsamplers.0.conv", padding=1)
    x = conv(F.silu(norm(x, "decoder.conv_norm_out")), "decoder.conv_out", padding=1)

    ours, _ = read_tokenizer(ursa(tmp_path, tensors))
    assert torch.equal(ours.tokenize(pixels), indices)
    torch.testing.assert_close(ours(pixels)[0].detach(), x, rtol=1e-4, atol=1e-4)


# -- which weights ---------------------------------------------------------------------------------------------------------


def test_averages_by_default_raw_on_request(tmp_path: Path) -> None:
    raw, average = published(1), published(2)
    torch.save(lightning(raw, average), tmp_path / "a.ckpt")
    tokenizer, report = read_tokenizer(tmp_path / "a.ckpt")
    assert_same(tokenizer.state_dict(), average)
    assert report.weights == "EMA"
    left = {out.what: out.count for out in report.left_out}
    assert left == {
        "loss.discriminator.*": 5,
        "loss.perceptual_loss.*": 1,
        "raw weights": 543,
        "model_ema.loss*": 5,
        "model_ema.decay, num_updates": 2,
    }
    assert "EMA of 1,234 updates" in report.notes
    assert "loss.discriminator.* (5 tensors)" in str(report)

    tokenizer, report = read_tokenizer(tmp_path / "a.ckpt", raw=True)
    assert_same(tokenizer.state_dict(), raw)
    assert report.weights.startswith("raw (as asked for")
    assert {out.what: out.count for out in report.left_out}["model_ema.*"] == 550

    torch.save(lightning(raw, None), tmp_path / "b.ckpt")
    tokenizer, report = read_tokenizer(tmp_path / "b.ckpt")
    assert_same(tokenizer.state_dict(), raw)
    assert report.weights == "raw (the file holds no EMA)"


def test_incomplete_averages_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    content = lightning(tensors, tensors)
    del content["state_dict"]["model_ema.encoderconv_inbias"]
    content["state_dict"]["model_ema.encoderconv_innothing"] = torch.ones(1)
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(
        ModelError, match=r"1 missing \(encoder.conv_in.bias\); 1 without .*encoderconv_innothing.* --raw"
    ):
        read_tokenizer(tmp_path / "a.ckpt")
    assert_same(read_tokenizer(tmp_path / "a.ckpt", raw=True)[0].state_dict(), tensors)


def test_averages_of_another_shape_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    """An average belongs to a raw weight of its shape, whether or not it would fit an architecture of its own."""
    content = lightning(tensors, {**tensors, "quantize.embedding.weight": torch.ones(70, 8)})
    content["state_dict"]["model_ema.encoderconv_inbias"] = "no tensor"
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(
        ModelError,
        match=r"2 of another shape .*conv_in.bias is str, raw \[4\].*embedding.weight is \[70, 8\], raw \[50, 8\].*--raw",
    ):
        read_tokenizer(tmp_path / "a.ckpt")
    assert_same(read_tokenizer(tmp_path / "a.ckpt", raw=True)[0].state_dict(), tensors)


def test_a_shipped_discriminator_is_kept(tensors: Tensors, tmp_path: Path) -> None:
    """Beside the tokenizer, its tensors bit for bit; one of another kind, or a broken one, is left out with the reason."""
    theirs = PatchDiscriminator(DiscriminatorConfig(channels=4)).state_dict()
    theirs["main.3.running_mean"] = torch.randn(8)

    def imported(discriminator: Tensors) -> LayoutReport:
        content = lightning(tensors, tensors)
        state = {name: t for name, t in content["state_dict"].items() if not name.startswith("loss.discriminator.")}
        state |= {f"loss.discriminator.{name}": tensor for name, tensor in discriminator.items()}
        torch.save({"state_dict": state}, tmp_path / "a.ckpt")
        return import_tokenizer(tmp_path / "a.ckpt", tmp_path / "ours", overwrite=True)

    report = imported(theirs)
    found = read_inheritance(tmp_path / "ours" / DISCRIMINATOR_NAME)
    assert_same(found.discriminator, theirs)
    assert (found.channels, found.strided_layers, found.moments, found.lecam) == (4, 3, {}, {})
    assert "channels 4, strided_layers 3" in str(report)
    back = export_tokenizer(
        VisionTokenizer.from_pretrained(tmp_path / "ours"),
        tmp_path / "back.ckpt",
        "seed-voken",
        source=tmp_path / "ours",
    )
    assert any(DISCRIMINATOR_NAME in note and "is not written" in note for note in back.notes)
    assert "loss.discriminator.*" not in {out.what for out in report.left_out}
    assert_same(VisionTokenizer.from_pretrained(tmp_path / "ours").state_dict(), tensors)
    assert "loss.discriminator.*" in {out.what for out in read_tokenizer(tmp_path / "a.ckpt")[1].left_out}

    for wrong in (
        {**theirs, "main.3.weight": torch.ones(9)},
        {name: tensor for name, tensor in theirs.items() if name != "main.11.bias"},
        {**theirs, "main.0.bias": torch.full((4,), float("inf"))},
        {**theirs, "main.0.bias": torch.ones(4, dtype=torch.complex64)},
        {**theirs, "main.0.bias": torch.ones(4, device="meta")},
    ):
        report = imported(wrong)
        assert report.discriminator == ""
        assert not (tmp_path / "ours" / DISCRIMINATOR_NAME).exists()
        why = {out.what: out.why for out in report.left_out}["loss.discriminator.*"]
        assert "no patch discriminator" in why


def test_averages_that_share_a_name_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    content = lightning(tensors, tensors)
    content["state_dict"]["encoder.conv_in.bi.as"] = torch.ones(4)
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ModelError, match=r"conv_in.bias and .*conv_in.bi.as share one EMA name"):
        read_tokenizer(tmp_path / "a.ckpt")


def test_averages_never_updated_are_pointed_out(tensors: Tensors, tmp_path: Path) -> None:
    content = lightning(tensors, tensors)
    content["state_dict"]["model_ema.num_updates"] = torch.tensor(0)
    torch.save(content, tmp_path / "a.ckpt")
    assert any("never updated" in note for note in read_tokenizer(tmp_path / "a.ckpt")[1].notes)
    for strange in ("nan", "inf"):
        content["state_dict"]["model_ema.num_updates"] = torch.tensor(float(strange))
        torch.save(content, tmp_path / "a.ckpt")
        assert any("says nothing" in note for note in read_tokenizer(tmp_path / "a.ckpt")[1].notes)


# -- architecture ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        IBQConfig(32, (1,), 1, (), 5, 32, 7, 3),
        IBQConfig(32, (1, 2), 2, (-1,), 6, 32, 8, 4),
        IBQConfig(32, (2, 1, 3), 1, (0, 2), 7, 32, 9, 5),
        IBQConfig(32, (1, 1, 2, 1), 1, (1,), 8, 32, 10, 6),
    ],
    ids=lambda c: str(c.channel_multipliers),
)
def test_shapes_give_the_architecture(config: IBQConfig, tmp_path: Path) -> None:
    state = IBQTokenizer(config).state_dict()
    torch.save({"state_dict": dict(state)}, tmp_path / "a.ckpt")
    tokenizer, report = read_tokenizer(tmp_path / "a.ckpt")
    assert tokenizer.config == config
    assert any("32 groups as in the reference" in note for note in report.notes)
    assert any("no configuration" in note for note in report.notes)
    export_tokenizer(tokenizer, tmp_path / "emu", "emu3.5")
    assert read_tokenizer(tmp_path / "emu")[0].config == config


def test_norm_groups_are_said_where_nothing_shows_them(tensors: Tensors, tmp_path: Path) -> None:
    source = seed_voken(tmp_path, tensors)
    tokenizer, report = read_tokenizer(source)
    assert tokenizer.config.norm_groups == 4
    assert any("32 do not divide the widths [4, 4, 8, 8, 16]" in note for note in report.notes)
    assert read_tokenizer(source, norm_groups=2)[0].config.norm_groups == 2
    with pytest.raises(UserError, match=r"multiples of norm_groups \(3\)"):
        read_tokenizer(source, norm_groups=3)


def test_a_configuration_beside_or_given(tensors: Tensors, tmp_path: Path) -> None:
    source = seed_voken(tmp_path, tensors)
    init = {**EMU_YAML, "entropy_temperature": "2e-2", "norm_groups": 2}
    body = {"model": {"class_path": "src.IBQ.models.ibqgan.IBQ", "init_args": init}}
    given = tmp_path / "elsewhere.yaml"
    given.write_text(yaml.safe_dump(body), encoding="utf-8")
    config = read_tokenizer(source, config=given)[0].config
    assert (config.entropy_temperature, config.norm_groups) == (0.02, 2)
    given.rename(source.with_suffix(".yaml"))
    assert read_tokenizer(source)[0].config == config
    source.with_suffix(".yaml").write_text("trainer: {devices: 8}\n", encoding="utf-8")
    assert read_tokenizer(source)[0].config == TINY
    with pytest.raises(ModelError, match="states no tokenizer"):
        read_tokenizer(source, config=source.with_suffix(".yaml"))


@pytest.mark.parametrize(
    ("write", "change", "message"),
    [
        (emu_json, {"num_res_blocks": 3}, "num_res_blocks is 3, the tensors' shapes give 4"),
        (emu_json, {"ch_mult": [1, 1, 2, 4, 4]}, "channel_multipliers is"),
        (emu_json, {"attn_resolutions": [32]}, r"attention_levels is \(3,\), .* \(4,\)"),
        (emu_json, {"codebook_size": 51}, "codebook_size is 51, the tensors' shapes give 50"),
        (emu_json, {"double_z": True}, "double_z = True is not supported"),
        (emu_json, {"model_type": "Emu3VisionVQ"}, "model_type 'Emu3VisionVQ'; only Emu3p5VisionVQ"),
        (emu_json, {"model_type": "ett_vision_tokenizer"}, "saved by ett already"),
        (emu_json, {"ch_mult": "1,2"}, "list of whole numbers"),
        (emu_yaml, {"l2_normalize": True}, "l2_normalize = True is not supported"),
        (emu_yaml, {"cosine_similarity": True}, "cosine_similarity = True"),
        (emu_yaml, {"remap": "used.npy"}, "remap = 'used.npy'"),
        (emu_yaml, {"entropy_temperature": "cold"}, "entropy_temperature must be a number"),
        (ursa, {"block_out_channels": [4, 8, 8, 8, 16]}, r"channel_multipliers is \(1, 2, 2, 2, 4\)"),
        (ursa, {"_quantizer_name": "LFQuantizer"}, "_quantizer_name = 'LFQuantizer'"),
        (ursa, {"_class_name": "VQModel"}, "VQModel"),
        (ursa, {"attn_down_block": False}, "attention_levels"),
        (ursa, {"temporal_stride": 4}, "temporal_stride = 4"),
        (ursa, {"norm_num_groups": 3}, "norm_groups"),
        (ursa, {"block_out_channels": [4, 6, 8, 8, 16]}, "must be multiples of the first"),
    ],
)
def test_configurations_of_something_else_are_refused(
    write: Callable[[Path, Tensors], Path], change: dict[str, Any], message: str, tensors: Tensors, tmp_path: Path
) -> None:
    source = write(tmp_path, tensors)
    path = next(p for p in (source / "config.json", source / "config.yaml") if p.is_file())
    content = yaml.safe_load(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    with pytest.raises(UserError, match=message):
        import_tokenizer(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_nearest_code_model_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    source = seed_voken(tmp_path, tensors)
    body = {"model": {"class_path": "src.IBQ.models.ibqgan.VQModel", "init_args": EMU_YAML}}
    source.with_suffix(".yaml").write_text(yaml.safe_dump(body), encoding="utf-8")
    with pytest.raises(ModelError, match="only IBQ's quantizer"):
        read_tokenizer(source)


def test_widths_and_shapes_that_no_configuration_gives(tensors: Tensors, tmp_path: Path) -> None:
    for name, value, message in (
        ("encoder.conv_in.weight", torch.ones(3, 3, 3, 3), r"widths \[4, 4, 8, 8, 16\] must be multiples of .* 3"),
        ("quantize.embedding.weight", torch.ones(50), r"quantize.embedding.weight is \[50\]; expected 2 dimensions"),
        ("encoder.conv_in.bias", torch.ones(4).to_sparse(), r"encoder.conv_in.bias is a Tensor, not a dense"),
        ("encoder.conv_in.bias", 3, r"encoder.conv_in.bias is a int"),
    ):
        torch.save({"state_dict": {**tensors, name: value}}, tmp_path / "a.ckpt")
        with pytest.raises(ModelError, match=message):
            read_tokenizer(tmp_path / "a.ckpt")


def test_what_a_configuration_adds_is_reported(tensors: Tensors, tmp_path: Path) -> None:
    source = ursa(tmp_path, tensors)
    write_json(source / "config.json", URSA_JSON | {"_class_name": "AutoencoderIBQ"})
    assert any("AutoencoderIBQ" in note for note in read_tokenizer(source)[1].notes)
    source = emu_json(tmp_path, tensors)
    write_json(source / "config.json", EMU_JSON | {"dropout": 0.1})
    assert "dropout 0.1 of the source is not carried over" in read_tokenizer(source)[1].notes


# -- wrong and damaged files -----------------------------------------------------------------------------------------------


def edited(write: Callable[[Path, Tensors], Path], edit: Callable[[Tensors], None], folder: Path) -> Path:
    tensors = published()
    edit(tensors)
    return write(folder, tensors)


def _reshape(t: Tensors) -> None:
    t["decoder.up.2.block.1.conv1.weight"] = torch.zeros(8, 8, 1, 1)


def _not_finite(t: Tensors) -> None:
    t["decoder.norm_out.bias"][0] = float("nan")


def _double(t: Tensors) -> None:
    t["decoder.norm_out.bias"] = t["decoder.norm_out.bias"].double()


@pytest.mark.parametrize("write", [emu_json, emu_yaml], ids=lambda w: w.__name__)
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("decoder.mid.attn_1.q.bias"), r"1 missing \(decoder.mid.attn_1.q.bias\)"),
        (lambda t: t.pop("encoder.conv_in.weight"), "no tensor encoder.conv_in.weight"),
        (lambda t: t.pop("quantize.embedding.weight"), "no tensor quantize.embedding.weight"),
        (lambda t: t.update({"colorize": torch.ones(3)}), r"1 unexpected \(colorize\)"),
        (_reshape, r"conv1.weight is \[8, 8, 1, 1\], expected \[8, 8, 3, 3\]"),
        (_not_finite, "decoder.norm_out.bias holds numbers that are not finite"),
        (_double, "decoder.norm_out.bias is torch.float64"),
    ],
    ids=["missing", "no first layer", "no codebook", "unexpected", "shape", "nan", "float64"],
)
def test_wrong_tensors_are_named(
    write: Callable[[Path, Tensors], Path], edit: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    source = edited(write, edit, tmp_path)
    with pytest.raises(ModelError, match=message):
        import_tokenizer(source, tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["emu"]


def test_wrong_diffusers_names_and_shapes(tensors: Tensors, tmp_path: Path) -> None:
    source = ursa(tmp_path, tensors)
    path = source / "diffusion_pytorch_model.safetensors"
    good = as_diffusers(tensors)
    name = "encoder.mid_block.attentions.0.to_q.weight"
    save_file({**good, name: good[name][:, :, None, None].clone()}, path)
    with pytest.raises(ModelError, match=r"to_q.weight must be a matrix, it is \[16, 16, 1, 1\]"):
        read_tokenizer(source)
    for strange in ("encoder.mid_block.attentions.0.query.weight", "encoder.down_blocks.00.resnets.0.conv1.weight"):
        save_file({**good, strange: torch.ones(1)}, path)
        with pytest.raises(ModelError, match=f"1 tensors unknown to the diffusers layout: {strange}"):
            read_tokenizer(source)
    save_file(
        {k: t for k, t in good.items() if "decoder.up_blocks.4.attentions" not in k and k != "decoder.conv_in.bias"},
        path,
    )
    with pytest.raises(ModelError, match=r"1 missing \(decoder.conv_in.bias\)"):
        read_tokenizer(source)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize(("write", "_layout"), WRITERS, ids=lambda v: getattr(v, "__name__", v))
def test_truncated_files_are_refused(
    write: Callable[[Path, Tensors], Path], _layout: str, share: float, tensors: Tensors, tmp_path: Path
) -> None:
    source = write(tmp_path, tensors)
    weights = source if source.is_file() else next(p for p in source.iterdir() if not p.name.startswith("config"))
    content = weights.read_bytes()
    weights.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"cut short|cannot be read|damaged|not a checkpoint"):
        import_tokenizer(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_flipped_bit_in_a_pytorch_file_is_found(tensors: Tensors, tmp_path: Path) -> None:
    source = emu_yaml(tmp_path, tensors)
    weights = source / "model.ckpt"
    content = bytearray(weights.read_bytes())
    at = content.index(tensors["encoder.conv_in.weight"].numpy().tobytes())
    content[at + 5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match=r"checksum of .* does not match"):
        read_tokenizer(source)


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_pickles_cannot_run_code(tensors: Tensors, tmp_path: Path) -> None:
    trap, source = tmp_path / "trapped", tmp_path / "a.ckpt"
    torch.save({**lightning(tensors, None), "callbacks": Evil(trap)}, source)
    with pytest.raises(ModelError, match=r"is refused: .*mkdir.* could run code.*weights_only"):
        read_tokenizer(source)
    source.write_bytes(pickle.dumps({"state_dict": Evil(trap)}))
    with pytest.raises(ModelError, match="loading them could run code"):
        read_tokenizer(source)
    assert not trap.exists()
    pickle.loads(source.read_bytes())
    assert trap.exists()  # it does run where nothing stops it


def test_what_is_no_checkpoint_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no"):
        read_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="holds no weights"):
        read_tokenizer(tmp_path)
    write_json(tmp_path / "diffusion_pytorch_model.safetensors.index.json", {})
    with pytest.raises(ModelError, match="weights in several parts"):
        read_tokenizer(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (tmp_path / "vae").mkdir()
    with pytest.raises(ModelError, match=r"It has a folder vae"):
        read_tokenizer(tmp_path)
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.ckpt")
    with pytest.raises(ModelError, match=r"no known layout .*seed-voken, emu3.5, diffusers.* but weight"):
        read_tokenizer(tmp_path)
    torch.save([torch.ones(2)], tmp_path / "a.ckpt")
    with pytest.raises(ModelError, match="holds a list"):
        read_tokenizer(tmp_path)
    torch.save(tensors, tmp_path / "a.ckpt")
    with pytest.raises(ModelError, match=r"no config.yaml or config.json beside it.* --config"):
        read_tokenizer(tmp_path)
    write_json(tmp_path / "config.json", [1])
    with pytest.raises(ModelError, match="must name values"):
        read_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="not valid JSON"):
        read_tokenizer(tmp_path)
    torch.save({}, tmp_path / "b.ckpt")
    with pytest.raises(ModelError, match=r"holds 2 checkpoints \(a.ckpt, b.ckpt\)"):
        read_tokenizer(tmp_path)


def test_one_of_two_weight_files_is_read_and_said(tensors: Tensors, tmp_path: Path) -> None:
    source = emu_json(tmp_path, tensors)
    torch.save(published(5), source / "model.ckpt")
    tokenizer, report = read_tokenizer(source)
    assert_same(tokenizer.state_dict(), tensors)
    assert [out.what for out in report.left_out] == ["model.ckpt"]


# -- precision -------------------------------------------------------------------------------------------------------------


def test_half_precision_widens_and_goes_back_exactly(tensors: Tensors, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    tokenizer, report = read_tokenizer(emu_json(tmp_path, half))
    assert_same(tokenizer.state_dict(), {name: tensor.float() for name, tensor in half.items()})
    assert "543 tensors were stored as bfloat16 and are float32 now, exactly" in report.notes
    export_tokenizer(tokenizer, tmp_path / "back", "emu3.5", dtype="bfloat16")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), half)

    full = IBQTokenizer(TINY)
    with pytest.raises(ModelError, match=r"bfloat16 would round \d+ tensors"):
        export_tokenizer(full, tmp_path / "rounded", "emu3.5", dtype="bfloat16")
    with pytest.raises(ModelError, match=r"Unknown dtype 'int8'.*Allowed: float32"):
        export_tokenizer(full, tmp_path / "rounded", "emu3.5", dtype="int8")
    assert not (tmp_path / "rounded").exists()


# -- what a layout cannot say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["seed-voken", "emu3.5", "diffusers"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"similarity": "distance"}, "similarity: distance .* quantize.distance_unit"),
        ({"normalize": True}, "normalize: true .* quantize.log_scale"),
    ],
)
def test_other_quantizers_are_not_exported(layout: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        export_tokenizer(IBQTokenizer(replace(TINY, **change)), tmp_path / "out", layout)
    assert not any(tmp_path.iterdir())


def test_shapes_that_diffusers_cannot_have_are_not_exported(tmp_path: Path) -> None:
    for change, message in (
        ({"attention_levels": (0, 4)}, "attention at levels"),
        ({"channel_multipliers": (2, 4)}, "2 times as wide"),
    ):
        with pytest.raises(ModelError, match=message):
            export_tokenizer(IBQTokenizer(replace(TINY, **change)), tmp_path / "out", "diffusers")  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_what_is_not_written_is_reported(tmp_path: Path) -> None:
    tokenizer = IBQTokenizer(replace(TINY, temperature=2.0, entropy_temperature=0.5, precision="bfloat16"))
    report = export_tokenizer(tokenizer, tmp_path / "a", "diffusers")
    said = "\n".join(report.notes)
    for words in ("temperature 2.0 is not", "entropy_temperature 0.5 is not", "precision bfloat16", "norm_groups is 4"):
        assert words in said
    assert "entropy_temperature" not in str(export_tokenizer(tokenizer, tmp_path / "b", "emu3.5"))
    assert read_tokenizer(tmp_path / "b")[0].config.entropy_temperature == 0.5
    assert "entropy_temperature 0.5 is not" in str(export_tokenizer(tokenizer, tmp_path / "c.ckpt", "seed-voken"))
    plain = export_tokenizer(IBQTokenizer(IBQConfig(32, (1,), 1, (), 8, 32, 9, 8)), tmp_path / "d", "emu3.5")
    assert plain.notes == ()


# -- the destination -------------------------------------------------------------------------------------------------------


def test_destinations_are_not_overwritten_by_accident(tensors: Tensors, tmp_path: Path) -> None:
    source = emu_json(tmp_path, tensors)
    (tmp_path / "ours").mkdir()
    import_tokenizer(source, tmp_path / "ours")  # an empty folder is free
    before = (tmp_path / "ours" / "model.safetensors").read_bytes()
    other = seed_voken(tmp_path, published(4))
    with pytest.raises(ModelError, match=r"already exists.*--overwrite"):
        import_tokenizer(other, tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == before
    import_tokenizer(other, tmp_path / "ours", overwrite=True)
    assert_same(load_file(tmp_path / "ours" / "model.safetensors"), published(4))

    (tmp_path / "ours" / "diary.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ModelError, match=r"also holds diary.txt"):
        import_tokenizer(source, tmp_path / "ours", overwrite=True)
    for taken in (source, tmp_path):
        with pytest.raises(ModelError, match="would be replaced"):
            import_tokenizer(source, taken, overwrite=True)
    with pytest.raises(ModelError, match="is a file; give a folder"):
        import_tokenizer(source, other, overwrite=True)
    tokenizer = VisionTokenizer.from_pretrained(tmp_path / "ours")
    (tmp_path / "folder.ckpt").mkdir()
    with pytest.raises(ModelError, match="is a folder; give a file's name"):
        export_tokenizer(tokenizer, tmp_path / "folder.ckpt", "seed-voken")
    with pytest.raises(ModelError, match="already exists"):
        export_tokenizer(tokenizer, other, "seed-voken")
    export_tokenizer(tokenizer, other, "seed-voken", overwrite=True)
    assert set(torch.load(other, weights_only=True)) == {"state_dict"}
    with pytest.raises(ModelError, match=r"is a folder; .* Leave its suffix out"):
        export_tokenizer(tokenizer, tmp_path / "x.ckpt", "emu3.5")
    with pytest.raises(ModelError, match=r"Unknown layout 'emu3'. Did you mean 'emu3.5'"):
        export_tokenizer(tokenizer, tmp_path / "x", "emu3")


def test_a_failing_disk_leaves_nothing_behind(
    tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = emu_json(tmp_path, tensors)
    import_tokenizer(source, tmp_path / "ours")
    present = sorted(p.name for p in tmp_path.rglob("*"))
    before = (tmp_path / "ours" / "model.safetensors").read_bytes()

    def full(self: VisionTokenizer, directory: Path) -> None:
        (directory / "config.json").write_text("{}", encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VisionTokenizer, "save_pretrained", full)
    for target, overwrite in (("ours", True), ("new", False)):
        with pytest.raises(ModelError, match="cannot be written: No space left on device"):
            import_tokenizer(source, tmp_path / target, overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.rglob("*")) == present
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == before


def test_an_interrupted_replacement_brings_the_old_back(
    tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between moving the old folder away and the new one in."""
    source = emu_json(tmp_path, tensors)
    import_tokenizer(source, tmp_path / "ours")
    before = (tmp_path / "ours" / "model.safetensors").read_bytes()
    other = seed_voken(tmp_path, published(4))

    def interrupted(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_tokenizer(other, tmp_path / "ours", overwrite=True)
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["emu", "imagenet256.ckpt", "ours"]


def test_nothing_of_a_tokenizer_is_dropped(tmp_path: Path) -> None:
    """A tensor that no layout names stops the export, whatever put it there."""
    tokenizer = IBQTokenizer(TINY)
    tokenizer.quantize.register_buffer("usage", torch.ones(50))
    with pytest.raises(ModelError, match=r"no place for its quantize\.usage"):
        export_tokenizer(tokenizer, tmp_path / "out", "seed-voken")


# -- command line ----------------------------------------------------------------------------------------------------------


def test_the_commands(tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    source, ours = seed_voken(tmp_path, tensors), tmp_path / "ours"
    code, out, _ = call("import-tokenizer", source, ours)
    assert code == 0
    for words in ("seed-voken", "EMA", "543", "K = 50, D = 8", "16 pixels", "loss.discriminator.* (5 tensors)"):
        assert words in out
    code, out, _ = call("export-tokenizer", ours, tmp_path / "ursa", "--layout", "diffusers")
    assert code == 0
    assert "norm_groups is 4" in out
    assert_same(load_file(tmp_path / "ursa" / "diffusion_pytorch_model.safetensors"), as_diffusers(tensors))

    code, _, _ = call("import-tokenizer", source, ours, "--raw", "--overwrite", "--norm-groups", 2)
    assert code == 0
    assert_same(load_file(ours / "model.safetensors"), published(seed=9))
    assert json.loads((ours / "config.json").read_text(encoding="utf-8"))["norm_groups"] == 2

    for arguments, message in (
        (("import-tokenizer", source, ours), "already exists"),
        (("export-tokenizer", ours, tmp_path / "x", "--layout", "ursa"), "Unknown layout 'ursa'"),
        (("export-tokenizer", tmp_path / "none", tmp_path / "x", "--layout", "emu3.5"), "There is no"),
    ):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1

"""The code cache: what it holds, when it is refused, and that a frozen stage trains from it as it does from pictures."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from ett.config import from_mapping
from ett.data import codes as codes_module
from ett.data.codes import MARGIN, CodeCache, tokenizer_hash
from ett.data.mixture import EncodedDraws, Mixture, SourceConfig, build_mixture
from ett.errors import DataError, RecipeError
from ett.experiments.recipe import Recipe
from ett.experiments.run import Interrupted, Run
from ett.images import FitMode
from ett.losses.joint import LossConfig
from ett.model.build import LanguageModelSpec, ModelSpec, build_model, build_vision_tokenizer
from ett.model.ett import EttForConditionalGeneration
from ett.model.processing import EttImageProcessor, EttProcessor
from ett.model.projector import ProjectorConfig
from ett.tokenizers import VisionTokenizer
from ett.train import cached as cached_module
from ett.train import loop as loop_module
from ett.train.log import read_log
from ett.types import Batch
from tests.conftest import LANGUAGE_MODELS, TOKENIZER

FROZEN = LossConfig(tokenizer_weight=0.0)
CNN = {name: value for name, value in TOKENIZER.items() if not name.startswith("codebook")}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "ibq": {},
    "distance": {"similarity": "distance"},
    "normalized": {"normalize": True},
    "straight_through": {"gradient": "straight_through"},
}


def model_with(tokenizer: dict[str, Any], **spec: Any) -> tuple[EttForConditionalGeneration, EttProcessor]:
    given = ModelSpec(
        image_size=32,
        vision_tokenizer=tokenizer,
        language_model=LanguageModelSpec(config=dict(LANGUAGE_MODELS["llama"])),
        projector=ProjectorConfig(merge_size=2),
        **spec,
    )
    model, processor = build_model(given, build_vision_tokenizer(given))
    return model.eval(), processor


@pytest.fixture
def parts() -> tuple[EttForConditionalGeneration, EttProcessor]:
    return model_with(dict(TOKENIZER))


@pytest.fixture
def mixed(pictures: Path) -> SourceConfig:
    """A manifest in which examples have two pictures, one, or none."""
    lines = []
    for i in range(9):
        names = [f"{i}.png", f"{i + 1}.png", f"{i + 2}.png"][: i % 3]
        turns = [{"from": "human", "value": "<image>" * len(names) + f"é {i}?"}, {"from": "gpt", "value": f"it is {i}"}]
        lines.append(json.dumps({"id": f"m{i}", "image": names, "conversations": turns}))
    path = pictures / "mixed.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return SourceConfig(source="manifest", path=str(path))


def fill(cache: CodeCache, configs: Sequence[SourceConfig], mixture: Mixture, draws: int, batch_size: int = 4) -> int:
    missing = cache.missing(configs, mixture, draws)
    done = 0
    for config, source, positions in zip(configs, mixture.sources, missing, strict=True):
        done += sum(cache.fill(config, source, positions, batch_size=batch_size))
    cache.refresh()
    assert not any(map(len, cache.missing(configs, mixture, draws)))
    return done


def cached(cache: CodeCache, configs: Sequence[SourceConfig], draws: int = 100) -> Mixture:
    mixture = build_mixture(configs, 0)
    fill(cache, configs, mixture, draws)
    return cache.mixture(configs, mixture)


def batch_of(mixture: Mixture, processor: EttProcessor, draws: range) -> Batch:
    return processor.collate([processor.encode(mixture[draw]) for draw in draws])


def forward(model: EttForConditionalGeneration, batch: Batch, **kwargs: Any) -> Any:
    return model(
        input_ids=batch.input_ids,
        pixel_values=batch.pixel_values,
        image_indices=batch.image_indices,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        **{"loss_config": FROZEN, **kwargs},
    )


# -- what it holds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "visual_input"),
    [*((kind, "embedding") for kind in (*TOKENIZERS, "fsq", "lfq")), ("ibq", "index"), ("fsq", "index")],
)
def test_the_model_computes_the_same_from_indices(
    kind: str, visual_input: str, mixed: SourceConfig, tmp_path: Path
) -> None:
    """Bit for bit, with two pictures, one or none in a conversation."""
    own = {"tokenizer_type": kind, **CNN} if kind in ("fsq", "lfq") else {**TOKENIZER, **TOKENIZERS[kind]}
    own |= {"levels": [3, 3, 3]} if kind == "fsq" else {"codebook_size": 64} if kind == "lfq" else {}
    model, processor = model_with(own, visual_input=visual_input)
    plain = build_mixture([mixed], 0)
    coded = cached(CodeCache(tmp_path / "codes", model.vision_tokenizer, processor.image_processor), [mixed])
    pixels, indices = (batch_of(mixture, processor, range(9)) for mixture in (plain, coded))
    assert indices.image_indices is not None
    assert indices.image_indices.dtype == torch.int64
    assert indices.image_indices.shape == (9, 8, 8)
    assert indices.pixel_values.shape == (0, 3, 32, 32)
    assert indices.num_images == pixels.num_images == 9
    assert indices.ids == pixels.ids
    assert torch.equal(indices.input_ids, pixels.input_ids)
    assert torch.equal(indices.labels, pixels.labels)
    assert torch.equal(indices.image_indices, model.vision_tokenizer.tokenize(pixels.pixel_values))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "normalized"):
        assert torch.equal(forward(model, pixels).logits, forward(model, indices).logits)


def test_nothing_reaches_the_tokenizer_and_pixels_are_not_forgotten(
    parts: tuple[EttForConditionalGeneration, EttProcessor], mixed: SourceConfig, tmp_path: Path
) -> None:
    model, processor = parts
    coded = cached(CodeCache(tmp_path / "codes", model.vision_tokenizer, processor.image_processor), [mixed])
    batch = batch_of(coded, processor, range(9))
    forward(model, batch).loss.backward()
    assert all(parameter.grad is None for parameter in model.vision_tokenizer.parameters())
    assert all(parameter.grad is not None for parameter in model.projector.parameters())
    with pytest.raises(ValueError, match="L_vq needs the pictures"):
        forward(model, batch, loss_config=LossConfig())
    with pytest.raises(ValueError, match="one form"):
        forward(model, replace(batch, pixel_values=torch.zeros(1, 3, 32, 32)))
    silent = next(draw for draw in range(9) if coded[draw].num_images == 0)
    words = batch_of(coded, processor, range(silent, silent + 1))
    assert words.image_indices is None
    assert torch.isfinite(forward(model, words).loss)


def test_generation_reads_indices(parts: tuple[EttForConditionalGeneration, EttProcessor], pictures: Path) -> None:
    model, processor = parts
    examples = list(SourceConfig(source="manifest", path=str(pictures / "manifest.jsonl")).build())[:2]
    prompt = processor.prompt(examples)
    indices = model.vision_tokenizer.tokenize(prompt.pixel_values)
    for beams in (1, 2):
        given = {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask, "num_beams": beams}
        from_pixels, from_indices = (
            model.generate(**given, **shown, max_new_tokens=3, do_sample=False)
            for shown in ({"pixel_values": prompt.pixel_values}, {"image_indices": indices})
        )
        assert torch.equal(from_pixels, from_indices)


def test_only_what_is_drawn_is_encoded_and_only_once(
    parts: tuple[EttForConditionalGeneration, EttProcessor], mixed: SourceConfig, tmp_path: Path
) -> None:
    model, processor = parts
    text = SourceConfig(source="drawn_text", size=32, weight=2.0)
    # two entries that are one source
    configs = [mixed, text, replace(text, weight=1.0)]
    mixture = build_mixture(configs, 3)
    for stop in (0, 1, 999, 1000, 1030):
        drawn: list[set[int]] = [set(), set(), set()]
        for draw in range(stop):
            source, index = mixture.locate(draw)
            drawn[source].add(index)
        assert [set(each.tolist()) for each in mixture.drawn(stop)] == drawn
        assert all((np.diff(each) > 0).all() for each in mixture.drawn(stop))
    cache = CodeCache(tmp_path / "codes", model.vision_tokenizer, processor.image_processor)
    drawn = [set(each.tolist()) for each in mixture.drawn(20)]
    assert fill(cache, configs, mixture, 20) == len(drawn[0]) + len(drawn[1] | drawn[2])
    again = CodeCache(tmp_path / "codes", model.vision_tokenizer, processor.image_processor)
    assert fill(again, configs, mixture, 20) == 0
    more = fill(again, configs, mixture, 30)
    assert 0 < more <= 10, "a longer stage adds what it draws beyond"
    coded = pickle.loads(pickle.dumps(again.mixture(configs, mixture)))
    for draw in range(30):
        assert coded[draw].id == mixture[draw].id
    with pytest.raises(DataError, match=r"lacks example .* Fill it first"):
        [coded[draw] for draw in range(30, 60)]


def test_indices_take_two_bytes_where_they_fit(mixed: SourceConfig, tmp_path: Path) -> None:
    for size, dtype in ((2**16, np.uint16), (2**16 + 1, np.int32)):
        tokenizer = VisionTokenizer.from_config({**TOKENIZER, "codebook_size": size, "codebook_dim": 2})
        coded = cached(CodeCache(tmp_path / str(size), tokenizer, EttImageProcessor(32, 32)), [mixed])
        shown = next(coded[draw] for draw in range(9) if coded[draw].num_images)
        assert shown.image_indices is not None
        assert shown.image_indices[0].dtype == dtype


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_indices_differ_only_below_the_stated_margin(precision: str, tmp_path: Path) -> None:
    """Many codes close to each other, against indices without rounding (float64): what flips lies at a border."""
    given = {**TOKENIZER, "codebook_size": 20_000, "codebook_dim": 3, "similarity": "distance"}
    tokenizer = VisionTokenizer.from_config({**given, "precision": precision})
    exact, images = VisionTokenizer.from_config(given).double().eval(), EttImageProcessor(32, 32)
    configs = [SourceConfig(source="drawn_text", size=32, limit=10)]
    mixture = build_mixture(configs, 0)
    pixels = torch.stack([torch.from_numpy(images.fit(mixture[draw].images[0])[0]) for draw in range(10)]).double()
    with torch.no_grad():
        exact.load_state_dict(tokenizer.state_dict())
        z = exact.encode(pixels).permute(0, 2, 3, 1).flatten(0, 2)
        codes = (torch.randn(20_000, 3) * z.std(dim=0) + z.mean(dim=0)).float()
        for each in (tokenizer, exact):
            each.get_parameter("quantize.embedding.weight").copy_(codes)
    coded = cached(CodeCache(tmp_path / "codes", tokenizer, images), configs)
    found = torch.from_numpy(np.stack([coded[draw].image_indices for draw in range(10)]).astype(np.int64))
    a, b = (codes.double()[each.flatten()] for each in (found, exact.tokenize(pixels)))
    differ = (a != b).any(dim=1)
    border = ((z - a).pow(2).sum(dim=1) - (z - b).pow(2).sum(dim=1)).abs() / (2 * (a - b).norm(dim=1))
    assert bool((border < MARGIN[precision] * z.pow(2).sum(dim=1).mean().sqrt())[differ].all())
    share = float(differ.double().mean())
    assert (share < 0.01) if precision == "float32" else (0.05 < share < 0.9), f"{share}: the bound is met by chance"


# -- when it is refused ------------------------------------------------------------------------------------------------


def test_a_stale_cache_is_refused_by_name(
    parts: tuple[EttForConditionalGeneration, EttProcessor],
    mixed: SourceConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = parts
    tokenizer, folder = model.vision_tokenizer, tmp_path / "codes"
    before = tokenizer_hash(tokenizer)

    def opened(size: int = 32, mode: FitMode = "pad", configs: Sequence[SourceConfig] = (mixed,)) -> Mixture:
        return cached(CodeCache(folder, tokenizer, EttImageProcessor(size, size, mode)), configs)

    opened()
    with pytest.raises(DataError, match=r"stale: it was made with another image_size \(32 x 32, now 64 x 64\)"):
        opened(64)
    with pytest.raises(DataError, match=r"another image_mode \(pad, now crop\)"):
        opened(mode="crop")
    with torch.no_grad():
        tokenizer.encoder_output.view(-1)[0] += 1e-6
    assert tokenizer_hash(tokenizer) != before
    with pytest.raises(DataError, match=f"another vision tokenizer .{before[:12]}, now"):
        opened()
    with torch.no_grad():
        tokenizer.encoder_output.view(-1)[0] -= 1e-6
    narrow = VisionTokenizer.from_config({**TOKENIZER, "precision": "bfloat16"})
    with pytest.raises(DataError, match=r"another precision \(float32, now bfloat16\)"):
        CodeCache(folder, narrow, EttImageProcessor(32, 32))
    opened()

    picture = Path(str(mixed.path)).parent / "7.png"
    status = picture.stat()
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"another content of .*mixed\.jsonl \("):
        opened()
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    opened()
    lines = Path(str(mixed.path)).read_text(encoding="utf-8")
    Path(str(mixed.path)).write_text(lines.replace("it is 7", "it is 8"), encoding="utf-8")
    with pytest.raises(DataError, match="another content of"):
        opened()
    Path(str(mixed.path)).write_text(lines, encoding="utf-8")

    text = SourceConfig(source="drawn_text", size=32)
    opened(configs=[text])
    monkeypatch.setattr("ett.data.drawn_text._MARGIN", 3)
    with pytest.raises(DataError, match="another content of drawn-text"):
        opened(configs=[text])
    opened(configs=[replace(text, seed=1)])


def test_damage_is_refused_with_its_reason(
    parts: tuple[EttForConditionalGeneration, EttProcessor], mixed: SourceConfig, tmp_path: Path
) -> None:
    model, processor = parts

    def cache() -> CodeCache:
        return CodeCache(tmp_path / "codes", model.vision_tokenizer, processor.image_processor)

    cached(cache(), [mixed])
    (shard,) = (tmp_path / "codes").iterdir()
    whole = shard.read_bytes()
    for length in (0, 5, 300, len(whole) - 1):
        shard.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"{shard.name} is truncated, damaged or no code cache: .+Delete it"):
            cache()
    header = 8 + int.from_bytes(whole[:8], "little")
    shard.write_bytes(whole)
    flipped = bytearray(whole)
    flipped[whole.index(b"it is 4", header)] ^= 1
    shard.write_bytes(bytes(flipped))
    with pytest.raises(DataError, match="example 4 is not as it was written"):
        [cached(cache(), [mixed])[draw] for draw in range(9)]
    shard.unlink()
    again = cached(cache(), [mixed])
    assert {again[draw].id for draw in range(9)} == {f"m{i}" for i in range(9)}


def test_an_unreadable_picture_keeps_what_was_encoded(
    parts: tuple[EttForConditionalGeneration, EttProcessor], mixed: SourceConfig, tmp_path: Path
) -> None:
    model, processor = parts
    picture = Path(str(mixed.path)).parent / "9.png"
    content = picture.read_bytes()
    picture.write_bytes(content[:50])
    cache = CodeCache(tmp_path / "codes", model.vision_tokenizer, processor.image_processor)
    mixture = build_mixture([mixed], 0)
    with pytest.raises(DataError, match=r"mixed\.jsonl:9: .*9\.png"):
        fill(cache, [mixed], mixture, 9, batch_size=2)
    cache.refresh()
    assert [each.tolist() for each in cache.missing([mixed], mixture, 9)] == [[8]]


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("semantic", {}),
        ("semantic", {"trains": ["projector"]}),
        ("tokenizer", {}),
        ("chat", {"trains": ["vision_tokenizer"]}),
    ],
)
def test_other_stages_refuse_it(toy_recipe: dict[str, Any], stage: str, change: dict[str, Any]) -> None:
    toy_recipe["stages"] = [{"stage": stage, "steps": 1, "batch_size": 4, "cached_codes": True, **change}]
    with pytest.raises(RecipeError, match=f"cached_codes is for the stages align and chat .* this {stage} stage"):
        from_mapping(Recipe, toy_recipe)


def test_a_loss_that_needs_more_than_indices_refuses_it(toy_recipe: dict[str, Any]) -> None:
    losses = {"soft_caption_weight": 0.5}
    toy_recipe["stages"] = [{"stage": "align", "steps": 1, "batch_size": 4, "cached_codes": True, "losses": losses}]
    with pytest.raises(RecipeError, match=r"soft_caption_weight .* Leave one of the two out"):
        from_mapping(Recipe, toy_recipe)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def frozen_recipe(toy_recipe: dict[str, Any], mixed: SourceConfig) -> dict[str, Any]:
    """Two frozen stages with validation, on pictures, drawn text and words alone."""
    toy_recipe["stages"] = [
        {
            "stage": stage,
            "steps": 4,
            "batch_size": 8,
            "micro_batch_size": 4,
            "checkpoint_every": 2,
            "validate_every": 2,
            "log_every": 1,
        }
        for stage in ("align", "chat")
    ]
    toy_recipe["data"] = [{"source": "manifest", "path": mixed.path}, {"source": "drawn_text", "size": 32}]
    toy_recipe["evaluation"] = {"limit": 6}
    return toy_recipe


def run(recipe: dict[str, Any], out: Path, cached_codes: bool | str, *, resume: bool = False) -> Path:
    for stage in recipe["stages"]:
        stage["cached_codes"] = cached_codes
    return Run(from_mapping(Recipe, recipe), out, resume=resume).train()


def losses(out: Path) -> list[tuple[Any, ...]]:
    return [
        (event["event"], event["stage"], event["step"], event["losses"])
        for event in read_log(out / "log.jsonl")
        if "losses" in event
    ]


def check_same(one: Path, other: Path, rel: float = 1e-6) -> None:
    found, expected = losses(one), losses(other)
    assert [each[:3] for each in found] == [each[:3] for each in expected]
    for (*_, ours), (*_, theirs) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=rel)


def test_a_frozen_stage_trains_the_same_from_codes(
    frozen_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses in training and validation as with pictures, dropout included; interrupted at any point, the same again."""
    run(frozen_recipe, tmp_path / "plain", False)
    shared = tmp_path / "shared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes_module, "SHARD_EXAMPLES", 5)
        run(frozen_recipe, tmp_path / "codes", str(shared))
    assert len(losses(tmp_path / "codes")) == 12
    check_same(tmp_path / "codes", tmp_path / "plain")
    assert len(list(shared.iterdir())) > 4
    assert all(path.suffix == ".safetensors" for path in shared.iterdir())
    events = read_log(tmp_path / "codes" / "log.jsonl")
    drawn = build_mixture(from_mapping(Recipe, frozen_recipe).data, 0).drawn(32)
    encoded = [(event["stage"], event["examples"]) for event in events if event["event"] == "codes_cached"]
    assert encoded == [("align", sum(map(len, drawn)))], "the second stage draws what the first one did"

    plain, encode = loop_module.Stage._train_step, CodeCache._encode
    calls = {"encode": 0, "step": 0}

    def interrupted_step(self: Any, batches: Any) -> Any:
        calls["step"] += 1
        if calls["step"] == 3:
            os.kill(os.getpid(), 15)
        return plain(self, batches)

    def interrupted_encode(self: Any, *given: Any) -> Any:
        calls["encode"] += 1
        if calls["encode"] == 2:
            os.kill(os.getpid(), 15)
        return encode(self, *given)

    monkeypatch.setattr(loop_module.Stage, "_train_step", interrupted_step)
    monkeypatch.setattr(CodeCache, "_encode", interrupted_encode)
    out = tmp_path / "stopped"
    for resume, step in ((False, 0), (True, 2)):
        with pytest.raises(Interrupted) as caught:
            run(frozen_recipe, out, True, resume=resume)
        assert caught.value.step == step
    assert list((out / "codes" / "0-align").iterdir())
    run(frozen_recipe, out, True, resume=True)
    check_same(out, tmp_path / "codes")
    assert not list((out / "codes").iterdir()), "they go with the stage"
    with pytest.raises(RecipeError, match="cached_codes"):
        run(frozen_recipe, out, False, resume=True)


def test_a_cache_of_another_tokenizer_stops_the_run(frozen_recipe: dict[str, Any], tmp_path: Path) -> None:
    frozen_recipe["stages"] = [{**frozen_recipe["stages"][0], "steps": 1}]
    run(frozen_recipe, tmp_path / "one", str(tmp_path / "shared"))
    frozen_recipe["seed"] = 1
    with pytest.raises(DataError, match="stale: it was made with another vision tokenizer"):
        run(frozen_recipe, tmp_path / "two", str(tmp_path / "shared"))


def test_processes_that_do_not_share_the_folder_are_told(
    frozen_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_module, "_fill", lambda *_: None)
    with pytest.raises(DataError, match="all must reach the same folder"):
        run(frozen_recipe, tmp_path / "run", True)


def test_drawn_batches_need_no_picture(
    parts: tuple[EttForConditionalGeneration, EttProcessor], mixed: SourceConfig, tmp_path: Path
) -> None:
    """Once cached, a picture file is not opened again."""
    model, processor = parts
    coded = cached(CodeCache(tmp_path / "codes", model.vision_tokenizer, processor.image_processor), [mixed])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PIL.Image, "open", None)
        items = [EncodedDraws(coded, processor, None)[draw] for draw in range(9)]
    assert sum(drawn.item.num_images for drawn in items) == 9  # type: ignore[union-attr]


@pytest.mark.slow
def test_two_processes_share_the_work(frozen_recipe: dict[str, Any], tmp_path: Path) -> None:
    """torchrun with two CPU processes: each encodes its part, both read all of it, and losses are those of one process."""
    frozen_recipe["model"]["language_model"]["config"]["attention_dropout"] = 0.0
    for stage in frozen_recipe["stages"]:
        stage |= {"optimizer": {"learning_rate": 1e-6}}
    run(frozen_recipe, tmp_path / "one", True)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(frozen_recipe), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ett.cli"]
    subprocess.run(
        [*launcher, "train", str(path), "--out", str(tmp_path / "two")],
        check=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    check_same(tmp_path / "two", tmp_path / "one", rel=1e-4)

"""The joint model: losses, gradients, placeholders, padding, saving, generation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ett.data.sources import conversation
from ett.losses.caption import supervised_columns
from ett.losses.joint import LossConfig
from ett.model import EttForConditionalGeneration, EttProcessor
from ett.model.build import ModelSpec, build_model, build_vision_tokenizer
from ett.model.loading import load_model
from ett.model.lora import merge_lora
from ett.types import Batch, Example
from tests.conftest import LANGUAGE_MODELS, TOKENIZER

from ett.config import from_mapping  # isort: skip


def build(kind: str = "llama", **changes: Any) -> tuple[EttForConditionalGeneration, EttProcessor]:
    given = {
        "image_size": 32,
        "vision_tokenizer": dict(TOKENIZER),
        "language_model": {"config": LANGUAGE_MODELS[kind]},
        "projector": {"merge_size": 2},
        **changes,
    }
    spec = from_mapping(ModelSpec, given)
    torch.manual_seed(0)
    return build_model(spec, build_vision_tokenizer(spec))


def picture(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 28, 3), dtype=np.uint8))


def examples() -> list[Example]:
    two = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " and "}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two pictures"}]},
        {"role": "user", "content": [{"type": "text", "text": "More?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    ]
    return [
        Example("one", conversation("What?", "a cat"), [picture(0)]),
        Example("two", two, [picture(1), picture(2)]),
        Example("text", conversation("Say hi", "hi", num_images=0), []),
    ]


def inputs(batch: Batch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids,
        "pixel_values": batch.pixel_values,
        "attention_mask": batch.attention_mask,
        "labels": batch.labels,
    }


def encoded(processor: EttProcessor, side: str = "right") -> Batch:
    return processor.collate([processor.encode(example) for example in examples()], side)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_loss_is_the_sum_of_its_terms(kind: str) -> None:
    model, processor = build(kind)
    batch = encoded(processor)
    weights = LossConfig(
        caption_weight=0.5, tokenizer_weight=0.3, reconstruction_weight=2, quantization_weight=3, entropy_weight=0.1
    )
    out = model(**inputs(batch), loss_config=weights)
    assert out.losses is not None
    terms = out.losses
    vq = 2 * terms["reconstruction_loss"] + 3 * terms["quantization_loss"] + 0.1 * terms["entropy_loss"]
    torch.testing.assert_close(out.loss, 0.5 * terms["caption_loss"] + 0.3 * vq)

    # the caption loss by hand: each supervised token from the position before it
    log_p = out.logits.log_softmax(-1)
    by_hand = [
        -log_p[b, t - 1, batch.labels[b, t]]
        for b in range(batch.labels.shape[0])
        for t in range(1, batch.labels.shape[1])
        if batch.labels[b, t] != -100
    ]
    torch.testing.assert_close(terms["caption_loss"], torch.stack(by_hand).mean())
    assert len(by_hand) == batch.num_supervised
    pixels, reconstruction = batch.pixel_values, out.reconstruction
    torch.testing.assert_close(terms["reconstruction_loss"], (pixels - reconstruction).abs().mean())


def test_a_share_of_the_pictures_is_decoded_while_training() -> None:
    """The reconstruction loss of the first pictures, the other terms of all; evaluation decodes them all."""
    model, processor = build()
    batch = encoded(processor)
    part, whole = LossConfig(reconstruction_share=0.4), LossConfig()
    model.train()
    out, full = (model(**inputs(batch), loss_config=weights) for weights in (part, whole))
    assert out.losses is not None
    assert len(out.reconstruction) == 2
    assert len(full.reconstruction) == len(batch.pixel_values) == 3
    torch.testing.assert_close(out.reconstruction, full.reconstruction[:2])
    by_hand = (batch.pixel_values[:2] - out.reconstruction).abs().mean()
    torch.testing.assert_close(out.losses["reconstruction_loss"], by_hand)
    torch.testing.assert_close(out.losses["quantization_loss"], full.losses["quantization_loss"])
    assert len(model.eval()(**inputs(batch), loss_config=part).reconstruction) == 3
    with pytest.raises(ValueError, match="reconstruction_share"):
        LossConfig(reconstruction_share=0)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_caption_loss_reaches_every_part(kind: str) -> None:
    model, processor = build(kind)
    model(**inputs(encoded(processor)), loss_config=LossConfig(tokenizer_weight=0)).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert {name.split(".")[1] for name in without} == {"decoder", "post_quant_conv"}


def test_supervised_positions_give_the_same_loss() -> None:
    model, processor = build()
    batch = encoded(processor)
    kept = model(**inputs(batch), logits_to_keep=supervised_columns(batch.labels))
    assert kept.logits.shape[1] < batch.labels.shape[1]
    torch.testing.assert_close(kept.loss, model(**inputs(batch)).loss)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_padding_side_does_not_matter(kind: str) -> None:
    model, processor = build(kind)
    right, left = encoded(processor), encoded(processor, "left")
    assert right.attention_mask[:, -1].min() == 0
    assert left.attention_mask[:, 0].min() == 0
    a, b = model(**inputs(right)), model(**inputs(left))
    torch.testing.assert_close(a.loss, b.loss)
    for row in range(3):
        ours = a.logits[row][right.attention_mask[row].bool()]
        torch.testing.assert_close(ours, b.logits[row][left.attention_mask[row].bool()], rtol=1e-4, atol=1e-5)


def test_index_and_embedding_are_equal_at_step_0() -> None:
    """The table starts as a copy of the codebook, so both arms start from the same function."""
    embedding, processor = build()
    index, _ = build(visual_input="index")
    index.projector.load_state_dict(embedding.projector.state_dict())
    index.language_model.load_state_dict(embedding.language_model.state_dict())
    batch = encoded(processor)
    a, b = embedding(**inputs(batch)), index(**inputs(batch))
    assert torch.equal(a.logits, b.logits)
    b.losses["caption_loss"].backward()
    assert index.index_embedding.weight.grad.abs().sum() > 0
    assert index.vision_tokenizer.encoder_output.grad is None
    random, _ = build(visual_input="index", index_init="random")
    assert not torch.equal(random.index_embedding.weight, index.index_embedding.weight)


def test_detached_caption_loss_leaves_the_tokenizer_alone() -> None:
    model, processor = build()
    out = model(**inputs(encoded(processor)), loss_config=LossConfig(caption_reaches_tokenizer=False))
    out.losses["caption_loss"].backward(retain_graph=True)
    assert model.vision_tokenizer.encoder_output.grad is None
    assert model.projector.layers[0].weight.grad.abs().sum() > 0
    out.loss.backward()
    assert model.vision_tokenizer.encoder_output.grad.abs().sum() > 0


def test_micro_batches_add_up_to_the_batch() -> None:
    """With the global divisor the caption losses of parts sum to the whole batch's, whatever the lengths."""
    model, processor = build()
    items = [processor.encode(example) for example in examples()[:2]]
    whole = processor.collate(items)
    parts = [processor.collate([item]) for item in items]
    total = sum(model(**inputs(part), num_items_in_batch=whole.num_supervised).losses["caption_loss"] for part in parts)
    torch.testing.assert_close(total, model(**inputs(whole)).losses["caption_loss"])


def test_placeholders_must_match_the_pictures() -> None:
    model, processor = build()
    batch = encoded(processor)
    with pytest.raises(ValueError, match="48 image placeholders, but 2 images give 32"):
        model(input_ids=batch.input_ids, pixel_values=batch.pixel_values[:2])
    with pytest.raises(ValueError, match="no pixel_values"):
        model(input_ids=batch.input_ids)


LOAD = """
import sys, torch
from ett.model import EttForConditionalGeneration, EttProcessor
inputs = torch.load(sys.argv[2], weights_only=True)
model = EttForConditionalGeneration.from_pretrained(sys.argv[1])
EttProcessor.from_pretrained(sys.argv[1])
torch.save(model(**inputs).logits, sys.argv[3])
"""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"visual_input": "index"},
        {"lora": {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}},
    ],
)
def test_saved_model_is_bit_equal_in_a_new_process(changes: dict[str, Any], tmp_path: Path) -> None:
    model, processor = build("qwen2", **changes)
    model.eval()
    batch = encoded(processor)
    with torch.no_grad():
        logits = model(**inputs(batch)).logits
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    torch.save(inputs(batch), tmp_path / "inputs.pt")
    subprocess.run(
        [sys.executable, "-c", LOAD, "model", "inputs.pt", "logits.pt"], cwd=tmp_path, check=True, timeout=120
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits)


def test_auto_classes_load_it(tmp_path: Path) -> None:
    model, processor = build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), EttForConditionalGeneration)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, EttProcessor)
    ours, theirs = processor.encode(examples()[1]), again.encode(examples()[1])
    assert (ours.input_ids, ours.labels) == (theirs.input_ids, theirs.labels)
    assert all(np.array_equal(a, b) for a, b in zip(ours.pixel_values, theirs.pixel_values, strict=True))


def test_loading_in_bfloat16_keeps_the_tokenizer(tmp_path: Path) -> None:
    model, _ = build()
    model.save_pretrained(tmp_path)
    again = EttForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in again.vision_tokenizer.parameters()} == {torch.float32}
    assert {p.dtype for p in again.language_model.parameters()} == {torch.bfloat16}


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    import json

    from ett.errors import ModelError

    model, processor = build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load_model(tmp_path)[0].training is False
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["vision_tokenizer"]["num_res_blocks"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="another architecture"):
        load_model(tmp_path)


def test_lora_trains_adapters_and_merges_without_change() -> None:
    from ett.train.stages import set_trainable

    model, processor = build(lora={"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False})
    set_trainable(model, ("projector", "language_model"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if name.startswith("language_model")}
    assert all(".lora_" in name for name in trained if name.startswith("language_model"))
    model.eval()
    batch = encoded(processor)
    before = model(**inputs(batch)).logits
    merge_lora(model.language_model)
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(**inputs(batch)).logits, before, rtol=1e-4, atol=1e-5)


def test_generation_continues_the_forward(tmp_path: Path) -> None:
    """Greedy generation with a cache equals repeated argmax without one, for a left-padded batch."""
    model, processor = build()
    model.eval()
    prompts = processor.prompt(examples()[:2])
    generated = model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        pixel_values=prompts.pixel_values,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
    )
    ids, mask = prompts.input_ids, prompts.attention_mask
    with torch.no_grad():
        for _ in range(5):
            logits = model(input_ids=ids, attention_mask=mask, pixel_values=prompts.pixel_values).logits[:, -1]
            logits[:, 256] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert torch.equal(generated, ids)


def test_beams_read_their_own_pictures() -> None:
    """Rows repeated for beams or several answers keep their pictures, whatever the number of these in a row."""
    model, processor = build()
    model.eval()
    prompts = processor.prompt(examples())
    assert prompts.pixel_values.shape[0] == 3
    given = {
        "input_ids": prompts.input_ids,
        "attention_mask": prompts.attention_mask,
        "pixel_values": prompts.pixel_values,
    }
    greedy = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    seen: list[torch.Tensor] = []
    plain = model.vision_tokenizer.encode

    def encode(pixel_values: torch.Tensor) -> torch.Tensor:
        seen.append(pixel_values)
        return plain(pixel_values)

    model.vision_tokenizer.encode = encode  # type: ignore[method-assign]
    model.generate(**given, max_new_tokens=4, do_sample=True, num_return_sequences=2)
    one, two, three = prompts.pixel_values
    assert torch.equal(seen[0], torch.stack([one, one, two, three, two, three]))
    beams = model.generate(**given, max_new_tokens=4, min_new_tokens=4, num_beams=2, do_sample=False)
    assert beams.shape == greedy.shape

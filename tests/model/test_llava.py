"""The tokenizer as LLaVA's vision tower: shapes, gradients, saving, generation, the stock processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from ett.model.llava import EttVisionTower, use_vision_tokenizer
from ett.model.processing import EttImageProcessor
from ett.model.text import byte_tokenizer
from ett.tokenizers import VisionTokenizer
from tests.conftest import LANGUAGE_MODELS, TOKENIZER

TEXT = {key: value for key, value in LANGUAGE_MODELS["llama"].items() if key != "model_type"}
IMAGE_TOKEN = 258


@pytest.fixture
def model() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE_TOKEN)
    found = LlavaForConditionalGeneration(config)
    use_vision_tokenizer(found, VisionTokenizer.from_config(dict(TOKENIZER)), image_size=32)
    return found


def inputs() -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    processor = LlavaProcessor(
        EttImageProcessor(32, 32),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        image_token=tokenizer.convert_ids_to_tokens(IMAGE_TOKEN),
        num_additional_image_tokens=0,
    )
    pictures = [
        PIL.Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)) for i in range(2)
    ]
    text = f"{processor.image_token}\nWhat?"
    return dict(processor(images=pictures, text=[text, text], return_tensors="pt"))


def test_the_caption_gradient_reaches_the_codebook(model: LlavaForConditionalGeneration) -> None:
    given = inputs()
    assert int((given["input_ids"] == IMAGE_TOKEN).sum()) == 2 * 64
    labels = given["input_ids"].masked_fill(given["input_ids"] == IMAGE_TOKEN, -100)
    tower = model.model.vision_tower
    assert isinstance(tower, EttVisionTower)
    output = model.train()(**given, labels=labels)
    assert output.logits.shape[:2] == given["input_ids"].shape
    assert output.image_hidden_states.shape == (2 * 64, TEXT["hidden_size"])
    tokenizer = tower.vision_tokenizer
    (by_caption,) = torch.autograd.grad(output.loss, tokenizer.quantize.embedding.weight, retain_graph=True)
    assert by_caption.abs().sum() > 0
    (output.loss + 0.25 * tower.tokenizer_loss()).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
    assert tokenizer.encoder_output.grad.abs().sum() > 0
    assert not torch.equal(tokenizer.quantize.embedding.weight.grad, by_caption), "L_vq is in it too"
    with pytest.raises(RuntimeError, match="no forward"):
        tower.tokenizer_loss()


def test_it_saves_loads_and_generates(model: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    given = inputs()
    model.eval().save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model(**given).logits)
    assert again.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1] == (
        given["input_ids"].shape[1] + 3
    )
    half = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.vision_tower.parameters()} == {torch.float32}
    assert half(**given).logits.dtype == torch.bfloat16


def test_sizes_that_do_not_divide_are_refused(model: LlavaForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="multiple"):
        use_vision_tokenizer(model, VisionTokenizer.from_config(dict(TOKENIZER)), image_size=33)

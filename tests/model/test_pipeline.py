"""transformers' own tools on a saved model: the pipeline, static caches, chat tensors as trainers ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from ett.generate.chat import answer
from ett.model.ett import EttForConditionalGeneration
from ett.model.processing import EttProcessor
from tests.model.test_ett import build, encoded, examples, picture


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for part in build("qwen2"):
        part.save_pretrained(folder)
    return folder


def chat(question: str, seed: int = 0) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": picture(seed)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def test_the_pipeline_answers_as_we_do(saved: Path) -> None:
    """Chats alone and together, plain text with a picture, and an answer that was begun."""
    ask = pipeline("image-text-to-text", model=str(saved), device="cpu")
    model, processor = ask.model, ask.processor
    assert isinstance(model, EttForConditionalGeneration)
    assert isinstance(processor, EttProcessor)
    said = ask(text=chat("What?"), max_new_tokens=6, do_sample=False, return_full_text=False)
    assert said[0]["generated_text"].strip() == answer(model, processor, picture(0), "What?", max_new_tokens=6)
    several = ask(text=[chat("What?"), chat("And?", 1)], max_new_tokens=6, do_sample=False, return_full_text=False)
    assert several[0][0]["generated_text"] == said[0]["generated_text"]
    text = processor.apply_chat_template(chat("What?"), add_generation_prompt=True)
    plain = ask(images=picture(0), text=text, max_new_tokens=6, do_sample=False, return_full_text=False)
    assert plain[0]["generated_text"] == said[0]["generated_text"]
    begun = [*chat("What?"), {"role": "assistant", "content": [{"type": "text", "text": "a c"}]}]
    full = ask(text=begun, max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert full[-1]["content"][-1]["text"].startswith("a c")


def test_a_static_cache_gives_the_same_words(saved: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(saved).eval()
    processor = AutoProcessor.from_pretrained(saved)
    inputs = processor.apply_chat_template(
        [chat("What?"), chat("What is to be seen here?", 1)], add_generation_prompt=True, tokenize=True
    )
    grown, fixed = (
        model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation=kind)
        for kind in ("dynamic", "static")
    )
    assert torch.equal(grown, fixed)
    assert grown.shape[1] == inputs["input_ids"].shape[1] + 6


def test_chat_tensors_are_those_of_training() -> None:
    """What a trainer gets by `apply_chat_template` is what our collation gives it: ids, padding, pictures and labels."""
    _, processor = build()
    ours = encoded(processor)
    chats = []
    for example in examples():
        images = iter(example.images)
        chats.append(
            [
                {
                    "role": turn["role"],
                    "content": [{**p, "image": next(images)} if p["type"] == "image" else p for p in turn["content"]],
                }
                for turn in example.messages
            ]
        )
    theirs = processor.apply_chat_template(
        chats, tokenize=True, return_assistant_tokens_mask=True, processor_kwargs={"padding_side": "right"}
    )
    assert torch.equal(theirs["input_ids"], ours.input_ids)
    assert torch.equal(theirs["attention_mask"], ours.attention_mask)
    assert torch.equal(theirs["pixel_values"], ours.pixel_values)
    assert torch.equal(theirs["assistant_masks"] == 1, ours.labels != -100)


def test_a_turn_left_open_has_no_end() -> None:
    _, processor = build()
    turns = [*chat("What?"), {"role": "assistant", "content": "a c"}]
    text = processor.apply_chat_template(turns, continue_final_message=True)
    assert text.endswith("a c")
    ids = processor.apply_chat_template(turns, continue_final_message=True, tokenize=True)["input_ids"][0]
    assert processor.tokenizer.eos_token_id not in ids
    whole = processor.apply_chat_template(turns, tokenize=True)["input_ids"][0]
    assert torch.equal(whole[: len(ids)], ids)

"""A chat model as a rewriter of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ett.errors import ModelError
from ett.generate.draw import requests
from ett.generate.rewrite import ChatRewriter
from ett.model.text import byte_tokenizer
from tests.conftest import LANGUAGE_MODELS


def test_a_chat_model_rewrites_with_its_likeliest_words(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LANGUAGE_MODELS["llama"])).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no chat template"):
        ChatRewriter(str(tmp_path))
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(tmp_path)
    rewrite = ChatRewriter(str(tmp_path), instruction="Longer: ", max_new_tokens=6)
    ids = tokenizer("<user>Longer: cat<assistant>").input_ids
    for _ in range(6):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    words = " ".join(tokenizer.decode(ids[len(tokenizer("<user>Longer: cat<assistant>").input_ids) :]).split())
    assert rewrite("cat") == words.removesuffix("<|end|>")
    if words:
        assert requests(["cat"], rewrite=rewrite)[0].rewritten == rewrite("cat")

"""Prompts rewritten by a chat model before they are drawn."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from ett.errors import ModelError
from ett.model.loading import load_language_model, load_text_tokenizer

INSTRUCTION = (
    "Describe a picture of the following in one sentence: what it shows, its colours, and where things are. "
    "Answer with the sentence alone.\n\n"
)
"""What a chat model is told, in front of the prompt; the wording is ours."""


class ChatRewriter:
    """Asks a chat model for a longer prompt; the likeliest words, so that a prompt always becomes the same one.

    Args:
        path: folder, hub id or "smollm2", as `ett.model.loading.load_language_model` takes them.
        instruction: in front of each prompt. max_new_tokens: where the answer stops at the latest, >= 1.

    Raises:
        ModelError: it cannot be loaded, or has no chat template.
    """

    def __init__(self, path: str, instruction: str = INSTRUCTION, max_new_tokens: int = 64) -> None:
        self.instruction, self.max_new_tokens = instruction, max_new_tokens
        self.tokenizer = load_text_tokenizer(path)
        if not getattr(self.tokenizer, "chat_template", None):
            raise ModelError(
                f"The text tokenizer of {path!r} has no chat template, so it cannot be asked to rewrite prompts."
            )
        self.model = load_language_model(path).eval()

    @torch.inference_mode()
    def __call__(self, prompt: str) -> str:
        """One line; empty where the model says nothing."""
        turns = [{"role": "user", "content": f"{self.instruction}{prompt}"}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        generator: Any = self.model
        pad = self.tokenizer.pad_token_id
        ids = generator.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=GenerationConfig(
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            ),
        )
        answer = self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return " ".join(str(answer).split())

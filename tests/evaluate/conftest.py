"""Toy models from configurations: a few thousand weights, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ett.data.sources import Source, conversation
from ett.model import EttConfig, EttForConditionalGeneration, EttImageProcessor, EttProcessor
from ett.model.text import add_image_token, byte_tokenizer
from ett.tokenizers import IBQConfig, IBQTokenizer
from ett.types import Example

Toy = tuple[EttForConditionalGeneration, EttProcessor]


def build_toy(seed: int = 0) -> Toy:
    """An untrained model over 32 x 32 pictures (16 positions), and its processor."""
    torch.manual_seed(seed)
    text_tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=264, pad_token_id=257, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    tokenizer = IBQTokenizer(
        IBQConfig(
            channels=32,
            channel_multipliers=(1, 1, 2),
            num_res_blocks=1,
            z_channels=32,
            codebook_size=64,
            codebook_dim=8,
        )
    )
    model = EttForConditionalGeneration.from_parts(
        EttConfig(projector={"merge_size": 2}, image_token_id=add_image_token(text_tokenizer)),
        tokenizer,
        AutoModelForCausalLM.from_config(config),
    ).eval()
    # embeddings of N(0, 0.02) make every likelihood nearly equal, which would hide mistakes
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model, EttProcessor(EttImageProcessor(32, 32), text_tokenizer, num_image_positions=16)


def picture(seed: int, width: int = 40, height: int = 30) -> PIL.Image.Image:
    """Noise, mode RGB."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


class Listed(Source):
    """Examples from a list."""

    def __init__(self, examples: Sequence[Example], name: str = "listed") -> None:
        self.name, self.examples = name, list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


@pytest.fixture(scope="session")
def toy() -> Toy:
    return build_toy()


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Five answered examples with questions and answers of different lengths."""
    texts = [
        ("what?", "cat"),
        (None, "a large dog"),
        ("which animal is this?", "ox"),
        ("?", "Emu."),
        ("name", "two newts"),
    ]
    return [
        Example(f"e{i}", conversation(question, answer), [picture(i, 20 + 9 * i)])
        for i, (question, answer) in enumerate(texts)
    ]

"""Text tokenizers and chat templates: what the processor needs around a language model's own."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

IMAGE_TOKEN = "<|ett_image|>"
"""Placeholder of one visual position."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{{ '\n' }}{% endif %}"
    "{% endfor %}"
)
"""The paper's captioning format: pictures, question if any, newline, answer, end of sequence. No roles, no system prompt."""

CHAT_TEMPLATES = {"plain": PLAIN_TEMPLATE}
"""Templates that a recipe can name beside "lm", the language model's own."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A text tokenizer of 256 bytes and three special tokens, for language models built from a configuration.

    Ids: 0 to 255 are bytes in byte-level order, 256 ``<|end|>`` (end of sequence), 257 ``<|pad|>``, 258 `IMAGE_TOKEN`.
    A language model needs vocab_size >= 257: padding and placeholders are never predicted.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special_tokens(tokenizer)


def name_tokenizer() -> PreTrainedTokenizerFast:
    """A text tokenizer of words: byte-level BPE, trained on the names of the built-in training pictures, in lower case.

    For language models that draw from names and never write: a name takes a token a word, case is lost, bytes spell any
    other word. Ids below 2,560 are BPE's; then ``<|end|>``, ``<|pad|>`` and `IMAGE_TOKEN`. vocab_size >= 2,562 will do.
    """
    return _with_special_tokens(Tokenizer.from_file(str(Path(__file__).with_name("names_tokenizer.json"))))


def _with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return fast


OWN_TEXT_TOKENIZERS = {"bytes": byte_tokenizer, "names": name_tokenizer}
"""Text tokenizers that a recipe can name, for language models built from a configuration."""


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Make sure `tokenizer` knows `IMAGE_TOKEN`; returns its id.

    A new id lies past the vocabulary and the language model's embedding is left as it is: the model never looks the
    placeholder up.
    """
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert isinstance(token_id, int)
    return token_id

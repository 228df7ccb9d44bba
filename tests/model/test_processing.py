"""Conversations to ids and labels."""

from __future__ import annotations

import pytest

from ett.errors import DataError, ModelError
from ett.model.loading import load_text_tokenizer
from ett.model.processing import EttImageProcessor, EttProcessor
from ett.model.text import IMAGE_TOKEN, byte_tokenizer
from ett.types import Example
from tests.model.test_ett import build, examples, picture

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def processor_with(template: str | None = None) -> EttProcessor:
    return EttProcessor(EttImageProcessor(16, 16), byte_tokenizer(), num_image_positions=3, chat_template=template)


def shown(processor: EttProcessor, ids: list[int]) -> str:
    return str(processor.tokenizer.decode(ids)).replace(IMAGE_TOKEN, "#")


def test_plain_format() -> None:
    processor = processor_with()
    ids, labels = processor.tokenize_conversation(examples()[1].messages)
    assert shown(processor, ids) == "### and ###\ntwo pictures<|end|>More?\nno<|end|>"
    supervised = [i for i, label in zip(ids, labels, strict=True) if label != -100]
    assert shown(processor, supervised) == "two pictures<|end|>no<|end|>"
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))


def test_chat_template_supervises_answers_and_their_end() -> None:
    processor = processor_with(CHATML)
    ids, labels = processor.tokenize_conversation(examples()[0].messages)
    assert shown(processor, ids) == "<|im_start|>user\n###What?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
    assert shown(processor, [label for label in labels if label != -100]) == "a cat<|im_end|>"


@pytest.mark.parametrize("template", [None, CHATML])
def test_prompts_are_what_training_saw(template: str | None) -> None:
    """The ids before the first supervised one are the prompt's, exactly."""
    processor = processor_with(template)
    for example in examples():
        ids, labels = processor.tokenize_conversation(example.messages)
        first = next(i for i, label in enumerate(labels) if label != -100)
        assert processor.prompt([example]).input_ids[0].tolist() == ids[:first]


def test_rewriting_templates_are_refused() -> None:
    processor = processor_with("{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ModelError, match="rewrites earlier turns"):
        processor.tokenize_conversation(examples()[1].messages)


def test_reserved_text_and_mismatched_pictures_are_refused() -> None:
    processor = processor_with()
    with pytest.raises(DataError, match="reserved for pictures"):
        processor.tokenize_conversation([{"role": "user", "content": f"a {IMAGE_TOKEN}"}])
    with pytest.raises(DataError, match="mentions 1 pictures and brings 2"):
        processor.encode(Example("x", examples()[0].messages, [picture(0), picture(1)]))


def test_cutting_keeps_a_supervised_token_and_every_picture() -> None:
    processor = processor_with()
    example = examples()[0]
    assert processor.encode(example, max_length=11).input_ids == processor.encode(example).input_ids[:11]
    with pytest.raises(DataError, match="max_length = 9"):
        processor.encode(example, max_length=9)
    with pytest.raises(DataError, match="max_length = 2"):
        processor.encode(example, max_length=2)


def test_transformers_call_expands_placeholders() -> None:
    _, processor = build()
    batch = processor(images=[picture(0)], text=f"{IMAGE_TOKEN}What?", return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == processor.num_image_positions == 16
    with pytest.raises(ValueError, match="mention 2 pictures"):
        processor(images=[picture(0)], text=IMAGE_TOKEN * 2)


def test_apply_chat_template_gives_generation_inputs() -> None:
    _, processor = build()
    turns = [{"role": "user", "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": "What?"}]}]
    batch = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    prompt = processor.prompt(examples()[:1])
    assert batch["input_ids"].tolist() == prompt.input_ids.tolist()
    assert batch["pixel_values"].equal(prompt.pixel_values)
    assert processor.apply_chat_template(turns).count(IMAGE_TOKEN) == 1


def test_a_chat_template_given_to_a_call_is_used_for_it() -> None:
    processor = processor_with()
    turns = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    assert processor.apply_chat_template(turns) == "What?\n"
    assert processor.apply_chat_template(turns, chat_template=CHATML) == "<|im_start|>user\nWhat?<|im_end|>\n"
    assert processor.apply_chat_template(turns) == "What?\n"


def test_names_are_words() -> None:
    tokenizer = load_text_tokenizer("names")
    assert len(tokenizer.tokenize("Red Apple, noto")) == 4
    # a word that no name has, in no alphabet of the names', is spelled and comes back
    for words in ("red apple, noto", "zyzzyva", "яблоко", "a\nb"):
        assert tokenizer.decode(tokenizer(words)["input_ids"]).strip() == words
    ids = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)]
    assert ids == [2560, 2561, 2562]

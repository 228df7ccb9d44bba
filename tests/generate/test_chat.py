"""Answers: batched and single, streamed and whole, greedy and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ett.data.sources import conversation
from ett.errors import DataError, ModelError
from ett.generate.chat import DESCRIBE_PROMPT, answer, answers, prompts, stop_ids
from ett.model import EttProcessor
from ett.model.text import IMAGE_TOKEN
from ett.types import Example
from tests.evaluate.conftest import Toy, build_toy, picture

CHATML = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|pad|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_a_batch_says_what_each_would_say_alone(toy: Toy, examples: list[Example]) -> None:
    model, processor = toy
    together = answers(model, processor, examples, max_new_tokens=12)
    lengths = prompts(processor, examples).attention_mask.sum(dim=1)
    assert len(set(lengths.tolist())) > 1, "the prompts must differ in length for this to show anything"
    assert together == [answers(model, processor, [example], max_new_tokens=12)[0] for example in examples]
    assert len(set(together)) > 1
    assert answers(model, processor, []) == []


def test_greedy_is_the_argmax_of_forward(toy: Toy, examples: list[Example]) -> None:
    model, processor = toy
    batch = prompts(processor, examples[:1])
    ids = batch.input_ids
    said: list[int] = []
    with torch.no_grad():
        for _ in range(8):
            logits = model(input_ids=ids, pixel_values=batch.pixel_values).logits[0, -1]
            logits[processor.image_token_id] = -torch.inf
            said.append(int(logits.argmax()))
            if said[-1] in stop_ids(model, processor):
                break
            ids = torch.cat([ids, torch.tensor([said[-1:]])], dim=1)
    expected = processor.tokenizer.decode(said, skip_special_tokens=True).strip()
    assert answers(model, processor, examples[:1], max_new_tokens=8) == [expected]


def test_streamed_pieces_make_the_answer(toy: Toy) -> None:
    pieces: list[str] = []
    text = answer(*toy, picture(0), "what?", max_new_tokens=20, on_text=pieces.append)
    assert "".join(pieces).strip() == text == answer(*toy, [picture(0)], "what?", max_new_tokens=20)
    assert text


def test_ends_where_an_answer_ends() -> None:
    model, processor = build_toy()
    model.generation_config.eos_token_id = list(range(256))
    assert len(answer(model, processor, picture(0), max_new_tokens=50)) <= 1


def test_the_template_says_what_ends_an_answer(toy: Toy) -> None:
    model, processor = toy
    assert stop_ids(model, processor) == [256]
    other = EttProcessor(processor.image_processor, processor.tokenizer, 16, chat_template=CHATML)
    assert stop_ids(model, other) == [256, 257]


def test_a_placeholder_is_never_said() -> None:
    model, processor = build_toy()
    with torch.no_grad():
        head = model.language_model.get_output_embeddings().weight
        head[processor.image_token_id] = 1e3 * head.abs().max()
    for question in ("what?", "which?", "?"):
        answer(model, processor, picture(0), question, max_new_tokens=5)


def test_saved_settings_do_not_change_the_answer(toy: Toy) -> None:
    model, processor = build_toy()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 3.0
    assert answer(model, processor, picture(0), "what?", max_new_tokens=12) == answer(
        *toy, picture(0), "what?", max_new_tokens=12
    )


def test_temperature_draws(toy: Toy) -> None:
    def drawn(seed: int) -> str:
        torch.manual_seed(seed)
        return answer(*toy, picture(0), "what?", max_new_tokens=12, temperature=3.0)

    assert drawn(0) == drawn(0)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_no_question_describes(toy: Toy) -> None:
    model, processor = toy
    assert DESCRIBE_PROMPT is None
    wordless = answers(model, processor, [Example("x", conversation(None, "?"), [picture(3)])], max_new_tokens=6)[0]
    for question in (None, "", "  \n"):
        assert answer(model, processor, picture(3), question, max_new_tokens=6) == wordless


def test_pictures_from_anywhere(toy: Toy, tmp_path: Path) -> None:
    model, processor = toy
    image = picture(1, 50, 20)
    image.save(tmp_path / "a.png")
    expected = answer(model, processor, image, "what?", max_new_tokens=6)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), [(tmp_path / "a.png").read_bytes()]):
        assert answer(model, processor, given, "what?", max_new_tokens=6) == expected
    for mode in ("L", "P", "RGBA", "1", "I;16"):
        answer(model, processor, image.convert("L").convert(mode), "what?", max_new_tokens=2)
    answer(model, processor, [image, image], "the same?", max_new_tokens=2)
    answer(model, processor, [], "no picture?", max_new_tokens=2)


def test_refusals(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        answer(*toy, tmp_path / "missing.png")
    with pytest.raises(DataError, match="reserved"):
        answer(*toy, picture(0), f"a {IMAGE_TOKEN}")
    with pytest.raises(ValueError, match="max_new_tokens"):
        answer(*toy, picture(0), max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature"):
        answer(*toy, picture(0), temperature=-1.0)


def test_longer_than_the_language_model() -> None:
    model, processor = build_toy()
    model.config.text_config.max_position_embeddings = 30
    assert len(answer(model, processor, picture(0), "what?", max_new_tokens=500)) <= 30
    with pytest.raises(ModelError, match="the language model has 30"):
        answer(model, processor, picture(0), "a question that is too long", max_new_tokens=5)


def test_modes_are_restored() -> None:
    model, processor = build_toy()
    model.train()
    model.vision_tokenizer.eval()
    before = [module.training for module in model.modules()]
    answer(model, processor, picture(0), max_new_tokens=1)
    assert [module.training for module in model.modules()] == before

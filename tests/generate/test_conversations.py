"""Conversations answered together: each as if it were alone, with settings of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ett.errors import DataError, ModelError
from ett.generate.chat import answer, stop_ids
from ett.generate.conversations import Asked, Sampling, converse, encode_prompt
from ett.model.processing import Encoded
from ett.model.text import IMAGE_TOKEN
from tests.evaluate.conftest import Toy, build_toy, picture


def prompt(toy: Toy, text: str | None = "what?", seed: int = 0) -> Encoded:
    content: list[dict[str, Any]] = [{"type": "image"}]
    if text is not None:
        content.append({"type": "text", "text": text})
    return encode_prompt(*toy, [{"role": "user", "content": content}], [picture(seed)])


def test_each_row_says_what_it_would_say_alone(toy: Toy) -> None:
    settings = [
        Sampling(12),
        Sampling(3),
        Sampling(12, temperature=2.0, seed=7),
        Sampling(20, temperature=2.0, seed=8, top_p=0.5),
        Sampling(12, temperature=2.0, seed=7),
    ]
    texts = ["what?", "which of these animals is it?", "what?", None, "what?"]
    rows = [Asked(prompt(toy, text), each) for text, each in zip(texts, settings, strict=True)]
    together = converse(*toy, rows)
    assert together == [converse(*toy, [row])[0] for row in rows]
    assert together[0].text == answer(*toy, picture(0), "what?", max_new_tokens=12)
    assert together[1].text == answer(*toy, picture(0), texts[1], max_new_tokens=3)
    assert together[2] == together[4] != together[0]
    assert together[1].ending == "length"
    assert together[1].num_tokens == 3
    assert converse(*toy, []) == []


def test_draws_follow_the_softmax(toy: Toy) -> None:
    """400 first tokens of one prompt, against the probabilities of `forward`."""
    model, processor = toy
    row = prompt(toy)
    batch = processor.collate([row], padding_side="left")
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, pixel_values=batch.pixel_values).logits[0, -1].double()
    logits[processor.image_token_id] = -torch.inf
    expected = (logits / 0.7).softmax(dim=-1)
    greedy = converse(*toy, [Asked(row, Sampling(1))])[0].text
    texts = [processor.tokenizer.decode([token], skip_special_tokens=True).strip() for token in range(len(expected))]
    wanted = sum(float(expected[token]) for token, text in enumerate(texts) if text == greedy)
    assert 0.05 < wanted < 0.95, "this prompt shows nothing"
    said = converse(*toy, [Asked(row, Sampling(1, temperature=0.7, seed=i)) for i in range(400)])
    share = sum(each.text == greedy for each in said) / 400
    assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / 400) ** 0.5


def test_nucleus_of_one_is_greedy(toy: Toy) -> None:
    greedy, nucleus = converse(
        *toy, [Asked(prompt(toy), Sampling(10)), Asked(prompt(toy), Sampling(10, temperature=5.0, top_p=1e-6, seed=1))]
    )
    assert greedy.text == nucleus.text


def test_pieces_make_the_answer(toy: Toy) -> None:
    pieces: dict[int, list[str]] = {0: [], 1: []}
    rows = [Asked(prompt(toy, seed=i), Sampling(40, temperature=1.5, seed=i), on_text=pieces[i].append) for i in pieces]
    for i, each in enumerate(converse(*toy, rows)):
        assert "".join(pieces[i]) == each.text == each.text.strip()
        assert len(pieces[i]) > 1


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_ends_the_answer_and_is_never_said(toy: Toy, length: int) -> None:
    whole = converse(*toy, [Asked(prompt(toy), Sampling(40, temperature=1.5, seed=3))])[0].text
    at = next(i for i in range(4, len(whole) - length) if whole[i : i + length].strip() == whole[i : i + length])
    stop = whole[at : at + length]
    pieces: list[str] = []
    sampling = Sampling(40, temperature=1.5, seed=3, stop=("never said", stop))
    cut = converse(*toy, [Asked(prompt(toy), sampling, on_text=pieces.append)])[0]
    assert cut.text == whole[: whole.index(stop)].rstrip()
    assert cut.ending == "stop"
    assert "".join(pieces) == cut.text


def scripted(text: str) -> Toy:
    """A model that says `text`, once, and ends."""
    model, processor = build_toy()
    script = iter([*processor.tokenizer(text, add_special_tokens=False).input_ids, *stop_ids(model, processor)])

    class Scripted(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*hidden.shape[:-1], 264)
            logits[..., -1, next(script)] = 1.0
            return logits

    model.language_model.lm_head = Scripted()
    return model, processor


def test_characters_of_several_tokens_come_whole() -> None:
    """Each letter of the byte tokenizer's text is one to four tokens; a listener never sees half of one."""
    toy = scripted("  äß€ 🙂! ")
    pieces: list[str] = []
    (said,) = converse(*toy, [Asked(prompt(toy), Sampling(50), on_text=pieces.append)])
    assert said.text == "äß€ 🙂!"
    assert pieces == ["ä", "ß", "€", " 🙂", "!"]
    assert said.ending == "stop"
    assert said.num_tokens == len("  äß€ 🙂! ".encode()) + 1


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ("END",), ["o", "n", "e"]),
        ("one ENd two", ("END",), ["o", "n", "e", " ENd", " t", "w", "o"]),
        ("aab", ("ab",), ["a"]),
        ("a\n\nb", ("\n\n",), ["a"]),
        ("xyz", ("yz", "y"), ["x"]),
        ("never", ("ver!",), ["n", "e", "ver"]),
    ],
)
def test_what_may_be_a_stop_waits(text: str, stop: tuple[str, ...], expected: list[str]) -> None:
    toy = scripted(text)
    pieces: list[str] = []
    (said,) = converse(*toy, [Asked(prompt(toy), Sampling(50, stop=stop), on_text=pieces.append)])
    assert pieces == expected
    assert said.text == "".join(expected)
    assert said.ending == "stop"


def test_an_abandoned_row_ends_and_the_others_go_on(toy: Toy) -> None:
    heard: list[str] = []
    rows = [
        Asked(prompt(toy), Sampling(30, temperature=1.5, seed=0), heard.append, lambda: len(heard) >= 2),
        Asked(prompt(toy), Sampling(12)),
    ]
    gone, other = converse(*toy, rows)
    assert gone.ending == "abandoned"
    assert gone.num_tokens < 30
    assert other == converse(*toy, [rows[1]])[0]


def test_earlier_answers_are_read(toy: Toy) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "and its colour?"}]},
    ]
    longer = encode_prompt(*toy, turns, [picture(0)])
    assert longer.input_ids[: len(prompt(toy).input_ids)] == prompt(toy).input_ids
    text = toy[1].tokenizer.decode(longer.input_ids[len(prompt(toy).input_ids) :])
    assert text == "a cat<|end|>and its colour?\n"


def test_refusals(toy: Toy) -> None:
    with pytest.raises(DataError, match="mentions 1 pictures and brings 0"):
        encode_prompt(*toy, [{"role": "user", "content": [{"type": "image"}]}], [])
    with pytest.raises(DataError, match="reserved"):
        prompt(toy, f"a {IMAGE_TOKEN}")
    model, processor = build_toy()
    model.config.text_config.max_position_embeddings = 25
    with pytest.raises(ModelError, match="the language model has 25"):
        prompt((model, processor), "a question that is too long")
    row = prompt((model, processor), "abc")
    assert converse(model, processor, [Asked(row, Sampling(500))])[0].num_tokens <= 25 - len(row.input_ids)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"stop": ("",)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)  # type: ignore[arg-type]

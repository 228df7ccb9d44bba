"""Conversations that share a row: the same losses and gradients as in rows of their own, and no look at each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ett.data.sources import conversation
from ett.errors import RecipeError
from ett.losses.joint import LossConfig
from ett.model import EttForConditionalGeneration, EttProcessor
from ett.model.packing import check_packable, packed_rows
from ett.train.objectives import run_model
from ett.train.stages import StageConfig
from ett.types import Batch, Example
from tests.model.test_ett import build, examples, picture


def more_examples() -> list[Example]:
    """Lengths from 3 to about 70, several of which fit into the longest."""
    short = [Example(f"short {i}", conversation("?" * i, "yes", num_images=0), []) for i in (1, 9, 4)]
    return [*short, *examples(), Example("last", conversation("Who?", "me"), [picture(3)])]


def batches(processor: EttProcessor) -> tuple[Batch, Batch]:
    items = [processor.encode(example) for example in more_examples()]
    return processor.collate(items), processor.collate(items, packing=True)


def test_rows_are_full_and_no_longer_than_the_longest() -> None:
    lengths = [3, 10, 4, 7, 1, 5]
    rows = packed_rows(lengths)
    assert sorted(number for row in rows for number in row) == list(range(6))
    assert all(sum(lengths[number] for number in row) <= 10 for row in rows)
    assert len(rows) == 3  # 30 positions
    assert packed_rows([4, 4]) == [[0], [1]]


def test_a_packed_batch_holds_the_same_words() -> None:
    _, processor = build()
    plain, packed = batches(processor)
    assert packed.input_ids.shape[0] < plain.input_ids.shape[0]
    assert packed.input_ids.shape[1] == plain.input_ids.shape[1]
    assert sorted(packed.ids) == sorted(plain.ids)
    assert packed.num_supervised == plain.num_supervised
    assert replace(packed, loss_positions=None).num_supervised == plain.num_supervised
    for batch in (plain, packed):
        assert batch.loss_positions is not None
    assert int(packed.attention_mask.sum()) == int(plain.attention_mask.sum())
    starts = packed.position_ids == 0
    assert int((starts & packed.attention_mask.bool()).sum()) == len(more_examples())
    assert bool((packed.labels[starts] == -100).all())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_losses_and_gradients_are_those_of_rows_of_their_own(kind: str, attention: str) -> None:
    model, processor = build(kind)
    model.language_model.set_attn_implementation(attention)
    weights = LossConfig(entropy_weight=0.1)
    found: list[tuple[dict[str, Tensor], list[Tensor]]] = []
    for batch in batches(processor):
        output = run_model(model, batch, weights)
        assert output.losses is not None
        assert output.logits is None
        parameters = [p for p in model.parameters() if p.requires_grad]
        found.append((output.losses, list(torch.autograd.grad(output.loss, parameters))))
    (plain, plain_gradients), (packed, packed_gradients) = found
    for name, value in plain.items():
        torch.testing.assert_close(packed[name], value, rtol=0, atol=1e-5)
    for ours, theirs in zip(packed_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_a_conversation_does_not_see_the_one_before_it() -> None:
    """Other words in one of two that share a row leave the other's states as they were, bit by bit."""
    model, _ = build()
    tokens = torch.arange(10)[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    decoder = model.language_model.eval().get_decoder()
    with torch.no_grad():
        before = decoder(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        tokens[0, 2] = 77
        after = decoder(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
    assert torch.equal(before[:, 6:], after[:, 6:])
    assert not torch.equal(before[:, 2:6], after[:, 2:6])


def test_a_model_that_mixes_them_is_refused() -> None:
    model, _ = build()
    check_packable(model.language_model)
    layer = model.language_model.model.layers[0].mlp
    plain: Callable[..., Tensor] = layer.forward
    # as a recurrent layer would: each position hears of all before it
    layer.forward = lambda x: plain(x) + 10 * x.cumsum(dim=1)
    with pytest.raises(RecipeError, match="LlamaForCausalLM does not keep them apart"):
        check_packable(model.language_model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stage": "tokenizer", "batch_size": 4}, "reads pictures alone"),
        ({"stage": "semantic", "batch_size": 4, "micro_batch_size": 1}, "a micro-batch has one"),
    ],
)
def test_packing_is_refused_where_it_makes_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        StageConfig(steps=1, packing=True, **given)


class _Capped(nn.Module):
    """A language model whose logits are capped, as Gemma's are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = self.inner(*arguments, **named)
        output.logits = 0.1 * torch.tanh(output.logits / 0.1)
        return output

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)


def test_logits_that_are_more_than_a_layer_come_from_the_model() -> None:
    model, processor = build()
    batch = processor.collate([processor.encode(example) for example in examples()])
    weights = LossConfig(tokenizer_weight=0)
    plain = run_model(model, batch, weights)
    assert plain.logits is None
    capped, _ = build()
    capped.language_model = _Capped(capped.language_model)
    output = run_model(capped, batch, weights)
    assert output.logits is not None
    full = _full_loss(capped, batch)
    torch.testing.assert_close(output.loss, full)
    assert abs(float(plain.loss.detach()) - float(full.detach())) > 1e-3


def _full_loss(model: EttForConditionalGeneration, batch: Batch) -> Tensor:
    output = model(
        input_ids=batch.input_ids,
        pixel_values=batch.pixel_values,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        loss_config=LossConfig(tokenizer_weight=0),
    )
    assert output.loss is not None
    return output.loss

"""Reading behind a cache: our own way through Llama and Qwen2 against the library's, and when it is not taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ett.model import few_rows
from ett.model.decoding import LibraryReader, PlainReader, reader_for
from tests.conftest import LANGUAGE_MODELS

SIZE = 48


def decoder(kind: str = "llama", **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(**{**LANGUAGE_MODELS[kind], **changes})
    found: PreTrainedModel = AutoModelForCausalLM.from_config(config).get_decoder().eval()
    return found


def real() -> torch.Tensor:
    """Three rows of 12 positions, two of them padded on the left."""
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, :3] = mask[2, :1] = False
    return mask


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4, "attention_bias": True}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "num_key_value_heads": 1},
        ),
        ("qwen2", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("copied", [True, False], ids=["copied", "layers"])
def test_both_readers_find_the_same_states(
    kind: str, changes: dict[str, Any], copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not copied:
        monkeypatch.setattr(few_rows, "COPIED_BYTES", 0)
    stack = decoder(kind, **changes)
    assert PlainReader.fits(stack)
    embeds = torch.randn(3, 12, SIZE)
    ours, theirs = PlainReader(stack, real()), LibraryReader(stack, stack.config, real())
    products = [*ours.attention_inputs, *(each for pair in ours.mlp_inputs for each in pair)]
    assert all((each.matrix is not None) == copied for each in products)
    # a prompt, then one position or two at a time
    for count, part in zip((5, 1, 1, 2, 1, 2), embeds.split([5, 1, 1, 2, 1, 2], dim=1), strict=True):
        assert part.shape[1] == count
        torch.testing.assert_close(ours.read(part), theirs.read(part), rtol=1e-4, atol=1e-5)


def test_what_it_does_not_compute_is_left_to_the_library() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not PlainReader.fits(decoder(rope_parameters=dynamic))
    assert not PlainReader.fits(decoder("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0))
    listened = decoder()
    assert isinstance(reader_for(listened, listened.config, real()), PlainReader)
    # the library's own hooks see nothing that is not asked for
    listened(inputs_embeds=torch.randn(1, 2, SIZE), output_hidden_states=True)
    assert PlainReader.fits(listened)
    handle = listened.layers[1].register_forward_hook(lambda *_: None)
    assert isinstance(reader_for(listened, listened.config, real()), LibraryReader)
    handle.remove()
    assert PlainReader.fits(listened)
    other = {"model_type": "gpt2", "n_embd": SIZE, "n_layer": 1, "n_head": 4, "vocab_size": 264}
    assert not PlainReader.fits(AutoModelForCausalLM.from_config(AutoConfig.for_model(**other)).get_decoder())

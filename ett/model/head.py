"""The language model's own output layer, where the loss may apply it without the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def has_linear_head(language_model: PreTrainedModel) -> bool:
    """Whether `language_model`'s logits are one linear layer's output on the decoder's last hidden state.

    Some models scale or cap what comes out of the layer, or what goes in, and adapters may sit on it. Which ones, no
    attribute says: one position goes through the model, and what the layer took and gave is compared with it, bit by bit.
    """
    head = language_model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    met: dict[str, Tensor] = {}

    def note_state(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
        met["state"] = outputs.last_hidden_state

    def note_logits(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        met["input"], met["output"] = inputs[0], output

    device = head.weight.device
    hooks = [language_model.get_decoder().register_forward_hook(note_state), head.register_forward_hook(note_logits)]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            token = torch.zeros(1, 1, dtype=torch.int64, device=device)
            embeds = language_model.get_input_embeddings()(token)
            logits = language_model(inputs_embeds=embeds, use_cache=False, return_dict=True).logits
    finally:
        for hook in hooks:
            hook.remove()
    return (
        len(met) == 3 and torch.equal(met["state"], met["input"]) and torch.equal(met["output"].float(), logits.float())
    )

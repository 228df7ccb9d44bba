"""Several conversations in one row: which ones share it, and whether a language model keeps them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ett.errors import RecipeError


def packed_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Which conversations share a row, so that no row is longer than the longest of them (first fit, longest first).

    Args:
        lengths: positions of each conversation, >= 1.

    Returns:
        For each row the numbers of its conversations, in the order in which they stand there.
    """
    room = max(lengths)
    rows: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        row = next((i for i, left in enumerate(free) if left >= lengths[number]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(room)
        rows[row].append(number)
        free[row] -= lengths[number]
    return rows


@torch.no_grad()
def check_packable(language_model: PreTrainedModel) -> None:
    """Refuse a language model in which conversations that share a row would see each other.

    Where positions begin at 0 again, transformers' attention masks begin anew. A recurrent layer, or attention of another
    make, may not know: two short sequences go through the model side by side, and the second must come out as if alone.

    Raises:
        RecipeError: it does not.
    """
    table = cast(nn.Embedding, language_model.get_input_embeddings()).weight
    tokens = 7919 * torch.arange(1, 9, device=table.device)[None] % table.shape[0]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=table.device)
    modes = {module: module.training for module in language_model.modules()}
    language_model.eval()
    try:
        decoder = language_model.get_decoder()
        alone = decoder(input_ids=tokens[:, 5:], use_cache=False, return_dict=True).last_hidden_state.float()
        packed = decoder(input_ids=tokens, position_ids=positions, use_cache=False, return_dict=True).last_hidden_state
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not torch.allclose(packed[:, 5:].float(), alone, rtol=1e-2, atol=1e-2 * float(alone.std())):
        raise RecipeError(
            f"packing puts several conversations into one row, and {type(language_model).__name__} does not keep them apart. "
            "Leave packing out."
        )

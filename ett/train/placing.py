"""Codes placed by k-means, once, in the middle of a tokenizer's training (`quantize_after`)."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ett.data.mixture import encode_draw
from ett.errors import RecipeError
from ett.tokenizers import IndexBackpropagationQuantizer, VisionTokenizer
from ett.train.feed import StageData
from ett.train.sharding import gathered, put

FEATURES_PER_CODE = 16
"""Features that place one code: k-means over so many times K of them."""


def check_placeable(model: nn.Module) -> None:
    """That a stage with `quantize_after` has codes to place.

    Raises:
        RecipeError: it has not.
    """
    quantizer = model.quantize if isinstance(model, VisionTokenizer) else None
    if not isinstance(quantizer, IndexBackpropagationQuantizer):
        raise RecipeError(
            f"quantize_after places codes by k-means, which {type(quantizer).__name__} has not. Set it to 0."
        )


@torch.no_grad()
def place_codes(
    tokenizer: VisionTokenizer, objective: nn.Module, data: StageData, micro_batch: int, accelerator: Accelerator
) -> float:
    """Put the codes, in place, where the features of the mixture's first pictures are; a function of weights and recipe alone.

    Args:
        tokenizer: that `check_placeable` lets pass. objective: what trains it, whole or divided among ranks; all of them call.
        data: of its stage. micro_batch: pictures that are encoded at a time.

    Returns:
        The mean squared distance of a feature to its code.
    """
    quantizer = tokenizer.quantize
    assert isinstance(quantizer, IndexBackpropagationQuantizer)
    with gathered(objective):
        features: list[Tensor] = []
        wanted, draw = FEATURES_PER_CODE * quantizer.codebook_size, 0
        while sum(each.shape[0] * each.shape[2] * each.shape[3] for each in features) < wanted:
            draws = range(draw, draw + micro_batch)
            items = [encode_draw(data.mixture, each, data.processor, None).item for each in draws]
            pixels = data.processor.collate(items).pixel_values.to(accelerator.device)
            features += [tokenizer.encode(pixels)]
            draw += micro_batch
        rows = torch.cat([each.flatten(2).transpose(1, 2).flatten(0, 1) for each in features])
        distance = quantizer.place_codes(rows.T[None, :, :, None])
        placed = [*quantizer.parameters(), *quantizer.buffers()]
        if accelerator.num_processes > 1:
            for tensor in placed:
                torch.distributed.broadcast(tensor, src=0)
        placed = [tensor.detach().clone() for tensor in placed]
    for target, value in zip((*quantizer.parameters(), *quantizer.buffers()), placed, strict=True):
        put(target, value)
    return distance

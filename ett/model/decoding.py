"""A language model's stack, read a few positions at a time behind a cache that is allocated once.

    R rows     L positions in all     Q positions read now     C hidden size     H heads, G of them share keys and values

The plain form: `decoder(inputs_embeds=...)` of everything read so far, and its last hidden state. Any decoder of transformers
is read through the library's static cache. Layers as Llama and Qwen2 have them are read by `PlainReader`: at one position a
call much of the library's time goes into masks, rotary tables and calls of modules, and a cache that is handed over whole is
read to its end (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from ett.model.few_rows import SideBySide, worth_copying

STEADY_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on how long the sequence has become."""


class Reader(ABC):
    """Reads positions in order; keeps keys and values.

    Args:
        real: bool[R, L], False where a row is padded on the left; true for all positions that are still to come.
    """

    def __init__(self, real: Tensor) -> None:
        self.real = real
        self.places = torch.arange(real.shape[1], device=real.device)
        self.positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        self.taken = 0

    def read(self, embeds: Tensor) -> Tensor:
        """float[R, C]: the last hidden state behind float[R, Q, C], the next positions."""
        chosen = slice(self.taken, self.taken + embeds.shape[1])
        self.taken = chosen.stop
        return self._read(embeds, chosen)

    @abstractmethod
    def _read(self, embeds: Tensor, chosen: slice) -> Tensor: ...

    def _mask(self, chosen: slice, length: int, dtype: torch.dtype) -> Tensor:
        """float[R, 1, Q, length]: 0 where a position sees, the type's lowest number where not."""
        seen = self.real[:, None, None, :length] & (self.places[:length] <= self.places[chosen, None])
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


class LibraryReader(Reader):
    """Any decoder, by its own forward."""

    def __init__(self, decoder: PreTrainedModel, config: PreTrainedConfig, real: Tensor) -> None:
        super().__init__(real)
        self.decoder = decoder
        self.cache = StaticCache(config, max_cache_len=real.shape[1])

    def _read(self, embeds: Tensor, chosen: slice) -> Tensor:
        # a mask of two dimensions would be looked at by the library, which waits for the device
        outputs = self.decoder(
            inputs_embeds=embeds,
            attention_mask=self._mask(chosen, self.real.shape[1], embeds.dtype),
            position_ids=self.positions[:, chosen],
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        return cast(Tensor, outputs.last_hidden_state[:, -1])


class PlainReader(Reader):
    """Decoders that `fits`: the same layers in plain operations; attention sees the filled part of the cache alone."""

    def __init__(self, decoder: PreTrainedModel, real: Tensor) -> None:
        super().__init__(real)
        stack = cast(Any, decoder)
        self.layers, self.norm = list(stack.layers), stack.norm
        attention = self.layers[0].self_attn
        self.head_dim, self.sharing = attention.head_dim, attention.num_key_value_groups
        self.key_heads = attention.config.num_key_value_heads
        shape = (real.shape[0], self.key_heads, real.shape[1], self.head_dim)
        fresh = torch.zeros(shape, dtype=decoder.dtype, device=real.device)
        self.caches = [(fresh.clone(), fresh.clone()) for _ in self.layers]
        inputs = [(each.self_attn.q_proj, each.self_attn.k_proj, each.self_attn.v_proj) for each in self.layers]
        widened = [(each.mlp.gate_proj, each.mlp.up_proj) for each in self.layers]
        copied = worth_copying([linear.weight for group in (*inputs, *widened) for linear in group])
        self.attention_inputs = [SideBySide(group, copied) for group in inputs]
        # one matrix of both would leave the nearer caches
        self.mlp_inputs = [(SideBySide([gate], copied), SideBySide([up], copied)) for gate, up in widened]
        cosines, sines = stack.rotary_emb(fresh, self.positions)
        # rotate_half(x) = roll(x) with its first half negated; the sign goes into the sines
        negated, kept = sines.chunk(2, dim=-1)
        self.cosines, self.sines = cosines.unsqueeze(1), torch.cat([-negated, kept], dim=-1).unsqueeze(1)
        self.padding = self._mask(slice(real.shape[1] - 1, real.shape[1]), real.shape[1], decoder.dtype)

    @staticmethod
    def fits(decoder: PreTrainedModel) -> bool:
        """Whether `decoder` is what this class computes, and nobody listens to what happens inside."""
        if type(decoder) not in (LlamaModel, Qwen2Model):
            return False
        config = decoder.config
        return (
            config.rope_parameters["rope_type"] in STEADY_ROTATIONS
            and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
            and config._attn_implementation in ("sdpa", "eager")
            and not any(_is_watched(module) for module in decoder.modules())
        )

    def _read(self, embeds: Tensor, chosen: slice) -> Tensor:
        count, end = embeds.shape[1], chosen.stop
        angles = self.cosines[:, :, chosen], self.sines[:, :, chosen]
        mask = self.padding[..., :end] if count == 1 else self._mask(chosen, end, embeds.dtype)
        hidden = embeds
        for number, layer in enumerate(self.layers):
            attention, mlp = layer.self_attn, layer.mlp
            x = self.attention_inputs[number](_normed(layer.input_layernorm, hidden))
            # float[R, H + 2 H / G, Q, d]: heads of queries, then of keys, then of values
            heads = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            turning, fresh_values = heads.split([heads.shape[1] - self.key_heads, self.key_heads], dim=1)
            query, fresh_keys = _rotated(turning, *angles).split(
                [turning.shape[1] - self.key_heads, self.key_heads], dim=1
            )
            keys, values = (kept[:, :, :end] for kept in self.caches[number])
            keys[:, :, chosen.start :] = fresh_keys
            values[:, :, chosen.start :] = fresh_values
            attended = self._attend(query, keys, values, mask, attention.scaling)
            hidden = hidden + attention.o_proj(attended.transpose(1, 2).reshape(*x.shape[:2], -1))
            gate, up = self.mlp_inputs[number]
            x = _normed(layer.post_attention_layernorm, hidden)
            hidden = hidden + mlp.down_proj(mlp.act_fn(gate(x)) * up(x))
        return _normed(self.norm, hidden[:, -1])

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
        """float[R, H, Q, d] of query float[R, H, Q, d] over keys and values float[R, H / G, end, d]."""
        if self.sharing == 1:
            return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
        if query.shape[2] > 1:
            keys, values = (x.repeat_interleave(self.sharing, dim=1) for x in (keys, values))
            return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
        # the heads that share keys stand where the positions would
        shared = query.squeeze(2).unflatten(1, (-1, self.sharing))
        return F.scaled_dot_product_attention(shared, keys, values, mask, scale=scale).flatten(1, 2).unsqueeze(2)


def reader_for(decoder: PreTrainedModel, config: PreTrainedConfig, real: Tensor) -> Reader:
    """The fastest one that reads `decoder`, whose configuration (with that of a wrapper) is `config`."""
    return PlainReader(decoder, real) if PlainReader.fits(decoder) else LibraryReader(decoder, config, real)


def _is_watched(module: nn.Module) -> bool:
    """Whether `module` is offloaded, or hooks run when it is called, other than the library's for `output_hidden_states`."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    foreign = any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)
    return foreign or hasattr(module, "_hf_hook")


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """The root-mean-square norm of Llama and Qwen2."""
    weight = cast(Tensor, norm.weight)
    return F.rms_norm(x, (x.shape[-1],), weight, cast(float, norm.variance_epsilon))


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of float[R, H, Q, d] by float[R, 1, Q, d] tables, the sines signed."""
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, dims=-1), sines)

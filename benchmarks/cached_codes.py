"""A step of a frozen stage: pictures encoded anew, from cached codes, and with the tokenizer removed, alternately.

    python benchmarks/cached_codes.py                            # three scales, on CUDA where there is one
    python benchmarks/cached_codes.py --scales small --repeats 3

A step reads its examples, pads them, and runs forward, backward and AdamW of `align` on one micro-batch. "encoded" draws
pictures and encodes them; "cached" reads indices from the cache on disk, conversations with them; "removed" reads the same
conversations and puts random embeddings of the same shape where the tokenizer's would be: what no cache can beat. Weights are
random. Ratios are of neighbouring steps, in every order, so that whatever else the machine does falls on all three.

Indices from the cache are compared with those of the same pictures encoded anew, one at a time: another batch size takes other
roads through the convolutions, and two codes that are nearly as good may change places.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from ett.data.codes import CodeCache
from ett.data.mixture import Mixture, SourceConfig, build_mixture
from ett.losses.caption import supervised_columns
from ett.losses.joint import LossConfig
from ett.model.build import LanguageModelSpec, ModelSpec, build_model, build_vision_tokenizer
from ett.model.projector import ProjectorConfig
from ett.tokenizers.quantizer import IndexBackpropagationQuantizer
from ett.train.stages import set_trainable, train_mode
from ett.types import Batch

FROZEN = LossConfig(tokenizer_weight=0.0)
SIDES = ("encoded", "cached", "removed")
CLOSE = 1e-4
"""Two logits closer than this share of the larger one are a tie: rounding of the encoder in float32 may decide it."""


@dataclass(frozen=True)
class Scale:
    """image_size [pixels]; the tokenizer's and the language model's own values; examples in a step."""

    image_size: int
    batch_size: int
    tokenizer: dict[str, Any]
    language_model: dict[str, Any]
    merge_size: int = 1


def llama(width: int, inner: int, layers: int, heads: int, vocabulary: int = 264) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 257,
    }


SCALES = {
    # the shipped reader's size
    "small": Scale(
        64,
        16,
        {"channels": 32, "channel_multipliers": [1, 2, 2, 4], "num_res_blocks": 1, "codebook_size": 4096, "codebook_dim": 32},
        llama(192, 512, 2, 6),
        merge_size=2,
    ),
    "medium": Scale(
        128,
        4,
        {"channels": 64, "channel_multipliers": [1, 1, 2, 4], "num_res_blocks": 2, "codebook_size": 16384, "codebook_dim": 64},
        llama(512, 1408, 8, 8),
    ),
    # the paper's tokenizer, and a language model of SmolLM2-135M's size
    "large": Scale(
        256,
        2,
        {"channels": 128, "channel_multipliers": [1, 1, 2, 2, 4], "num_res_blocks": 4, "codebook_size": 131072,
         "codebook_dim": 256},
        llama(576, 1536, 30, 9, vocabulary=49152),
    ),
}  # fmt: skip


class Bench:
    """One scale: a model in its `align` stage, and its three ways to a step."""

    def __init__(self, scale: Scale, folder: Path, device: torch.device, steps: int) -> None:
        torch.manual_seed(0)
        spec = ModelSpec(
            image_size=scale.image_size,
            vision_tokenizer=scale.tokenizer,
            language_model=LanguageModelSpec(config=scale.language_model),
            projector=ProjectorConfig(merge_size=scale.merge_size),
        )
        model, self.processor = build_model(spec, build_vision_tokenizer(spec))
        self.model, self.device, self.batch_size = model.to(device), device, scale.batch_size
        set_trainable(self.model, ("projector",))
        train_mode(self.model, ("projector",))
        self.optimizer = torch.optim.AdamW(self.model.projector.parameters(), lr=1e-4)
        configs = [SourceConfig(source="drawn_text", size=scale.image_size)]
        self.pictures = build_mixture(configs, 0)
        cache = CodeCache(folder, self.model.vision_tokenizer, self.processor.image_processor)
        (positions,) = cache.missing(configs, self.pictures, steps * scale.batch_size)
        started = time.perf_counter()
        for _ in cache.fill(configs[0], self.pictures.sources[0], positions, batch_size=scale.batch_size):
            pass
        self.fill_seconds = (time.perf_counter() - started) / len(positions)
        cache.refresh()
        self.codes = cache.mixture(configs, self.pictures)

    def read(self, mixture: Mixture, step: int) -> Batch:
        draws = range(step * self.batch_size, (step + 1) * self.batch_size)
        return self.processor.collate([self.processor.encode(mixture[draw]) for draw in draws]).to(self.device)

    def step(self, side: str, step: int) -> float:
        """Seconds from the draws to the updated projector."""
        self._wait()
        started = time.perf_counter()
        batch = self.read(self.pictures if side == "encoded" else self.codes, step)
        given: dict[str, Any] = {"pixel_values": batch.pixel_values, "image_indices": batch.image_indices}
        given["input_ids"] = batch.input_ids
        if side == "removed":
            given = {"inputs_embeds": self.model.embed(batch.input_ids, self.random_visual(batch))}
        columns = supervised_columns(batch.labels)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            output = self.model(
                **given,
                attention_mask=batch.attention_mask,
                labels=batch.labels,
                logits_to_keep=columns,
                loss_config=FROZEN,
                use_cache=False,
            )
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        return time.perf_counter() - started

    def random_visual(self, batch: Batch) -> Tensor:
        """What the projector makes of noise of the embeddings' shape."""
        assert batch.image_indices is not None
        images, height, width = batch.image_indices.shape
        shape = (images, self.model.vision_tokenizer.codebook_dim, height, width)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            visual: Tensor = self.model.projector(torch.randn(shape, device=self.device))
        return visual

    @torch.no_grad()
    def changed_indices(self, steps: int) -> tuple[int, int, float]:
        """(indices that differ between the cache and a fresh encoding, indices in all, largest margin among the former).

        The margin is the distance of the two largest logits, as a share of the larger one.
        """
        tokenizer = self.model.vision_tokenizer
        quantizer = tokenizer.quantize
        assert isinstance(quantizer, IndexBackpropagationQuantizer)
        changed, compared, margin = 0, 0, 0.0
        for step in range(steps):
            cached = self.read(self.codes, step).image_indices
            assert cached is not None
            for indices, pixels in zip(cached, self.read(self.pictures, step).pixel_values, strict=True):
                features = tokenizer.encode(pixels[None])
                differs = (quantizer.nearest(features)[0] != indices).flatten()
                rows = quantizer._query(quantizer._rows(features))[differs]
                compared += differs.numel()
                changed += len(rows)
                if len(rows):
                    first, second = (rows @ quantizer._keys().T).topk(2, dim=1).values.unbind(1)
                    margin = max(margin, float(((first - second) / first.abs()).max()))
        return changed, compared, margin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(name: str, repeats: int, device: torch.device) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(SCALES[name], Path(folder), device, repeats + 1)
        for side in SIDES:
            bench.step(side, repeats)
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        # every order as often: a step behind an encoder's finds the machine's caches full of that
        orders = list(itertools.permutations(SIDES))
        for turn in range(repeats):
            for side in orders[turn % len(orders)]:
                seconds[side].append(bench.step(side, turn))
        changed, compared, margin = bench.changed_indices(repeats)
    print(f"{name}: {SCALES[name].image_size} px, {SCALES[name].batch_size} pictures a step")
    for side, values in seconds.items():
        print(f"  {side:<8} median {statistics.median(values) * 1e3:9.1f} ms  (min {min(values) * 1e3:.1f})")
    speed = [removed / cached for removed, cached in zip(seconds["removed"], seconds["cached"], strict=True)]
    gain = [encoded / cached for encoded, cached in zip(seconds["encoded"], seconds["cached"], strict=True)]
    print(
        f"  cached / removed, speed {statistics.median(speed):.3f} (min {min(speed):.3f}, max {max(speed):.3f})\n"
        f"  encoded / cached, time {statistics.median(gain):.2f} (min {min(gain):.2f}, max {max(gain):.2f})\n"
        f"  filling the cache {bench.fill_seconds * 1e3:.1f} ms a picture; {changed} of {compared} indices differ from those "
        f"of a fresh encoding",
        flush=True,
    )
    if margin > CLOSE:
        raise SystemExit(
            f"An index differs where the best two codes are {margin:.1e} apart; only ties below {CLOSE} may."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", nargs="+", choices=sorted(SCALES), default=list(SCALES))
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(
        f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{platform.processor() or platform.machine()}"
    )
    for name in arguments.scales:
        measure(name, arguments.repeats, device)


if __name__ == "__main__":
    main()

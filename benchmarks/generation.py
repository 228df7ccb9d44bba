"""Text to image: `generate_images` against two-pass guidance on dynamic caches, alternately in one process.

    python benchmarks/generation.py                            # draw_64px's shape, 8 pictures: under a minute on 2 cores
    python benchmarks/generation.py --batch-sizes 1 8 32 --repeats 20
    python benchmarks/generation.py --recipe mine.yaml model.image_size=128 --device cuda

The baseline is the loop that usual stacks run for guidance (transformers' `guidance_scale`, Emu3): a token takes two forward
passes, with and without the prompt, each on a dynamic cache of its own; logits are those of the extended vocabulary, words and
codes, of which words are then forbidden. It is lean: nothing but that loop, neither `generate` nor logits processors
around it, and a draw is one call for the batch. Both sides have the same weights (random, but for a tokenizer that the recipe
names), type, threads and sampling, nothing compiled, and stop at the indices. First logits along the same tokens are
compared, in float32: ours, the baseline's, and those of one pass over the whole picture without any cache.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, cast

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ett.cli.common import quiet_libraries
from ett.experiments.recipe import load_recipe
from ett.generate.draw import grid_of
from ett.model.build import build_model, build_vision_tokenizer
from ett.model.drawing import DrawingSteps
from ett.model.ett import EttForConditionalGeneration
from ett.model.image_sampling import ImageSampling
from ett.model.processing import EttProcessor

PROMPTS = (
    "red apple",
    "cat",
    "flag: Norway",
    "person running",
    "a glass of milk",
    "sunrise over mountains",
    "car",
    "bee",
)
HEAD_STD = 0.3
"""Spread of the image head's weights, so that logits differ as a trained model's do."""

Grid = tuple[int, int]


class Branch:
    """One of the two passes: its rows, its cache."""

    def __init__(
        self, model: EttForConditionalGeneration, input_ids: Tensor, attention_mask: Tensor, grid: Grid
    ) -> None:
        self.model, self.width = model, grid[1]
        self.attention_mask, self.input_ids = attention_mask, input_ids
        self.cache = DynamicCache(config=model.config.text_config)
        self.drawn = 0

    def first(self) -> Tensor:
        """float[B, V + K]: logits behind the prompt."""
        positions = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        return self._logits(self.model.get_input_embeddings()(self.input_ids), positions)

    def next(self, tokens: Tensor) -> Tensor:
        """float[B, V + K]: logits behind int64[B] image tokens."""
        embeds = self.model.token_embeddings(tokens, self.drawn, self.width)
        self.drawn += 1
        real = self.attention_mask.new_ones(embeds.shape[:2])
        self.attention_mask = torch.cat([self.attention_mask, real], dim=1)
        return self._logits(embeds, self.attention_mask.cumsum(dim=1)[:, -embeds.shape[1] :] - 1)

    def _logits(self, embeds: Tensor, positions: Tensor) -> Tensor:
        outputs = self.model.language_model.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=self.attention_mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden = outputs.last_hidden_state[:, -1]
        text = cast(nn.Module, self.model.get_output_embeddings())(hidden)
        return torch.cat([text, self.model.drawing_head(hidden, self.model.codes())], dim=-1)


class TwoPass:
    """Guidance on dynamic caches, with the interface of `DrawingSteps`: logits of 2 B rows, with prompts, then without."""

    def __init__(
        self, model: EttForConditionalGeneration, input_ids: Tensor, attention_mask: Tensor, grid: Grid
    ) -> None:
        pairs = zip(input_ids.chunk(2), attention_mask.chunk(2), strict=True)
        self.branches = [Branch(model, ids, mask, grid) for ids, mask in pairs]

    def first(self) -> list[Tensor]:
        return [branch.first() for branch in self.branches]

    def next(self, tokens: Tensor) -> list[Tensor]:
        return [branch.next(tokens) for branch in self.branches]


Inputs = dict[str, Tensor]


@torch.no_grad()
def two_pass(
    model: EttForConditionalGeneration, inputs: Inputs, grid: Grid, seeds: list[int], sampling: ImageSampling
) -> Tensor:
    """int64[B, N] tokens, as the baseline draws them."""
    torch.manual_seed(seeds[0])
    steps = TwoPass(model, **inputs, grid=grid)
    words = model.config.text_config.get_text_config().vocab_size
    found: list[Tensor] = []
    conditional, plain = steps.first()
    while True:
        logits = plain + sampling.guidance * (conditional - plain)
        logits[:, :words] = -torch.inf
        found.append(torch.multinomial((logits / sampling.temperature).softmax(dim=-1), 1)[:, 0] - words)
        if len(found) == grid[0] * grid[1]:
            return torch.stack(found, dim=1)
        conditional, plain = steps.next(found[-1])


@torch.no_grad()
def ours(
    model: EttForConditionalGeneration, inputs: Inputs, grid: Grid, seeds: list[int], sampling: ImageSampling
) -> Tensor:
    """int64[B, N] tokens, as `generate_images` draws them."""
    return model.generate_image_indices(**inputs, grid=grid, seeds=seeds, sampling=sampling).flatten(1)


SIDES: dict[str, Callable[..., Tensor]] = {"ours": ours, "two passes": two_pass}


class Logits(NamedTuple):
    """float[2 B, N, K] of every token, with prompts, then without."""

    ours: Tensor
    two_pass: Tensor
    uncached: Tensor


@torch.no_grad()
def forced_logits(model: EttForConditionalGeneration, inputs: Inputs, grid: Grid, indices: Tensor) -> Logits:
    """Logits along int64[B, N] given tokens, three ways."""
    words = model.config.text_config.get_text_config().vocab_size
    steps, branches = DrawingSteps(model, **inputs, grid=grid), TwoPass(model, **inputs, grid=grid)
    hidden, theirs = [steps.first()], [torch.cat(branches.first())]
    for tokens in indices.T[:-1]:
        hidden.append(steps.next(tokens))
        theirs.append(torch.cat(branches.next(tokens)))
    # a row of tokens may have an end of its own, at which nothing is predicted
    step = grid[1] + (model.projector.row_end is not None)
    placeholders = inputs["input_ids"].new_full((1, grid[0] * step), model.config.image_token_id)
    places = (torch.arange(grid[0])[:, None] * step + torch.arange(grid[1])).flatten().to(indices.device)
    rows, length = inputs["input_ids"].shape
    whole = model(
        input_ids=torch.cat([inputs["input_ids"], placeholders.expand(rows, -1)], dim=1),
        attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(placeholders).expand(rows, -1)], dim=1),
        image_indices=indices.unflatten(1, grid).repeat(2, 1, 1),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states[-1]
    return Logits(
        steps.logits(torch.stack(hidden, dim=1)),
        torch.stack(theirs, dim=1)[..., words:],
        steps.logits(whole[:, length - 1 + places]),
    )


def seconds(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(seconds, seconds of CPU time) of `run`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started, busy = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - busy


def measure(
    model: EttForConditionalGeneration, processor: EttProcessor, batch_size: int, repeats: int, sampling: ImageSampling
) -> None:
    device = model.device
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch_size)]
    inputs = {name: tensor.to(device) for name, tensor in processor.drawing_inputs(prompts).items()}
    grid, seeds = grid_of(model, processor, None), list(range(batch_size))
    drawn = ours(model, inputs, grid, seeds, sampling)
    logits = forced_logits(model, inputs, grid, drawn)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for turn in range(repeats + 1):
        for name, side in SIDES.items():
            taken = seconds(lambda: side(model, inputs, grid, seeds, sampling), device)  # noqa: B023  # called at once
            if turn > 0:  # the first one warms up
                found[name].append(taken)
    print(
        f"{batch_size} pictures of {grid[0]} x {grid[1]} tokens, prompts of up to {inputs['input_ids'].shape[1]} positions"
    )
    for name, turns in found.items():
        times = [each[0] for each in turns]
        print(
            f"  {name:<10} median {statistics.median(times) * 1e3:8.1f} ms (min {min(times) * 1e3:.1f}, "
            f"max {max(times) * 1e3:.1f}), {drawn.numel() / statistics.median(times):7.0f} tokens/s, "
            f"CPU time {statistics.median(each[1] for each in turns) * 1e3:.1f} ms"
        )
    for label, column in (("time", 0), ("CPU time", 1)):
        ratios = [b[column] / a[column] for a, b in zip(found["ours"], found["two passes"], strict=True)]
        shown = f"{statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})"
        print(f"  two passes / ours, {label}: {shown}")
    apart = [float((logits.ours - other).abs().max()) for other in (logits.two_pass, logits.uncached)]
    spread = float(logits.ours.std())
    print(f"  logits (spread {spread:.1f}) apart by at most {apart[0]:.1e}; from those without a cache {apart[1]:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=["draw_64px"], help="with overrides")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.guidance == 1:
        raise SystemExit("Without guidance there is one pass on either side: give another --guidance.")
    quiet_libraries()
    recipe = load_recipe(arguments.recipe[0], arguments.recipe[1:])
    if recipe.model.init is not None or recipe.model.image_head is None:
        raise SystemExit("Give a recipe that builds its model itself, with an image head.")
    torch.manual_seed(0)
    model, processor = build_model(recipe.model, build_vision_tokenizer(recipe.model))
    assert model.image_head is not None
    nn.init.normal_(model.image_head.layer.weight, std=HEAD_STD)
    model = model.to(arguments.device).eval()
    print(
        f"{recipe.name}: {arguments.device}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{platform.processor() or platform.machine()}"
    )
    for batch_size in arguments.batch_sizes:
        measure(model, processor, batch_size, arguments.repeats, ImageSampling(guidance=arguments.guidance))


if __name__ == "__main__":
    main()

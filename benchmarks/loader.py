"""How many pictures a second the training's own reader gives, against what a step takes; how long a step waits for them.

    python benchmarks/loader.py                                 # 4 minutes on 2 cores
    python benchmarks/loader.py --device cuda --recipe quickstart arm=ett stages.semantic.batch_size=256 --workers 0 4 16

Read with `ett.train.feed.steps_of`, as `ett train` reads: decoded, resized, drawn, encoded, collated in the loader processes.
JPEGs are photographs' size and noise-like, the slow kind; they lie in the machine's file cache. Memory is the proportional set
size of this process and its loaders together, at its largest after the first tenth, against what it was then.

Then the tuned step of a recipe, with the recipe's own data: the share of the time in which the step waited for its batch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from streaming import memory_in_use

from ett.data.mixture import SourceConfig, build_mixture
from ett.evaluate.run_folder import resolve_model_folder
from ett.experiments.recipe import load_recipe
from ett.model.build import ModelSpec, build_processor, build_vision_tokenizer, start_from
from ett.model.loading import find_weights
from ett.model.text import byte_tokenizer
from ett.train.feed import StageData, Step, steps_of
from ett.train.objectives import JointObjective, Shares
from ett.train.optim import build_optimizer
from ett.train.stages import StageConfig, set_trainable, train_mode

TOKENIZER = {"channels": 8, "channel_multipliers": [1, 1], "norm_groups": 8, "z_channels": 8, "codebook_size": 16}
PICTURES = 64
"""JPEGs that are read again and again."""


def write_jpegs(folder: Path, side: int) -> Path:
    """A manifest of `PICTURES` pictures of `side` x `side` pixels: blurred noise, some 100 kB each at 512."""
    rng, lines = np.random.default_rng(0), []
    for number in range(PICTURES):
        small = PIL.Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
        small.resize((side, side), PIL.Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"picture {number}"}]
        lines.append(json.dumps({"id": str(number), "image": f"{number}.jpg", "conversations": turns}))
    path = folder / "pictures.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def reader(source: SourceConfig, size: int, batch_size: int, steps: int, workers: int) -> Iterator[Step]:
    """The batches of a stage that aligns, from one source."""
    spec = ModelSpec(image_size=size, vision_tokenizer=TOKENIZER)
    processor = build_processor(spec, byte_tokenizer(), build_vision_tokenizer(spec))
    data = StageData(build_mixture([source], seed=0), [], processor, workers)
    return steps_of(data, StageConfig("align", steps, batch_size), 0, Accelerator(cpu=True), lambda: False)


def speed(source: SourceConfig, size: int, batch_size: int, steps: int, workers: int) -> tuple[float, float]:
    """(pictures a second, growth of memory as a share) over the last nine tenths of `steps`."""
    warm, started, memory = max(1, steps // 10), 0.0, list[int]()
    for step, _ in enumerate(reader(source, size, batch_size, steps, workers), 1):
        if step == warm:
            started = time.perf_counter()
        if step >= warm and (step - warm) % max(1, steps // 20) == 0:
            memory.append(memory_in_use())
    return batch_size * (steps - warm) / (time.perf_counter() - started), max(memory) / memory[0] - 1


def waiting(words: list[str], steps: int, workers: int, device: str) -> tuple[float, float, float]:
    """(examples a second that a step takes by itself, examples a second of the loop, share of it that waits) of a recipe's last
    stage."""
    recipe = load_recipe(words[0], words[1:])
    stage = replace(recipe.stages[-1], steps=steps + 1)
    if recipe.model.init is None:
        raise SystemExit("Give a recipe that starts from a saved model.")
    torch.manual_seed(0)
    model, processor = start_from(resolve_model_folder(find_weights(recipe.model.init)), recipe.model)
    model = model.to(device)
    set_trainable(model, stage.parts)
    train_mode(model, stage.parts)
    parts = {name: getattr(model, name) for name in ("vision_tokenizer", "projector", "language_model")}
    optimizer, objective = build_optimizer(parts, stage.optimizer), JointObjective(model)
    mixture = build_mixture(stage.data or recipe.data, recipe.seed)
    feed = steps_of(
        StageData(mixture, [], processor, workers), stage, 0, Accelerator(cpu=device == "cpu"), lambda: False
    )
    waited, worked, begun = 0.0, 0.0, time.perf_counter()
    for number in range(steps + 1):
        if number == 1:  # the first one starts the loaders and warms up
            waited, worked, begun = 0.0, 0.0, time.perf_counter()
        asked = time.perf_counter()
        fed = next(feed)
        given = time.perf_counter()
        for batch in fed.micro_batches:
            shares = Shares(float(batch.num_supervised), 1.0)
            objective(batch, stage.loss_config, shares).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.optimizer.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        waited, worked = waited + given - asked, worked + time.perf_counter() - given
    whole, examples = time.perf_counter() - begun, steps * stage.batch_size
    return examples / worked, examples / whole, waited / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--recipe", nargs="+", default=["quickstart", "arm=ett"], help="with overrides")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}")
    with tempfile.TemporaryDirectory() as folder:
        sources = {
            "names, 64 px": (SourceConfig("names"), 64),
            "drawn text, 64 px": (SourceConfig("drawn_text", size=64), 64),
            "drawn scenes, 64 px": (SourceConfig("drawn_scenes", size=64), 64),
        }
        for side, size in ((512, 64), (512, 256)):
            place = Path(folder) / f"{side}-{size}"
            place.mkdir()
            sources[f"JPEG {side} to {size} px"] = (SourceConfig("manifest", path=str(write_jpegs(place, side))), size)
        for name, (source, size) in sources.items():
            found = [speed(source, size, given.batch_size, given.batches, workers) for workers in given.workers]
            rates = "   ".join(
                f"{workers} loaders {rate:6.0f} a second, memory {growth:+.1%}"
                for workers, (rate, growth) in zip(given.workers, found, strict=True)
            )
            print(f"{name:<20} {rates}", flush=True)
    for workers in given.workers:
        alone, loop, share = waiting(given.recipe, given.steps, workers, given.device)
        print(
            f"{' '.join(given.recipe)}, {workers} loaders: a step takes {alone:.1f} a second by itself, the loop {loop:.1f}; "
            f"it waits {share:.1%} of the time",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""`ett plan` against what a few steps really take: peak memory of one device, each stage in a process of its own.

    python benchmarks/plan.py                             # every case below, on CPU: about 10 minutes on 2 cores
    python benchmarks/plan.py --cases quickstart toy --device cuda

On CPU the measured peak is Linux's high-water mark of resident memory above what was resident before the model was built, when
all libraries were imported; on CUDA it is what PyTorch's allocator held at most. A case is a recipe and one of its stages, cut
to a few steps and a short validation in the plan and in the run alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from ett.cli.common import quiet_libraries
from ett.config import from_mapping
from ett.experiments.plan import HARDWARE, Target, plan
from ett.experiments.recipe import Recipe, load_recipe
from ett.experiments.run import Run

STEPS = 3
SHIPPED = "model.vision_tokenizer.path=reader_64px"
"""In place of the tokenizer that another recipe would have to train first; of the same shape."""


@dataclass(frozen=True)
class Case:
    """A recipe's file with overrides, or its values; the number of the stage that runs."""

    recipe: tuple[str, ...] | dict[str, object]
    stage: int = 0


LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
TOY = {
    "name": "toy",
    "model": {
        "image_size": 32,
        "vision_tokenizer": {"channels": 16, "channel_multipliers": [1, 2, 2], "num_res_blocks": 1, "z_channels": 16,
                             "norm_groups": 8, "codebook_size": 64, "codebook_dim": 8},
        "language_model": {"config": LLAMA},
        "projector": {"merge_size": 2},
    },
    "data": [{"source": "drawn_text", "size": 32}],
    "stages": [{"stage": "semantic", "steps": 20, "batch_size": 8}],
    "precision": "fp32",
    "num_workers": 0,
    "trackers": [],
}  # fmt: skip
LARGE = TOY | {
    "name": "large",
    "model": {
        "image_size": 64,
        "vision_tokenizer": {"channels": 32, "channel_multipliers": [1, 2, 4], "num_res_blocks": 2, "z_channels": 64,
                             "norm_groups": 8, "codebook_size": 16384, "codebook_dim": 64},
        "language_model": {"config": LLAMA | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
                                              "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 4096}},
    },
    "stages": [{"stage": "semantic", "steps": 20, "batch_size": 8, "micro_batch_size": 4, "ema_decay": 0.99}],
}  # fmt: skip
CASES = {
    "quickstart": Case(("quickstart", "arm=ett")),
    "tokenizer_64px": Case(("tokenizer_64px", "stages.0.quantize_after=0")),
    "smollm2_64px": Case(("smollm2_64px", "arm=ett"), stage=1),
    "reader_64px": Case(("reader_64px", SHIPPED)),
    "draw_64px": Case(("draw_64px",)),
    "decoder": Case(("quickstart", "arm=ett", "stages.0={stage: decoder, steps: 20, batch_size: 16}")),
    "chat": Case(("quickstart", "arm=ett", "stages.0={stage: chat, steps: 20, batch_size: 32}")),
    "toy": Case(TOY),
    "large": Case(LARGE),
}


def recipe_of(case: Case) -> Recipe:
    """The case's recipe, cut to its stage and to a few steps."""
    given = case.recipe
    recipe = from_mapping(Recipe, given) if isinstance(given, dict) else load_recipe(given[0], given[1:])
    stage = replace(recipe.stages[case.stage], steps=STEPS, validate_every=None, checkpoint_every=None)
    return replace(recipe, stages=(stage,), evaluation=replace(recipe.evaluation, limit=32), num_workers=0, trackers=())


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(recipe: Recipe, device: str) -> int:
    """Bytes at the peak of a run in this process, which has done nothing else."""
    with tempfile.TemporaryDirectory() as out:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        Run(recipe, Path(out) / "run").train()
    return _status("VmHWM") - before if device == "cpu" else torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--hardware", default="h200-141gb", help="that plans of CUDA are made for")
    parser.add_argument("--only", choices=["plan", "run"], help="one side of one case, printed as JSON [bytes by part]")
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.only:
        recipe = recipe_of(CASES[arguments.cases[0]])
        if arguments.only == "run":
            print(json.dumps({"peak": measure(recipe, arguments.device)}))
            return
        name = "cpu-2core" if arguments.device == "cpu" else arguments.hardware
        (found,) = plan(recipe, Target(name, HARDWARE[name]))
        print(json.dumps({**found.memory, "moment": found.moment}))
        return
    print(
        f"{arguments.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{platform.processor() or platform.machine()}; MiB"
    )
    worst = 0.0
    for name in arguments.cases:
        sides = {}
        for side in ("plan", "run"):
            command = [sys.executable, __file__, "--cases", name, "--device", arguments.device, "--only", side]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            sides[side] = json.loads(printed.splitlines()[-1])
        moment = sides["plan"].pop("moment")
        planned, measured = sum(sides["plan"].values()), sides["run"]["peak"]
        worst = max(worst, abs(planned / measured - 1))
        parts = ", ".join(f"{part} {size / 2**20:.0f}" for part, size in sides["plan"].items() if size)
        print(
            f"{name:<16} planned {planned / 2**20:7.0f}, measured {measured / 2**20:7.0f}, {planned / measured - 1:+4.0%}"
            f"   during {moment}: {parts}",
            flush=True,
        )
    print(f"largest difference {worst:.0%}")


if __name__ == "__main__":
    main()

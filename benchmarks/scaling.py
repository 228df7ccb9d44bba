"""Memory and examples per second against the number of processes: `ett plan`'s figures, and what short runs take, on CPU.

    python benchmarks/scaling.py                        # 1, 2 and 4 processes, ddp and fsdp: about 5 minutes on 2 cores
    python benchmarks/scaling.py --worlds 1 2 --steps 10

Every process has four examples a step, whatever their number (weak scaling), and one thread. Memory is the largest of the
processes' high-water marks of resident memory, above what each held before it built the model, against the plan for one device
of that many. Time is that of the steps after the first two. Examples per second are held against what the cores allow: those of
one process, times the processes or the cores, whichever are fewer; what is missing is exchange, and memory that cores share.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from plan import LARGE, _status

from ett.cli.common import quiet_libraries
from ett.config import from_mapping
from ett.experiments.plan import HARDWARE, Target, plan
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run
from ett.train.log import read_log

EACH = 4
"""Examples of a process and step."""


def recipe_of(world: int, sharding: str, steps: int) -> Recipe:
    """The large case of plan.py with a smaller tokenizer, grown with the number of processes."""
    stage = {**LARGE["stages"][0], "steps": steps, "batch_size": EACH * world, "micro_batch_size": EACH}
    stage |= {"log_every": 1, "checkpoint_every": None, "health": {"pictures": 0}}
    tokenizer = {**LARGE["model"]["vision_tokenizer"], "channels": 16, "num_res_blocks": 1, "codebook_size": 4096}
    model = {**LARGE["model"], "vision_tokenizer": tokenizer}
    given = {**LARGE, "model": model, "stages": [stage], "sharding": sharding, "evaluation": {"limit": 4}}
    return from_mapping(Recipe, given)


def rank(world: int, sharding: str, steps: int, out: Path) -> None:
    """One process's part of a run; its peak goes to a file."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    Run(recipe_of(world, sharding, steps), out / "run").train()
    peak = _status("VmHWM") - before
    (out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(peak), encoding="utf-8")


def measured(world: int, sharding: str, steps: int) -> tuple[int, float]:
    """(largest peak of the processes [bytes], examples per second)."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["--only", folder, "--worlds", str(world), "--shardings", sharding, "--steps", str(steps)]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *launcher, __file__, *given], check=False, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        events = read_log(Path(folder) / "run" / "log.jsonl")
        times = [event["time"] for event in events if event["event"] == "step"]
        seconds = statistics.median(b - a for a, b in pairwise(times[2:]))
        peaks = [json.loads((Path(folder) / f"{k}.json").read_text(encoding="utf-8")) for k in range(world)]
    return max(peaks), EACH * world / seconds


def planned(world: int, sharding: Any, steps: int) -> int:
    """Bytes of one of `world` devices."""
    target = Target("cpu-2core", HARDWARE["cpu-2core"], world_size=world, sharding=sharding)
    (found,) = plan(recipe_of(world, sharding, steps), target)
    return sum(found.memory.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--shardings", nargs="+", choices=["ddp", "fsdp"], default=["ddp", "fsdp"])
    parser.add_argument("--steps", type=int, default=12, help="at least 5")
    parser.add_argument("--only", metavar="DIR", type=Path, help="be one process of a run that writes there")
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.only:
        rank(arguments.worlds[0], arguments.shardings[0], arguments.steps, arguments.only)
        return
    cores = len(os.sched_getaffinity(0))
    print(f"torch {torch.__version__}, {cores} cores of {platform.processor() or platform.machine()}; MiB a process")
    print("sharding  processes  planned  measured          examples/s  of what the cores allow")
    for sharding in arguments.shardings:
        alone = 0.0
        for world in arguments.worlds:
            expected, (peak, rate) = (
                planned(world, sharding, arguments.steps),
                measured(world, sharding, arguments.steps),
            )
            alone = alone or rate / min(world, cores)
            print(
                f"{sharding:<8}  {world:>9}  {expected / 2**20:7.0f}  {peak / 2**20:8.0f}  {expected / peak - 1:+5.0%}"
                f"  {rate:10.1f}  {rate / (alone * min(world, cores)):6.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()

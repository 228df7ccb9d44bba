"""Runs that kill themselves (kill -9) at a given moment: ``python -m tests.faults.victim``, one job a line.

A job is JSON: ``recipe`` and ``out`` (paths), ``seen`` (where the ids of each finished step go) and ``moment`` ([name, number]:
the run dies as the moment comes for the number-th time; null lets it live). It is answered by ``{"signal": 9}`` or
``{"status": 0}``. Each job runs in a fork of this process, so that libraries are imported once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ett.experiments import run as run_module
from ett.experiments.recipe import load_recipe
from ett.experiments.run import Run
from ett.train import checkpoint as checkpoint_module
from ett.train import loop as loop_module
from ett.train import saving as saving_module

MOMENTS = {
    # inside a step: the first micro-batch of two is done; gradients are there, the weights have not moved
    "micro_batch": "before",
    "update": "before",
    # inside a save: one file is written, or half of it; all are there, but not under their name; old ones are still there
    "weights_written": "after",
    "torn_weights": "torn",
    "before_publishing": "before",
    "before_rotation": "before",
    # at a hand-off: the model is saved but not under its name; it is, and the stage's checkpoints too; the next stage begins
    "model_saved": "before",
    "handed_over": "before",
    "next_stage": "before",
}


def _places() -> dict[str, list[tuple[Any, str]]]:
    objectives = (loop_module.TokenizerObjective, loop_module.JointObjective)
    return {
        "micro_batch": [(each, "forward") for each in objectives],
        "update": [(loop_module.Stage, "_update_weights")],
        "weights_written": [(checkpoint_module, "save_file")],
        "torn_weights": [(checkpoint_module, "save_file")],
        "before_publishing": [(checkpoint_module, "publish")],
        "before_rotation": [(checkpoint_module, "best_of")],
        "model_saved": [(run_module, "publish")],
        "handed_over": [(Run, "_clear_up")],
        "next_stage": [(saving_module.Saver, "resume")],
    }


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(name: str, number: int) -> None:
    left = number

    def armed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and MOMENTS[name] == "before":
                _die()
            result = function(*arguments, **named)
            if left == 0 and MOMENTS[name] == "torn":
                path = Path(arguments[1])
                os.truncate(path, path.stat().st_size // 2)
            if left == 0:
                _die()
            return result

        return call

    for owner, attribute in _places()[name]:
        setattr(owner, attribute, armed(getattr(owner, attribute)))


def _note_ids(path: Path) -> None:
    plain = loop_module.Stage._train_step

    def step(self: Any, micro_batches: Any) -> Any:
        taken = plain(self, micro_batches)
        if taken is not None:
            ids = [each for batch in micro_batches for each in batch.ids]
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([self.name, self.step, ids]) + "\n")
        return taken

    loop_module.Stage._train_step = step  # type: ignore[method-assign]


def _run(job: dict[str, Any]) -> None:
    _note_ids(Path(job["seen"]))
    if job["moment"] is not None:
        _arm(*job["moment"])
    Run(load_recipe(job["recipe"]), Path(job["out"]), resume=True).train()


def main() -> None:
    """Answer jobs until the input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _run(json.loads(line))
                status = 0
            finally:
                sys.stderr.flush()
                # the parent's buffers are not this process's to flush
                os._exit(status)
        _, code = os.waitpid(child, 0)
        ended = {"signal": os.WTERMSIG(code)} if os.WIFSIGNALED(code) else {"status": os.WEXITSTATUS(code)}
        print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    main()

"""`ett ablate` and `ett demo`: every arm of a comparison in its own process, a few at a time, then one report."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ett.errors import UserError
from ett.experiments.comparison import (
    EVALUATION_NAME,
    OUTPUT_SUFFIX,
    START,
    Arm,
    Comparison,
    ComparisonFolder,
    load_comparison,
    measure_start,
    open_comparison,
    run_arm,
    steps_of,
)
from ett.experiments.comparison_report import write_comparison_report
from ett.experiments.search import SEARCH_NAME, TRIAL_NAME, choose, run_trial
from ett.signals import noted_signals
from ett.train.log import LOG_NAME, finished_steps, read_log
from ett.train.loop import Interrupted

DEMO = "quickstart"
"""The recipe of `ett demo`."""
POLL_SECONDS, LINE_SECONDS = 0.5, 20.0


@dataclass
class _Job:
    """A process to run: an arm, or the start's evaluation."""

    key: str
    folder: Path
    steps: int
    needs: str | None = None
    process: subprocess.Popen[bytes] | None = None
    output: Path | None = None

    @property
    def done_steps(self) -> int:
        """Steps that its log tells of, over all stages."""
        log = self.folder / LOG_NAME
        return finished_steps(read_log(log)) if log.is_file() else 0


def ablate(
    recipe: str | Path,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    jobs: int | None = None,
    search: Mapping[str, Any] | None = None,
) -> Path:
    """Run every arm of a recipe that compares arms, and write the report.

    Args:
        recipe, overrides: as `load_comparison` takes them.
        out: the comparison's folder; see `ett.experiments.comparison`.
        resume: continue what is there. overwrite: delete the comparison that is there.
        jobs: arms at a time, each with its share of the cores; None takes one for each CPU core, or one at a time where
            there is an accelerator.
        search: what is searched for each arm on validation first, in place of the recipe's (`Search`).

    Returns:
        The path of ``report.html``.

    Raises:
        Interrupted: stopped by a signal, every arm saved. UserError: an arm failed; the others were stopped and saved.
    """
    comparison = load_comparison(recipe, overrides, search=search)
    folder = ComparisonFolder(out, comparison, resume=resume, overwrite=overwrite)
    folder.open()
    if comparison.trials and not (out / SEARCH_NAME).is_file():
        trials = _pending_trials(comparison, out)
        if trials:
            _run_all(trials, out, jobs if jobs is not None else _jobs(len(trials)))
        choose(comparison.trials, out)
    comparison = open_comparison(out)
    pending = _pending(comparison, out)
    if pending:
        _run_all(pending, out, jobs if jobs is not None else _jobs(len(pending)))
    return write_comparison_report(out)


def run_only(out: Path, key: str) -> None:
    """One arm ("NAME:SEED"), one trial ("search:NAME:NUMBER"), or "start", of the comparison that was opened in `out`, in this
    process.

    Raises:
        Interrupted: stopped by a signal, after saving. UserError: there is no such comparison or arm, or it failed.
    """
    comparison = open_comparison(out)
    trials = {trial.key: trial for trial in comparison.trials}
    if key == START:
        measure_start(comparison, out)
    elif key in trials:
        run_trial(trials[key], out)
    else:
        run_arm(comparison, comparison.find(key), out)


def _jobs(pending: int) -> int:
    return 1 if torch.accelerator.is_available() else max(1, min(pending, os.cpu_count() or 1))


def _pending_trials(comparison: Comparison, out: Path) -> list[_Job]:
    return [
        _Job(trial.key, out / trial.folder, steps_of(trial.recipe))
        for trial in comparison.trials
        if not (out / trial.folder / TRIAL_NAME).is_file()
    ]


def _pending(comparison: Comparison, out: Path) -> list[_Job]:
    """What is not finished: seed by seed, so that what is interrupted has whole ones; of each, arms that tune the tokenizer
    first, for they take longest; and the start last."""
    arms = [arm for arm in comparison.arms if not (out / arm.folder / EVALUATION_NAME).is_file()]
    arms.sort(key=lambda arm: (comparison.seeds.index(arm.seed), _cost(arm)))
    found = [_Job(arm.key, out / arm.folder, steps_of(arm.recipe), arm.needs) for arm in arms]
    recipe = comparison.arms[0].recipe
    if recipe.model.init is not None and not (out / START / EVALUATION_NAME).is_file():
        found.append(_Job(START, out / START, 0))
    return found


def _cost(arm: Arm) -> float:
    return -sum(stage.steps * (3 if "vision_tokenizer" in stage.parts else 1) for stage in arm.recipe.stages)


def _run_all(pending: list[_Job], out: Path, jobs: int) -> None:
    """Run the jobs, `jobs` at a time, the CPU cores shared among them.

    Raises:
        Interrupted: a signal came; every process was told to save and has ended. UserError: a job failed.
    """
    waiting, running = list(pending), list[_Job]()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    total = sum(job.steps for job in pending)
    before = sum(job.done_steps for job in pending)
    bar: tqdm[Any] = tqdm(total=total, initial=before, unit="step", disable=None, dynamic_ncols=True, leave=False)
    with noted_signals(second_one_stops=False) as received, bar:
        said = time.monotonic()
        try:
            while waiting or running:
                while len(running) < jobs and (job := _next(waiting, running)) is not None:
                    running.append(_started(job, out, threads))
                time.sleep(POLL_SECONDS)
                if received:
                    raise Interrupted(sum(job.done_steps for job in pending), received[0])
                for job in [job for job in running if job.process is not None and job.process.poll() is not None]:
                    running.remove(job)
                    _check(job)
                if time.monotonic() - said > LINE_SECONDS or not bar.disable:
                    said = time.monotonic()
                    _say(bar, pending, running, total)
        finally:
            _stop(running)


def _next(waiting: list[_Job], running: Sequence[_Job]) -> _Job | None:
    """Take the first job out of `waiting` that starts from nothing which is still to be made."""
    unfinished = {job.key for job in (*waiting, *running)}
    for position, job in enumerate(waiting):
        if job.needs not in unfinished:
            return waiting.pop(position)
    return None


def _started(job: _Job, out: Path, threads: int) -> _Job:
    job.folder.mkdir(parents=True, exist_ok=True)
    # outside of the run's folder while that may still have to be made: a run starts only in an empty one
    output = out / f"{job.key.replace(':', '-')}{OUTPUT_SUFFIX}"
    with output.open("ab") as file:
        job.process = subprocess.Popen(
            [sys.executable, "-m", "ett.cli", "ablate", "--out", str(out), "--only", job.key],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            # signals of the terminal are for us to pass on: two of them would end an arm before it has saved
            start_new_session=True,
        )
    job.output = output
    return job


def _check(job: _Job) -> None:
    """Raise what ended a process that did not finish."""
    assert job.process is not None
    assert job.output is not None
    if job.process.returncode == 0:
        return
    lines = job.output.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
    raise UserError(
        f"{job.key} ended with exit code {job.process.returncode}: {lines[-1].removeprefix('ett: ')} (all of it: "
        f"{job.output}). The other arms were stopped and saved; go on with --resume."
    )


def _stop(running: Sequence[_Job]) -> None:
    """Tell every process to save and end, and wait for it."""
    processes = [job.process for job in running if job.process is not None and job.process.poll() is None]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def _say(bar: tqdm[Any], pending: Sequence[_Job], running: Sequence[_Job], total: int) -> None:
    done = {job.key: job.done_steps for job in pending}
    now = ", ".join(
        f"{job.key.removesuffix(':0')} {'measuring' if done[job.key] >= job.steps else f'{done[job.key]}/{job.steps}'}"
        for job in running
    )
    if bar.disable:
        print(f"{sum(done.values())}/{total} steps  {now}", file=sys.stderr, flush=True)
    else:
        bar.set_postfix_str(now, refresh=False)
        bar.n = sum(done.values())
        bar.refresh()

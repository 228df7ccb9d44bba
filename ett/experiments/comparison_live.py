"""A comparison while it runs, as a page: how far each arm is, and all their curves in one chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ett.evaluate.comparison_evidence import curves
from ett.evaluate.html import folded, safe, table
from ett.evaluate.page import page
from ett.evaluate.verdict import arm_title
from ett.experiments.comparison import EVALUATION_NAME, Arm, Comparison, open_comparison, steps_of
from ett.experiments.comparison_report import reference_of
from ett.experiments.search import SEARCH_NAME, TRIAL_NAME
from ett.train.log import LOG_NAME, finished_steps, read_log

Run = Sequence[Mapping[str, Any]]
"""The events of a run's log."""


def render_live(folder: Path) -> str:
    """The page's HTML, from the logs of the arms in a comparison's folder as they stand.

    Raises:
        UserError: there is no comparison, or a file in it is damaged.
    """
    comparison = open_comparison(folder)
    runs = {arm.key: _events(folder / arm.folder) for arm in comparison.arms}
    rows = [
        (safe(arm_title(arm.name)), str(arm.seed), _state(arm, runs[arm.key], folder / arm.folder))
        for arm in comparison.arms
    ]
    sections = [
        ("How far it is", _searched(comparison, folder) + table(("arm", "seed", "steps"), rows)),
        ("Curves", _curves(comparison, runs)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    return page(safe(comparison.name), body, "arms of one recipe side by side, while they train")


def _curves(comparison: Comparison, runs: Mapping[str, Run]) -> str:
    """All arms of the seed that began last, and folded away those of the seeds before it."""
    found = {}
    for seed in comparison.seeds:
        begun = {arm.name: [runs[arm.key]] for arm in comparison.arms if arm.seed == seed and runs[arm.key]}
        if begun and (drawn := curves(begun, reference_of(comparison))):
            found[seed] = drawn
    if not found:
        return "<p>No arm has logged a step yet.</p>"
    *before, last = found
    title = f"<p>Seed {last}:</p>" if len(comparison.seeds) > 1 else ""
    return title + found[last] + "".join(folded(f"Seed {seed}", found[seed]) for seed in reversed(before))


def _events(folder: Path) -> Run:
    if not (folder / LOG_NAME).is_file():
        return []
    return [event for event in read_log(folder / LOG_NAME) if "stage" in event and "step" in event]


def _state(arm: Arm, events: Run, folder: Path) -> str:
    """How far an arm is, in words."""
    whole = steps_of(arm.recipe)
    if (folder / EVALUATION_NAME).is_file():
        return f"{whole:,}, measured"
    if not events:
        return f"waits: 0 of {whole:,}"
    done = finished_steps(events)
    return f"{done:,} of {whole:,}" if done < whole else f"{whole:,}, is being measured"


def _searched(comparison: Comparison, folder: Path) -> str:
    """How many trials of the search have ended, while it lasts."""
    if not comparison.trials or (folder / SEARCH_NAME).is_file():
        return ""
    ended = sum((folder / trial.folder / TRIAL_NAME).is_file() for trial in comparison.trials)
    return f"<p>Settings are searched first: {ended} of {len(comparison.trials)} trials have ended.</p>"

"""What a run says: one JSON line an event, trackers through Accelerate, and plain lines where there is no terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

LOG_NAME = "log.jsonl"
LINE_SECONDS = 15.0


class Tracker(Protocol):
    """The part of `accelerate.Accelerator` that this needs."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None: ...


class RunLog:
    """Appends to ``log.jsonl`` and mirrors numbers to trackers.

    Events: ``step`` (losses unweighted by name, gradient norm, learning rates, images_per_second), ``validation`` (the same
    names), ``reach`` (gradient norms of the caption loss by part), ``codes_placed`` (mean squared distance of features to their
    nearest code), ``codes_cached`` (examples encoded before the first step), ``health`` (values and gradient norms by place and
    loss, `ett.train.measures`), ``warning`` (kind, message), ``inherited`` (file of the discriminator that goes on),
    ``ends_with`` (best_step: whose weights the stage ends with). Each carries stage, step and seconds since the epoch.

    Attributes:
        health_now: the stage's last measurement of health in a few words, for a line of progress; "" before the first.
    """

    def __init__(self, directory: Path, tracker: Tracker, main: bool = True, quiet: bool = False) -> None:
        self.path, self.tracker, self.main = directory / LOG_NAME, tracker, main
        self.quiet = quiet
        self.plain = main and not quiet and not sys.stderr.isatty()
        self.health_now = ""
        self._warned: set[tuple[str, str]] = set()
        self._offset = 0
        self._last_line = 0.0

    def forget_after(self, stage_order: Mapping[str, int], stage: str, step: int, undone: bool = False) -> None:
        """Drop events that a resumed run will write again: later steps of `stage`, and later stages; where the validation of
        `step` was left `undone`, that and the measurement after it too."""
        if not self.main or not self.path.is_file():
            return
        position = (stage_order[stage], step)
        kept = [e for e in read_log(self.path) if (stage_order.get(e["stage"], -1), e["step"]) <= position]
        if undone:
            kept = [
                e
                for e in kept
                if (e["stage"], e["step"]) != (stage, step) or e["event"] not in ("validation", "health")
            ]
        work = self.path.with_suffix(".tmp")
        work.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
        work.replace(self.path)
        self._warned = {(e["stage"], e["kind"]) for e in kept if e["event"] == "warning"}

    def start_stage(self, offset: int) -> None:
        """Steps of all stages before this one: trackers get one running step."""
        self._offset, self.health_now = offset, ""

    def step(
        self,
        stage: str,
        step: int,
        steps: int,
        losses: Mapping[str, float],
        grad_norm: float,
        rates: Mapping[str, float],
        images_per_second: float,
    ) -> None:
        self._write(
            "step",
            stage,
            step,
            losses=losses,
            grad_norm=grad_norm,
            learning_rates=rates,
            images_per_second=images_per_second,
        )
        numbers = {**losses, "grad_norm": grad_norm, "images_per_second": images_per_second}
        self._track({f"{stage}/train/{name}": value for name, value in numbers.items()}, step)
        now = time.monotonic()
        if self.plain and (now - self._last_line > LINE_SECONDS or step == steps):
            self._last_line = now
            shown = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            health = f"  {self.health_now}" if self.health_now else ""
            line = f"{stage} {step}/{steps}  {shown}{health}  {images_per_second:.1f} images/s"
            print(line, file=sys.stderr, flush=True)

    def validation(self, stage: str, step: int, losses: Mapping[str, float]) -> None:
        if not losses:
            return
        self._write("validation", stage, step, losses=losses)
        self._track({f"{stage}/validation/{name}": value for name, value in losses.items()}, step)
        if self.plain:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            print(f"{stage} {step}  validation: {shown}", file=sys.stderr, flush=True)

    def encoding(self, stage: str, done: int, total: int) -> None:
        """How far the code cache of a stage is, examples of this process."""
        if done == total:
            self._write("codes_cached", stage, 0, examples=total)
        now = time.monotonic()
        if self.plain and (now - self._last_line > LINE_SECONDS or done == total):
            self._last_line = now
            print(f"{stage}: codes of {done}/{total} examples", file=sys.stderr, flush=True)

    def codes_placed(self, stage: str, step: int, distance: float) -> None:
        self._write("codes_placed", stage, step, mean_squared_distance=distance)

    def health(
        self, stage: str, step: int, values: Mapping[str, float], gradient_norms: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Mirror a measurement of `ett.train.health`; what is not finite is null."""
        norms = {place: _finite_or_none(terms) for place, terms in gradient_norms.items()}
        self._write("health", stage, step, values=_finite_or_none(values), gradient_norms=norms)
        self.health_now = _health_in_short(values)
        if self.plain:
            print(f"{stage} {step}  health: {self.health_now}", file=sys.stderr, flush=True)
        shown = {**values}
        for place, terms in gradient_norms.items():
            shown |= {f"gradient_{place}/{name}": norm for name, norm in terms.items()}
        self._track({f"{stage}/health/{name}": value for name, value in shown.items()}, step)

    def warning(self, stage: str, step: int, kind: str, message: str, *, once: bool = True) -> None:
        """Tell it on stderr and in the log; with `once` only the first of this kind in a stage, a resumed run's included."""
        if once and (stage, kind) in self._warned:
            return
        self._warned.add((stage, kind))
        self._write("warning", stage, step, kind=kind, message=message)
        if self.main and not self.quiet:
            tqdm.write(f"Warning ({stage}, step {step}): {message}", file=sys.stderr)

    def resumed(self, stage: str, step: int) -> None:
        """A process goes on from `step` finished steps; what lies before it in time is a pause."""
        self._write("resumed", stage, step)

    def inherited(self, stage: str, source: Path) -> None:
        """The stage goes on with the discriminator in file `source`."""
        self._write("inherited", stage, 0, discriminator=str(source))

    def ends_with(self, stage: str, step: int, best: int) -> None:
        """The stage's weights are those of step `best`, the best validation's."""
        self._write("ends_with", stage, step, best_step=best)

    def reach(self, stage: str, norms: Mapping[str, float]) -> None:
        self._write("reach", stage, 0, caption_gradient_norms=norms)

    def _write(self, event: str, stage: str, step: int, **fields: Any) -> None:
        if self.main:
            line = {"event": event, "stage": stage, "step": step, "time": time.time(), **fields}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _track(self, values: dict[str, Any], step: int) -> None:
        self.tracker.log(values, step=self._offset + step)


def finished_steps(events: Iterable[Mapping[str, Any]]) -> int:
    """Optimizer steps that a run's events tell of, over all its stages."""
    latest = {event["stage"]: event["step"] for event in events if event.get("event") == "step"}
    return sum(latest.values())


def progress(values: Mapping[str, float], rate: float, health: str = "") -> str:
    """What a progress bar says of a step: the losses that matter most, how healthy the tokenizer is, images a second."""
    short = {
        "loss": "loss",
        "caption_loss": "cap",
        "image_loss": "image",
        "reconstruction_loss": "rec",
        "quantization_loss": "quant",
    }
    shown = [f"{label} {values[name]:.3f}" for name, label in short.items() if name in values]
    return ", ".join([*shown, *([health] if health else []), f"{rate:.1f} img/s"])


def _health_in_short(values: Mapping[str, float]) -> str:
    """Codes in use and their perplexity, the index softmax's largest mass; what was not measured is left out."""
    wanted = {
        "codes_in_use": "{:.0f} codes",
        "index_perplexity": "perplexity {:.0f}",
        "top1_mass": "top-1 {:.2f}",
        "indices_changed": "{:.0%} changed",
    }
    return ", ".join(form.format(values[name]) for name, form in wanted.items() if name in values)


def _finite_or_none(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events of a run in order; a line cut short by a crash is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events

"""A plan as text for people and as plain values for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ett.experiments.plan.estimate import StagePlan, Target, show_bytes
from ett.experiments.plan.hardware import ASSUMED_UTILISATION
from ett.experiments.plan.tracker import PARTS

_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def as_values(name: str, stages: Sequence[StagePlan], target: Target) -> dict[str, Any]:
    """For JSON; bytes, seconds and FLOPs as numbers."""
    return {
        "recipe": name,
        "hardware": target.name,
        "world_size": target.world_size,
        "sharding": target.sharding,
        "device_memory": target.available,
        "assumed_utilisation": ASSUMED_UTILISATION[target.hardware.device],
        "stages": [{**asdict(stage), "peak": stage.peak} for stage in stages],
    }


def as_text(name: str, stages: Sequence[StagePlan], target: Target) -> str:
    """A table for each stage, and what was assumed."""
    devices = f"{target.world_size} x {target.name}, {target.sharding}" if target.world_size > 1 else target.name
    lines = [f"{name} on {devices} ({show_bytes(target.available)} a device)"]
    for stage in stages:
        lines += ["", *_stage(stage)]
    share = ASSUMED_UTILISATION[target.hardware.device]
    lines += ["", f"Times are estimates: they assume {share:.0%} of the hardware's peak rate, and no wait for data."]
    return "\n".join(lines)


def _stage(stage: StagePlan) -> list[str]:
    examples, length, pictures = stage.batch
    lines = [f"stage {stage.name}"]
    for part, count in stage.parameters.items():
        lines.append(f"  {part:<18}{count:>15,} parameters, {stage.trainable[part]:,} of them train")
    for name in PARTS:
        if stage.memory.get(name, 0):
            size = stage.memory[name]
            lines.append(f"  {name:<18}{show_bytes(size):>15}{size / stage.peak:>7.0%}")
    lines += [
        f"  {'peak memory':<18}{show_bytes(stage.peak):>15}   during {stage.moment}",
        f"  {'micro-batch':<18}{examples:>15} examples of up to {length} positions, {pictures} pictures; "
        f"{stage.micro_batches} a step",
        f"  {'step':<18}{_operations(stage.flops):>15}   about {stage.seconds:.2g} s; all steps {_duration(stage.hours)}",
    ]
    lines += [f"  note: {note}" for note in stage.notes]
    return lines + ([f"  WARNING: {stage.warning}"] if stage.warning else [])


def _operations(count: int) -> str:
    size, unit = next(((size, unit) for size, unit in _UNITS if count >= size), _UNITS[-1])
    return f"{count / size:.1f} {unit}"


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"

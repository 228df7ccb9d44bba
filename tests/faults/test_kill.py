"""kill -9 at seeded moments, inside steps, saves and hand-overs; resumed, the run is the one that nothing happened to."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from ett.train.log import read_log

ROOT = Path(__file__).parents[2]
STAGES = ("tokenizer", "align", "semantic", "chat")
IN_A_STAGE = {
    "micro_batch": (3, 8),
    "update": (2, 4),
    "weights_written": (2, 3),
    "torn_weights": (2, 3),
    "before_publishing": (2, 3),
    "before_rotation": (3, 4),
}
"""How often a moment passes before the kill: at least once, so that runs get on, and few times, so that all fit a stage."""
BETWEEN_STAGES = ("model_saved", "handed_over", "next_stage")


class Victims:
    """Runs one recipe into folders, killed or not."""

    def __init__(self, process: subprocess.Popen[str], recipe: Path) -> None:
        self.process, self.recipe = process, recipe

    def run(self, out: Path, moment: tuple[str, int] | None = None) -> dict[str, int]:
        """How it ended."""
        job = {"recipe": str(self.recipe), "out": str(out), "seen": f"{out}.seen", "moment": moment}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer: dict[str, int] = json.loads(self.process.stdout.readline())
        return answer


@contextmanager
def victims(given: dict[str, Any], tmp_path: Path) -> Iterator[Victims]:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    command = [sys.executable, "-m", "tests.faults.victim"]
    with (tmp_path / "victim.err").open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        with process:
            yield Victims(process, path)
            assert process.stdin is not None
            process.stdin.close()


def check_same(killed: Path, whole: Path) -> None:
    """Equal weights of every stage, equal losses, and the same examples at every step, however often it was taken."""

    def digests(run: Path) -> dict[str, str]:
        files = sorted(run.glob("stages/*/model.safetensors"))
        return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def losses(run: Path) -> list[tuple[Any, ...]]:
        return [(e["stage"], e["step"], e["losses"]) for e in read_log(run / "log.jsonl") if e["event"] == "step"]

    def ids(run: Path) -> dict[tuple[str, int], list[str]]:
        taken: dict[tuple[str, int], list[str]] = {}
        for line in Path(f"{run}.seen").read_text(encoding="utf-8").splitlines():
            stage, step, seen = json.loads(line)
            assert taken.setdefault((stage, step), seen) == seen, f"{stage}, step {step}: other examples than before"
        return taken

    assert digests(killed)
    assert digests(killed) == digests(whole)
    assert losses(killed) == losses(whole)
    assert list(ids(killed).items()) == list(ids(whole).items())
    assert not list((killed / "checkpoints").iterdir()), "nothing of what was half written is left"


def test_killed_in_a_save_a_step_and_a_hand_over(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["stages"] = [{**toy_recipe["stages"][k], "steps": 5} for k in (0, 2)]
    with victims(toy_recipe, tmp_path) as runs:
        assert runs.run(tmp_path / "whole") == {"status": 0}
        for moment in (("torn_weights", 3), ("handed_over", 1), ("micro_batch", 6)):
            assert runs.run(tmp_path / "killed", moment) == {"signal": signal.SIGKILL}, moment
        assert runs.run(tmp_path / "killed") == {"status": 0}
    check_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills(toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    """One run, killed twenty times: in each stage at four seeded moments, and once where it hands over."""
    rng = random.Random(20)
    for stage in toy_recipe["stages"]:
        stage["steps"] = 24
    for stage in (toy_recipe["stages"][0], toy_recipe["stages"][2]):
        stage["losses"] = {"adversarial_weight": 0.1}
        stage["discriminator"] = {"channels": 4, "generator_start": 1, "strided_layers": 2}
        stage["ema_decay"] = 0.9
    toy_recipe["num_workers"] = 1
    between = [*BETWEEN_STAGES, rng.choice(BETWEEN_STAGES[:2])]
    with victims(toy_recipe, tmp_path) as runs:
        assert runs.run(tmp_path / "whole") == {"status": 0}
        kills = []
        for finished, (stage, hand_over) in enumerate(zip(STAGES, between, strict=True)):
            for name in rng.sample(sorted(IN_A_STAGE), 4):
                kills.append((stage, name, rng.randint(*IN_A_STAGE[name])))
            # as it begins, a resumed run clears up after finished stages and puts the stage under way back
            earlier = {"model_saved": 0, "handed_over": finished, "next_stage": 1}[hand_over]
            kills.append((stage, hand_over, 1 + earlier))
        assert len(kills) == 20
        for stage, name, number in kills:
            ended = runs.run(tmp_path / "killed", (name, number))
            assert ended == {"signal": signal.SIGKILL}, f"{stage}: {name} did not come {number} times: {ended}"
        assert runs.run(tmp_path / "killed") == {"status": 0}
    check_same(tmp_path / "killed", tmp_path / "whole")

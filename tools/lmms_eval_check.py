"""lmms-eval's own command and our evaluation on the same held-out pictures: do they agree, sample by sample?

    python tools/lmms_eval_check.py --model reader_64px --out checks/lmms [--limit 64] [--venv .venv-lmms]

1. A virtual environment of its own that sees this one's packages, with lmms-eval and the few packages that its command imports.
   lmms-eval also requires torchvision and some thirty clients and judges of other models: torchvision has no build for the CPU
   version of PyTorch, and no task here uses any of them. So it is installed with ``--no-deps``, and what it imports beside
   it: that is the whole workaround.
2. `ett lmms-tasks` writes the tasks, lmms-eval evaluates the model on them (chat class for answers, simple class for choices),
   our own evaluation reads the same files.
3. Every sample is compared; ``agreement.json`` in --out has the figures and each disagreement. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

from ett.evaluate.run import evaluate, load_for_evaluation
from ett.evaluate.run_folder import resolve_model_folder
from ett.evaluate.sources import manifest_source
from ett.model.loading import find_weights

ROOT = Path(__file__).resolve().parents[1]
LMMS_EVAL = "lmms-eval==0.7.3"
IMPORTED = (
    "av<16",
    "datasets",
    "evaluate",
    "jsonlines",
    "loguru",
    "numexpr",
    "openpyxl",
    "python-dotenv",
    "pytablewriter",
    "pytz",
    "tenacity",
    "tqdm-multiprocess",
)
"""What lmms-eval's command imports before it reads a task, and this environment may lack."""
PAIRS = {"answers": ("exact_match", "exact_match"), "choices": ("acc", "choice_accuracy")}
"""Kind of task -> (lmms-eval's metric, ours)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reader_64px", help="a run's or model's folder, or a shipped name")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-lmms", help="made if it is not there")
    parser.add_argument("--recipe", help="whose data to take instead of the built-in ones as they are")
    parser.add_argument("--split", default="heldout")
    parser.add_argument("--limit", type=int, default=64, help="examples of each source")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    model = str(Path(arguments.model).resolve()) if Path(arguments.model).is_dir() else arguments.model
    python = set_up(arguments.venv.resolve())
    found = compare(python, model, arguments.out.resolve(), arguments)
    (arguments.out / "agreement.json").write_text(
        json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for task, each in found.items():
        print(f"{task}: {each['samples']} samples, lmms-eval {each['lmms_eval']:.4f}, ett {each['ett']:.4f}, "
              f"{len(each['disagreements'])} disagreements")  # fmt: skip
    return int(any(each["disagreements"] for each in found.values()))


def set_up(folder: Path) -> Path:
    """The environment's Python."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
        inside = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        # a virtual environment cannot stand on another one; a path file can
        Path(inside, "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", LMMS_EVAL], check=True)
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", *IMPORTED], check=True)
        # its own copy of our entry point, whatever the environment beneath was installed with
        subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)
    return python


def compare(python: Path, model: str, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Task -> figures of both sides and where they differ."""
    environment = {**os.environ, "HF_HOME": str(out / "cache"), "HF_HUB_OFFLINE": "1"}

    def run(*words: object) -> None:
        subprocess.run([str(word) for word in words], check=True, env=environment, cwd=out)

    data = ("--recipe", arguments.recipe) if arguments.recipe else ()
    chosen = ("--split", arguments.split, "--limit", arguments.limit, *data)
    run(sys.executable, "-m", "ett.cli", "lmms-tasks", "tasks", *chosen)
    names = sorted(path.name for path in (out / "tasks").iterdir())
    common = ("--model", "ett", "--model_args", f"pretrained={model}", "--include_path", "tasks", "--batch_size", 16)
    for kind, more in (("answers", ()), ("choices", ("--force_simple",))):
        wanted = [name for name in names if name.endswith(kind)]
        run(python, "-m", "lmms_eval", *common, *more, "--tasks", ",".join(wanted), "--device", "cpu",
            "--log_samples", "--output_path", out / kind)  # fmt: skip
    whole, _, processor = load_for_evaluation(resolve_model_folder(find_weights(model)))
    assert whole is not None
    found = {}
    for name in names:
        kind, source = name.rpartition("_")[2], manifest_source(out / "tasks" / name / "data.jsonl")
        ours = evaluate(whole, processor, source, [kind]).to_json()
        (out / f"{name}.json").write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")
        found[name] = agreement(kind, out / kind, name, ours)
    return found


def agreement(kind: str, folder: Path, name: str, ours: dict[str, Any]) -> dict[str, Any]:
    """One task's figures of both sides, and the samples that they judge or answer differently."""
    theirs_name, ours_name = PAIRS[kind]
    (samples,) = folder.rglob(f"*_samples_{name}.jsonl")
    theirs = sorted(map(json.loads, samples.read_text(encoding="utf-8").splitlines()), key=lambda each: each["doc_id"])
    (results,) = folder.rglob("*_results.json")
    value = json.loads(results.read_text(encoding="utf-8"))["results"][name][f"{theirs_name},none"]
    hits = [hit for hit, _ in ours["parts"][ours_name]]
    assert len(theirs) == len(hits), f"{name}: {len(theirs)} samples against {len(hits)}"
    said = [each["prediction"] for each in ours["predictions"]] or [None] * len(hits)
    different = [
        {"doc_id": each["doc_id"], "lmms_eval": [each[theirs_name], each["filtered_resps"]], "ett": [hit, text]}
        for each, hit, text in zip(theirs, hits, said, strict=True)
        if each[theirs_name] != hit or (text is not None and each["filtered_resps"] != text)
    ]
    figure = ours["metrics"][ours_name]["value"]
    return {"samples": len(hits), "lmms_eval": value, "ett": figure, "disagreements": different}


if __name__ == "__main__":
    sys.exit(main())

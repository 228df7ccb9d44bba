"""Keeps what came of a comparison with the documents: ``docs/results/<name>/report.{json,html}``.

    python tools/keep_results.py runs/demo-proof 2026-11-21

The report of a later comparison of the same arms shows these figures beside its own, with their date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def keep(run: Path, date: datetime.date) -> Path:
    """The reports of the comparison in `run` under its name; returns the folder."""
    summary = json.loads((run / "report.json").read_text(encoding="utf-8"))
    target = RESULTS / str(summary["name"])
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"date": date.isoformat(), **summary}, indent=1, ensure_ascii=False)
    (target / "report.json").write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(run / "report.html", target / "report.html")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep a comparison's reports under docs/results.")
    parser.add_argument("run", type=Path, help="folder that `ett ablate` wrote")
    parser.add_argument("date", type=datetime.date.fromisoformat, help="day on which it was run, YYYY-MM-DD")
    arguments = parser.parse_args()
    print(keep(arguments.run, arguments.date))


if __name__ == "__main__":
    main()

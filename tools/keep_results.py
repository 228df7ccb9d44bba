"""Keeps what came of a comparison with the documents, in ``docs/results/<name>``.

That is report.json, table.md, pareto.svg, and report.html where its pictures leave it below a megabyte.

    python tools/keep_results.py runs/demo-proof 2026-11-21

The report of a later comparison of the same arms shows these figures beside its own, with their date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
from pathlib import Path
from typing import Any

LARGEST = 1_000_000
"""Bytes of a page that is kept."""
DIGITS = 6
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def keep(run: Path, date: datetime.date) -> Path:
    """The reports of the comparison in `run` under its name; returns the folder."""
    summary = json.loads((run / "report.json").read_text(encoding="utf-8"))
    target = RESULTS / str(summary["name"])
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"date": date.isoformat(), **_rounded(summary)}, ensure_ascii=False, separators=(",", ":"))
    (target / "report.json").write_text(text + "\n", encoding="utf-8")
    for name in ("report.html", "table.md", "pareto.svg"):
        (target / name).unlink(missing_ok=True)
        if (run / name).is_file() and (run / name).stat().st_size <= LARGEST:
            shutil.copyfile(run / name, target / name)
    return target


def _rounded(value: Any) -> Any:
    """Floats to `DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep a comparison's reports under docs/results.")
    parser.add_argument("run", type=Path, help="folder that `ett ablate` wrote")
    parser.add_argument("date", type=datetime.date.fromisoformat, help="day on which it was run, YYYY-MM-DD")
    arguments = parser.parse_args()
    print(keep(arguments.run, arguments.date))


if __name__ == "__main__":
    main()

"""The report of a run or a comparison, live: rendered again when logs, recipe or evaluations changed."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from ett.evaluate.report import render
from ett.evaluate.run_folder import kept_pictures, read_run
from ett.experiments.comparison import is_comparison
from ett.experiments.comparison_live import render_live
from ett.experiments.comparison_report import REPORT_NAME

WATCHED = ("log.jsonl", "recipe.yaml", "samples.json", "evaluation*.json", REPORT_NAME)
GROWING = ("log.jsonl", "evaluation.json", "trial.json")
"""Files of an arm, or of a trial, that tell of progress."""
ARMS = ("*", "*/seed-*", "search/*/*")
"""Where arms and trials lie in a comparison's folder."""


class RunReport:
    """The report of one run's folder, or of a comparison's: as `ett report` wrote it, or while arms train, their curves.

    Args:
        folder: of a run or a comparison that may still be training.

    Raises:
        UserError: neither a run's folder nor a comparison's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._compared = folder, is_comparison(folder)
        self._lock = threading.Lock()
        self._tag = self._page = ""
        self.current()

    def tag(self) -> str:
        """Changes whenever the report would."""
        found = sorted({*(path for pattern in WATCHED for path in self._folder.glob(pattern)), *self._growing()})
        facts = [(str(path), (stat := path.stat()).st_mtime_ns, stat.st_size) for path in found]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def current(self) -> tuple[str, str]:
        """(tag, HTML) of the report as the folder stands; may take a second, so not for the event loop's thread.

        Raises:
            UserError: a file in the folder is damaged.
        """
        with self._lock:
            tag = self.tag()
            if tag != self._tag:
                self._page, self._tag = self._render(), tag
            return self._tag, self._page

    def _render(self) -> str:
        if not self._compared:
            return render(read_run(self._folder), kept_pictures(self._folder))
        report = self._folder / REPORT_NAME
        if not report.is_file():
            return render_live(self._folder)
        written = report.stat().st_mtime_ns
        if any(path.stat().st_mtime_ns > written for path in self._growing()):
            return render_live(self._folder)
        return report.read_text(encoding="utf-8")

    def _growing(self) -> list[Path]:
        """Of a comparison, the files of its arms that tell of progress."""
        if not self._compared:
            return []
        return [path for arm in ARMS for name in GROWING for path in self._folder.glob(f"{arm}/{name}")]

"""A run's report, live: rendered again when its log, recipe or evaluations changed."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from ett.errors import UserError
from ett.evaluate.report import render
from ett.evaluate.run_folder import kept_pictures, read_run
from ett.experiments.comparison import is_comparison
from ett.experiments.comparison_report import REPORT_NAME

WATCHED = ("log.jsonl", "recipe.yaml", "samples.json", "evaluation*.json", REPORT_NAME)


class RunReport:
    """The report of one run's folder, or of a comparison's (as `ett report` wrote it).

    Args:
        folder: of a run that may still be training.

    Raises:
        UserError: not a run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._compared = folder, is_comparison(folder)
        self._lock = threading.Lock()
        self._tag = self._page = ""
        self.current()

    def tag(self) -> str:
        """Changes whenever the report would."""
        found = sorted(path for pattern in WATCHED for path in self._folder.glob(pattern))
        facts = [(path.name, (stat := path.stat()).st_mtime_ns, stat.st_size) for path in found]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def current(self) -> tuple[str, str]:
        """(tag, HTML) of the report as the folder stands; may take a second, so not for the event loop's thread.

        Raises:
            UserError: a file in the folder is damaged, or a comparison has no report yet.
        """
        with self._lock:
            tag = self.tag()
            if tag != self._tag:
                self._page, self._tag = self._render(), tag
            return self._tag, self._page

    def _render(self) -> str:
        if not self._compared:
            return render(read_run(self._folder), kept_pictures(self._folder))
        path = self._folder / REPORT_NAME
        if not path.is_file():
            raise UserError(
                f"The comparison in {self._folder} has no report yet. Write it with `ett report {self._folder}`."
            )
        return path.read_text(encoding="utf-8")

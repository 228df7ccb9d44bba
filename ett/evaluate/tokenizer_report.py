"""Several tokenizers on the same pictures, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from ett.data.manifest import Manifest
from ett.data.sources import Source
from ett.errors import ModelError, UserError
from ett.evaluate import reading
from ett.evaluate.base import Selection
from ett.evaluate.comparison import compare
from ett.evaluate.frechet import ENOUGH
from ett.evaluate.run import load_for_evaluation, versions
from ett.evaluate.run_folder import write_whole
from ett.evaluate.tokenizer_measures import FRECHET, READ, Measured, measure_tokenizer
from ett.evaluate.tokenizer_page import SheetRow, render_tokenizers
from ett.losses.lpips_vgg import PACKAGES, LpipsVGG, lpips_is_installed
from ett.losses.perceptual import DISTRIBUTION, INSTALL, lite0_is_installed

REPORT_NAME, SUMMARY_NAME, KIND = "report.html", "report.json", "tokenizer-report"
DEFAULT_LIMIT = 400
"""Pictures taken of a built-in source where nothing else is said: enough for the Fréchet distance's covariance."""


def write_tokenizer_report(
    tokenizers: Mapping[str, str | Path],
    sources: Sequence[tuple[str, Source]],
    out: str | Path,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    overwrite: bool = False,
) -> tuple[Path, Sequence[str]]:
    """Measure tokenizers one after another and write ``report.json`` and ``report.html`` into `out`, made if need be.

    Args:
        tokenizers: name -> folder of a saved tokenizer or model.
        sources: (name, source), with different names.
        limit: examples of each source; None takes all of a manifest and `DEFAULT_LIMIT` of others.
        batch_size: examples at a time.
        overwrite: replace the tokenizer report that is in `out`; whatever else is there stays.

    Returns:
        The path of ``report.html``, and what to know about the figures, a sentence or two each.

    Raises:
        UserError: a folder that cannot be used, an example that cannot be read, or sources without pictures.
    """
    folder = Path(out)
    check_out(folder, overwrite)
    missing = reading.why_missing()
    reader = None if missing else reading.Reader()
    lpips, without_lpips = _lpips()
    selections = [_selection(name, source, limit) for name, source in sources]
    found: dict[str, Measured] = {}
    for name, path in tokenizers.items():
        _, tokenizer, processor = load_for_evaluation(path)
        found[name] = measure_tokenizer(
            tokenizer, processor, selections, batch_size=batch_size, reader=reader, lpips=lpips
        )
    summary = summarize(found, selections, missing, without_lpips)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(folder / SUMMARY_NAME, text + "\n")
        write_whole(folder / REPORT_NAME, render_tokenizers(summary, contact_sheet(found)))
    except OSError as error:
        raise UserError(f"The report in {folder} cannot be written: {error.strerror or error}.") from error
    return folder / REPORT_NAME, summary["notes"]


def _lpips() -> tuple[LpipsVGG | None, str]:
    """(LPIPS where its packages are installed, why it is not measured although they are)."""
    if not lpips_is_installed():
        return None, ""
    try:
        return LpipsVGG(), ""
    except ModelError as error:
        return None, f"LPIPS is not measured: {error}"


def _selection(name: str, source: Source, limit: int | None) -> Selection:
    return Selection(name, source, DEFAULT_LIMIT if limit is None and not isinstance(source, Manifest) else limit)


def summarize(
    found: Mapping[str, Measured], selections: Sequence[Selection], missing: str = "", without_lpips: str = ""
) -> dict[str, Any]:
    """``report.json``: sources, each tokenizer's figures, paired differences from the first one, and notes.

    "differences" are there for tokenizers that see pictures as the first one does: others are not measured on the same.

    Args:
        missing: why no text was read; "" where it could be. without_lpips: why there is no LPIPS although it is installed.
    """
    first = next(iter(found))
    alike = {name: each for name, each in found.items() if each.canvas == found[first].canvas}
    parts = {
        name: [{m: f.parts for m, f in each.metrics.items() if f.parts and "." in m}] for name, each in alike.items()
    }
    return {
        "kind": KIND,
        "sources": [
            {"name": data.name, "num_examples": len(data), "available": len(data.source)} for data in selections
        ],
        "tokenizers": {name: each.to_json() for name, each in found.items()},
        "reference": first,
        "differences": {
            pair.removesuffix(f" - {first}"): {metric: each.to_json() for metric, each in metrics.items()}
            for pair, metrics in compare(parts, first).items()
        },
        "notes": [*_notes(found, missing), *([without_lpips] if without_lpips else [])],
        "versions": versions(reading.DISTRIBUTION, *PACKAGES),
    }


def _notes(found: Mapping[str, Measured], missing: str) -> list[str]:
    notes = []
    if len({each.canvas for each in found.values()}) > 1:
        notes.append(
            "The tokenizers do not see the same pictures: their sizes, or the ways in which pictures are fitted, differ. Each "
            "is measured against the original at its own size, so figures of different sizes do not compare directly: a small "
            "picture has less to lose."
        )
    metrics = next(iter(found.values())).metrics
    distances = {name.removesuffix(FRECHET): each for name, each in metrics.items() if name.endswith(FRECHET)}
    few = [
        f"{prefix.removesuffix('.') or 'all sources'}: {each.num_examples}"
        for prefix, each in distances.items()
        if each.num_examples < ENOUGH
    ]
    if few:
        notes.append(
            f"The Fréchet distance needs at least {ENOUGH} pictures for covariances of full rank; there are fewer "
            f"({', '.join(few)}), and its values are too high. Compare them with values of the same pictures only."
        )
    if not lite0_is_installed():
        notes.append(f"The EfficientNet-Lite0 distances are not measured: {DISTRIBUTION} is not installed ({INSTALL}).")
    if missing:
        notes.append(missing)
    elif READ not in metrics:
        notes.append("Reading is not measured: no picture's text is known (an example's metadata say it under text).")
    unseen = [name for name, each in found.items() if int(each.index_counts.sum()) < len(each.index_counts)]
    if unseen:
        notes.append(
            f"Fewer indices than codes were seen with {', '.join(unseen)}, so not all codes could occur: take more pictures to "
            "judge how much of the codebook is in use."
        )
    return notes


def contact_sheet(found: Mapping[str, Measured]) -> dict[str, list[SheetRow]]:
    """By source, each picture's caption and versions: the original as each size shows it, then every reconstruction."""
    sheet: dict[str, list[SheetRow]] = {}
    several = len({each.canvas for each in found.values()}) > 1
    for source, shown in next(iter(found.values())).sheet.items():
        for i, (caption, _) in enumerate(shown):
            cells = []
            for canvas in dict.fromkeys(each.canvas for each in found.values()):
                original = next(each for each in found.values() if each.canvas == canvas).sheet[source][i][1].original
                cells.append(
                    (["original", *([f"{canvas[0]} x {canvas[1]}, {canvas[2]}"] if several else [])], original)
                )
            for name, each in found.items():
                made = each.sheet[source][i][1]
                cells.append(([name, f"{made.psnr:.1f} dB"], made.image))
            sheet.setdefault(source, []).append((caption, cells))
    return sheet


def check_out(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything, but with `overwrite` an earlier tokenizer report.

    Raises:
        UserError: it is a file, or holds what is not to be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder with --out.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"The output folder {folder} already exists. Replace it with --overwrite, or choose another with --out."
        )
    try:
        kind = json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    if kind != KIND:
        raise UserError(
            f"{folder} holds no tokenizer report, so nothing in it is replaced. Choose another folder with --out."
        )


def labels(given: Sequence[str]) -> list[str]:
    """A name for each of the given folders: the last part of its path, as many parts as tell them apart, or a number behind."""
    parts = [[part for part in Path(path).parts if part not in ("/", ".", "..")] or [path] for path in given]
    found: list[str] = []
    for i, own in enumerate(parts):
        others = [other for k, other in enumerate(parts) if k != i and other != own]
        depth = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        name = "/".join(own[-depth:])
        candidates = (name if number == 1 else f"{name}-{number}" for number in count(1))
        found.append(next(each for each in candidates if each not in found))
    return found

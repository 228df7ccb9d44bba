"""The page of a tokenizer report: one row for each tokenizer, and what became of the same pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image

from ett.evaluate.charts import Series, line_chart, number
from ett.evaluate.html import compared, folded, safe, table
from ett.evaluate.metric_cells import metric_cells, metric_head
from ett.evaluate.page import page
from ett.evaluate.verdict import INTERVAL, decimals, figure, fixed, interval_of, value_of

MEASURES = (
    "psnr",
    "ssim",
    "lpips_vgg",
    "lite0_distance",
    "lite0_frechet_distance",
    "ocr_character_error_rate",
    "ocr_character_error_rate_of_originals",
    "l1",
    "codebook_usage",
    "index_perplexity",
)
"""In the order of the columns; what was not measured is left out."""

SheetRow = tuple[str, Sequence[tuple[Sequence[str], PIL.Image.Image]]]
"""A picture's caption, and its versions: (names, picture)."""

Summary = Mapping[str, Any]
"""The content of ``report.json``."""

_WHAT = """<p>Each picture is fitted to the tokenizer's own size, encoded to indices and decoded again; padding does not count.
PSNR, SSIM and the mean absolute difference compare pixels. The EfficientNet-Lite0 distance compares what a network trained
to recognise things sees in a picture and in its reconstruction, at five depths. The EfficientNet-Lite0 Fréchet distance
compares all originals with all reconstructions: mean and covariance of the network's pooled last features, as
‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁^½ Σ₂ Σ₁^½)^½. Neither compares with figures made with other networks. Reading errors are
those of an OCR judge (RapidOCR with PP-OCRv4, pictures enlarged to 256 pixels, case ignored) on pictures whose text is known;
its errors on the originals stand beside them.</p>"""
_LPIPS = "<p>LPIPS is that of the package lpips with VGG-16, version 0.1.</p>"


def render_tokenizers(summary: Summary, sheet: Mapping[str, Sequence[SheetRow]]) -> str:
    """The page's HTML: self-contained, without scripts, for light and dark, desk and phone.

    Args:
        sheet: by source, the pictures to show.
    """
    sources = [str(entry["name"]) for entry in summary["sources"]]
    notes = "".join(f"<li>{safe(note)}</li>" for note in summary["notes"])
    results = _figures(summary, "") + "".join(
        f"<h3>{safe(source)}</h3>{_figures(summary, f'{source}.')}" for source in sources if len(sources) > 1
    )
    pictures = "".join(
        f"<h3>{safe(source)}</h3>{''.join(compared(*row) for row in rows)}" for source, rows in sheet.items()
    )
    lpips = _LPIPS if any("lpips_vgg" in about["metrics"] for about in summary["tokenizers"].values()) else ""
    versions = table(["Package", "Version"], [[safe(k), safe(v)] for k, v in summary["versions"].items()])
    sections = [
        ("What was measured", _introduction(summary)),
        ("Before comparing", f"<ul>{notes}</ul>" if notes else ""),
        ("Figures", results + _differences(summary)),
        ("Codebooks", _codebooks(summary)),
        ("The same pictures through every tokenizer", pictures),
        ("How the figures are made", _WHAT + lpips + folded("Versions", versions)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return page("Tokenizers", body, "vision tokenizers side by side on the same pictures")


def _introduction(summary: Summary) -> str:
    taken = ", ".join(
        f"{entry['name']}: {entry['num_examples']} of {entry['available']} examples" for entry in summary["sources"]
    )
    rows = [
        [
            safe(name),
            _size(about),
            f"{about['downsample']} px",
            str(_tokens(about)),
            f"{about['codebook_size']:,} x {about['codebook_dim']}",
            f"{about['num_parameters']:,}",
            safe(about["kind"]),
        ]
        for name, about in summary["tokenizers"].items()
    ]
    head = ["Tokenizer", "Pictures", "A token's side", "Tokens a picture", "Codebook", "Parameters", "Kind"]
    return f"<p>{safe(taken)}.</p>{table(head, rows, range(1, 6), 'arms')}"


def _size(about: Mapping[str, Any]) -> str:
    height, width = about["image_size"]
    return f"{height} x {width} px, {safe(about['image_mode'])}"


def _tokens(about: Mapping[str, Any]) -> int:
    height, width = about["image_size"]
    return (height // about["downsample"]) * (width // about["downsample"])


def _figures(summary: Summary, prefix: str) -> str:
    """A row for each tokenizer; stars only among those that see pictures of one size in one way."""
    tokenizers = summary["tokenizers"]
    ranked = tokenizers if len({_size(about) for about in tokenizers.values()}) == 1 else ()
    measures = [
        name for name in MEASURES if any(figure(about["metrics"], prefix + name) for about in tokenizers.values())
    ]
    if not measures:
        return "<p>No picture.</p>"
    found = {
        name: {tokenizer: figure(about["metrics"], prefix + name) for tokenizer, about in tokenizers.items()}
        for name in measures
    }
    columns = {name: metric_cells(name, figures, ranked) for name, figures in found.items()}
    rows = [
        [
            f'{safe(name)}<br><span class="unit">{_size(about)}</span>',
            *(column[name] for column in columns.values()),
        ]
        for name, about in tokenizers.items()
    ]
    star = " ★ marks the best value, whether or not the difference is sure." if len(ranked) > 1 else ""
    note = (
        "" if prefix else f'<p class="unit">All sources together. Below a value its {INTERVAL} over examples.{star}</p>'
    )
    heads = [metric_head(name, figures.values()) for name, figures in found.items()]
    return note + table(["Tokenizer", *heads], rows, range(1, len(heads) + 1), "arms")


def _differences(summary: Summary) -> str:
    """Paired differences from the first tokenizer, of those measured on the same pictures at the same size."""
    differences = summary["differences"]
    measures = [name for name in MEASURES if any(name in metrics for metrics in differences.values())]
    if not measures:
        return ""
    rows = []
    for name, metrics in differences.items():
        cells = []
        for measure in measures:
            each = figure(metrics, measure)
            ends = interval_of(each)
            places = decimals(ends)
            within = "" if ends is None else f"{fixed(ends[0], places)} to {fixed(ends[1], places)}"
            cells.append(f'{fixed(value_of(each), places)}<br><span class="unit">{within}</span>')
        rows.append([safe(name), *cells])
    reference = safe(summary["reference"])
    heads = [metric_head(name, [figure(metrics, name) for metrics in differences.values()]) for name in measures]
    return (
        f'<h3>Differences from {reference}</h3><p class="unit">Each tokenizer minus {reference} on the same pictures, all '
        f"sources together, with the paired {INTERVAL}: one that leaves out zero shows a difference.</p>"
        + table(["Tokenizer", *heads], rows, range(1, len(heads) + 1), "arms")
    )


def _codebooks(summary: Summary) -> str:
    books = {name: about["codebook"] for name, about in summary["tokenizers"].items()}
    rows = [
        [
            safe(name),
            f"{book['size']:,}",
            f"{book['in_use']:,}",
            f"{book['usage']:.1%}",
            number(book["perplexity"]),
            f"{book['num_indices']:,}",
        ]
        for name, book in books.items()
    ]
    head = ["Tokenizer", "Codes", "In use", "Share", "Perplexity", "Indices seen"]
    chart = line_chart(
        "What the most frequent codes cover",
        [Series(name, [(x, y) for x, y in book["curve"]]) for name, book in books.items()],
        "share of the codes, most frequent first",
        "share of the indices",
    )
    note = '<p class="unit">Of all sources together, padding included. Equal use of every code would be a straight line.</p>'
    return f'{table(head, rows, range(1, 6), "arms")}{note}<div class="charts">{chart}</div>'

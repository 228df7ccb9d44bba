"""Judges what came of ``ett ablate tokenizer_losses`` on held-out pictures: distances, and reading after reconstruction.

    python tools/judge_tokenizer_losses.py runs/tokenizer_losses runs/tokenizer_losses_report    # reading: extra `ocr`

Names of held-out concepts, styles and pairs; held-out strings in known and in held-out fonts, easy enough that an OCR judge
reads the originals: what is lost is the tokenizer's doing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ett.data.drawn_text import DrawnText
from ett.data.sources import Source
from ett.evaluate.sources import builtin_sources
from ett.evaluate.tokenizer_report import write_tokenizer_report
from ett.model.loading import find_weights

SIZE = 64
DIFFICULTIES = (0.0, 0.2)
PICTURES = 128


def held_out() -> list[tuple[str, Source]]:
    """Every source that the arms are judged on."""
    sources: list[tuple[str, Source]] = [each for each in builtin_sources("heldout") if each[0].startswith("names")]
    for difficulty in DIFFICULTIES:
        for split in ("word", "font"):
            text = DrawnText(split, size=SIZE, difficulty=difficulty, seed=31, length=PICTURES)
            sources.append((f"text at difficulty {difficulty:g}, unseen {split}s", text))
    return sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the comparison's folder")
    parser.add_argument("out", type=Path, help="where the report goes")
    arguments = parser.parse_args()
    tokenizers = {
        "start": find_weights("reader_64px"),
        **{path.parts[-3]: path for path in sorted(arguments.run.glob("*/stages/0-tokenizer"))},
    }
    page, notes = write_tokenizer_report(tokenizers, held_out(), arguments.out, limit=PICTURES, overwrite=True)
    print(page, *notes, sep="\n")


if __name__ == "__main__":
    main()

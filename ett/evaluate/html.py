"""Pieces of HTML that the reports share: text made safe, tables, pictures inside the page."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypeVar

import PIL.Image

T = TypeVar("T")

MAX_SIZE = 256
"""Longest side of a picture among others on a page [pixels]."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def safe(value: object) -> str:
    """Text for HTML: escaped, and characters that HTML cannot hold shown as U+FFFD."""
    return escape(_CONTROL.sub("\ufffd", str(value)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = (), kind: str = "") -> str:
    """A table of ready HTML cells in a box that scrolls sideways where the screen is narrow.

    Args:
        numeric: columns to set as figures, aligned to the right.
        kind: a class of the style sheet: "arms" keeps the first column in sight while the others scroll.
    """

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=num' if i in numeric else ''}>{value}</{tag}>" for i, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    opened = f'<table class="{kind}">' if kind else "<table>"
    return f'<div class="scroll">{opened}<thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def embedded(image: PIL.Image.Image, alternative: str) -> str:
    """A picture as part of the page, PNG; `alternative` is its text for who does not see it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{safe(alternative)}">'


def compared(caption: str, cells: Sequence[tuple[Sequence[str], PIL.Image.Image]]) -> str:
    """One picture in several versions side by side: (names, picture) each, at most `MAX_SIZE` large. All texts are plain."""
    thumbs = []
    for labels, image in cells:
        small = image.copy()
        small.thumbnail((MAX_SIZE, MAX_SIZE))
        alternative = f"{caption}: {', '.join(labels)}"
        thumbs.append(f"<div><span>{'<br>'.join(map(safe, labels))}</span>{embedded(small, alternative)}</div>")
    return (
        f'<figure class="compared"><figcaption>{safe(caption)}</figcaption>'
        f'<div class="thumbs" style="--columns: {len(cells)}">{"".join(thumbs)}</div></figure>'
    )


def folded(title: str, content: str) -> str:
    """Ready HTML behind a line that opens it; nothing where there is no content."""
    return f"<details><summary>{safe(title)}</summary>{content}</details>" if content else ""


def words(name: object) -> str:
    """Plain text: a name of code as people write it."""
    return str(name).replace("_", " ")


def titled(name: str) -> str:
    """Plain text: `words` with a capital."""
    return words(name.capitalize())


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """What of `values` is a finite number."""
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}


def spread(items: Sequence[T], count: int) -> list[T]:
    """Up to `count` items at equal distances: samples of every source."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]

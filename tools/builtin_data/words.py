"""Words to draw: lower-case English words out of the names and keywords of emojibase and CLDR."""

from __future__ import annotations

import re
from pathlib import Path

from builtin_data.sources import CLDR, EMOJIBASE, Package

SHORTEST, LONGEST = 3, 10
"""Letters in a word, both included."""

# fmt: off
_LEFT_OUT = frozenset((
    "ass", "bisexual", "breast", "crap", "damn", "drugs", "drunk", "fart", "gay", "hell", "lesbian", "lgbt", "lgbtq",
    "lgbtqia", "lmao", "lmfao", "lust", "omfg", "pissed", "porn", "queer", "sex", "sexy", "shit", "trans", "turd",
    "virgin", "wtf",
))
# fmt: on
"""Crude words, and words about people that must not turn up at random."""


def extract(folder: Path) -> list[str]:
    """Every word, sorted, each once. Words that are written with a capital (names) are left out."""
    with Package(folder, EMOJIBASE) as package:
        texts = [
            text for entry in package.json("en/data.json") for text in (entry["label"], *entry.get("tags", ()))
        ] + [name.lower() for name in package.json("meta/unicode-names.json").values()]
    with Package(folder, CLDR) as package:
        annotations = package.json("annotations/en/annotations.json")["annotations"]["annotations"]
    for entry in annotations.values():
        texts += [*entry.get("default", ()), *entry.get("tts", ())]
    words = {word for text in texts for word in re.split(r"[^A-Za-z]+", text)}
    pattern = re.compile(rf"[a-z]{{{SHORTEST},{LONGEST}}}")
    return sorted(word for word in words - _LEFT_OUT if pattern.fullmatch(word))

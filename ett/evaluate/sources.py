"""What is evaluated on: the built-in data by split, or someone's manifest."""

from __future__ import annotations

from pathlib import Path

from ett.data.artwork import HELD_OUT_SPLITS as ARTWORK_HELD_OUT
from ett.data.artwork import SPLITS as ARTWORK_SPLITS
from ett.data.drawn_text import SPLITS as TEXT_SPLITS
from ett.data.manifest import Manifest
from ett.data.mixture import SourceConfig
from ett.data.sources import Source
from ett.errors import DataError, unknown

HELD_OUT = "heldout"
"""Stands for every split of each source that nothing is tuned on."""

_TEXT_HELD_OUT = tuple(split for split in TEXT_SPLITS if split not in ("train", "validation"))

NamedSources = list[tuple[str, Source]]


def builtin_sources(split: str = "validation") -> NamedSources:
    """The built-in sources that have `split`: "names", "questions", "drawn_text".

    "heldout" gives every held-out split of each, named "names.pair", "drawn_text.font" and so on.

    Raises:
        DataError: a split that no source has.
    """
    configs = {
        "names": (SourceConfig(source="names"), ARTWORK_SPLITS, ARTWORK_HELD_OUT),
        "questions": (SourceConfig(source="questions"), ARTWORK_SPLITS, ARTWORK_HELD_OUT),
        "drawn_text": (SourceConfig(source="drawn_text"), TEXT_SPLITS, _TEXT_HELD_OUT),
    }
    allowed = dict.fromkeys([*ARTWORK_SPLITS, *TEXT_SPLITS, HELD_OUT])
    if split not in allowed:
        raise DataError(unknown("split of the built-in data", split, allowed))
    if split == HELD_OUT:
        return [
            (f"{name}.{each}", config.with_split(each))
            for name, (config, _, held_out) in configs.items()
            for each in held_out
        ]
    return [(name, config.with_split(split)) for name, (config, splits, _) in configs.items() if split in splits]


def manifest_source(path: str | Path) -> NamedSources:
    """The manifest alone, under its file's name.

    Raises:
        DataError: it cannot be used.
    """
    manifest = Manifest(path)
    return [(manifest.name, manifest)]

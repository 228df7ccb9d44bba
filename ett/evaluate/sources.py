"""What is evaluated on: the built-in data by split, or someone's manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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

BUILTIN = (SourceConfig(source="names"), SourceConfig(source="questions"), SourceConfig(source="drawn_text"))
"""Evaluated where nothing else is said."""

_TEXT_HELD_OUT = tuple(split for split in TEXT_SPLITS if split not in ("train", "validation"))

NamedSources = list[tuple[str, Source]]


def builtin_sources(split: str = "validation", configs: Sequence[SourceConfig] = BUILTIN) -> NamedSources:
    """The built-in sources among `configs` that have `split`: "names", "questions", "drawn_text".

    "heldout" gives every held-out split of each, named "names.pair", "drawn_text.font" and so on.

    Args:
        split: of the sources.
        configs: how they are drawn, as a recipe's data say it. Their limits are for training and do not count here.
            Manifests are left out, for they have no splits; where nothing else is there, `BUILTIN` is taken.

    Raises:
        DataError: a split that no source has.
    """
    allowed = dict.fromkeys([*ARTWORK_SPLITS, *TEXT_SPLITS, HELD_OUT])
    if split not in allowed:
        raise DataError(unknown("split of the built-in data", split, allowed))
    found: NamedSources = []
    for name, config in _named([config for config in configs if config.source != "manifest"] or BUILTIN):
        is_text = config.source == "drawn_text"
        if split == HELD_OUT:
            held_out = _TEXT_HELD_OUT if is_text else ARTWORK_HELD_OUT
            found += [(f"{name}.{each}", config.with_split(each)) for each in held_out]
        elif split in (TEXT_SPLITS if is_text else ARTWORK_SPLITS):
            found.append((name, config.with_split(split)))
    if not found:
        raise DataError(f"None of the sources has a split {split!r}. Take validation or {HELD_OUT}.")
    return found


def _named(configs: Sequence[SourceConfig]) -> list[tuple[str, SourceConfig]]:
    """Each configuration without its limit, under its source's name, numbered where one comes again."""
    named: dict[str, SourceConfig] = {}
    for config in configs:
        earlier = sum(other.source == config.source for other in named.values())
        name = config.source if earlier == 0 else f"{config.source}-{earlier + 1}"
        named[name] = replace(config, limit=None)
    return list(named.items())


def manifest_source(path: str | Path, image_root: str | Path | None = None) -> NamedSources:
    """The manifest alone, under its file's name; `image_root` is a folder outside its own whose pictures may be read.

    Raises:
        DataError: it cannot be used.
    """
    manifest = Manifest(path, image_root=image_root)
    return [(manifest.name, manifest)]

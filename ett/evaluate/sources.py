"""What is evaluated on: the built-in data by split, stored data whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from ett.data.artwork import HELD_OUT_SPLITS as ARTWORK_HELD_OUT
from ett.data.artwork import SPLITS as ARTWORK_SPLITS
from ett.data.drawn_scenes import SPLITS as SCENE_SPLITS
from ett.data.drawn_text import SPLITS as TEXT_SPLITS
from ett.data.manifest import Manifest
from ett.data.mixture import STORED, SourceConfig, SourceName
from ett.data.sources import Source
from ett.errors import DataError, unknown

HELD_OUT = "heldout"
"""Stands for every split of each source that nothing is tuned on."""

BUILTIN = (SourceConfig(source="names"), SourceConfig(source="questions"), SourceConfig(source="drawn_text"))
"""Evaluated where nothing else is said."""

NAMED = (*BUILTIN, SourceConfig(source="drawn_scenes"))
"""Evaluated where they are named."""

_TEXT_HELD_OUT = tuple(split for split in TEXT_SPLITS if split not in ("train", "validation"))
_SCENES_HELD_OUT = tuple(split for split in SCENE_SPLITS if split not in ("train", "validation"))

_SPLITS = {"drawn_text": (TEXT_SPLITS, _TEXT_HELD_OUT), "drawn_scenes": (SCENE_SPLITS, _SCENES_HELD_OUT)}
"""All splits, and the held-out ones, of sources that are no artwork."""

NamedSources = list[tuple[str, Source]]


def builtin_sources(split: str = "validation", configs: Sequence[SourceConfig] = BUILTIN) -> NamedSources:
    """The built-in sources among `configs` that have `split`: "names", "questions", "drawn_text", "drawn_scenes".

    "heldout" gives every held-out split of each, named "names.pair", "drawn_text.font" and so on.

    Args:
        split: of the sources.
        configs: how they are drawn, as a recipe's data say it. Their limits are for training and do not count here, and what
            a model draws is read here.
            Manifests are left out, for they have no splits; where nothing else is there, `BUILTIN` is taken.

    Raises:
        DataError: a split that no source has.
    """
    allowed = dict.fromkeys([*ARTWORK_SPLITS, *TEXT_SPLITS, HELD_OUT])
    if split not in allowed:
        raise DataError(unknown("split of the built-in data", split, allowed))
    found: NamedSources = []
    for name, config in _named([config for config in configs if config.source not in STORED] or BUILTIN):
        splits, held_out = _SPLITS.get(config.source, (ARTWORK_SPLITS, ARTWORK_HELD_OUT))
        if split == HELD_OUT:
            found += [(f"{name}.{each}", config.with_split(each)) for each in held_out]
        elif split in splits:
            found.append((name, config.with_split(split)))
    if not found:
        raise DataError(f"None of the sources has a split {split!r}. Take validation or {HELD_OUT}.")
    return found


def held_back(given: Sequence[SourceConfig] | None, trained: Sequence[SourceConfig]) -> list[SourceConfig]:
    """What a recipe is measured on: the sources that its evaluation names, stored ones among them; where it names none, the
    built-in ones that it trains on, for these have splits. Empty where it names none and trains on stored data alone."""
    return list(given) if given else [config for config in trained if config.source not in STORED]


def configured_sources(configs: Sequence[SourceConfig], split: str) -> NamedSources:
    """Built-in sources for `split` (`builtin_sources`), and stored ones whole (`stored_sources`).

    Raises:
        DataError: a split that no built-in source has, or stored data that cannot be used.
    """
    builtin = [config for config in configs if config.source not in STORED]
    stored = [config for config in configs if config.source in STORED]
    return [*(builtin_sources(split, builtin) if builtin or not stored else ()), *stored_sources(stored)]


def stored_sources(configs: Sequence[SourceConfig]) -> NamedSources:
    """Manifests, shards and tables as they stand, up to their own limit, under the names of their files.

    A dot would group the figures (`ett.evaluate.comparison.pooled`), so names have none; where one comes several times it is
    numbered, "mine.1", "mine.2", and one that a built-in source has says what it is, "names_manifest". What a model draws is
    read here.

    Raises:
        DataError: data that cannot be used.
    """
    found = []
    for config in configs:
        source = replace(config, draws=False).build()
        plain = source.name.replace(".", "_")
        found.append((f"{plain}_{config.source}" if plain in get_args(SourceName) else plain, source))
    count, numbers = Counter(name for name, _ in found), Counter[str]()
    named: NamedSources = []
    for name, source in found:
        numbers[name] += 1
        named.append((f"{name}.{numbers[name]}" if count[name] > 1 else name, source))
    return named


def _named(configs: Sequence[SourceConfig]) -> list[tuple[str, SourceConfig]]:
    """Each configuration without its limit, under its source's name; where one comes several times, "drawn_text.1",
    "drawn_text.2" and so on, so that their figures are pooled under the name itself (`ett.evaluate.comparison.pooled`)."""
    families = [_family(config) for config in configs]
    named = []
    for i, (family, config) in enumerate(zip(families, configs, strict=True)):
        number = f".{families[: i + 1].count(family)}" if families.count(family) > 1 else ""
        named.append((f"{family}{number}", replace(config, limit=None, draws=False)))
    return named


def _family(config: SourceConfig) -> str:
    """What a built-in source's figures are pooled under; short answers about drawn text are no texts read."""
    return "text_questions" if config.short_answers and config.source == "drawn_text" else config.source


def named_sources(given: Sequence[str], split: str | None = None, image_root: str | Path | None = None) -> NamedSources:
    """Sources by name: "names", "questions", "drawn_text", "drawn_scenes", or a manifest's path.

    Args:
        given: names and paths; none stands for "names" and "drawn_text" ("questions" shows the pictures of "names" again).
        split: of the built-in ones: validation where it is None, or heldout for every one that nothing is tuned on.
        image_root: a folder outside the manifests' whose pictures may be read.

    Raises:
        DataError: an unknown name or split, a split for manifests alone, two sources of one name, or a manifest that cannot be
            used.
    """
    builtin: dict[str, SourceConfig] = {config.source: config for config in NAMED}
    names = [name for name in given if name in builtin] if given else ["names", "drawn_text"]
    if split is not None and not names:
        raise DataError("A manifest has no splits: leave the split out, or name built-in data too.")
    found = builtin_sources(split or "validation", [builtin[name] for name in dict.fromkeys(names)]) if names else []
    for path in given:
        if path in builtin:
            continue
        if not Path(path).exists() and Path(path).suffix != ".jsonl":
            raise DataError(f"{unknown('data', path, builtin)} Or give the path of a manifest (.jsonl).")
        found += manifest_source(path, image_root)
    twice = {name for name, _ in found if sum(name == other for other, _ in found) > 1}
    if twice:
        raise DataError(f"Two sources have the name {min(twice)!r}. Rename one of the files, or leave one out.")
    return found


def manifest_source(path: str | Path, image_root: str | Path | None = None) -> NamedSources:
    """The manifest alone, under its file's name; `image_root` is a folder outside its own whose pictures may be read.

    Raises:
        DataError: it cannot be used.
    """
    manifest = Manifest(path, image_root=image_root)
    return [(manifest.name, manifest)]

"""NOTICE: who made what, what was changed, and every licence in full, all taken from the packages themselves."""

from __future__ import annotations

import re
from pathlib import Path

from builtin_data.artwork import SIZE, STYLES
from builtin_data.fonts import FONTS, Font
from builtin_data.sources import CLDR, EMOJIBASE, LICENCES, PINS, Package

_MAKERS = {
    "noto": "Copyright Google Inc.",
    "noto-v1": "Copyright Google Inc.",
    "fluent-emoji": "Copyright (c) Microsoft Corporation.",
    "fluent-emoji-flat": "Copyright (c) Microsoft Corporation.",
    "twemoji": "Copyright Twitter, Inc and other contributors.",
    "emojione": "Emoji artwork by EmojiOne (version 2), continued as EmojiTwo.",
}
_CHANGES = (
    f"Changed: drawn from SVG to {SIZE} x {SIZE} pixels on white, encoded as WebP, named after Unicode CLDR; variants\n"
    "  with skin tones, lone letters and digits, and drawings that repeat another one of the set are left out."
)
_RULE = "\n" + "=" * 100 + "\n"


def text(folder: Path) -> str:
    """The whole file."""
    with Package(folder, LICENCES) as package:
        licence = {
            name: _title(name) + package.json(f"licenses/{name}.json")["licenseText"].strip() + "\n"
            for name in ("Apache-2.0", "CC-BY-4.0", "OFL-1.1", "MIT")
        }
    with Package(folder, EMOJIBASE) as package:
        emojibase = _title("MIT (emojibase)") + package.text("LICENSE").strip() + "\n"
    with Package(folder, CLDR) as package:
        cldr = _title("Unicode-3.0 (CLDR)") + package.text("LICENSE").strip() + "\n"
    fluent = licence["MIT"].replace("Copyright (c) <year> <copyright holders>", _MAKERS["fluent-emoji"])
    if fluent == licence["MIT"]:
        raise ValueError("the MIT template of the licence list has changed; its copyright line was not found")
    parts = [
        _attribution(folder),
        licence["Apache-2.0"],
        fluent.replace("MIT", "MIT (Fluent Emoji)", 1),
        licence["CC-BY-4.0"],
        emojibase,
        cldr,
        licence["OFL-1.1"],
    ]
    lines = "\n".join(part.rstrip() for part in _RULE.join(parts).splitlines())
    return lines + "\n"


def _title(name: str) -> str:
    return f"LICENCE TEXT: {name}\n\n"


def _attribution(folder: Path) -> str:
    blocks = [
        "The data in this folder are made from the works below by tools/build_builtin_data.py. The works keep their\n"
        "licences; the texts of all of them follow. Nobody named here endorses this package.",
        "ARTWORK (artwork-*.tar.gz)",
    ]
    for style in STYLES:
        with Package(folder, f"@iconify-json/{style}") as package:
            info = package.json("info.json")
        origin = f"npm @iconify-json/{style} {_version(f'@iconify-json/{style}')}"
        blocks.append(
            f"* {info['name']} ({style}). {_MAKERS[style]}\n"
            f"  From {info['author']['url']} by way of {origin}.\n"
            f"  Licence: {info['license']['spdx']}, {info['license']['url']}\n  {_CHANGES}"
        )
    blocks += [
        "NAMES, GROUPS, TAGS AND WORDS (the JSON beside each picture, words.txt)",
        f"* emojibase-data {_version(EMOJIBASE)}. Copyright (c) 2017-2019 Miles Johnson. Licence: MIT.\n"
        "  Changed: facts (flag, time, direction, colour, writing, base concept) are derived from the names.",
        f"* Unicode CLDR annotations, npm {CLDR} {_version(CLDR)}. Copyright (c) Unicode, Inc. Licence: Unicode-3.0.",
        "FONTS (fonts/*.ttf)\n"
        "  Changed, all of them: cut down to printable ASCII without hinting or layout tables, and renamed, so that\n"
        "  no reserved font name is used.",
        *(_font(folder, font) for font in FONTS),
    ]
    return "\n\n".join(blocks) + "\n"


def _font(folder: Path, font: Font) -> str:
    with Package(folder, font.source) as package:
        licence = package.text("LICENSE")
        spdx = package.json("package.json")["license"]
    if spdx == "OFL-1.1":
        copyright_line = licence.split("\n", 1)[0].strip()
    else:
        copyright_line = "Copyright 2018 The Roboto Slab Project Authors (https://github.com/googlefonts/robotoslab)"
    # The line goes on with the same words for each other file of the family ("Lato-Bold.ttf: Copyright ...").
    copyright_line = re.split(r" \S+\.ttf: ", copyright_line)[0]
    return (
        f"* {font.name}.ttf from npm {font.source} {_version(font.source)}, weight {font.weight}. Licence: {spdx}.\n"
        f"  {copyright_line}"
    )


def _version(package: str) -> str:
    return PINS[package].version

"""Open fonts for drawn text: cut down to printable ASCII and renamed."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

from fontTools import subset  # type: ignore[import-untyped]
from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

from builtin_data.sources import Package


@dataclass(frozen=True)
class Font:
    """One family: its npm package, weight, look, and whether it is held out of training."""

    package: str
    weight: int
    look: str
    held_out: bool = False

    @property
    def source(self) -> str:
        return f"@fontsource/{self.package}"

    @property
    def name(self) -> str:
        """Our own name: modified fonts must not carry a reserved one (OFL, condition 3)."""
        return self.look


FONTS = (
    Font("lato", 400, "sans"),
    Font("roboto", 700, "sans-bold"),
    Font("merriweather", 400, "serif"),
    Font("playfair-display", 700, "serif-contrast"),
    Font("roboto-slab", 700, "slab"),
    Font("jetbrains-mono", 500, "mono"),
    Font("oswald", 400, "condensed"),
    Font("anton", 400, "poster"),
    Font("nunito", 700, "rounded"),
    Font("fredoka", 600, "rounded-bold"),
    Font("pacifico", 400, "brush"),
    Font("patrick-hand", 400, "hand"),
    Font("righteous", 400, "deco"),
    Font("comfortaa", 600, "geometric", held_out=True),
    Font("courier-prime", 700, "typewriter", held_out=True),
    Font("eb-garamond", 600, "oldstyle", held_out=True),
    Font("lobster", 400, "script", held_out=True),
    Font("caveat", 700, "cursive", held_out=True),
)
"""Held out: a quarter of them, each of a look of its own (no other typewriter, old-style serif, upright script ...)."""

ASCII = range(0x20, 0x7F)
_COPYRIGHT, _FAMILY, _SUBFAMILY, _UNIQUE, _FULL, _POSTSCRIPT, _LICENCE, _LICENCE_URL = 0, 1, 2, 3, 4, 6, 13, 14


def build(folder: Path, out: Path) -> None:
    """`out`/``<name>.ttf`` for every font, and ``fonts.json``: name -> package, weight, held_out."""
    out.mkdir(parents=True, exist_ok=True)
    for font in FONTS:
        with Package(folder, font.source) as package:
            woff = package.read(f"files/{font.package}-latin-{font.weight}-normal.woff")
        (out / f"{font.name}.ttf").write_bytes(cut(woff, font))
    listing = {font.name: {"package": font.source, "weight": font.weight, "held_out": font.held_out} for font in FONTS}
    (out / "fonts.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")


def cut(woff: bytes, font: Font) -> bytes:
    """A TrueType file with the glyphs of printable ASCII, no hinting, no layout tables, and names of ours.

    Pillow's basic layout reads none of GSUB, GPOS and hinting is switched off, so that pictures do not depend on them.
    """
    loaded = TTFont(io.BytesIO(woff), recalcTimestamp=False)
    options = subset.Options(hinting=False, layout_features=[], notdef_outline=True, recalc_timestamp=False)
    options.drop_tables += ["GSUB", "GPOS", "GDEF", "kern", "DSIG", "STAT", "meta"]
    options.name_IDs = [_COPYRIGHT, _LICENCE, _LICENCE_URL]
    options.name_languages = [0x409]
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=ASCII)
    cutter.subset(loaded)
    loaded.flavor = None
    family = f"ETT Drawn {font.name.replace('-', ' ').title()}"
    for name_id, text in (
        (_FAMILY, family),
        (_SUBFAMILY, "Regular"),
        (_UNIQUE, f"{family};1"),
        (_FULL, family),
        (_POSTSCRIPT, family.replace(" ", "")),
    ):
        loaded["name"].setName(text, name_id, 3, 1, 0x409)
    plain = io.BytesIO()
    loaded.save(plain)
    return plain.getvalue()

"""Icon sets -> named pictures: matched to emoji, drawn, and cleared of pictures with two names."""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import resvg_py

from builtin_data.emoji import Emoji, plain_code
from builtin_data.sources import CLDR, EMOJIBASE, Package

STYLES: Mapping[str, str] = {
    "noto": "noto",
    "noto-v1": "noto",
    "fluent-emoji": "fluent-emoji",
    "fluent-emoji-flat": "fluent-emoji",
    "twemoji": "twemoji",
    "emojione": "emojione",
}
"""Style -> family. The styles of a family are near-twins: the same drawings, redrawn."""

SIZE = 96
"""Side of a picture [pixels]."""

LOSSY_QUALITY = 85
# Measured on 60 pictures of each style at 96 px, mean bytes (method 6; PNG optimised):
#                      q75   q85   q90  lossless    PNG
#   noto              1153  1562  1886      2089   3666
#   noto-v1           1129  1510  1794      1168   2497
#   fluent-emoji      1039  1409  1704      4407   5592
#   fluent-emoji-flat  940  1259  1507      1011   2115
#   twemoji            964  1303  1573      1129   2459
#   emojione          1049  1419  1714      1164   2584
# Flat artwork is smaller without loss than at quality 85, so each picture keeps the smaller of the two.


@dataclass(frozen=True)
class Picture:
    """One drawing with its name.

    Attributes:
        style: one of `STYLES`.
        emoji: what it shows.
        webp: the encoded picture, SIZE x SIZE, RGB on white.
        pixels: SHA-256 of its pixels before encoding.
    """

    style: str
    emoji: Emoji
    webp: bytes
    pixels: str

    @property
    def family(self) -> str:
        return STYLES[self.style]

    @property
    def key(self) -> str:
        """Unique over all styles."""
        return f"{self.style}-{self.emoji.code}"


def slug(name: str) -> str:
    """``Japanese “secret” button`` -> ``japanese-secret-button``, as the icon sets name their icons."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['.&!]", "", plain)).strip("-")


def read_icon_set(folder: Path, style: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(icons.json, chars.json: code -> icon name) of a style."""
    with Package(folder, f"@iconify-json/{style}") as package:
        return package.json("icons.json"), package.json("chars.json")


def names_to_codes(folder: Path, emojis: Sequence[Emoji]) -> dict[str, str]:
    """Slug -> code: from emojibase, CLDR and Unicode names, then from the sets that publish their code points."""
    codes = {slug(emoji.name): emoji.code for emoji in emojis}
    known = {emoji.code for emoji in emojis}
    with Package(folder, CLDR) as package:
        annotations = package.json("annotations/en/annotations.json")["annotations"]["annotations"]
    for character, entry in annotations.items():
        code = plain_code("-".join(f"{ord(char):x}" for char in character))
        if code in known and "tts" in entry:
            codes.setdefault(slug(entry["tts"][0]), code)
    for style in ("noto", "twemoji", "fluent-emoji-flat"):
        icons, chars = read_icon_set(folder, style)
        by_icon = {name: plain_code(code) for code, name in chars.items() if plain_code(code) in known}
        aliases = {name: by_icon.get(alias["parent"]) for name, alias in sorted(icons.get("aliases", {}).items())}
        for name, aliased in (by_icon | aliases).items():
            if aliased is not None:
                codes.setdefault(name, aliased)
    with Package(folder, EMOJIBASE) as package:
        for hexcode, name in sorted(package.json("meta/unicode-names.json").items()):
            if plain_code(hexcode) in known:
                codes.setdefault(slug(name), plain_code(hexcode))
    return codes


def match(icons: Mapping[str, Any], chars: Mapping[str, str], codes: Mapping[str, str]) -> dict[str, str]:
    """Code -> icon name: by the set's own code points if it publishes them, else by slug of a name or alias."""
    if chars:
        found = {plain_code(code): name for code, name in sorted(chars.items())}
    else:
        found = {}
        aliases = {name: alias["parent"] for name, alias in sorted(icons.get("aliases", {}).items()) if len(alias) == 1}
        for name, icon in [*((name, name) for name in icons["icons"]), *aliases.items()]:
            # Older sets name flags "flag-for-…"; CLDR now says "flag: …".
            for candidate in (name, name.replace("flag-for-", "flag-", 1)):
                if candidate in codes:
                    found.setdefault(codes[candidate], icon)
    return {
        code: name
        for code, name in found.items()
        if name in icons["icons"] and not icons["icons"][name].get("hidden", False)
    }


def to_svg(icons: Mapping[str, Any], name: str) -> str:
    """One icon as an SVG document."""
    icon = icons["icons"][name]
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def draw(svg: str) -> PIL.Image.Image:
    """The drawing at SIZE x SIZE, RGB, on white."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    drawn = PIL.Image.open(io.BytesIO(png)).convert("RGBA")
    square = PIL.Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 255))
    square.alpha_composite(drawn, ((SIZE - drawn.width) // 2, (SIZE - drawn.height) // 2))
    return square.convert("RGB")


def encode(image: PIL.Image.Image) -> bytes:
    """WebP, without loss where that is no larger than at LOSSY_QUALITY."""
    lossy, lossless = io.BytesIO(), io.BytesIO()
    image.save(lossy, "WEBP", quality=LOSSY_QUALITY, method=6)
    # Lossless quality is effort alone; 100 takes 30 times as long for 0.5% fewer bytes.
    image.save(lossless, "WEBP", lossless=True, quality=80, method=6)
    return min(lossless.getvalue(), lossy.getvalue(), key=len)


def draw_style(folder: Path, style: str, emojis: Sequence[Emoji], codes: Mapping[str, str]) -> Iterator[Picture]:
    """Every matched picture of a style, in Unicode's order."""
    icons, chars = read_icon_set(folder, style)
    matched = match(icons, chars, codes)
    for emoji in emojis:
        if emoji.code in matched:
            image = draw(to_svg(icons, matched[emoji.code]))
            yield Picture(style, emoji, encode(image), hashlib.sha256(image.tobytes()).hexdigest())


def one_name_each(pictures: Sequence[Picture]) -> list[Picture]:
    """Without pictures that a style uses for several names, such as the flags of Norway and of Bouvet Island.

    The shortest name keeps the picture. The concepts become one, so that splits by concept never share a picture.
    """
    owner: dict[tuple[str, str], Picture] = {}
    for picture in sorted(pictures, key=lambda p: (len(p.emoji.name), p.emoji.order)):
        owner.setdefault((picture.style, picture.pixels), picture)
    merged: dict[str, str] = {}

    def root(concept: str) -> str:
        while concept in merged:
            concept = merged[concept]
        return concept

    for picture in pictures:
        kept, gone = root(owner[picture.style, picture.pixels].emoji.concept), root(picture.emoji.concept)
        if kept != gone:
            merged[gone] = kept
    unique = [picture for picture in pictures if owner[picture.style, picture.pixels] is picture]
    return [replace(p, emoji=replace(p.emoji, concept=root(p.emoji.concept))) for p in unique]

"""Rebuilds ``ett/data/builtin`` from packages of the npm registry, byte for byte.

    python tools/build_builtin_data.py TARBALLS --download --out ett/data/builtin   # fetch, build, write SHA256SUMS
    python tools/build_builtin_data.py TARBALLS --check                             # build aside and compare

TARBALLS is a folder of ``npm pack`` files. Needs resvg-py, Pillow and fonttools in the versions below: they draw and
encode, so another version may give other bytes. Takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from builtin_data import archive, artwork, emoji, fonts, notice, sources, splits, words

TOOLS = {"resvg-py": "0.5.0", "pillow": "13.0.0", "fonttools": "4.68.0"}
BUILTIN = Path(__file__).resolve().parents[1] / "ett" / "data" / "builtin"


def build(tarballs: Path, out: Path) -> None:
    """Everything but ``SHA256SUMS``, into `out`."""
    (out / "fonts").mkdir(parents=True, exist_ok=True)
    for split, pictures in artwork_splits(tarballs).items():
        archive.write_shard(out / f"artwork-{split}.tar.gz", pictures, split)
        counts = Counter(picture.style for picture in pictures)
        print(f"{split:10} {len(pictures):5}  " + "  ".join(f"{style} {counts[style]}" for style in artwork.STYLES))
    fonts.build(tarballs, out / "fonts")
    (out / "words.txt").write_text("\n".join(words.extract(tarballs)) + "\n", encoding="utf-8")
    (out / "NOTICE").write_text(notice.text(tarballs), encoding="utf-8")


def artwork_splits(tarballs: Path) -> dict[str, list[artwork.Picture]]:
    """Split -> its pictures."""
    emojis = emoji.load(tarballs)
    codes = artwork.names_to_codes(tarballs, emojis)
    pictures = []
    for style in artwork.STYLES:
        drawn = list(artwork.draw_style(tarballs, style, emojis, codes))
        print(f"{style:18} {len(drawn):5} matched, {sum(len(p.webp) for p in drawn) / len(drawn):.0f} bytes each")
        pictures += drawn
    return splits.assign(artwork.one_name_each(pictures))


def check_tools() -> None:
    """The tools that determine bytes, in the pinned versions.

    Raises:
        sources.SourceError: naming each one that differs.
    """
    wrong = [f"{name}=={pin} (found {version(name)})" for name, pin in TOOLS.items() if version(name) != pin]
    if wrong:
        raise sources.SourceError(f"These versions give the committed bytes; install {', '.join(wrong)}.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tarballs", type=Path, help="folder of npm tarballs")
    parser.add_argument("--download", action="store_true", help="npm pack the pinned packages that are not there yet")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="build into this folder and write SHA256SUMS there")
    what.add_argument("--check", action="store_true", help=f"build aside and compare with {BUILTIN.name}/SHA256SUMS")
    options = parser.parse_args(arguments)
    try:
        check_tools()
        if options.download:
            sources.download(options.tarballs)
        sources.verify(options.tarballs)
    except sources.SourceError as error:
        print(error, file=sys.stderr)
        return 2
    if options.out is not None:
        build(options.tarballs, options.out)
        archive.write_sums(options.out)
        return 0
    with tempfile.TemporaryDirectory() as aside:
        build(options.tarballs, Path(aside))
        found = archive.differences(Path(aside), BUILTIN)
    print("\n".join(found) or "the same")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Open Clip Art as manifests: pictures of another nature than emoji, with the titles that their authors gave them.

The pictures (public domain) are not part of this package; Debian's packages have them:

    apt-get download openclipart-svg openclipart-png
    for package in openclipart-*.deb; do dpkg-deb -x $package clipart; done
    python tools/clipart_manifest.py clipart/usr/share/openclipart data/clipart

writes OUT/{titles,groups}_{train,validation,heldout}.jsonl and the pictures, OUT/pictures. "titles" have the title as the
answer; "groups" ask for the folder that a picture lies in ("animals", "food" ...), one of the line's choices. Titles that more
than three pictures share name collections, not pictures: those are left out, as are titles without a word. All pictures of a
title are in one split.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import PIL.Image

from ett.data.sources import split_by_hash
from ett.errors import DataError
from ett.images import WHITE, load_image

SIDE = 128
"""Of the pictures [pixels], on white."""
MOST_OF_A_TITLE = 3
SMALLEST_GROUP = 40
"""Pictures; smaller folders, and those that say nothing of what is shown, are no choices."""
NO_GROUPS = ("unsorted", "special", "shapes", "decorations", "buttons", "logos")
QUESTION = "What group does the picture belong to?"
SHARES = {"train": range(80), "validation": range(80, 88), "heldout": range(88, 100)}
"""Of 100 equal shares of all titles, by hash."""


def titles(svg: Path) -> dict[Path, str]:
    """Path below `svg` without its suffix -> the title, in lower case, without numbers."""
    found = {}
    for path in sorted(svg.rglob("*.svg")):
        match = re.search(r"<dc:title>([^<]*)</dc:title>", path.read_text("utf-8", "replace"))
        title = re.sub(r"[\W\d_]+", " ", match[1] if match else "").strip().lower()
        if re.search("[a-z]{3}", title) and title.isascii() and len(title) <= 30:
            found[path.relative_to(svg).with_suffix("")] = title
    count = Counter(found.values())
    return {path: title for path, title in found.items() if count[title] <= MOST_OF_A_TITLE}


def save_small(source: Path, out: Path) -> bool:
    """Write the picture on white in a square of `SIDE`, no larger than it is; False where it cannot be read."""
    try:
        picture = load_image(source)
    except DataError:
        return False
    picture.thumbnail((SIDE, SIDE))
    ground = PIL.Image.new("RGB", (SIDE, SIDE), WHITE)
    ground.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    out.parent.mkdir(parents=True, exist_ok=True)
    ground.save(out)
    return True


def line(identity: str, picture: str, question: str | None, answer: str, **facts: object) -> str:
    """One line of a manifest (docs/data.md)."""
    asked: list[dict[str, object]] = [{"type": "image_url", "image_url": {"url": picture}}]
    if question is not None:
        asked.append({"type": "text", "text": question})
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": identity, "messages": turns, **facts}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="with svg and png, as Debian's packages have them")
    parser.add_argument("out", type=Path, help="a new folder")
    arguments = parser.parse_args()
    named = titles(arguments.folder / "svg")
    if not named:
        parser.error(f"{arguments.folder}/svg holds no titled SVG files.")
    arguments.out.mkdir(parents=True)
    sizes = Counter(path.parts[0] for path in named)
    groups = sorted(group for group, size in sizes.items() if size >= SMALLEST_GROUP and group not in NO_GROUPS)
    lines: dict[str, list[str]] = {f"{kind}_{split}": [] for kind in ("titles", "groups") for split in SHARES}
    for path, title in named.items():
        picture = f"pictures/{path}.png"
        if not save_small(arguments.folder / "png" / f"{path}.png", arguments.out / picture):
            continue
        split, identity = split_by_hash(f"clipart:{title}", SHARES), f"clipart/{path}"
        lines[f"titles_{split}"].append(line(identity, picture, None, title))
        if path.parts[0] in groups:
            answer = path.parts[0].replace("_", " ")
            choices = [group.replace("_", " ") for group in groups]
            lines[f"groups_{split}"].append(line(identity, picture, QUESTION, answer, choices=choices))
    for name, each in lines.items():
        (arguments.out / f"{name}.jsonl").write_text("".join(each), encoding="utf-8")
        print(f"{arguments.out / name}.jsonl: {len(each)} examples")


if __name__ == "__main__":
    main()

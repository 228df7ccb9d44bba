"""Open Clip Art's folders as manifests: titles, groups, splits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import PIL.Image

from ett.data.manifest import Manifest, question_and_reference

TOOL = Path(__file__).parents[2] / "tools" / "clipart_manifest.py"


def test_titles_and_groups(tmp_path: Path) -> None:
    source, out = tmp_path / "openclipart", tmp_path / "out"
    titles = {
        **{f"animals/cat_{i}": f"Cat {chr(97 + i // 26)}{chr(97 + i % 26)}x" for i in range(60)},
        **{f"food/pear_{i}": f"Pear {chr(97 + i // 26)}{chr(97 + i % 26)}y" for i in range(60)},
        **{f"tools/saw_{i}": "A collection" for i in range(4)},
        "tools/broken": "Broken saw",
        "tools/none": "12",
    }
    for name, title in titles.items():
        for kind in ("svg", "png"):
            (source / kind / name).parent.mkdir(parents=True, exist_ok=True)
        (source / "svg" / f"{name}.svg").write_text(f"<svg><dc:title>{title}</dc:title></svg>", encoding="utf-8")
        if name == "tools/broken":
            (source / "png" / f"{name}.png").write_bytes(b"no picture")
        else:
            PIL.Image.new("RGBA", (300, 200), (255, 0, 0, 255)).save(source / "png" / f"{name}.png")
    subprocess.run([sys.executable, str(TOOL), str(source), str(out)], check=True, capture_output=True)
    splits = ("train", "validation", "heldout")
    found = {kind: [Manifest(out / f"{kind}_{split}.jsonl") for split in splits] for kind in ("titles", "groups")}
    for manifests in found.values():
        assert sum(map(len, manifests)) == 120
        assert len(manifests[0]) > 80
        ids = [{example.id for example in manifest} for manifest in manifests]
        assert len(set.union(*ids)) == 120
        assert sum(map(len, ids)) == 120
    example = found["titles"][0][0]
    assert example.images[0].size == (128, 128)
    assert example.images[0].getpixel((0, 0)) == (255, 255, 255)
    assert example.images[0].getpixel((64, 64)) == (255, 0, 0)
    assert question_and_reference(example) == (None, titles[example.id.removeprefix("clipart/")].lower())
    asked = found["groups"][0][0]
    assert asked.metadata["choices"] == ["animals", "food"]
    assert question_and_reference(asked)[1] == asked.id.split("/")[1]
    again = subprocess.run([sys.executable, str(TOOL), str(source), str(out)], check=False, capture_output=True)
    assert again.returncode != 0

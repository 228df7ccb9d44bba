"""The built wheel, installed alone, works outside the clone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

OUTSIDE = """
import ett, pathlib, sys
assert pathlib.Path(ett.__file__).is_relative_to(sys.argv[1]), ett.__file__
recipe = ett.load_recipe("quickstart", ["arm=ett"])
from ett.data.mixture import SourceConfig
from ett.tokenizers import VisionTokenizer
example = SourceConfig("names").build()[0]
assert example.images[0].size == (96, 96)
assert SourceConfig("drawn_text").build()[3].messages
import importlib.metadata
assert importlib.metadata.version("ett-tuning") == ett.__version__
"""


def test_wheel_works_outside_the_clone(tmp_path: Path) -> None:
    def python(*arguments: str, cwd: Path = ROOT, path: str = "") -> str:
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
            env={**__import__("os").environ, "PYTHONPATH": path},
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path / "dist"), ".")
    (wheel,) = (tmp_path / "dist").glob("ett_tuning-*.whl")
    site = tmp_path / "site"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    outside = tmp_path / "outside"
    outside.mkdir()
    python("-c", OUTSIDE, str(site), cwd=outside, path=str(site))
    assert "usage: ett" in python("-m", "ett.cli", "--help", cwd=outside, path=str(site))

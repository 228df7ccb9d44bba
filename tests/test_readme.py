"""The README's code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import ett
from ett.experiments.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example(toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, with the quickstart recipe at toy size."""
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toy_recipe), encoding="utf-8")

    def toy(name: str, overrides: list[str]) -> object:
        assert load_recipe(name, overrides).stages[-1].steps == 50
        return load_recipe(path)

    monkeypatch.setattr(ett, "load_recipe", toy, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["indices"].shape == (1, 8, 8)
    assert names["pixels"].shape == (1, 3, 32, 32)


def test_links_and_commands_exist() -> None:
    for link in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / link.partition("#")[0]).exists(), link
    from ett.cli import build_parser

    (commands,) = [a for a in build_parser()._actions if isinstance(a.choices, dict)]
    for command in re.findall(r"^ett ([\w-]+)", README, flags=re.MULTILINE):
        assert command in commands.choices  # type: ignore[operator]


def test_public_names_are_there() -> None:
    """Each name of the package imports, and none is hidden by a subpackage of the same name."""
    import importlib

    for name in ett.__all__:
        found = getattr(ett, name)
        assert not isinstance(found, type(importlib)), f"ett.{name} is the subpackage"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ett.nothing

"""The house: imports point one way, and every module says what it is for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ett"
LEVELS = [
    {"errors", "types"},
    {"allocator", "config", "devices", "environment", "files", "images", "signals"},
    {"tokenizers", "losses"},
    {"model"},
    {"data"},
    {"generate"},
    {"evaluate"},
    {"train"},
    {"experiments"},
    {"export"},
    {"serve"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""] + [
                f"{node.module}.{alias.name}" for alias in node.names if node.module == "ett"
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("ett.")}
    return found & set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = room(path.relative_to(PACKAGE).parts)
    assert own in LEVEL, f"{own} is not a room of the house: add it to LEVELS with its place"
    for other in imported_rooms(path) - {own}:
        assert LEVEL[other] <= LEVEL[own], f"{path.name} in {own} imports {other}, which stands above it"
        assert LEVEL[other] < LEVEL[own] or LEVEL[own] <= 1, f"{own} and {other} are neighbours and must not depend"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_say_what_they_are_for(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), f"{path} has code but no docstring"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, f"{path} has outgrown one idea"


def test_nothing_is_swallowed() -> None:
    """No bare or broad except anywhere in the package."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else ""
                assert caught not in ("", "Exception", "BaseException"), f"{path}:{node.lineno} catches everything"

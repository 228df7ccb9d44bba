"""Several modules of this package as one file that needs none of them, with what a few names reach and nothing else.

From the names asked for, everything that they refer to is followed, through the syntax trees alone: functions, constants and
classes, and of a class the methods whose names are looked up somewhere in what was already reached. What is found is
copied word for word, in the order of the modules' imports; imports of other packages are gathered at the top.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
Member = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(eq=False)
class Unit:
    """A definition at the top of a module, or a statement there that acts on some.

    Attributes:
        module: where it stands. node: its tree. names: what it defines. end: its last line, with the text that documents it.
        members: of a class, the functions that were reached, by name.
    """

    module: Module
    node: ast.stmt
    names: list[str]
    end: int
    members: dict[str, list[Member]] = field(default_factory=dict)

    @property
    def start(self) -> int:
        return _start(self.node, self.module.lines)


class Module:
    """A file of the package, read."""

    def __init__(self, name: str) -> None:
        self.name = name
        path = PACKAGE.parent.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        source = path.read_text(encoding="utf-8")
        self.lines = source.splitlines()
        self.tree = ast.parse(source)

    @cached_property
    def units(self) -> list[Unit]:
        found: list[Unit] = []
        for node in self.tree.body:
            end = node.end_lineno or node.lineno
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                # a string below a constant documents it; one at the top documents the module
                if found:
                    found[-1].end = end
            elif not isinstance(node, ast.Import | ast.ImportFrom) and not _for_checkers(node):
                found.append(Unit(self, node, _defined(node), end))
        return found

    @cached_property
    def definitions(self) -> dict[str, Unit]:
        return {name: unit for unit in self.units for name in unit.names}

    @cached_property
    def imports(self) -> dict[str, tuple[str, str | None]]:
        """Local name -> (module, name in it, None for the module itself), those for type checkers included."""
        found: dict[str, tuple[str, str | None]] = {}
        guarded = [each for node in self.tree.body if _for_checkers(node) for each in ast.iter_child_nodes(node)]
        for node in [*self.tree.body, *guarded]:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.asname or alias.name.split(".")[0]] = (alias.name, None)
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None
                for alias in node.names:
                    found[alias.asname or alias.name] = (node.module, alias.name)
        return found


@dataclass(frozen=True)
class Shape:
    """What a bundle is to hold beside what its roots reach.

    Attributes:
        roots: (module, name) of what is asked for.
        entries: methods that outsiders call, of every class that is reached.
        replaced: "Class.method" -> the source of the method that stands there instead.
        left_out: of (module, class, method): whether that method stays out although something names it.
    """

    roots: tuple[tuple[str, str], ...]
    entries: Collection[str] = ()
    replaced: Mapping[str, str] = field(default_factory=dict)
    left_out: Callable[[str, str, str], bool] = lambda module, owner, method: False


class Bundle:
    """The file that `shape` asks for; `text` is its source, without a head of its own."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.modules: dict[str, Module] = {}
        self.units: list[Unit] = []
        self.externals: set[tuple[str, str | None, str]] = set()
        self.looked_up = set(shape.entries)
        for module, name in shape.roots:
            origin = self._module(module)
            assert name in origin.definitions or name in origin.imports, f"there is no {name} in {module}"
            self._reach(origin, name)
        while self._add_members() or self._add_statements():
            pass

    def text(self) -> str:
        """Source code; raises AssertionError where two modules define one name."""
        owners: dict[str, str] = {}
        for unit in self.units:
            for name in unit.names:
                assert name not in owners, f"{name} is defined in {owners[name]} and in {unit.module.name}"
                owners[name] = unit.module.name
        blocks = []
        for module in self._module_order():
            blocks.append(f"# -- {module.name} ".ljust(120, "-"))
            blocks += [self._unit_text(unit) for unit in module.units if unit in self.units]
        return "\n".join(self._import_lines()) + "\n\n\n" + "\n\n\n".join(blocks) + "\n"

    # -- following names -----------------------------------------------------------------------------------------------

    def _module(self, name: str) -> Module:
        if name not in self.modules:
            self.modules[name] = Module(name)
        return self.modules[name]

    def _reach(self, module: Module, name: str) -> None:
        if name in module.definitions:
            self._include(module.definitions[name])
        elif name in module.imports:
            origin, own = module.imports[name]
            if origin.split(".")[0] != PACKAGE.name:
                self.externals.add((origin, own, name))
            elif own is not None:
                self._reach(self._module(origin), own)
        # anything else is a parameter, a local name or a builtin

    def _include(self, unit: Unit) -> None:
        if unit not in self.units:
            self.units.append(unit)
            self._scan(unit.module, _own_nodes(unit.node))

    def _scan(self, module: Module, nodes: Iterable[ast.AST]) -> None:
        for root in nodes:
            for node in ast.walk(root):
                if isinstance(node, ast.Name):
                    self._reach(module, node.id)
                elif isinstance(node, ast.Attribute):
                    self.looked_up.add(node.attr)
                elif isinstance(node, ast.ImportFrom):
                    assert node.module is not None
                    assert node.module.split(".")[0] != PACKAGE.name, "an import inside a function"

    def _add_members(self) -> bool:
        added = False
        for unit in list(self.units):
            for member in _members(unit.node):
                wanted = member.name in self.looked_up or (member.name.startswith("__") and member.name.endswith("__"))
                owner = unit.names[0]
                known = member in unit.members.get(member.name, [])
                if wanted and not known and not self.shape.left_out(unit.module.name, owner, member.name):
                    unit.members.setdefault(member.name, []).append(member)
                    other = self.shape.replaced.get(f"{owner}.{member.name}")
                    self._scan(unit.module, [member] if other is None else [ast.parse(textwrap.dedent(other))])
                    added = True
        return added

    def _add_statements(self) -> bool:
        """Statements that act on what was reached, by a name or by a function that they name."""
        added = False
        for module in {unit.module for unit in self.units}:
            for unit in module.units:
                if unit.names or unit in self.units:
                    continue
                near = [module.definitions[name] for name in _names(unit.node) if name in module.definitions]
                near += [module.definitions[n] for one in near for n in _names(one.node) if n in module.definitions]
                if any(each in self.units for each in near):
                    self._include(unit)
                    added = True
        return added

    # -- writing -------------------------------------------------------------------------------------------------------

    def _module_order(self) -> list[Module]:
        """Modules with something to show, each behind those that it imports."""
        order: list[Module] = []

        def visit(module: Module) -> None:
            if module in order:
                return
            for origin, _ in module.imports.values():
                if origin in self.modules and self.modules[origin] is not module:
                    visit(self.modules[origin])
            order.append(module)

        for module in list(self.modules.values()):
            visit(module)
        shown = {unit.module for unit in self.units}
        return [module for module in order if module in shown]

    def _import_lines(self) -> list[str]:
        plain = sorted({(m, local) for m, name, local in self.externals if name is None and m != "__future__"})
        lines = [f"import {m}" if m.split(".")[0] == local else f"import {m} as {local}" for m, local in plain]
        origins: dict[str, set[str]] = {}
        for module, name, local in self.externals:
            if name is not None and module != "__future__":
                origins.setdefault(module, set()).add(name if name == local else f"{name} as {local}")
        lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(origins.items())]
        return ["from __future__ import annotations", "", *lines]

    def _unit_text(self, unit: Unit) -> str:
        lines = unit.module.lines
        if not isinstance(unit.node, ast.ClassDef):
            return "\n".join(lines[unit.start - 1 : unit.end])
        body = unit.node.body
        kept = lines[unit.start - 1 : _start(body[0], lines) - 1]
        previous = None
        for node in body:
            if isinstance(node, Member):
                if node not in unit.members.get(node.name, []):
                    continue
                other = self.shape.replaced.get(f"{unit.names[0]}.{node.name}")
                text = lines[_start(node, lines) - 1 : node.end_lineno]
                kept += [
                    "",
                    *(text if other is None else textwrap.indent(textwrap.dedent(other), " " * 4).splitlines()),
                ]
            else:
                spaced = previous is not None and (
                    isinstance(previous, Member) or not lines[_start(node, lines) - 2].strip()
                )
                kept += [*([""] if spaced else []), *lines[_start(node, lines) - 1 : node.end_lineno]]
            previous = node
        if previous is None:
            kept.append("    pass")
        return "\n".join(kept).rstrip()


def _start(node: ast.stmt, lines: list[str]) -> int:
    """First line of a statement, its decorators and the comment right above it included."""
    decorators = getattr(node, "decorator_list", [])
    line = min([node.lineno, *(each.lineno for each in decorators)])
    indent = " " * node.col_offset
    while line > 1 and lines[line - 2].startswith(indent + "# ") and not lines[line - 2].startswith(indent + "# --"):
        line -= 1
    return line


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def _members(node: ast.stmt) -> Iterator[Member]:
    if isinstance(node, ast.ClassDef):
        yield from (each for each in node.body if isinstance(each, Member))


def _own_nodes(node: ast.stmt) -> list[ast.AST]:
    """What a definition always brings: of a class, everything but its functions."""
    if not isinstance(node, ast.ClassDef):
        return [node]
    head: list[ast.AST] = [*node.decorator_list, *node.bases, *node.keywords]
    return head + [each for each in node.body if not isinstance(each, Member)]


def _names(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} | {
        name for each in ast.walk(node) if isinstance(each, ast.Global) for name in each.names
    }


def _for_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"

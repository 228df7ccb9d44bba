"""YAML without surprises: plain values alone, no key twice, nothing that grows when its aliases are followed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ett.errors import RecipeError

MAX_VALUES = 100_000
"""Values in a file, its aliases followed. Recipes have hundreds; ten lines of aliases to aliases can stand for billions."""


# What yaml raises for a number or date that looks like one and is none, or that a tag (!!int, !!bool, !!timestamp) declares.
_BAD_SCALARS = (ValueError, OverflowError, AttributeError, KeyError, IndexError, TypeError)


class _Loader(yaml.SafeLoader):
    """Of two equal keys `yaml.SafeLoader` takes the last and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice; keep one of them", key.start_mark
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> Any:
    """The plain values that `text` stands for, nothing in them shared.

    Args:
        where: for messages, such as the file's name.

    Raises:
        RecipeError: not YAML, a tag (nothing is ever constructed or run), a key twice, a value that contains itself, or too
            much of anything.
    """
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{where}{line} is not valid YAML: {getattr(error, 'problem', None) or error}.") from error
    except RecursionError as error:
        raise RecipeError(f"{where} is nested too deeply to be read.") from error
    except _BAD_SCALARS as error:
        raise RecipeError(f"{where} holds a value that is not of its type: {str(error)[:200]}.") from error
    if _size(value, {}) > MAX_VALUES:
        raise RecipeError(f"{where} stands for more than {MAX_VALUES} values; aliases to aliases multiply.")
    return without_aliases(value)


def without_aliases(value: Any) -> Any:
    """A copy in which nothing is shared, so that a change of one place changes that place alone."""
    if isinstance(value, Mapping):
        return {key: without_aliases(item) for key, item in value.items()}
    return [without_aliases(item) for item in value] if isinstance(value, list) else value


def _size(value: Any, known: dict[int, int | None]) -> int:
    """How many values there are in `value`, shared ones as often as they occur."""
    if not isinstance(value, Mapping | list):
        return 1
    if id(value) in known:
        size = known[id(value)]
        if size is None:
            raise RecipeError("The recipe contains itself through a YAML alias.")
        return size
    known[id(value)] = None
    items = value.values() if isinstance(value, Mapping) else value
    total = known[id(value)] = 1 + sum(_size(item, known) for item in items)
    return total

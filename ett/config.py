"""Strict configuration: a mapping becomes a dataclass or an error that says where, what was given and what is allowed.

Every component keeps its own dataclass beside its class and checks its values in ``__post_init__`` by raising
``ValueError``; this file adds the path to the message, names the nearest match of an unknown key and converts types.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ett.errors import RecipeError, unknown

T = TypeVar("T")


def from_mapping(cls: type[T], given: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from plain values (as YAML or JSON give them).

    Args:
        cls: a dataclass of int, float, bool, str, Literal, X | None, list, tuple, dict and dataclasses of these.
        given: its fields by name; missing ones take their defaults.
        where: dotted path of this mapping within its file, for messages.

    Raises:
        RecipeError: an unknown or missing key, a value of the wrong type, or one that `cls` refuses.
    """
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where or 'The configuration'} must be a mapping of names to values, got {_show(given)}.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]  # T is a dataclass by contract
    hints = _hints(cast(Hashable, cls))
    values: dict[str, Any] = {}
    for key, value in given.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise RecipeError(f"{unknown('key', path, [f'{where}.{f}' if where else f for f in fields])}")
        values[str(key)] = _convert(hints[key], value, path)
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise RecipeError(f"{where or 'The configuration'} lacks the required key {name!r}.")
    try:
        return cls(**values)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{where + ': ' if where else ''}{error}") from error


def to_mapping(config: Any) -> Any:
    """The inverse of `from_mapping`: plain values for YAML or JSON (tuples become lists)."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_mapping(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Mapping):
        return {key: to_mapping(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_mapping(value) for value in config]
    return config


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise ValueError in the standard wording unless `condition` holds."""
    if not condition:
        raise ValueError(f"{field} = {_show(value)} is not possible: it must be {allowed}.")


@cache
def _hints(cls: Hashable) -> dict[str, Any]:
    return get_type_hints(cls)


def _show(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to write numbers of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is Literal:
        if value not in args:
            raise RecipeError(unknown(f"value for {path}:", value, [str(a) for a in args]))
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_mapping(hint, value, path)
    if origin in (list, tuple, Sequence):
        return _convert_sequence(origin, args, value, path)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{path} must be a mapping, got {_show(value)}.")
        return {str(key): _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    return _convert_scalar(hint, value, path)


def _convert_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors: list[RecipeError] = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(option, value, path)
        except RecipeError as error:
            errors.append(error)
    # a mapping was meant for the dataclass among the options: its own message is the useful one
    raise errors[-1] if isinstance(value, Mapping) else errors[0]


def _convert_sequence(origin: Any, args: tuple[Any, ...], value: Any, path: str) -> Any:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise RecipeError(f"{path} must be a list, got {_show(value)}.")
    if origin is tuple and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise RecipeError(f"{path} must have {len(args)} entries, got {len(value)}.")
        return tuple(_convert(a, item, f"{path}[{i}]") for i, (a, item) in enumerate(zip(args, value, strict=True)))
    items = [_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    return tuple(items) if origin is tuple else items


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4 as a string
        try:
            number = float(value)
        except (ValueError, OverflowError) as error:
            raise RecipeError(f"{path} must be a number, got {_show(value)}.") from error
        if number != number or number in (float("inf"), float("-inf")):
            raise RecipeError(f"{path} must be a finite number, got {_show(value)}.")
        return number
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    exact = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if not exact:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise RecipeError(f"{path} must be {names.get(hint, hint)}, got {_show(value)}.")
    return value

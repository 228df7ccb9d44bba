"""Errors that are the user's to mend. The command line prints their message alone and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was given, what is allowed, how to mend it. Everything below is one of these."""


class RecipeError(UserError):
    """A recipe that cannot be run: an unknown key, an impossible value."""


class DataError(UserError):
    """A picture, manifest or shard that cannot be used."""


class ModelError(UserError):
    """A model or checkpoint that cannot be loaded, or not for this purpose."""


def unknown(what: str, given: object, allowed: Iterable[str]) -> str:
    """The standard wording for a name that is not one of `allowed`, with the nearest match first."""
    names = list(allowed)
    close = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {what} {given!r}.{hint} Allowed: {', '.join(names) or '(none)'}."

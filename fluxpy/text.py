"""Pieces of error messages."""

import difflib
from collections.abc import Iterable


def names_of(keys: Iterable[object]) -> str:
    """The first few names, and how many there are."""
    names = [repr(key) for key in keys]
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "") if names else "none"


def near(name: object, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: what was perhaps meant, or what there is."""
    names = list(names)
    close = difflib.get_close_matches(str(name), names, n=3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"there is: {names_of(names)}"

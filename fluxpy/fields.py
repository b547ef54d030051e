"""Declaring and validating fields: the hyperparameters of rules, the arguments of schedules."""

import dataclasses
import math
from typing import Any

import numpy as np
from torch import Tensor

from .text import named

# A hyperparameter as the user writes it is a number, a tuple, a tensor or a schedule (count -> value);
# by the time a rule's `apply` sees it, schedules have become values. No static type says both.
Hyper = Any
_NUMPY = np.generic, np.ndarray


def hyper(
    *, default: Any = dataclasses.MISSING, allowed: str | tuple[Any, ...] | None = None, fixed: bool = False
) -> Any:
    """Declare a field with the values it allows.

    `allowed` is an interval in the notation of the docs (`"[0, 1)"`, for a tuple: of each element), `"1, 2, ..."` or
    `"0, 1, ..."` for whole numbers, or a tuple of words (or of True, False and None). A `fixed` field shapes a rule's
    state, so `adjust` refuses it.

    >>> class Halve(Rule):
    ...     lr: float = hyper(default=0.5, allowed="(0, 1]")
    >>> Halve(lr=2.0)
    Traceback (most recent call last):
        ...
    ValueError: Halve: lr=2.0 is not allowed; it must lie in (0, 1]
    """
    return dataclasses.field(default=default, metadata={"allowed": allowed, "bounds": _bounds(allowed), "fixed": fixed})


def plain(value: Any) -> Any:
    """Lists as tuples and NumPy's numbers as Python's own, so that rules that hold them can be saved and compared."""
    if isinstance(value, list | tuple):
        return tuple(plain(v) for v in value)
    if type(value) is np.longdouble:  # of which Python has none, so that NumPy would give it back
        return float(value)
    return plain(value.tolist()) if isinstance(value, _NUMPY) else value


def validate(owner: Any) -> None:
    """Bring the fields of a frozen dataclass into plain form; ValueError for one whose value is not allowed."""
    for field in dataclasses.fields(owner):
        value = plain(getattr(owner, field.name))
        check(type(owner).__name__, field, value)
        object.__setattr__(owner, field.name, value)


def check(owner: str, field: dataclasses.Field[Any], value: Any) -> None:
    """ValueError unless the field allows the value. A schedule is checked when it gives a value, a tensor never: that
    would read the device."""
    allowed, bounds = field.metadata.get("allowed"), field.metadata.get("bounds")
    if allowed is None or (value is None and field.default is None):
        return
    if isinstance(value, type) or type(value).__module__.startswith("torch.optim"):
        raise TypeError(f"{owner}: {field.name} takes a number or a schedule, but got {named(value)}")
    usual = None if callable(value) else field.default
    if isinstance(usual, tuple):
        value = tuple(value) if isinstance(value, Tensor) and value.ndim else value
        ok = isinstance(value, tuple) and len(value) == len(usual)
        ok = ok and all(
            _allows(allowed, bounds, v) or (v is None and default is None)
            for v, default in zip(value, usual, strict=True)
        )
    elif isinstance(allowed, tuple):
        ok = callable(value) or (type(value), value) in [(type(word), word) for word in allowed]  # True is not 1
    else:
        ok = _allows(allowed, bounds, value)
    if not ok:
        raise ValueError(f"{owner}: {field.name}={value!r} is not allowed; {_wanted(field, usual)}")


def _wanted(field: dataclasses.Field[Any], usual: Any) -> str:
    allowed = field.metadata["allowed"]
    if isinstance(usual, tuple):
        none = f"; {field.name}[{usual.index(None)}] may be None" if None in usual else ""
        return f"it must be {len(usual)} numbers, each in {allowed}{none}"
    if isinstance(allowed, tuple):
        return f"it must be one of {', '.join(map(repr, allowed))}"
    return f"it must lie in {allowed}" if field.metadata["bounds"] else f"it must be one of {allowed}"


def _allows(allowed: str, bounds: tuple[float, float] | None, value: Any) -> bool:
    if callable(value) or isinstance(value, Tensor):
        return True
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return False
    if bounds is None:
        return math.isfinite(value) and value == int(value) >= int(allowed[0])
    low, high = bounds
    inside = low < value < high
    return inside or (allowed[0] == "[" and value == low) or (allowed[-1] == "]" and value == high)


def _bounds(allowed: Any) -> tuple[float, float] | None:
    """The ends of an interval such as "(0, 1]"; None of what is no interval."""
    if not isinstance(allowed, str) or allowed[0] not in "[(":
        return None
    low, high = map(float, allowed[1:-1].split(","))
    return low, high

"""What a script sets up now, beside what the saved run was set up with."""

import re
from typing import Any

import torch
from torch import Tensor

from .values import describe, is_none, short_repr

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in the repr of a function, another one in each process


def changes(now: Any, saved: Any, place: str = "") -> list[str]:
    """Where two rules as plain data differ: "lr was 0.1, is now 0.01"."""
    if isinstance(now, dict) and isinstance(saved, dict) and now.keys() == saved.keys():
        if "callable" not in now and now.get("type") == saved.get("type"):
            inner = [(_at(place, key), now[key], saved[key]) for key in now if isinstance(key, str)]
            return [line for at, a, b in inner for line in changes(a, b, at)]
    elif isinstance(now, list) and isinstance(saved, list) and len(now) == len(saved) and _of_dicts(now):
        pairs = enumerate(zip(now, saved, strict=True))
        return [line for i, (a, b) in pairs for line in changes(a, b, f"{place}[{i}]")]
    if _same(now, saved):
        return []
    functions = isinstance(now, dict) and isinstance(saved, dict) and "callable" in now and "callable" in saved
    end = ": functions are not in a file, so this script's stays" if functions else ""
    return [f"{place or 'the rule'} was {_shown(saved)}, is now {_shown(now)}{end}"]


def _at(place: str, key: str) -> str:
    """A member of a chain is called by its number alone."""
    if key in ("rules", "rule"):
        return place
    return f"{place}.{key}" if place else key


def _of_dicts(values: list[Any]) -> bool:
    return any(isinstance(value, dict) for value in values)


def _same(a: Any, b: Any) -> bool:
    if is_none(a) or is_none(b):
        return is_none(a) and is_none(b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, str) and isinstance(b, str):
        return _ADDRESS.sub("", a) == _ADDRESS.sub("", b)
    return a == b


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return describe(value)
    if is_none(value):
        return "None"
    if isinstance(value, dict) and isinstance(value.get("callable"), str):
        return _ADDRESS.sub("", value["callable"])
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        inner = ", ".join(f"{key}={_shown(v)}" for key, v in value.items() if key != "type")
        return f"{value['type']}({inner})"
    if isinstance(value, list):
        return "(" + ", ".join(map(_shown, value)) + ")"
    return short_repr(value)

"""Rules, schedules and momenta as plain data. `decode` is the way back.

Plain data is what `torch.load(..., weights_only=True)` takes: numbers, strings, tensors, lists and dicts. A rule, a
schedule or None is a dict with its class's name as "type".
"""

import dataclasses
import reprlib
from typing import Any

import torch
from torch import Tensor

from .. import schedules
from ..pytree import HOLE, Skeleton, skeleton_of
from ..rule import Rule
from ..text import dtype_name
from .record import LeafRecord
from .values import NONE

SCALARS = (bool, int, float, str)  # bool first: it is a kind of int

SCHEDULES: dict[str, Any] = {
    name: cls
    for name, cls in vars(schedules).items()
    if dataclasses.is_dataclass(cls) and cls.__module__ == schedules.__name__ and dataclasses.fields(cls)
}


def plain_scalar(value: Any) -> Any:
    """A number or string as Python's own: a member of an enumeration or a NumPy number is more than plain data."""
    if type(value) in SCALARS:
        return value
    return next(kind(value) for kind in SCALARS if isinstance(value, kind))


def part_names(skeleton: Skeleton) -> list[str]:
    """The name of each part of a state: `["[0].m", "[0].t"]`."""
    return [place.removeprefix(".") for place in skeleton.places()]


class Encoder:
    """Leaves as plain data. An object that occurs twice is encoded once, so that leaves which share a rule share it
    again when they are loaded."""

    def __init__(self) -> None:
        # Each object with its data, by its id. Keeping the object keeps the id from being given to another.
        self._encoded: dict[int, tuple[Any, Any]] = {}
        self._part_names: dict[Any, list[str]] = {}

    def leaf(self, record: LeafRecord, names: list[str]) -> dict[str, Any]:
        entry = {
            "names": names,
            "shape": list(record.shape),
            "dtype": dtype_name(record.dtype),
            "rule": self.rule(record.rule),
            "setup": self.rule(record.setup_rule),
            "frozen": record.frozen,
            "count": record.count,
        }
        if record.state is not None:
            entry["state"] = self._state(record.state)
        if record.pending is not None:
            entry["pending"] = self._numbers(record.pending)
        return entry

    def rule(self, rule: Rule | None) -> Any:
        return self._value(rule)

    def part(self, part: Any) -> Any:
        """A part of a state."""
        if isinstance(part, Tensor):
            return part.detach().clone()
        if part is None or isinstance(part, SCALARS):
            return self._value(part)
        raise ValueError(f"{reprlib.repr(part)} in the state cannot be saved; tensors, numbers and strings can")

    def _state(self, state: Any) -> dict[str, Any]:
        skeleton = skeleton_of(state)
        names = self._names(skeleton)
        return {name: self.part(part) for name, part in zip(names, skeleton.parts, strict=True)}

    def _numbers(self, skeleton: Skeleton) -> dict[str, Any]:
        """The parts of a state that are no tensors."""
        pairs = zip(self._names(skeleton), skeleton.parts, strict=True)
        return {name: self.part(part) for name, part in pairs if part is not HOLE}

    def _names(self, skeleton: Skeleton) -> list[str]:
        names = self._part_names.get(skeleton.spec)
        if names is None:
            names = self._part_names[skeleton.spec] = part_names(skeleton)
        return names

    def _value(self, value: Any) -> Any:
        if value is None:
            return {"type": NONE}
        if isinstance(value, SCALARS):
            return plain_scalar(value)
        if isinstance(value, torch.dtype):
            return dtype_name(value)
        if isinstance(value, list | tuple):
            return [self._value(v) for v in value]
        if id(value) not in self._encoded:
            self._encoded[id(value)] = value, self._object(value)
        return self._encoded[id(value)][1]

    def _object(self, value: Any) -> Any:
        name = type(value).__name__
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, Rule) or type(value) is SCHEDULES.get(name):
            fields = {f.name: self._value(getattr(value, f.name)) for f in dataclasses.fields(value)}
            if "type" in fields:
                raise ValueError(f"{name} has a hyperparameter 'type', the word for its class when saved")
            return {"type": name, **fields}
        if callable(value):
            return {"callable": repr(value)}
        raise ValueError(f"{reprlib.repr(value)} cannot be saved; tensors, numbers, strings and schedules can")

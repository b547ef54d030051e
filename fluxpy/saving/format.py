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
from ..leaf import Leaf, init_state, record_of
from ..pytree import HOLE, Skeleton, skeleton_of
from ..rule import Rule
from ..text import dtype_name
from .values import NONE

SCALARS = (bool, int, float, str)  # bool first: it is a kind of int

SCHEDULES: dict[str, Any] = {
    name: cls
    for name, cls in vars(schedules).items()
    if dataclasses.is_dataclass(cls) and cls.__module__ == schedules.__name__ and dataclasses.fields(cls)
}


def plain_scalar(value: Any) -> Any:
    """A number or string as Python's own: a member of an enumeration or a NumPy number is more than plain data."""
    return next(kind(value) for kind in SCALARS if isinstance(value, kind))


def state_template(rule: Rule, shape: torch.Size, dtype: torch.dtype) -> Skeleton | None:
    """The state that `rule` starts with for such a parameter, on the meta device: its form without its memory. None
    where the rule reads the parameter, which has no numbers there."""
    try:
        return skeleton_of(init_state(rule, torch.empty(shape, dtype=dtype, device="meta"), 0, ""))
    except (RuntimeError, TypeError):
        return None


class Encoder:
    """Leaves as plain data. An object that occurs twice is encoded once, so that leaves which share a rule share it
    again when they are loaded."""

    def __init__(self) -> None:
        # Each object with its data, by its id. Keeping the object keeps the id from being given to another.
        self._encoded: dict[int, tuple[Any, Any]] = {}

    def leaf(self, leaf: Leaf, names: list[str]) -> dict[str, Any]:
        record, state = record_of(leaf), leaf.state
        entry = {
            "names": names,
            "shape": list(leaf.shape),
            "dtype": dtype_name(leaf.dtype),
            "rule": self.value(leaf.rule),
            "setup": self.value(record.setup_rule),
            "frozen": leaf.frozen,
            "count": leaf.count,
        }
        if state is not None:
            entry["state"] = self.parts(skeleton_of(state))
        if record.pending is not None:
            entry["pending"] = self.parts(record.pending)
        return entry

    def parts(self, skeleton: Skeleton) -> dict[str, Any]:
        """The parts of a state by name, without the places of tensors that are not there."""
        pairs = zip(skeleton.spec.names, skeleton.parts, strict=True)
        return {name: self._part(part) for name, part in pairs if part is not HOLE}

    def _part(self, part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.detach().clone()
        if part is None or isinstance(part, SCALARS):
            return self.value(part)
        raise ValueError(f"{reprlib.repr(part)} in the state cannot be saved; tensors, numbers and strings can")

    def value(self, value: Any) -> Any:
        """A rule, or a hyperparameter of one."""
        if value is None:
            return {"type": NONE}
        if isinstance(value, SCALARS):
            return plain_scalar(value)
        if isinstance(value, torch.dtype):
            return dtype_name(value)
        if isinstance(value, list | tuple):
            return [self.value(v) for v in value]
        if id(value) not in self._encoded:
            self._encoded[id(value)] = value, self._object(value)
        return self._encoded[id(value)][1]

    def _object(self, value: Any) -> Any:
        name = type(value).__name__
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, Rule) or type(value) is SCHEDULES.get(name):
            fields = {f.name: self.value(getattr(value, f.name)) for f in dataclasses.fields(value)}
            if "type" in fields:
                raise ValueError(f"{name} has a hyperparameter 'type', the word for its class when saved")
            return {"type": name, **fields}
        if callable(value):
            return {"callable": repr(value)}
        raise ValueError(f"{reprlib.repr(value)} cannot be saved; tensors, numbers, strings and schedules can")

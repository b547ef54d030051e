"""What is bound to a module besides its children, rebound to a copy of the module: methods, closures, partials."""

import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor, nn

_CONTAINERS = (list, tuple, set, frozenset, deque)
_CLOSED = (bool, int, float, complex, str, bytes, type, types.ModuleType, types.BuiltinFunctionType, np.ndarray, Tensor)
_MOST, _DEEPEST = 5_000, 8  # how far an object is looked into, for what is a part of the model


class Rebinding:
    """`known` has the copy of each tensor and module of the model, by the identity of the original, and `view` gives
    that of a tensor in their memory."""

    def __init__(self, known: dict[int, Any], view: Callable[[Tensor], Tensor | None]) -> None:
        self.known, self.view = known, view
        self.free: dict[int, Any] = {}  # what holds no part of the model
        self.made: dict[int, Any] = {}  # new functions, by the identity of the old

    def of(self, x: Any) -> Any:
        """`x`, or what stands for it in the copy. TypeError for an object that holds a part of the model."""
        if (part := self._part(x)) is not None:
            return part
        kind: Any = type(x)
        if kind in (list, tuple):
            return kind([self.of(part) for part in x])
        if kind in (dict, OrderedDict):
            return kind((key, self.of(part)) for key, part in x.items())
        if not self.holds(x):
            return x
        if kind is types.MethodType:
            return types.MethodType(self.of(x.__func__), self.of(x.__self__))
        if kind is types.FunctionType:
            return self.made.get(id(x)) or self._function(x)
        if kind is weakref.ref:
            return weakref.ref(self.of(x()))
        if kind is functools.partial:
            return functools.partial(self.of(x.func), *self.of(x.args), **self.of(x.keywords))
        raise TypeError(f"holds a part of the model in an object of {kind.__module__}.{kind.__qualname__}")

    def _function(self, f: types.FunctionType) -> types.FunctionType:
        """The function with other cells, but for those that hold nothing of the model, which stay shared."""
        old = f.__closure__ or ()
        cells = tuple([types.CellType() if self.holds(cell) else cell for cell in old])
        new = self.made[id(f)] = types.FunctionType(f.__code__, f.__globals__, f.__name__, None, cells)
        new.__qualname__, new.__module__, new.__doc__ = f.__qualname__, f.__module__, f.__doc__
        for cell, own in zip(old, cells, strict=True):
            if own is not cell:
                own.cell_contents = self.of(cell.cell_contents)
        new.__defaults__, new.__kwdefaults__ = self.of(f.__defaults__), self.of(f.__kwdefaults__)
        new.__dict__.update(self.of(f.__dict__))
        return new

    def _part(self, x: Any) -> Any:
        """The copy of a part of the model; None of anything else."""
        found = self.known.get(id(x)) if isinstance(x, Tensor | nn.Module) else None
        if found is None and isinstance(x, Tensor) and (found := self.view(x)) is not None:
            self.known[id(x)] = found
        return found

    def holds(self, x: Any) -> bool:
        """Whether a part of the model can be reached from `x` in a few steps."""
        todo, seen = [(x, 0)], {}
        while todo and len(seen) < _MOST:
            x, depth = todo.pop()
            if self._part(x) is not None:
                return True
            if id(x) not in seen and id(x) not in self.free and depth < _DEEPEST:
                seen[id(x)] = x
                todo += [(part, depth + 1) for part in _inside(x)]
        if not todo:
            self.free.update(seen)  # kept alive, so that no other object gets its identity
        return False


def _inside(x: Any) -> Iterable[Any]:
    """What an object holds."""
    if x is None or isinstance(x, _CLOSED):
        return ()
    if isinstance(x, _CONTAINERS):
        return x
    if isinstance(x, dict | types.MappingProxyType):
        return list(x.values())
    if isinstance(x, weakref.ref):  # not to the hooks that a handle would remove
        return (held,) if isinstance(held := x(), Tensor | nn.Module | types.MethodType) else ()
    if isinstance(x, types.MethodType):
        return x.__self__, x.__func__
    if isinstance(x, types.CellType):
        with suppress(ValueError):  # it may be empty yet
            return (x.cell_contents,)
        return ()
    if isinstance(x, types.FunctionType):
        return *(x.__closure__ or ()), x.__defaults__, x.__kwdefaults__, x.__dict__
    if isinstance(x, functools.partial):
        return x.func, x.args, x.keywords
    slots = [name for kind in type(x).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    return *getattr(x, "__dict__", {}).values(), *(getattr(x, name, None) for name in slots)


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(name for name in slots if not name.startswith("__"))

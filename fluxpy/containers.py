"""The tensors in batches and outputs of any kind, also in containers that optree does not know."""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable
from typing import Any

import torch.utils._pytree as torch_pytree
from torch import Tensor

from .pytree import HOLE, Skeleton, skeleton_of

Make = Callable[[list[Any]], Any]
MAX_DEPTH = 20  # of such containers in each other


class Opened(Skeleton):
    """A container without its tensors. Its parts may be such containers again; `make` gives it of new parts."""

    __slots__ = ("make",)

    def __init__(self, spec: Any, parts: list[Any], make: Make) -> None:
        super().__init__(spec, parts)
        self.make = make

    def combine(self, tensors: Iterable[Any]) -> Any:
        source, new = iter(tensors), []
        for part in self.parts:
            if part is HOLE:
                part = next(source)
            elif isinstance(part, Opened):
                part = part.combine(source)
            new.append(part)
        return self.make(new)

    def is_like(self, other: "Opened") -> bool:
        """Whether both are the same but for their tensors."""
        return self.spec == other.spec and all(map(_alike, self.parts, other.parts))


def open_data(tree: Any) -> tuple[list[Tensor], Opened]:
    """The tensors of a batch or an output in order, and what is left, to put others into.

    Looks into pytrees of optree and of PyTorch's own registry (as the outputs of Hugging Face's models), into
    dataclasses and `UserDict`s, but not for ever: they may hold each other.
    """
    tensors: list[Tensor] = []
    return tensors, _open(tree, tensors, 0)


def _open(tree: Any, tensors: list[Tensor], depth: int) -> Opened:
    skeleton = skeleton_of(tree)
    parts = [_part(part, tensors, depth) for part in skeleton.parts]
    return Opened(skeleton.spec, parts, skeleton.spec.build)


def _part(x: Any, tensors: list[Tensor], depth: int) -> Any:
    """What stands for `x` among the parts of a container. Appends its tensors to the list."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return HOLE
    if x is None or isinstance(x, bool | int | float | str):
        return x
    found = _inside(x) if depth < MAX_DEPTH else None
    if found is None:
        return x
    spec, children, make = found
    return Opened((type(x), spec), [_open(child, tensors, depth + 1) for child in children], make)


def _inside(x: Any) -> tuple[Any, list[Any], Make] | None:
    """A container that optree does not know, taken apart: its metadata, its children, and what makes it of others."""
    node = torch_pytree.SUPPORTED_NODES.get(type(x))
    if node is not None:
        children, context = node.flatten_fn(x)
        return context, list(children), lambda new: node.unflatten_fn(new, context)
    if isinstance(x, UserDict):
        return tuple(x.data), list(x.data.values()), lambda new: _with(x, {"data": dict(zip(x.data, new, strict=True))})
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        names = tuple(field.name for field in dataclasses.fields(x) if hasattr(x, field.name))
        return names, [getattr(x, n) for n in names], lambda new: _with(x, dict(zip(names, new, strict=True)))
    return None


def _with(x: Any, attributes: dict[str, Any]) -> Any:
    """A copy with other attributes, also of a frozen dataclass."""
    other = copy.copy(x)
    for name, value in attributes.items():
        object.__setattr__(other, name, value)
    return other


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Opened):
        return isinstance(b, Opened) and a.is_like(b)
    if a is b:
        return True
    return isinstance(a, bool | int | float | str) and type(a) is type(b) and a == b

"""A property that is worked out once."""

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

import torch

Value = TypeVar("Value")


class cached(Generic[Value]):
    """`functools.cached_property` without its lock, which `torch.compile` cannot follow (Python 3.11 has one)."""

    def __init__(self, f: Callable[[Any], Value]) -> None:
        self.f, self.name, self.__doc__ = f, f.__name__, f.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...
    @overload
    def __get__(self, owner: object, kind: type) -> Value: ...
    def __get__(self, owner: Any, kind: type) -> Self | Value:
        if owner is None:
            return self
        value = self.f(owner)
        if not torch.compiler.is_compiling():  # another graph would be made as soon as the value is there
            owner.__dict__[self.name] = value
        return value

"""A structural copy of a model, with other tensors in place of its parameters."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .pytree import is_wrapped, level, unwrap

_HOOKS = (dict, OrderedDict, set)
_SIMPLE = (bool, int, float, str, type(None))  # what can hold neither parameters nor modules


def rebuild(model: Any, old: Sequence[Tensor], new: Sequence[Any]) -> Any:
    """A structural copy of a model with other parameters, `new` for `old`. See `Copies`."""
    return Copies(model, old, new).model


class Copies:
    """A structural copy of a model with other parameters, `new` for `old`. (Not functions that call themselves: what
    those hold dies by the garbage collector alone.)

    Modules are new, with cloned buffers; everything else that is no parameter is shared. A compiled or data-parallel
    wrapper is left out of the copy.
    """

    def __init__(self, model: Any, old: Sequence[Tensor], new: Sequence[Any]) -> None:
        self.known: dict[int, Any] = {id(x): value for x, value in zip(old, new, strict=True)}
        self.containers: dict[int, Any] = {}  # new for old, by the identity of the old
        self.modules: list[nn.Module] = []
        self.model = self.of(model)
        self.finish()

    def of(self, x: Any) -> Any:
        """One Python frame a level: models may be deep."""
        x = unwrap(x)
        if id(x) in self.known:
            return self.known[id(x)]
        if not isinstance(x, nn.Module):
            inside = level(x)
            if inside is None:
                return x
            other = self.containers[id(x)] = inside.make(list(map(self.of, inside.children)))
            return other
        new = self.known[id(x)] = x.__new__(type(x))
        self.modules.append(new)
        held = new.__dict__
        held.update(x.__dict__)
        for key, hooks in x.__dict__.items():
            if type(hooks) in _HOOKS and key[0] == "_":
                held[key] = hooks.copy() if hooks else type(hooks)()
        for key, b in x._buffers.items():
            held["_buffers"][key] = b if b is None else self.known.setdefault(id(b), b.clone())
        params = {name: self.known.get(id(p), p) for name, p in x._parameters.items()}
        modules = {name: self.of(module) for name, module in x._modules.items()}
        held["_parameters"] = self.containers[id(x._parameters)] = params
        held["_modules"] = self.containers[id(x._modules)] = modules
        return new

    def finish(self) -> None:
        """Let parameters and modules that occur a second time in plain attributes (as in nn.LSTM) follow."""
        registered = ("_parameters", "_buffers", "_modules")
        for module in self.modules:
            for key, value in module.__dict__.items():
                if type(value) in _SIMPLE or not value or key in registered:
                    continue
                module.__dict__[key] = self.swapped(value)  # no key is new

    def swapped(self, x: Any) -> Any:
        if type(x) in (list, tuple):
            return type(x)([self.swapped(value) for value in x])
        if type(x) is dict:
            return {key: self.swapped(value) for key, value in x.items()}
        return self.known.get(id(x), x) if isinstance(x, Tensor | nn.Module) else x


def like_parameter(new: Tensor, old: Tensor) -> Tensor:
    """`new` as a parameter in place of `old`; a tensor with a history stays as it is, to be differentiated through."""
    if new.requires_grad or is_wrapped(new):
        return new
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new.requires_grad_(old.requires_grad)

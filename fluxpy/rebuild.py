"""A structural copy of a model, with other tensors in place of its parameters."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .pytree import is_wrapped, level, unwrap
from .tree import walk


def rebuild(model: Any, values: Mapping[int, Tensor]) -> Any:
    """A structural copy of a model with other parameters (by the number `walk` gives them).

    Modules are new, with cloned buffers; everything else that is no parameter is shared. A compiled or data-parallel
    wrapper is left out of the copy.
    """
    old = walk(model)[1]
    copies = _Copies({id(old[i]): _like(value, old[i]) for i, value in values.items()})
    new = copies.of(model)
    copies.finish()
    return new


class _Copies:
    """New for old, by the identity of the old. (Not functions that call themselves: what those hold dies by the garbage
    collector alone.)"""

    def __init__(self, known: dict[int, Any]) -> None:
        self.known = known
        self.modules: list[nn.Module] = []

    def of(self, x: Any) -> Any:
        x = unwrap(x)
        if id(x) in self.known:
            return self.known[id(x)]
        if isinstance(x, nn.Module):
            return self.of_module(x)
        inside = level(x)
        return x if inside is None else inside.make([self.of(child) for child in inside.children])

    def of_module(self, x: nn.Module) -> nn.Module:
        new = self.known[id(x)] = x.__new__(type(x))
        self.modules.append(new)
        hooks = {k: h.copy() for k, h in x.__dict__.items() if isinstance(h, dict | set) and k.startswith("_")}
        new.__dict__.update(x.__dict__ | hooks)
        buffers = {k: b if b is None else self.known.setdefault(id(b), b.clone()) for k, b in x._buffers.items()}
        parameters, modules = ({k: self.of(v) for k, v in held.items()} for held in (x._parameters, x._modules))
        new.__dict__.update(_buffers=buffers, _parameters=parameters, _modules=modules)
        return new

    def finish(self) -> None:
        """Let parameters and modules that occur a second time in plain attributes (as in nn.LSTM) follow."""
        registered = ("_parameters", "_buffers", "_modules")
        for module in self.modules:
            plain = {k: self.swapped(v) for k, v in module.__dict__.items() if k not in registered}
            module.__dict__.update(plain)

    def swapped(self, x: Any) -> Any:
        if type(x) in (list, tuple):
            return type(x)([self.swapped(value) for value in x])
        if type(x) is dict:
            return {key: self.swapped(value) for key, value in x.items()}
        return self.known.get(id(x), x) if isinstance(x, Tensor | nn.Module) else x


def _like(new: Tensor, old: Tensor) -> Tensor:
    """`new` as a parameter in place of `old`; a tensor with a history stays as it is, to be differentiated through."""
    if new.requires_grad or is_wrapped(new):
        return new
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new.requires_grad_(old.requires_grad)

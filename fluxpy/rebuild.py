"""A structural copy of a model, with other tensors in place of its parameters."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .pytree import is_wrapped, level, unwrap


def rebuild(model: Any, old: Sequence[Tensor], new: Sequence[Any]) -> Any:
    """A structural copy of a model with other parameters, `new` for `old`.

    Modules are new, with cloned buffers; everything else that is no parameter is shared. A compiled or data-parallel
    wrapper is left out of the copy.
    """
    copies = _Copies({id(x): value for x, value in zip(old, new, strict=True)})
    copy = copies.of(model)
    copies.finish()
    return copy


class _Copies:
    """New for old, by the identity of the old. (Not functions that call themselves: what those hold dies by the garbage
    collector alone.)"""

    def __init__(self, known: dict[int, Any]) -> None:
        self.known = known
        self.modules: list[nn.Module] = []

    def of(self, x: Any) -> Any:
        """One Python frame a level: models may be deep."""
        x = unwrap(x)
        if id(x) in self.known:
            return self.known[id(x)]
        if not isinstance(x, nn.Module):
            inside = level(x)
            return x if inside is None else inside.make(list(map(self.of, inside.children)))
        new = self.known[id(x)] = x.__new__(type(x))
        self.modules.append(new)
        hooks = {k: h.copy() for k, h in x.__dict__.items() if isinstance(h, dict | set) and k.startswith("_")}
        new.__dict__.update(x.__dict__ | hooks)
        new._buffers = {k: b if b is None else self.known.setdefault(id(b), b.clone()) for k, b in x._buffers.items()}
        new._parameters = dict(zip(x._parameters, map(self.of, x._parameters.values()), strict=True))
        new._modules = dict(zip(x._modules, map(self.of, x._modules.values()), strict=True))
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


def like_parameter(new: Tensor, old: Tensor) -> Tensor:
    """`new` as a parameter in place of `old`; a tensor with a history stays as it is, to be differentiated through."""
    if new.requires_grad or is_wrapped(new):
        return new
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new.requires_grad_(old.requires_grad)

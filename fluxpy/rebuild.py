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
    _, old = walk(model)
    memo: dict[int, Any] = {id(old[i]): _like(value, old[i]) for i, value in values.items()}
    modules: list[nn.Module] = []

    def copy(x: Any) -> Any:
        x = unwrap(x)
        if id(x) in memo:
            return memo[id(x)]
        if isinstance(x, nn.Module):
            new = memo[id(x)] = x.__new__(type(x))
            modules.append(new)
            hooks = {k: h.copy() for k, h in x.__dict__.items() if isinstance(h, dict | set) and k.startswith("_")}
            new.__dict__.update(x.__dict__ | hooks)
            new._buffers = {k: b if b is None else memo.setdefault(id(b), b.clone()) for k, b in x._buffers.items()}
            new._parameters, new._modules = ({}, {})
            for kept, held in ((new._parameters, x._parameters), (new._modules, x._modules)):
                for key, value in held.items():
                    kept[key] = copy(value)
            return new
        here = level(x)
        return x if here is None else here.make(list(map(copy, here.children)))

    def swap(x: Any) -> Any:
        """Parameters and modules that stand a second time in plain attributes (as in nn.LSTM) follow."""
        if isinstance(x, list | tuple) and type(x) in (list, tuple):
            return type(x)(map(swap, x))
        if type(x) is dict:
            return {key: swap(value) for key, value in x.items()}
        return memo.get(id(x), x) if isinstance(x, Tensor | nn.Module) else x

    new = copy(model)
    for module in modules:
        registered = ("_parameters", "_buffers", "_modules")
        module.__dict__.update({k: swap(v) for k, v in module.__dict__.items() if k not in registered})
    return new


def _like(new: Tensor, old: Tensor) -> Tensor:
    """`new` as a parameter in place of `old`; a tensor with a history stays as it is, to be differentiated through."""
    if new.requires_grad or is_wrapped(new):
        return new
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new.requires_grad_(old.requires_grad)

"""A structural copy of a model, with other tensors in place of its parameters."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .engine.layout import extent
from .pytree import is_unseen, level, memories, memory, unwrap
from .rebind import Rebinding
from .text import COPY_STAYS, MAKES_NO_MODULE, form
from .tree import TreeSpec

_HOOKS = {dict, OrderedDict, set}
_SIMPLE = {bool, int, float, str, type(None), torch.dtype, torch.device}  # what can hold neither parameters nor modules


def rebuild(model: Any, spec: TreeSpec, old: Sequence[Tensor], new: Sequence[Any]) -> Any:
    """A structural copy of a model of a shape with other parameters, `new` for `old`. See `Copies`."""
    if torch.compiler.is_compiling():
        return _refilled(model, spec, dict(zip(spec.leaves, new, strict=True)))
    return Copies(model, old, new).model


def _refilled(x: Any, spec: TreeSpec, new: dict[int, Any]) -> Any:
    """What `torch.compile` can follow: no identity is asked for, and no module made."""
    x = unwrap(x)
    if spec.kind == "leaf":
        return new[spec.index]
    if isinstance(x, nn.Module):
        raise TypeError(MAKES_NO_MODULE)
    inside = level(x)
    if inside is None:
        return x
    pairs = zip(inside.children, spec.children, strict=True)
    return inside.make([_refilled(child, place, new) for child, place in pairs])


class Copies:
    """A structural copy of a model with other parameters, `new` for `old`. (A class, not functions that call
    themselves: what closures hold dies by the garbage collector alone.)

    Modules are new, with cloned buffers; everything else that is no parameter is shared. A compiled or data-parallel
    wrapper is left out of the copy.
    """

    def __init__(self, model: Any, old: Sequence[Tensor], new: Sequence[Any]) -> None:
        self.known: dict[int, Any] = {id(x): value for x, value in zip(old, new, strict=True)}
        self.old, self.places = old, dict[int, list[Tensor]]()  # by their memory, buffers too
        self.containers: dict[int, Any] = {}  # new for old, by the identity of the old
        self.rest: list[tuple[nn.Module, str]] = []  # attributes that may hold something of the model besides
        self.model = self.of(model)
        self.finish()

    def of(self, x: Any) -> Any:
        """One Python frame a level: models may be deep."""
        x = unwrap(x)
        if id(x) in self.known:
            return self.known[id(x)]
        if not isinstance(x, nn.Module):
            if type(x) is dict:
                other = dict(zip(x, map(self.of, x.values()), strict=True))
            elif (inside := level(x)) is not None:
                other = inside.make(list(map(self.of, inside.children)))
            else:
                return x
            self.containers[id(x)] = other
            return other
        if isinstance(x, torch.jit.ScriptModule):
            raise TypeError(f"a scripted module ({type(x).__name__}) cannot be copied in parts; update in place")
        new = self.known[id(x)] = object.__new__(type(x))  # some classes make another class when they are called
        held = new.__dict__
        held.update(x.__dict__)
        for key, value in x.__dict__.items():
            kind = type(value)
            if kind in _SIMPLE or key in _REGISTERED:
                continue
            if kind in _HOOKS and key[0] == "_":
                held[key] = value.copy() if value else kind()
            if kind not in _EMPTIABLE or value:
                self.rest.append((new, key))
        params, buffers, modules = x._parameters, x._buffers, x._modules
        params = {name: self.known.get(id(p), p) for name, p in params.items()} if params else {}
        buffers = {name: self._buffer(b) for name, b in buffers.items()} if buffers else {}
        modules = {name: self.of(module) for name, module in modules.items()} if modules else {}
        held["_parameters"] = self.containers[id(x._parameters)] = params
        held["_buffers"], held["_modules"] = buffers, modules
        self.containers[id(x._modules)] = modules
        return new

    def _buffer(self, b: Tensor | None) -> Tensor | None:
        if b is not None and id(b) not in self.known:
            view = self.view(b)
            self.known[id(b)] = b.clone() if view is None else view
            self.places.setdefault(memory(b), []).append(b)
        return None if b is None else self.known[id(b)]

    def view(self, t: Tensor) -> Tensor | None:
        """Of a tensor in the memory of a parameter or buffer, the same view of the copy; None of any other."""
        if not self.places:
            for x, place in zip(self.old, memories(self.old), strict=True):
                self.places.setdefault(place, []).append(x)
        for x in self.places.get(memory(t), ()):
            new, start, room = self.known[id(x)], t.storage_offset() - x.storage_offset(), extent(x) - extent(t)
            low = start * t.element_size()
            if 0 <= low <= room and t.dtype == x.dtype and new.stride() == x.stride():
                with torch.enable_grad():
                    whole = new if t.requires_grad else new.detach()
                    return whole.as_strided(t.shape, t.stride(), new.storage_offset() + start)
            if -extent(t) < low < extent(x):
                raise TypeError(f"holds {form(t.shape, t.dtype)} in the memory of a parameter, which is no part of it")
        return None

    def finish(self) -> None:
        """Let what is bound to the model follow: parameters and modules in plain attributes (as in nn.LSTM), views of
        parameters, hooks, methods, functions. TypeError, with the path, where that cannot be."""
        rebinding = Rebinding(self.known, self.view)
        for module, key in self.rest:
            held = module.__dict__
            if key == "_compiled_call_impl":  # of module.compile(), bound to the old one
                del held[key]
            elif "state_dict" not in key and not (key == "_graph" and isinstance(module, torch.fx.GraphModule)):
                try:
                    held[key] = rebinding.of(held[key])
                except TypeError as error:
                    raise TypeError(f"{self._path(module)}.{key} {error}: {COPY_STAYS}") from None

    def _path(self, module: nn.Module) -> str:
        found = self.model.named_modules() if isinstance(self.model, nn.Module) else ()
        names = [name for name, x in found if x is module]
        return ".".join(filter(None, (type(self.model).__name__, *names))) if names else type(module).__name__


_REGISTERED = {"_parameters", "_buffers", "_modules"}
_EMPTIABLE = {dict, OrderedDict, set, list, tuple}


def like_parameter(new: Tensor, old: Tensor) -> Tensor:
    """`new` as a parameter in place of `old`; a tensor with a history stays as it is, to be differentiated through."""
    return new if new.requires_grad or is_unseen(new) else as_parameter(new, old)


def as_parameter(new: Tensor, old: Tensor) -> Tensor:
    """A tensor without history as a parameter in place of `old`, of its class, with its attributes and hooks."""
    kind, train = type(old), old.requires_grad
    if type(new) is not Tensor or not (kind is Tensor or issubclass(kind, nn.Parameter)):  # it may hold its numbers
        return nn.Parameter(new, requires_grad=train) if isinstance(old, nn.Parameter) else new.requires_grad_(train)
    # As the constructor of parameters does, in half the time.
    made = new.requires_grad_(train) if kind is Tensor else Tensor._make_subclass(kind, new, train)
    if own := vars(old):  # of most there is none, and none is made
        vars(made).update(own)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if (held := getattr(old, hooks)) is not None:
            setattr(made, hooks, held.copy())
    return made

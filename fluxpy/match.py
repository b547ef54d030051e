"""What belongs to what: parameters and gradients by the places of a state tree, and models rebuilt from them."""

from collections.abc import Mapping
from itertools import chain
from operator import is_, methodcaller
from typing import Any

from torch import Tensor, nn

from .pytree import is_parameter, is_wrapped, level, unwrap
from .text import names_of, near
from .tree import Mirror, Spec, explore, walk

_VALUES = methodcaller("values")


class Fit:
    """A model that fits `spec`: its parameters in the order of `spec.unique`. ValueError with the place where it has
    another shape.

    Kept from step to step: `holds` says at next to no cost whether this is still the same model, by looking whether
    each container still has the same things in it.
    """

    def __init__(self, spec: Spec, model: Any) -> None:
        if spec.kind in ("slice", "selection"):
            raise ValueError(
                "a slice or a selection of the state has no matching branch of a model; "
                "pass the whole state or a branch of it (frozen leaves are passed by)"
            )
        self.spec, self.model = spec, model
        self.walked, values, holders = explore(model)
        if self.walked != spec:
            raise ValueError(_difference(spec, self.walked, ""))
        self.params = [values[j] for j in self.walked.unique]
        self.names = tuple(spec.unique.values())
        self.plan: Any = None  # how the engine steps these parameters
        self.every = [x for x in holders if isinstance(x, dict)]
        self.dicts = [x for x in self.every if x]
        self.sizes = [*map(len, self.every)]
        self.lists = [x for x in holders if type(x) in (list, tuple)]
        self.plain = len(self.every) + len(self.lists) == len(holders)  # else some container cannot be looked into
        self.keys, self.held = self._look()

    def _look(self) -> tuple[list[Any], list[Any]]:
        inside = chain.from_iterable(map(_VALUES, self.dicts))
        return [*chain.from_iterable(self.dicts)], [*inside, *chain.from_iterable(self.lists)]

    def holds(self, model: Any) -> bool:
        if model is not self.model or not self.plain:
            return False
        if [*map(len, self.every)] != self.sizes:
            return False
        keys, held = self._look()
        return len(held) == len(self.held) and all(map(is_, held, self.held)) and keys == self.keys


def fit(spec: Spec, model: Any) -> dict[int, Tensor]:
    """The model's parameters by the numbers of `spec`."""
    return dict(zip(spec.unique, Fit(spec, model).params, strict=True))


def _difference(ours: Spec, other: Spec, path: str) -> str:
    at = f"at {path!r}" if path else "at the top"
    if (ours.kind == "leaf") != (other.kind == "leaf") or ours.keys != other.keys:
        return (
            f"the model does not fit the state: {at} the state has {_describe(ours)}, the model {_describe(other)}; "
            "pass the model (or branch) that setup was given, or call setup(rule, model, keep=state) again"
        )
    for key, a, b in zip(ours.keys, ours.children, other.children, strict=True):
        if a != b:
            return _difference(a, b, f"{path}.{key}" if path else str(key))
    return f"the model does not fit the state: {at} other parameters are tied than at setup; call setup again"


def _describe(spec: Spec) -> str:
    return {"leaf": "a parameter", "empty": "no parameter"}.get(spec.kind, f"children {names_of(spec.keys)}")


def scatter(spec: Spec, tree: Any, what: str = "gradients") -> dict[int, Any]:
    """Values given for the parameters of `spec` by number, from a mirror tree, a pytree like the model, or a mapping
    by (dotted) name. None, and a name left out, is nothing given. ValueError names the place of what does not fit."""
    found: dict[int, Any] = {}

    def put(spec: Spec, value: Any, path: str) -> None:
        at = f"at {path!r}" if path else "at the top"
        if value is None:
            return
        if spec.kind == "leaf":
            if isinstance(value, Mapping) and list(value) == [""]:  # the path of a model that is one tensor
                value = value[""]
            if not isinstance(value, Tensor):
                raise ValueError(f"{what} {at} must be a tensor or None, but got {type(value).__name__}")
            known = found.setdefault(spec.index, value)
            if known is not value and not _same_memory(known, value):
                raise ValueError(
                    f"two different {what} for one tied parameter, the second {at}: give their sum, at one of its "
                    "places (fluxpy.gradient does)"
                )
        elif isinstance(value, Mirror):
            other = value._spec
            if other != spec:
                raise ValueError(
                    f"the {what} do not fit the state: " + _difference(spec, other, path).partition(": ")[2]
                )
            for (below, i), (_, j) in zip(spec.slots, other.slots, strict=True):
                put(Spec("leaf", index=i), value._values[j], f"{path}.{below}" if path else below)
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                place = spec.find(key)
                if place is None and isinstance(key, str):  # as a compiled or data-parallel wrapper names it
                    place = spec.find(key.replace("_orig_mod.", "").removeprefix("module."))
                if place is None:
                    raise ValueError(
                        f"{what} {at} have an unknown name {key!r}; {near(key, (p for p, _ in spec.slots))}"
                    )
                put(place, inner, f"{path}.{key}" if path else str(key))
        elif spec.kind == "empty":
            if is_parameter(value):
                raise ValueError(f"{what} {at} have a tensor where the model has no parameter")
        else:
            here = level(unwrap(value))
            if here is None or here.keys != spec.keys:
                came = type(value).__name__ if here is None else f"children {names_of(here.keys)}"
                raise ValueError(f"{what} {at} do not fit: the state has {_describe(spec)}, but got {came}")
            for key, place, inner in zip(spec.keys, spec.children, here.children, strict=True):
                put(place, inner, f"{path}.{key}" if path else str(key))

    put(spec, tree, "")
    return found


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.numel() > 0


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

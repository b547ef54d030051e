"""Gradients in any form that `update` takes -> a list in the order of the parameters."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from .binding import Binding, describe, difference
from .pytree import flatten, is_parameter, level, unwrap
from .text import bare_name, join, names_of, near
from .tree import Mirror, TreeSpec, spec_of, values_of


def in_order(binding: Binding, grads: Any) -> list[Any]:
    """The gradients in the order of the parameters, None where there is none."""
    if grads is None:
        found: list[Any] = [x.grad for x in binding.params]
        if found and all(g is None for g in found):
            raise ValueError(
                "update was given no gradients, and no parameter has a .grad: call loss.backward() first, "
                "or pass what fluxpy.gradient returns"
            )
        return found
    if isinstance(grads, Mirror) and spec_of(grads) is binding.walked:
        return list(values_of(grads))
    if type(grads) is dict and tuple(grads) == binding.paths:
        return list(grads.values())
    if is_compiling():
        return _scattered(binding, grads)
    parts, structure = flatten(grads)
    if binding.grads_form is not None and binding.grads_form[0] is structure:
        return [parts[i] for i in binding.grads_form[1]]
    found = _scattered(binding, grads)
    places = {id(part): i for i, part in enumerate(parts)}
    if len(places) == len(parts) == len(found) and all(dx is not None and id(dx) in places for dx in found):
        binding.grads_form = structure, [places[id(dx)] for dx in found]
    return found


def _scattered(binding: Binding, grads: Any) -> list[Any]:
    by_index = scatter(binding.spec, grads)
    return [by_index.get(index) for index in binding.indices]


def scatter(spec: TreeSpec, tree: Any, what: str = "gradients") -> dict[int, Any]:
    """Values given for the parameters of `spec`, by number, from a mirror tree, a pytree like the model, or a mapping
    by (dotted) name. None, and a name left out, is nothing given. ValueError names the place of what does not fit."""
    found = _Scattered(what)
    found.put(spec, tree, "")
    return found.values


class _Scattered:
    """Values by the number of their parameter."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.values: dict[int, Any] = {}

    def put(self, spec: TreeSpec, value: Any, path: str) -> None:
        if value is None:
            return
        if spec.kind == "leaf":
            self.put_leaf(spec.index, value, path)
        elif isinstance(value, Mirror):
            self.put_mirror(spec, value, path)
        elif isinstance(value, Mapping):
            self.put_mapping(spec, value, path)
        elif spec.kind == "empty":
            if is_parameter(value):
                raise ValueError(f"{self.what} {_at(path)} have a tensor where the model has no parameter")
        else:
            inside = level(unwrap(value))
            if inside is None or inside.keys != spec.keys:
                got = type(value).__name__ if inside is None else f"children {names_of(inside.keys)}"
                raise ValueError(f"{self.what} {_at(path)} do not fit: the state has {describe(spec)}, but got {got}")
            for key, place, inner in zip(spec.keys, spec.children, inside.children, strict=True):
                self.put(place, inner, join(path, key))

    def put_leaf(self, index: int, value: Any, path: str) -> None:
        if isinstance(value, Mapping) and list(value) == [""]:  # the path of a parameter that is the whole model
            value = value[""]
        if not isinstance(value, Tensor):
            raise ValueError(f"{self.what} {_at(path)} must be a tensor or None, but got {type(value).__name__}")
        known = self.values.setdefault(index, value)
        if known is not value and not _same_memory(known, value):
            raise ValueError(
                f"two different {self.what} for one tied parameter, the second {_at(path)}: give their sum, at one of "
                "its places (fluxpy.gradient does)"
            )

    def put_mirror(self, spec: TreeSpec, value: Mirror, path: str) -> None:
        other, values = spec_of(value), values_of(value)
        if other != spec:
            raise ValueError(
                f"the {self.what} do not fit the state: " + difference(spec, other, path).partition(": ")[2]
            )
        for (below, i), (_, j) in zip(spec.paths, other.paths, strict=True):
            if values[j] is not None:
                self.put_leaf(i, values[j], join(path, below))

    def put_mapping(self, spec: TreeSpec, value: Mapping[Any, Any], path: str) -> None:
        for key, inner in value.items():
            place = spec.find(key)
            if place is None and isinstance(key, str):  # perhaps the name that a wrapper gives it
                place = spec.find(bare_name(key))
            if place is None:
                known = near(key, (p for p, _ in spec.paths))
                raise ValueError(f"{self.what} {_at(path)} have an unknown name {key!r}; {known}")
            self.put(place, inner, join(path, key))


def _at(path: str) -> str:
    return f"at {path!r}" if path else "at the top"


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.numel() > 0

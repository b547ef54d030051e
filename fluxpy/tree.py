"""Mirror trees: the shape of a model, and values laid out in that shape. Knows no rules and no training.

    Spec      the shape: each place has named children, or is a parameter's, or is empty
    Mirror    a spec and one value for each parameter; navigation gives views that share the values
    walk      reads the spec and the parameters off a model

Parameters are numbered in depth-first order; a tied one has one number and stands at several places.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import optree
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from .text import names_of, near

NAMESPACE = "fluxpy"


# --- Sources of truth: one function for one question about a model -----------------------------------------------


def is_parameter(x: Any) -> bool:
    """Whether a tensor is trained: floating-point and complex ones are, integers and flags are not."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def unwrap(module: Any) -> Any:
    """The module inside `torch.compile`, DataParallel and DistributedDataParallel: they are no part of a path."""
    while isinstance(module, nn.Module):
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif "_orig_mod" in module._modules:  # torch.compile; its class lives in a module that is slow to import
            module = module._orig_mod
        else:
            break
    return module


class Level(NamedTuple):
    """One level of a model: what it holds, under which keys, and how to make another one like it."""

    kind: str
    keys: tuple[Any, ...]
    children: list[Any]
    make: Any = None


def level(x: Any) -> Level | None:
    """The children of a container; None of anything else."""
    if isinstance(x, nn.Module):
        inside = {**x._parameters, **x._modules}
        sequence = isinstance(x, nn.Sequential | nn.ModuleList | nn.ParameterList)
        return Level("sequence" if sequence else "record", tuple(inside), list(inside.values()))
    if isinstance(x, Mirror) or optree.tree_is_leaf(x, none_is_leaf=True, namespace=NAMESPACE):
        return None
    children, metadata, entries, make = optree.tree_flatten_one_level(x, none_is_leaf=True, namespace=NAMESPACE)
    keys = getattr(x, "_fields", None) or tuple(entries)
    kind = "sequence" if isinstance(x, list | tuple) or keys == tuple(range(len(keys))) else "mapping"
    return Level(kind, keys, list(children), lambda new: make(metadata, new))


# --- The shape ----------------------------------------------------------------------------------------------------


class Spec:
    """One place of a tree. Immutable, and shared by all trees made from one model. Equal where one's values fit the
    other: the same keys all the way down, and the same ties.

    `kind` is "record" (a module), "mapping", "sequence", "leaf", "empty", or, of views no model has, "slice" and
    "selection". `index` is the parameter's number at a leaf, -1 elsewhere.
    """

    def __init__(
        self, kind: str, keys: tuple[Any, ...] = (), children: tuple["Spec", ...] = (), index: int = -1
    ) -> None:
        self.kind, self.keys, self.children, self.index = kind, keys, children, index

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Spec) and self.signature == other.signature)

    def __hash__(self) -> int:
        return hash(len(self.slots))

    def __deepcopy__(self, memo: Any) -> "Spec":
        return self

    def __reduce__(self) -> Any:
        return Spec, (self.kind, self.keys, self.children, self.index)

    @cached_property
    def slots(self) -> tuple[tuple[str, int], ...]:
        """(path, number) of every place of a parameter, ties at each of their places, depth first."""
        found: list[tuple[str, int]] = []
        todo: list[tuple[str, Spec]] = [("", self)]
        while todo:
            path, spec = todo.pop()
            if spec.kind == "leaf":
                found.append((path, spec.index))
            for key, child in zip(reversed(spec.keys), reversed(spec.children), strict=True):
                todo.append((f"{path}.{key}" if path else str(key), child))
        return tuple(found)

    @cached_property
    def unique(self) -> dict[int, str]:
        """Number -> path of each parameter, ties under the first of their paths."""
        found: dict[int, str] = {}
        for path, index in self.slots:
            found.setdefault(index, path)
        return found

    @cached_property
    def signature(self) -> Any:
        """What two equal specs have in common."""
        order = {index: i for i, index in enumerate(self.unique)}
        return self._shape(order)

    def _shape(self, order: dict[int, int]) -> Any:
        if not self.children:
            return order.get(self.index)
        return self.keys, tuple([child._shape(order) for child in self.children])

    @cached_property
    def by_key(self) -> dict[Any, "Spec"]:
        """Children by key and its type: 1 is not True."""
        return {(type(key), key): child for key, child in zip(self.keys, self.children, strict=True)}

    def child(self, key: Any) -> "Spec | None":
        """The place under a key, or, of a sequence, at a position (negative too) or slice."""
        sequence = self.kind in ("sequence", "slice")
        if isinstance(key, slice):
            if not sequence:
                raise TypeError(f"a slice is for sequences of layers; this place has the names {names_of(self.keys)}")
            return Spec("slice", self.keys[key], self.children[key]) if self.children[key] else None
        if sequence and isinstance(key, int):
            return self.children[key] if -len(self.children) <= key < len(self.children) else None
        return self.by_key.get((type(key), key))

    def find(self, path: Any) -> "Spec | None":
        """The place under an exact key, else under a dotted path."""
        found = self.child(path)
        for key, child in zip(self.keys, self.children, strict=True) if found is None and isinstance(path, str) else ():
            name = str(key)
            if path == name:
                return child
            if path.startswith(name + ".") and (found := child.find(path[len(name) + 1 :])) is not None:
                return found
        return found


def walk(model: Any) -> tuple[Spec, list[Tensor]]:
    """The shape of a model, and its parameters by number.

    Raises ValueError where two parameters would have one path, and where a module is not yet initialised.
    """
    values: list[Tensor] = []
    numbers: dict[int, int] = {}
    above: set[int] = set()

    def visit(x: Any) -> Spec:
        x = unwrap(x)
        if is_parameter(x):
            if id(x) not in numbers:
                numbers[id(x)] = len(values)
                values.append(x)
            return Spec("leaf", index=numbers[id(x)])
        here = level(x)
        if here is None or id(x) in above:  # a module that holds one it stands in: its parameters are listed already
            return Spec("empty")
        above.add(id(x))
        children = tuple([visit(child) for child in here.children])
        above.remove(id(x))
        return Spec(here.kind, here.keys, children)

    spec = visit(model)
    paths = set()
    for path, index in spec.slots:
        if path in paths:
            raise ValueError(f"two parameters of the model have one path, {path!r}; rename one of them")
        if nn.parameter.is_lazy(values[index]):
            raise ValueError(f"the parameter {path!r} is lazy and has no shape yet; run the model once first")
        paths.add(path)
    return spec, values


# --- Values in that shape -----------------------------------------------------------------------------------------


class Mirror:
    """Values in the shape of a model. Children by attribute, key, position, slice or dotted path; no public methods.

    What navigation returns is a view: it shares the values. A name that collides with anything is reached by `[name]`.
    """

    __slots__ = ("_spec", "_values")
    _what: ClassVar[str] = "tree"

    def __init_subclass__(cls) -> None:
        register(cls, lambda tree: rooted(tree)[::-1], lambda spec, values: cls(spec, list(values)))

    def __init__(self, spec: Spec, values: list[Any]) -> None:
        self._spec, self._values = spec, values

    def _view(self, spec: Spec) -> Any:
        return self._values[spec.index] if spec.kind == "leaf" else type(self)(spec, self._values)

    def __getattr__(self, name: str) -> Any:
        found = None if name.startswith("__") else self._spec.child(name)
        if found is None:
            raise AttributeError(f"this {self._what} has no {name!r} here; {near(name, map(str, self._spec.keys))}")
        return self._view(found)

    def __getitem__(self, key: Any) -> Any:
        found = self._spec.find(key)
        if found is not None:
            return self._view(found)
        if isinstance(key, int | slice):
            raise IndexError(f"this {self._what} has nothing at {key}; here there is: {names_of(self._spec.keys)}")
        names = [*map(str, self._spec.keys), *(path for path, _ in self._spec.slots)]
        raise KeyError(f"this {self._what} has no {key!r} here; {near(key, names)}")

    def __contains__(self, key: Any) -> bool:
        return self._spec.find(key) is not None

    def __len__(self) -> int:
        return len(self._spec.children)

    def __iter__(self) -> Iterator[Any]:
        sequence = self._spec.kind in ("sequence", "slice")
        return map(self._view, self._spec.children) if sequence else iter(self._spec.keys)

    def __dir__(self) -> list[str]:
        return [key for key in self._spec.keys if isinstance(key, str)]

    def __reduce__(self) -> Any:
        return type(self), rooted(self)


def rooted(tree: Mirror) -> tuple[Spec, list[Any]]:
    """The spec and values of a view as those of a tree of its own, with nothing of what lies outside the view."""
    order = {index: i for i, index in enumerate(tree._spec.unique)}
    values = [tree._values[index] for index in order]

    def renumber(spec: Spec) -> Spec:
        return Spec(spec.kind, spec.keys, tuple([renumber(c) for c in spec.children]), order.get(spec.index, -1))

    return (tree._spec if list(order) == list(order.values()) else renumber(tree._spec)), values


# --- Pytrees ------------------------------------------------------------------------------------------------------


class Frame:
    """What a pytree is without its tensors. Equal to another where the tensors lie alike; other data do not count."""

    def __init__(self, tree: Any) -> None:
        self.parts, self.spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)

    @classmethod
    def split(cls, tree: Any) -> tuple[list[Tensor], "Frame"]:
        """The tensors of a pytree, and the frame to put them back into."""
        frame = cls(tree)
        tensors = [part for part in frame.parts if isinstance(part, Tensor)]
        frame.parts = [_HOLE if isinstance(part, Tensor) else part for part in frame.parts]
        return tensors, frame

    def join(self, tensors: Iterable[Any]) -> Any:
        """The pytree again, with other tensors."""
        source = iter(tensors)
        return optree.tree_unflatten(self.spec, [next(source) if part is _HOLE else part for part in self.parts])

    def __eq__(self, other: object) -> bool:
        holes = [part is _HOLE for part in self.parts]
        return isinstance(other, Frame) and self.spec == other.spec and holes == [p is _HOLE for p in other.parts]

    def __hash__(self) -> int:
        return hash(len(self.parts))


class _HOLE:
    """Where a tensor stood."""


def register(cls: type, flatten: Any, unflatten: Any) -> None:
    """Make a class a pytree, of optree (namespace "fluxpy") and of torch (for `torch.func`).

    `flatten(x)` gives (children, metadata), `unflatten(metadata, children)` the object again.
    """
    optree.register_pytree_node(cls, flatten, unflatten, namespace=NAMESPACE)
    torch_pytree.register_pytree_node(
        cls,
        lambda x: (list((out := flatten(x))[0]), out[1]),
        lambda children, metadata: unflatten(metadata, tuple(children)),
        serialized_type_name=f"{NAMESPACE}.{cls.__name__}",
    )

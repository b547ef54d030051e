"""Mirror trees: the shape of a model, and values laid out in that shape. Knows no rules and no training.

    TreeSpec  the shape: each place has named children, or is a parameter's, or is empty
    Mirror    a spec and one value for each parameter; navigation gives views that share the values
    walk      reads the spec and the parameters off a model

Parameters are numbered in depth-first order; a tied one has one number and stands at several places.
"""

from collections import Counter
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, ClassVar, Self, overload
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .cached import cached
from .pytree import is_parameter, level, register, unwrap
from .text import OTHER_OBJECT, join, names_of, near


class TreeSpec:
    """One place of a tree. Immutable, and shared by all trees made from one model. Equal where one's values fit the
    other: the same keys all the way down, and the same ties.

    `kind` is "record" (a module), "mapping", "sequence", "leaf", "empty", or, of views no model has, "slice" and
    "selection". `index` is the parameter's number at a leaf, -1 elsewhere.
    """

    def __init__(
        self,
        kind: str,
        keys: tuple[Any, ...] = (),
        children: tuple[Any, ...] = (),
        index: int = -1,
        loose: bool = False,
    ) -> None:
        self.kind, self.keys, self.children, self.index = kind, keys, children, index
        self.loose = loose  # as after a renaming: only its paths count, and it takes the order of the next model

    @staticmethod
    def build(places: list[tuple[str, tuple[Any, ...], int]], loose: bool = False) -> "TreeSpec":
        """The spec of (kind, keys, index) of each place in depth-first order. No recursion: trees may be deep."""
        done: list[TreeSpec] = []
        for kind, keys, index in reversed(places):
            done.append(TreeSpec(kind, keys, tuple([done.pop() for _ in keys]), index, loose))
        return done[0]

    @property
    def preorder(self) -> list[tuple[str, tuple[Any, ...], int]]:
        found, todo = [], [self]
        while todo:
            spec = todo.pop()
            found.append((spec.kind, spec.keys, spec.index))
            todo.extend(reversed(spec.children))
        return found

    def renumbered(self, order: dict[int, int]) -> "TreeSpec":
        """The same shape with other numbers for its parameters."""
        if list(order) == list(order.values()):
            return self
        return TreeSpec.build([(kind, keys, order.get(index, -1)) for kind, keys, index in self.preorder], self.loose)

    def __reduce__(self) -> Any:
        return (TreeSpec.build, (self.preorder, True)) if self.loose else (_known, (self.preorder,))

    def __deepcopy__(self, memo: Any) -> "TreeSpec":
        return self

    @cached
    def signature(self) -> Any:
        """What two equal specs have in common."""
        order = {index: i for i, index in enumerate(self.leaves)}
        return [(keys, order.get(index)) for _, keys, index in self.preorder]

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, TreeSpec) and self.signature == other.signature)

    def __hash__(self) -> int:
        return hash(len(self.paths))

    @cached
    def paths(self) -> tuple[tuple[str, int], ...]:
        """(path, number) of every place of a parameter, ties at each of their places, depth first."""
        found: list[tuple[str, int]] = []
        todo: list[tuple[str, TreeSpec]] = [("", self)]
        while todo:
            path, spec = todo.pop()
            if spec.kind == "leaf":
                found.append((path, spec.index))
            for key, child in zip(reversed(spec.keys), reversed(spec.children), strict=True):
                todo.append((join(path, key), child))
        return tuple(found)

    @cached
    def leaves(self) -> dict[int, str]:
        """Number -> path of each parameter, ties under the first of their paths."""
        found: dict[int, str] = {}
        for path, index in self.paths:
            found.setdefault(index, path)
        return found

    @cached
    def names(self) -> dict[int, list[str]]:
        """Number -> all paths of each parameter."""
        found: dict[int, list[str]] = {}
        for path, index in self.paths:
            found.setdefault(index, []).append(path)
        return found

    @cached
    def duplicate(self) -> str | None:
        """A path that two parameters have, if there is one."""
        return next((path for path, times in Counter(path for path, _ in self.paths).items() if times > 1), None)

    @cached
    def by_name(self) -> dict[Any, "TreeSpec"]:
        """Leaves by path; and children by key and its type, for 1 is not True."""
        children = zip(self.keys, self.children, strict=True)
        leaves = {path: TreeSpec("leaf", index=index) for path, index in self.paths} if self.children else {}
        return leaves | {(type(key), key): child for key, child in children}

    def child(self, key: Any) -> "TreeSpec | None":
        """The place under a key, or, of a sequence, at a position (negative too) or slice."""
        sequence = self.kind in ("sequence", "slice")
        if isinstance(key, slice):
            if not sequence:
                raise TypeError(f"a slice is for sequences of layers; this place has the names {names_of(self.keys)}")
            return TreeSpec("slice", self.keys[key], self.children[key]) if self.children[key] else None
        if sequence and isinstance(key, int):
            return self.children[key] if -len(self.children) <= key < len(self.children) else None
        return self.by_name.get((type(key), key))

    def find(self, path: Any) -> "TreeSpec | None":
        """The place under an exact key, else under a dotted path."""
        found = self.child(path)
        if found is not None or not isinstance(path, str):
            return found
        if path in self.by_name:
            return self.by_name[path]
        for key, child in zip(self.keys, self.children, strict=True):
            name = str(key)
            if path == name:
                return child
            if path.startswith(name + ".") and (found := child.find(path[len(name) + 1 :])) is not None:
                return found
        return None


def walk(model: Any) -> tuple[TreeSpec, list[Tensor]]:
    """The shape of a model, and its parameters by number. Equal shapes are one `TreeSpec`.

    Raises ValueError where two parameters would have one path, where a module is not yet initialised, and where the
    model is nested deeper than 900 levels.
    """
    return explore(model)[:2]


def explore(model: Any) -> tuple[TreeSpec, list[Tensor], list[Any]]:
    """`walk`, and the containers that it went through; for a module, its dicts of parameters and of modules."""
    values, numbers, holders = [], {}, []  # not list[Tensor](): torch.compile does not follow that
    places: list[tuple[str, tuple[Any, ...], int]] = []
    todo, above = [iter([model])], []  # the containers that are open: what is left of each; their identities
    while todo:
        for top in todo[-1]:
            if is_parameter(top):
                number = numbers.setdefault(id(top), len(values))
                if number == len(values):
                    values.append(top)
                places.append(("leaf", (), number))
                continue
            x = unwrap(top)
            while top is not x:  # a wrapper may be given another module
                holders.append(top._modules)
                top = next(iter(top._modules.values()))
            if (here := level(x)) is None or id(x) in above:
                # Nothing, or a module within itself, which is listed already.
                places.append(("empty", (), -1))
                continue
            places.append((here.kind, here.keys, -1))
            holders += [x._parameters, x._modules] if isinstance(x, nn.Module) else [x]
            above.append(id(x))
            todo.append(iter(here.children))
            if len(above) > 900:
                raise ValueError("the model is nested deeper than 900 levels")
            break
        else:  # all below this place was visited
            todo.pop()
            del above[-1:]
    spec = _known(places)
    if spec.duplicate is not None:
        raise ValueError(f"two parameters of the model have one path, {spec.duplicate!r}; rename one of them")
    if not torch.compiler.is_compiling() and any(map(nn.parameter.is_lazy, {type(x): x for x in values}.values())):
        path = next(path for index, path in spec.leaves.items() if nn.parameter.is_lazy(values[index]))
        raise ValueError(f"the parameter {path!r} is lazy and has no shape yet; run the model once first")
    return spec, values, holders


def check_model(x: Any, call: str) -> None:
    """TypeError for what is no model. A number, a function or an empty list is one, without parameters."""
    x, tree = unwrap(x), isinstance(x, Mirror)
    if not tree and (level(x) is not None or x is None or isinstance(x, _PLAIN)):
        return
    name = x.__name__ if isinstance(x, type) else type(x).__name__
    if tree:
        what = f"a {x._what}; pass the model that it belongs to"
    elif isinstance(x, Iterator):
        what = "an iterator, as model.parameters() gives; pass the model itself"
    elif isinstance(x, type):
        what = f"the class {name}; pass an instance, {name}(...)"
    else:
        what = OTHER_OBJECT.format(name)
    raise TypeError(f"{call}: a model is an nn.Module, or a pytree of tensors, but got {what}")


_PLAIN = (Tensor, complex, float, int, str, bytes, FunctionType, BuiltinFunctionType, MethodType)
_SPECS: WeakValueDictionary[Any, TreeSpec] = WeakValueDictionary()


def _known(places: list[tuple[str, tuple[Any, ...], int]]) -> TreeSpec:
    """The spec of these places. One for all models of a shape, so that comparing, naming and numbering is done once."""
    if torch.compiler.is_compiling():
        return TreeSpec.build(places)
    types = tuple(type(key) for kind, keys, _ in places if kind not in ("record", "leaf") for key in keys)
    key = tuple(places), types  # 1, 1.0 and True are equal, but not one key
    found = _SPECS.get(key)
    if found is None:
        found = _SPECS[key] = TreeSpec.build(places)
    return found


class Mirror:
    """Values in the shape of a model. Children by attribute, key, position, slice or dotted path; no public methods.

    What navigation returns is a view: it shares the values. A name that collides with anything is reached by `[name]`.

    For a type checker it is Any (but a slice, which is a tree): what stands at a name depends on the model.
    """

    __slots__ = ("_spec", "_values")
    _what: ClassVar[str] = "tree"
    _of_several: ClassVar[str] = "ask for one after another"

    def __init_subclass__(cls) -> None:
        register(cls, lambda tree: rooted(tree)[::-1], lambda spec, values: cls._rebuilt(spec, list(values)))

    @classmethod
    def _rebuilt(cls, spec: TreeSpec, values: list[Any]) -> Any:
        """A tree from its values, after a transform such as `tree_map`."""
        return cls(spec, values)

    def __init__(self, spec: TreeSpec, values: list[Any]) -> None:
        self._spec, self._values = spec, values

    def _view(self, spec: TreeSpec) -> Any:
        return self._values[spec.index] if spec.kind == "leaf" else type(self)(spec, self._values)

    def __getattr__(self, name: str) -> Any:
        if name in Mirror.__slots__:  # of a tree that is only being made
            raise AttributeError(name)
        found = None if name.startswith("__") else self._spec.child(name)
        if found is None:
            known = near(name, map(str, self._spec.keys))
            raise AttributeError(_with(f"this {self._what} has no {name!r} here; {known}", self._hint(name, self)))
        return self._view(found)

    @classmethod
    def _hint(cls, name: str, here: Any) -> str:
        """What to write instead of asking `here` for a name that it does not have."""
        return ""

    @overload
    def __getitem__(self, key: slice) -> Self: ...
    @overload
    def __getitem__(self, key: Any) -> Any: ...
    def __getitem__(self, key: Any) -> Any:
        found = self._spec.find(key)
        if found is not None:
            return self._view(found)
        if isinstance(key, int | slice):
            raise IndexError(f"this {self._what} has nothing at {key}; here there is: {names_of(self._spec.keys)}")
        if isinstance(key, tuple | list | set):
            raise TypeError(f"this {self._what} takes one name, path or position, but got {key!r}; {self._of_several}")
        names = [*map(str, self._spec.keys), *(path for path, _ in self._spec.paths)]
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
        return type(self)._rebuilt, rooted(self)


def _refuse_assignment(tree: Mirror, name: str, value: Any) -> None:
    if name not in Mirror.__slots__:
        raise AttributeError(_with(f"nothing is assigned in a {tree._what}", tree._hint(name, tree)))
    object.__setattr__(tree, name, value)


# Not in the class, where a type checker would then take any assignment.
Mirror.__setattr__ = _refuse_assignment


def _with(message: str, hint: str) -> str:
    return f"{message}. {hint}" if hint else message


def spec_of(tree: Mirror) -> TreeSpec:
    """The shape of a tree, or of a view of one."""
    return tree._spec


def values_of(tree: Mirror) -> list[Any]:
    """The values of the whole tree that a view is of; the numbers in its spec are places in this list."""
    return tree._values


def respec(tree: Mirror, spec: TreeSpec) -> None:
    """Give a tree another shape for the same values."""
    tree._spec = spec


def relaid(spec: TreeSpec, other: TreeSpec) -> TreeSpec | None:
    """The shape `other` with the numbers of `spec`, if that is loose and both have the same paths and ties; else
    None."""
    numbers, order = dict(spec.paths), dict[int, int]()
    if not spec.loose or numbers.keys() != dict(other.paths).keys():
        return None
    if any(order.setdefault(index, numbers[path]) != numbers[path] for path, index in other.paths):
        return None
    return other.renumbered(order) if len({*order.values()}) == len(order) else None


def rooted(tree: Mirror) -> tuple[TreeSpec, list[Any]]:
    """The spec and values of a view as those of a tree of its own, with nothing of what lies outside the view."""
    order = {index: i for i, index in enumerate(tree._spec.leaves)}
    return tree._spec.renumbered(order), [tree._values[index] for index in order]

"""rename: the state of modules that moved within their model."""

from collections.abc import Mapping
from typing import Any

from ..state import State, shape_of
from ..text import near
from ..tree import TreeSpec, respec, values_of

Place = tuple[str, tuple[Any, ...], int]  # kind, keys from the root down, number


def rename(state: State, names: Mapping[str, str]) -> State:
    """Let leaves follow modules that moved: `{"old.path": "new.path"}`. Returns the state, changed in place.

    A path is that of a branch, with all under it, or of one leaf. All are renamed at once, so that two may change
    places; of several that fit, the longest counts. Views that were taken before keep the old names.

    The order of names does not matter: the state takes that of the model when it is next used with one. ValueError
    where there is no such path, where two leaves would have one path, or for a view of a part of the state.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> state = fluxpy.setup(fluxpy.Adam(), model)
    >>> _ = fluxpy.surgery.rename(state, {"1": "head", "0": "body.first"})
    >>> [path for path, _ in fluxpy.leaves(state)]
    ['body.first.weight', 'body.first.bias', 'head.weight', 'head.bias']
    """
    if not isinstance(state, State):
        raise TypeError(f"rename takes the whole state that setup returns, but got {type(state).__name__}")
    spec = shape_of(state)
    if len(spec.leaves) != len(values_of(state)) or spec.kind in ("slice", "selection"):
        raise ValueError("rename takes the whole state: names of a view are not its own")
    inner = _inner(spec)
    places = [(here.kind, keys, here.index) for keys, here in inner if not here.children]
    paths = [_joined(keys[:i]) for _, keys, _ in places for i in range(1, len(keys) + 1)]
    for old in names:
        if old not in paths:
            raise ValueError(f"rename: the state has no {old!r}; {near(old, dict.fromkeys(paths))}")
    moved = [(kind, _moved(keys, names), index) for kind, keys, index in places]
    new = _spec_of(moved, {keys: here.kind for keys, here in inner})
    if new.duplicate is not None:
        raise ValueError(f"rename: two leaves would have the path {new.duplicate!r}")
    respec(state, new)
    return state


def _joined(keys: tuple[Any, ...]) -> str:
    return ".".join(map(str, keys))


def _inner(spec: TreeSpec) -> list[tuple[tuple[Any, ...], TreeSpec]]:
    """Every place, with the keys from the root down to it."""
    found, todo = [], [((), spec)]
    while todo:
        keys, here = todo.pop()
        found.append((keys, here))
        todo += [((*keys, key), child) for key, child in zip(reversed(here.keys), reversed(here.children), strict=True)]
    return found


def _moved(keys: tuple[Any, ...], names: Mapping[str, str]) -> tuple[Any, ...]:
    """The keys of a place under its new name."""
    for length in range(len(keys), 0, -1):
        new = names.get(_joined(keys[:length]))
        if new is not None:
            return (*new.split("."), *keys[length:])
    return keys


def _spec_of(places: list[Place], kinds: dict[tuple[Any, ...], str]) -> TreeSpec:
    """The tree with leaves at these places; its containers keep the kind that they had."""
    held = {keys[:i] for _, keys, index in places if index >= 0 for i in range(len(keys) + 1)}
    tree: dict[Any, Any] = {}
    for kind, keys, index in places:
        if index < 0 and keys in held:
            continue  # what had nothing has something now
        here = tree
        for key in keys[:-1]:
            here = here.setdefault(key, {})
            if isinstance(here, TreeSpec):
                raise ValueError(f"rename: {_joined(keys)!r} would lie within a leaf")
        if keys[-1] in here:
            raise ValueError(f"rename: two leaves would have the path {_joined(keys)!r}")
        here[keys[-1]] = TreeSpec(kind, index=index)
    return _built(tree, (), kinds)


def _built(tree: Any, keys: tuple[Any, ...], kinds: dict[tuple[Any, ...], str]) -> TreeSpec:
    if isinstance(tree, TreeSpec):
        return tree
    children = tuple(_built(child, (*keys, key), kinds) for key, child in tree.items())
    kind = kinds.get(keys, "record")
    return TreeSpec("record" if kind in ("leaf", "empty") else kind, tuple(tree), children, loose=True)

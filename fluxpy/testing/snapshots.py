"""What training changes, copied, and what differs between two such copies."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..distributed.sharding import local_tensors
from ..leaf import Leaf
from ..pytree import entries_of, is_parameter, places
from ..rule import all_hyperparameters, title
from ..state import State, bind, leaves, require_state
from ..text import join
from ..tree import check_model, walk
from .compare import describe_change, require, same_bits


class Snapshot(dict[str, dict[str, Any]]):
    """What `snapshot` saw, by dotted path and then by name: `taken["head.weight"]["parameter"]`, `["lr"]`, ..."""


class Diff(dict[str, dict[str, str]]):
    """What `diff` found, by dotted path and then by name: `found["head.weight"]["lr"] == "0.001 -> 0.0003"`. Empty, so
    false, where nothing differs. Its text has a line for each path."""

    def __str__(self) -> str:
        lines = (f"{path or '(top)'}: " + ", ".join(map(" ".join, notes.items())) for path, notes in self.items())
        return "\n".join(lines) or "no difference"

    __repr__ = __str__


def snapshot(model: Any, state: State | Leaf | None = None) -> Snapshot:
    """An independent copy of what training changes, by dotted path: parameters ("parameter") and buffers ("buffer"),
    and of a state the hyperparameters by name, "rule", "frozen", "count", and the momenta ("state.m", ...).

    A tied parameter is under its first path, with all its "names". A hyperparameter that occurs more than once in a
    chain has the tuple of its values. ValueError where the state does not belong to the model.
    """
    check_model(model, "snapshot(model, state)")
    spec, values = walk(model)
    taken = Snapshot({path: {"parameter": _copy(values[index])} for index, path in spec.leaves.items()})
    for first, *others in spec.names.values():
        if others:
            taken[first]["names"] = first, *others
    for path, x in _buffers(model):
        taken[path] = {"buffer": _copy(x)}
    if state is not None:
        require_state(state, "snapshot")
        bind(state, model)  # raises where they do not belong together
        for path, leaf in leaves(state):
            taken[path] |= _describe(leaf)
    return taken


def diff(before: Any, after: Any) -> Diff:
    """What differs between two snapshots (or models), bit for bit. See `Diff`.

    >>> model = torch.nn.Linear(2, 1)
    >>> state = setup(Momentum(0.1), model)
    >>> before = snapshot(model, state)
    >>> _ = adjust(freeze(state.weight), 0.2), update(state, model, {"bias": torch.ones(1)})
    >>> print(diff(before, snapshot(model, state)))
    weight: state removed, frozen False -> True, lr 0.1 -> 0.2
    bias: parameter by at most 0.1, count 0 -> 1, state by at most 1
    """
    old, new = (x if isinstance(x, Snapshot) else snapshot(x) for x in (before, after))
    found = Diff()
    for path in old | new:
        if path not in new:
            notes = {_kind(old[path]): "removed"}
        elif path not in old:
            notes = {_kind(new[path]): "added"}
        else:
            notes = _differences(old[path], new[path])
        if notes:
            found[path] = notes
    return found


def require_equal(before: Any, after: Any, where: str) -> None:
    """Two snapshots (or models) are the same, bit for bit."""
    found = diff(before, after)
    require(not found, f"{where}: {found}")


def _kind(entry: dict[str, Any]) -> str:
    return "parameter" if "parameter" in entry else "buffer"


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    notes = {name: "removed" for name in old if name not in new}
    notes |= {name: "added" for name in new if name not in old}
    for name in old:
        if name in new and not same_bits(old[name], new[name]):
            notes[name] = describe_change(old[name], new[name])
    return notes


def _describe(leaf: Leaf) -> dict[str, Any]:
    found: dict[str, Any] = {"rule": None, "frozen": leaf.frozen, "count": leaf.count}
    if leaf.rule is not None:
        found |= {"rule": title(leaf.rule), **_hyperparameters(leaf.rule, taken=set(found))}
    if leaf.state is not None:
        for name, part in entries_of(leaf.state):
            dot = "." if name and not name.startswith("[") else ""
            found[f"state{dot}{name}"] = _copy(part)
    return found


def _hyperparameters(rule: Any, taken: set[str]) -> dict[str, Any]:
    """By name, of inner rules too; one whose name is taken as `rule.<name>`."""
    values = {name: _copy(tuple(found)) for name, found in all_hyperparameters(rule).items()}
    single = {name: found[0] if len(found) == 1 else found for name, found in values.items()}
    return {f"rule.{name}" if name in taken else name: value for name, value in single.items()}


def _buffers(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are no parameters: buffers of modules, and integers and flags in containers."""
    for path, x in places(model):
        if isinstance(x, Tensor) and not is_parameter(x):
            yield path, x
        elif isinstance(x, nn.Module):
            for key, buffer in x.named_buffers(recurse=False, remove_duplicate=False):
                yield join(path, key), buffer


def _copy(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(_copy, x))
    if isinstance(x, Tensor):
        return local_tensors([x.detach()])[0].clone()  # of what is spread over processes, this one's part
    return x

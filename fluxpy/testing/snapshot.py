"""What training changes, copied, and what differs between two such copies."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..match import fit
from ..pytree import Frame, is_parameter, level, unwrap
from ..rule import hyperparameters, title
from ..rule import walk as walk_rules
from ..state import Leaf, State, leaves, spec_of
from ..tree import Spec, walk


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

    A tied parameter stands under its first path, with all its "names". A hyperparameter that stands more than once in
    a chain has the tuple of its values. ValueError where the state does not belong to the model.
    """
    spec, values = walk(model)
    taken = Snapshot({path: {"parameter": _copy(values[index])} for index, path in spec.unique.items()})
    for path, names in all_names(spec).items():
        if len(names) > 1:
            taken[path]["names"] = names
    for path, x in _buffers(model):
        taken[path] = {"buffer": _copy(x)}
    if state is not None:
        fit(spec_of(state), model)
        for path, leaf in leaves(state):
            taken[path] |= _describe(leaf)
    return taken


def _describe(leaf: Leaf) -> dict[str, Any]:
    seen: dict[str, Any] = {"rule": leaf.rule and title(leaf.rule), "frozen": leaf.frozen, "count": leaf._count}
    hypers: dict[str, list[Any]] = {}
    for rule in walk_rules(leaf.rule) if leaf.rule else ():
        for name, v in hyperparameters(rule).items():
            hypers.setdefault(name if name not in seen else f"rule.{name}", []).append(_copy(v))
    frame = Frame(leaf.state)
    parts = zip(frame.spec.accessors(), frame.parts, strict=True)
    seen |= {name: v[0] if len(v) == 1 else tuple(v) for name, v in hypers.items()}
    return seen | {"state" + place.codify(""): _copy(part) for place, part in parts if leaf.state is not None}


def diff(before: Any, after: Any) -> Diff:
    """What differs between two snapshots (or models), bit for bit. See `Diff`.

    >>> model = torch.nn.Linear(2, 1)
    >>> state = setup(Momentum(0.1), model)
    >>> before = snapshot(model, state)
    >>> _ = adjust(freeze(state.weight), 0.2), update(state, model, {"bias": torch.ones(1)})
    >>> print(diff(before, snapshot(model, state)))
    weight: frozen False -> True, lr 0.1 -> 0.2
    bias: parameter by at most 0.1, count 0 -> 1, state by at most 1
    """
    old, new = (x if isinstance(x, Snapshot) else snapshot(x) for x in (before, after))
    found = Diff()
    for path in old | new:
        if path not in old or path not in new:
            whole = "added" if path in new else "removed"
            notes = {next(iter((old | new)[path])): whole}
        else:
            a, b = old[path], new[path]
            notes = {name: "removed" for name in a if name not in b}
            notes |= {name: "added" for name in b if name not in a}
            notes |= {name: how(a[name], b[name]) for name in a if name in b and not same(a[name], b[name])}
        if notes:
            found[path] = notes
    return found


def all_names(spec: Spec) -> dict[str, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = {}
    for path, index in spec.slots:
        found[index] = (*found.get(index, ()), path)
    return {names[0]: names for names in found.values()}


def _buffers(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are no parameters: buffers of modules, and integers and flags in containers."""
    seen: set[int] = set()
    todo = [("", model)]
    while todo:
        path, x = todo.pop()
        x = unwrap(x)
        if isinstance(x, Tensor) and not is_parameter(x):
            yield path, x
        if id(x) in seen or (here := level(x)) is None:
            continue
        seen.add(id(x))
        at = path and f"{path}."
        if isinstance(x, nn.Module):
            yield from ((f"{at}{key}", buffer) for key, buffer in x._buffers.items() if buffer is not None)
        children = zip(reversed(here.keys), reversed(here.children), strict=True)
        todo += ((f"{at}{key}", child) for key, child in children)


def _copy(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(_copy, x))
    return x.detach().clone() if isinstance(x, Tensor) else x


def bits(x: Tensor) -> bytes:
    return x.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and bits(a) == bits(b)
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def how(a: Any, b: Any) -> str:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape):
        wide = torch.complex128 if a.is_complex() else torch.float64
        return f"by at most {(b.detach().cpu().to(wide) - a.detach().cpu().to(wide)).abs().max().item():.3g}"
    old, new = _text(a), _text(b)
    return f"{old} -> {new}" if old != new else f"{a!r} -> {b!r}"


def _text(x: Any) -> str:
    if isinstance(x, Tensor) and x.ndim:
        return f"{dtype_name(x.dtype)}{list(x.shape)}"
    return f"{x:.6g}" if isinstance(x, float) else str(x)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

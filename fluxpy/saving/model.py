"""The tensors of a model by name: what of it is saved, and what of it a saved one fits."""

import reprlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.sharding import copy_whole
from ..leaf import Leaf
from ..pytree import level, unwrap, unwritable
from ..state import State
from ..text import form, join, names_of
from .values import tensor_bytes

MAX_DEPTH = 900


def model_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all tensors of a model, without the buffers of modules that are not persistent."""
    if isinstance(model, State | Leaf) or not (isinstance(model, Tensor | nn.Module) or level(model)):
        raise TypeError(f"model= takes a module or a pytree of tensors, but got {reprlib.repr(model)}")
    names: set[str] = set()
    todo = [("", unwrap(model), 0)]
    while todo:
        path, x, depth = todo.pop()
        if isinstance(x, Tensor):
            if path in names:
                raise ValueError(f"two tensors of the model have one path, {path!r}; rename one of them")
            if nn.parameter.is_lazy(x):
                raise ValueError(f"{path!r} of the model is lazy and has no shape yet; run the model once first")
            names.add(path)
            yield path, x
            continue
        children = _children(path, x)
        if children and depth > MAX_DEPTH:
            raise ValueError(f"the model is nested deeper than {MAX_DEPTH} levels, or holds itself")
        for key, child in reversed(children):
            todo.append((join(path, key), unwrap(child), depth + 1))


def _children(path: str, x: Any) -> list[tuple[Any, Any]]:
    """(key, child) of a module or container; of a module also the persistent buffers."""
    inside = level(x)
    if inside is None:
        return []
    children = list(zip(inside.keys, inside.children, strict=True))
    if isinstance(x, nn.Module):
        if type(x).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{path!r} has a get_extra_state, which is not saved; save what it gives as extra")
        children += [(key, b) for key, b in x._buffers.items() if key not in x._non_persistent_buffers_set]
    return children


def match_tensors(own: dict[str, Tensor], saved: dict[str, Tensor]) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """(own, saved) of each tensor that is to be overwritten, and a line for each that does not fit."""
    pairs: list[tuple[Tensor, Tensor]] = []
    problems: list[str] = []
    tied: dict[int, Tensor] = {}  # by the id of the own one, what was saved under its first name
    for name, target in own.items():
        if name not in saved:
            continue
        first = tied.setdefault(id(target), saved[name])
        problem = _problem(target, saved[name])
        if problem is None and first is not saved[name] and tensor_bytes(first) != tensor_bytes(saved[name]):
            problem = "expected one tied tensor, got a tensor of its own with other values"
        if problem is not None:
            problems.append(f"{name!r}: {problem}")
        elif first is saved[name]:
            pairs.append((target, saved[name]))
    for kind, names in (("missing", own.keys() - saved), ("unexpected", saved.keys() - own.keys())):
        if names:
            problems.append(f"{kind}: {names_of(sorted(names))}")
    return pairs, problems


def write_tensors(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Overwrite what `match_tensors` paired. All was checked there, so that none of these fails."""
    with torch.no_grad():
        for own, saved in pairs:
            copy_whole(own, saved)
    torch.clear_autocast_cache()  # an autocast around this has cast the old weights


def _problem(target: Tensor, saved: Tensor) -> str | None:
    """Why a tensor cannot be overwritten by a saved one."""
    expected, got = form(target.shape, target.dtype), form(saved.shape, saved.dtype)
    if expected != got:
        return f"expected {expected}, got {got}"
    if any(t.layout is not torch.strided or t.is_meta for t in (target, saved)):
        return "expected a dense tensor"
    if unwritable(target):
        return "cannot be written in place (it is expanded, or was made in inference mode)"
    return None

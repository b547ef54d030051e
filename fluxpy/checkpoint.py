"""save and load: model, state and what else a run needs in one file, whole or not at all."""

import os
import reprlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .files import read, write
from .pytree import level, unwrap, unwritable
from .state import Leaf, State
from .statedict import load_state_dict, state_dict
from .text import form, names_of

_DEPTH = 100  # of lists and dicts in extra


def save(path: str | os.PathLike[str], *, model: Any = None, state: State | Leaf | None = None, **extra: Any) -> None:
    """Write a model, a state and any plain data to one file, which a crash at any instant leaves old or new, not torn.

    Of a module the parameters and persistent buffers are saved, by the names of `model.state_dict()` without those of
    wrappers; of any other model its tensors, by dotted path. `extra` takes numbers, strings, bools, None, tensors, and
    lists, tuples and dicts of them. ValueError names what cannot be saved; OSError comes with the path. Then, too, the
    old file is whole. The file is written beside `path`, flushed to the disk and renamed.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/run.flux"
    >>> model = torch.nn.Linear(2, 3)
    >>> state = setup(Adam(0.1), model)
    >>> save(path, model=model, state=state, epoch=3)
    >>> load(path, model=model, state=state)
    {'epoch': 3}
    """
    data: dict[str, Any] = {"model": None, "state": None if state is None else state_dict(state)}
    if model is not None:
        shared: dict[int, Tensor] = {}
        data["model"] = {name: _dense(f"model {name!r}", t, shared) for name, t in _tensors(model)}
    data["extra"] = {name: _plain(name, value, {}) for name, value in extra.items()}
    write(os.fsdecode(path), data)


def load(
    path: str | os.PathLike[str],
    *,
    model: Any = None,
    state: State | Leaf | None = None,
    strict: bool = True,
    hyperparameters: Literal["load", "keep"] = "load",
) -> dict[str, Any]:
    """Read what `save` wrote into this model and this state, in place, and return the extra data (tensors on the CPU).

    All of it, or nothing: names, shapes and dtypes of both are checked first, and ValueError lists what does not fit.
    With `strict=False` what does not fit stays as it is, and a warning lists it. `hyperparameters="keep"` leaves those
    of the state, as for a resumed run with a new rate; for more see `load_state_dict`.

    A file that is truncated, altered, of another kind or of a newer fluxpy is a ValueError that names file and cause.
    Nothing in a file is ever run.
    """
    at = f"load: {os.fsdecode(path)!r}"
    data = read(os.fsdecode(path), at)
    if not _sound(data):
        raise ValueError(f"{at} does not hold what fluxpy.save writes")
    for name, wanted in (("model", model), ("state", state)):
        if wanted is not None and data[name] is None:
            raise ValueError(f"{at} holds no {name}; it was saved without one")
    pairs, problems = ([], []) if model is None else _matched(dict(_tensors(model)), data["model"])
    if problems and strict:
        raise ValueError(f"{at} does not fit the model; nothing was loaded" + "".join(problems))
    if state is not None:
        try:
            report = load_state_dict(state, data["state"], strict=strict, hyperparameters=hyperparameters)
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from error
        problems += [f"\n  state: {report}"] if any(report[1:6]) else []
    with torch.no_grad():
        for here, saved in pairs:  # all was checked: nothing can fail from here on
            here.copy_(saved)
    if problems:
        warnings.warn(f"{at} fits in part" + "".join(problems), stacklevel=2)
    return data["extra"]


def _sound(data: Any) -> bool:
    """Whether this is laid out as `save` does it. What the state is, `load_state_dict` checks."""
    if not isinstance(data, dict) or set(data) != {"model", "state", "extra"} or not isinstance(data["extra"], dict):
        return False
    model = {} if data["model"] is None else data["model"]
    return isinstance(model, dict) and all(isinstance(t, Tensor) for t in model.values())


# --- What a model holds -------------------------------------------------------------------------------------------


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all tensors of a model but the buffers that say they are not to be saved."""
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
        elif (here := level(x)) is not None:
            if depth > 900:
                raise ValueError("the model is nested deeper than 900 levels, or holds itself")
            inside = list(zip(here.keys, here.children, strict=True))
            if isinstance(x, nn.Module):
                if type(x).get_extra_state is not nn.Module.get_extra_state:
                    raise ValueError(f"{path!r} has a get_extra_state, which is not saved; save what it gives as extra")
                inside += [(k, b) for k, b in x._buffers.items() if k not in x._non_persistent_buffers_set]
            for key, child in reversed(inside):
                todo.append((f"{path}.{key}" if path else str(key), unwrap(child), depth + 1))


def _matched(ours: dict[str, Tensor], saved: dict[str, Tensor]) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """What goes where, and what does not fit."""
    pairs: list[tuple[Tensor, Tensor]] = []
    problems: list[str] = []
    first: dict[int, Tensor] = {}
    for name, here in ours.items():
        if name not in saved:
            continue
        came, known = saved[name], first.setdefault(id(here), saved[name])
        if (came.shape, came.dtype) != (here.shape, here.dtype):
            problems.append(
                f"\n  {name!r} was saved as {form(came.shape, came.dtype)}, here it is {form(here.shape, here.dtype)}"
            )
        elif came.layout is not torch.strided or here.layout is not torch.strided or here.is_meta or came.is_meta:
            problems.append(f"\n  {name!r} is not dense")
        elif unwritable(here):
            problems.append(f"\n  {name!r} cannot be written in place (expanded, or made in inference mode)")
        elif known is not came and _bytes(known) != _bytes(came):
            problems.append(f"\n  {name!r} is tied here, but was saved as a tensor of its own with other values")
        elif known is came:
            pairs.append((here, came))
    for kind, names in (("missing", ours.keys() - saved), ("unexpected", saved.keys() - ours.keys())):
        problems += [f"\n  {kind}: {names_of(sorted(names))}"] * bool(names)
    return pairs, problems


def _bytes(t: Tensor) -> bytes:
    """NaNs too are equal to themselves this way."""
    return t.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


# --- Plain data ---------------------------------------------------------------------------------------------------


def _dense(place: str, t: Tensor, shared: dict[int, Tensor]) -> Tensor:
    """The numbers of a tensor and nothing else: no history, no class, nothing of the storage it is a part of."""
    data = t.detach().resolve_conj().resolve_neg()
    if type(data) is not Tensor or data.layout is not torch.strided or data.is_meta:
        raise ValueError(f"save: {place} must be a dense tensor with numbers, but is {type(t).__name__}, {t.layout}")
    if id(t) not in shared:
        shared[id(t)] = data.clone() if data.untyped_storage().nbytes() > data.nbytes else data
    return shared[id(t)]


def _plain(place: str, value: Any, shared: dict[int, Tensor], depth: int = 0) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # an enumeration is more than data
    if value is None:
        return None
    if isinstance(value, Tensor):
        return _dense(f"extra {place!r}", value, shared)
    if depth == _DEPTH:
        raise ValueError(f"save: extra {place[:40]!r}... is nested deeper than {_DEPTH} levels, or holds itself")
    if type(value) in (list, tuple):
        return type(value)([_plain(f"{place}[{i}]", v, shared, depth + 1) for i, v in enumerate(value)])
    if type(value) is dict and all(type(key) in (str, int) for key in value):
        return {key: _plain(f"{place}[{key!r}]", v, shared, depth + 1) for key, v in value.items()}
    raise ValueError(
        f"save: extra {place!r} is {reprlib.repr(value)}; what can be saved is numbers, strings, bools, None, tensors, "
        "and lists, tuples and dicts (by strings or whole numbers) of them"
    )

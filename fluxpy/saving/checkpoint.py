"""save and load: model, state and anything else that a run needs in one file, whole or not at all."""

import os
import reprlib
import warnings
from collections import OrderedDict
from typing import Any, Literal, Never

import numpy as np
import torch
from torch import Tensor

from ..distributed.sharding import any_dtensor, is_dtensor
from ..leaf import Leaf
from ..state import State, require_training_weights, tree_context
from .file import read, write
from .format import SCALARS, plain_scalar
from .model import match_tensors, model_tensors, write_tensors
from .state_dict import Report, changed_rules, load_state_dict, state_dict

MAX_DEPTH = 100  # of lists and dicts in extra


def save(
    path: str | os.PathLike[str],
    *refused: Never,
    model: Any = None,
    state: State | Leaf | None = None,
    **extra: Any,
) -> None:
    """Write a model, a state and any plain data to one file, which a crash at any instant leaves old or new, not torn.

    Of a module the parameters and persistent buffers are saved, by the names of `model.state_dict()` without those of
    wrappers; of any other model its tensors, by dotted path. `extra` takes numbers, strings, bools, None, tensors, and
    lists, tuples and dicts of them. ValueError names what cannot be saved; OSError comes with the path. Then, too, the
    old file is whole. The file is written beside `path`, flushed to the disk and renamed; a file that is replaced keeps
    its permissions. Anything but a regular file (a device, a pipe) is refused.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/run.flux"
    >>> model = torch.nn.Linear(2, 3)
    >>> state = setup(Adam(0.1), model)
    >>> save(path, model=model, state=state, epoch=3)
    >>> load(path, model=model, state=state)
    {'epoch': 3}
    """
    _refuse_positions("save", path, refused)
    _require_one_process("save", model, state)
    tensors = None if model is None else dict(model_tensors(model))
    plain = None if state is None else state_dict(state)
    if model is not None and state is not None:
        require_training_weights(state, "save(..., model=, state=)")
    write_checkpoint(path, tensors, plain, extra)


def write_checkpoint(
    path: str | os.PathLike[str],
    model: dict[str, Tensor] | None,
    state: dict[str, Any] | None,
    extra: dict[str, Any],
) -> None:
    """What `save` writes, of the tensors of a model by name, and of what `state_dict` gave."""
    data: dict[str, Any] = {"model": None, "state": state}
    if model is not None:
        shared: dict[int, Tensor] = {}
        data["model"] = {name: _dense(f"model {name!r}", t, shared) for name, t in model.items()}
    data["extra"] = {name: _plain(name, value, {}) for name, value in extra.items()}
    write(os.fsdecode(path), data)


def _refuse_positions(verb: str, path: Any, refused: tuple[Any, ...]) -> None:
    if refused or not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(f"{verb} takes the path, and all else by name: {verb}(path, model=model, state=state)")


def load(
    path: str | os.PathLike[str],
    *refused: Never,
    model: Any = None,
    state: State | Leaf | None = None,
    strict: bool = True,
    hyperparameters: Literal["load", "keep"] = "load",
) -> dict[str, Any]:
    """Read what `save` wrote into this model and this state, in place, and return the extra data (tensors on the CPU).

    All of it, or nothing: names, shapes and dtypes of both are checked first, and ValueError lists what does not fit.
    With `strict=False` what does not fit stays as it is, and a warning lists it. `hyperparameters="keep"` leaves those
    of the state, as for a resumed run with a new rate; where `setup` was given other ones than in the saved run and
    those of the file are loaded, a warning says so. For more see `load_state_dict`.

    A file that is truncated, altered, of another kind or of a newer fluxpy is a ValueError that names file and cause.
    Nothing in a file is ever run.
    """
    _refuse_positions("load", path, refused)
    _require_one_process("load", model, state)
    where = f"load: {os.fsdecode(path)!r}"
    data = read(os.fsdecode(path), where)
    if not _is_checkpoint(data):
        raise ValueError(f"{where} does not hold what fluxpy.save writes")
    for name, target in (("model", model), ("state", state)):
        if target is not None and data[name] is None:
            raise ValueError(f"{where} holds no {name}; it was saved without one")
    pairs, problems = ([], []) if model is None else match_tensors(dict(model_tensors(model)), data["model"])
    if problems and strict:
        raise ValueError("\n  ".join([f"{where} does not fit the model; nothing was loaded", *problems]))
    report: Report | None = None
    if state is not None:
        try:
            report = load_state_dict(state, data["state"], strict=strict, hyperparameters=hyperparameters)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not report.complete:
            problems.append(f"state: {report}")
    write_tensors(pairs)
    rules = report.changed if report is not None and hyperparameters == "load" else {}
    if changed := changed_rules(rules, 'hyperparameters="keep"'):
        warnings.warn(f"{where}: {changed}", stacklevel=2)
    if problems:
        warnings.warn("\n  ".join([f"{where} fits in part", *problems]), stacklevel=2)
    return data["extra"]


def _require_one_process(verb: str, model: Any, state: State | Leaf | None) -> None:
    """ValueError for tensors of which each process has a part: one file of one process holds them not."""
    spread = isinstance(state, State | Leaf) and tree_context(state).spread
    if spread or (model is not None and any_dtensor([t for _, t in model_tensors(model)])):
        raise ValueError(
            f"{verb} is for one process, and these tensors are spread over several: give "
            '{"model": model.state_dict(), "state": fluxpy.state_dict(state)} to torch.distributed.checkpoint'
            + (", then load_state_dict what it fills" if verb == "load" else "")
        )


def _is_checkpoint(data: Any) -> bool:
    """Whether this is laid out as `save` does it. The state is checked by `load_state_dict`."""
    if not isinstance(data, dict) or data.keys() != {"model", "state", "extra"} or not isinstance(data["extra"], dict):
        return False
    model = data["model"]
    if not isinstance(model, dict):
        return model is None
    return all(isinstance(name, str) and isinstance(t, Tensor) for name, t in model.items())


def _dense(place: str, t: Tensor, shared: dict[int, Tensor]) -> Tensor:
    """The numbers of a tensor and nothing else: no history, no class, nothing of the storage it is a part of.

    `shared` has those done before, by the id of the tensor: a tied one is saved once.
    """
    if is_dtensor(t):
        raise ValueError(f"save: {place} is spread over processes; save it by torch.distributed.checkpoint")
    data = t.detach().resolve_conj().resolve_neg()
    if type(data) is not Tensor or data.layout is not torch.strided or data.is_meta:
        raise ValueError(f"save: {place} must be a dense tensor with numbers, but is {type(t).__name__}, {t.layout}")
    if id(t) not in shared:
        is_part = data.untyped_storage().nbytes() > data.nbytes
        shared[id(t)] = data.clone() if is_part else data
    return shared[id(t)]


def _plain(place: str, value: Any, shared: dict[int, Tensor], depth: int = 0) -> Any:
    """A copy of the containers in `value`, which may hold plain data only."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, SCALARS):
        return None if value is None else plain_scalar(value)
    if isinstance(value, Tensor):
        return _dense(f"extra {place!r}", value, shared)
    if depth == MAX_DEPTH:
        raise ValueError(f"save: extra {place[:40]!r}... is nested deeper than {MAX_DEPTH} levels, or holds itself")
    if type(value) in (list, tuple):
        return type(value)([_plain(f"{place}[{i}]", v, shared, depth + 1) for i, v in enumerate(value)])
    if type(value) in (dict, OrderedDict) and all(type(key) in (str, int) for key in value):
        return {key: _plain(f"{place}[{key!r}]", v, shared, depth + 1) for key, v in value.items()}
    raise ValueError(
        f"save: extra {place!r} is {reprlib.repr(value)}; what can be saved is numbers, strings, bools, None, tensors, "
        "and lists, tuples and dicts (by strings or whole numbers) of them"
    )

"""averaged: the weights to evaluate with, in the model's own parameters for a while."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .distributed.parallel import reshard
from .leaf import Leaf, Record
from .rule import at
from .state import State, bind, tree_context
from .text import form, names_of


@contextmanager
def averaged(state: State | Leaf, model: Any) -> Iterator[list[str]]:
    """Within the block, the model's parameters hold the weights to evaluate with; after it their own, bit for bit.

    These weights are what rules give that have an `evaluation`: `Averaged`, and rules of your own. Where there is none
    nothing changes; nor for leaves that are frozen or never stepped. `as` gives the paths of those that changed. Takes
    the state or a view of it with the matching branch of the model; a block within a block changes what is left.

    The training weights are put back whatever happens in the block. In there they are a copy, the only one that is
    made; what else is written to these parameters meanwhile is lost, with a warning. `update` and what calls it, and
    saving, loading or taking over the state beside the model, are refused there with RuntimeError. A copy of the model
    made in there has the weights to evaluate with.

    >>> model = {"w": torch.ones(1)}
    >>> state = setup(Averaged(Descent(1.0), decay=0.5), model)
    >>> for _ in range(3):
    ...     _ = update(state, model, {"w": torch.ones(1)})
    >>> with averaged(state, model) as paths:
    ...     print(paths, model["w"])
    ['w'] tensor([-1.2500])
    >>> model["w"]
    tensor([-2.])
    """
    if not isinstance(state, State | Leaf):
        raise TypeError(f"averaged takes (state, model), but the first is {type(state).__name__}")
    binding, aside = bind(state, model), tree_context(state).aside
    exchanged: list[tuple[Record, Tensor, Tensor]] = []
    versions: list[int] = []
    try:
        for record, x, path in zip(binding.records, binding.local, binding.paths, strict=True):
            if id(record) not in aside and (value := _evaluation(record, x, path)) is not None:
                own = x.detach().clone()
                exchanged.append((record, x, own))
                aside[id(record)] = own
                _write(x, value)
        binding.note_writes()
        versions = [_version(x) for _, x, _ in exchanged]
        torch.clear_autocast_cache()  # of an autocast around the block: it has cast the other weights
        paths = dict(zip(map(id, binding.records), binding.paths, strict=True))
        yield [paths[id(record)] for record, _, _ in exchanged]
    finally:
        changed = [record for (record, x, _), old in zip(exchanged, versions, strict=False) if _version(x) != old]
        if binding.spread:
            reshard(model)
        for record, x, own in exchanged:
            _write(x, own)
            aside.pop(id(record), None)
        binding.note_writes()
        torch.clear_autocast_cache()
        if changed:
            lost = names_of([path for r, path in zip(binding.records, binding.paths, strict=True) if r in changed])
            warnings.warn(f"what was written to {lost} within fluxpy.averaged is lost", stacklevel=3)


def _evaluation(record: Record, x: Tensor, path: str) -> Tensor | None:
    """The weights to evaluate with; None where they are the parameter itself."""
    rule, count = record.rule, record.numbers.count
    if rule is None or record.frozen or not rule.evaluates or record.tensors is None or record.untrained:
        return None
    try:
        with torch.no_grad():
            value = at(rule, max(count - 1, 0)).evaluation_any(
                record.state, x
            )  # with the hyperparameters of the last step
    except Exception as error:
        error.add_note(f"in the evaluation of the rule {rule!r} of the parameter {path!r}")
        raise
    if not isinstance(value, Tensor) or (value.shape, value.device) != (x.shape, x.device):
        got = form(value.shape, value.dtype) if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"the evaluation of the rule {rule!r} of the parameter {path!r} gave {got}; it must be like the "
            f"parameter, {form(x.shape, x.dtype)} on {x.device}"
        )
    return None if value is x else value


def _write(x: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        x.copy_(value)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version

"""averaged: the weights to evaluate with, in the model's own parameters for a while."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .binding import Binding
from .context import Context
from .distributed.parallel import reshard
from .leaf import Leaf, Record
from .pytree import uncast
from .rule import at
from .state import State, bind, require_state, tree_context
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
    require_state(state, "averaged")
    binding = bind(state, model)
    exchange = Exchange(binding, tree_context(state))
    try:
        exchange.begin()
        yield exchange.paths
    finally:
        try:
            lost = exchange.written()
            if binding.spread:
                reshard(model)
            exchange.end()
        except BaseException:  # an interrupt came in between
            exchange.end()
            raise
        if lost:
            warnings.warn(f"what was written to {names_of(lost)} within fluxpy.averaged is lost", stacklevel=3)


class Exchange:
    """Parameters that hold their weights to evaluate with, from `begin` to `end`. Their training weights are aside."""

    def __init__(self, binding: Binding, context: Context) -> None:
        self.binding, self.context = binding, context
        self.held: list[tuple[str, Record, Tensor, Tensor]] = []  # path, leaf, parameter and its training weights
        self.versions: list[int] = []  # of the parameters, as they were left

    def begin(self) -> None:
        """Put the weights to evaluate with in, but where they are in already. `end` also undoes one that failed."""
        binding, aside = self.binding, self.context.aside
        self.context.settle()
        for record, x, path in binding.leaves:
            if id(record) not in aside and (value := _evaluation(record, x, path)) is not None:
                own = x.detach().clone()
                self._keep(path, record, x, own)
                _write(x, value)
        binding.note_writes()
        self.versions = [_version(x) for _, _, x, _ in self.held]
        torch.clear_autocast_cache()  # of an autocast around the block: it has cast the other weights

    def resume(self, training: Mapping[str, Tensor]) -> None:
        """Begin where others put the weights to evaluate with in: these are the training weights, by path."""
        binding = self.binding
        for record, x, path in binding.leaves:
            if path in training:
                self._keep(path, record, x, training[path])

    def _keep(self, path: str, record: Record, x: Tensor, own: Tensor) -> None:
        self.held.append((path, record, x, own))
        self.context.aside[id(record)] = own

    @property
    def paths(self) -> list[str]:
        """Of the parameters that hold other weights."""
        return [path for path, *_ in self.held]

    @property
    def training(self) -> dict[str, Tensor]:
        """The training weights, by path."""
        return {path: own for path, _, _, own in self.held}

    def written(self) -> list[str]:
        """The paths of those that somebody wrote to since."""
        return [path for (path, _, x, _), old in zip(self.held, self.versions, strict=False) if _version(x) != old]

    def end(self) -> None:
        """Put the training weights back, bit for bit. After an interrupt it goes on where it was."""
        while self.held:
            _, record, x, own = self.held[-1]
            _write(x, own)
            self.context.aside.pop(id(record), None)
            self.held.pop()
        self.versions = []
        self.binding.note_writes()
        torch.clear_autocast_cache()


def _evaluation(record: Record, x: Tensor, path: str) -> Tensor | None:
    """The weights to evaluate with; None where they are the parameter itself."""
    rule, count = record.rule, record.numbers.count
    if rule is None or record.frozen or not rule.evaluates or record.tensors is None or record.untrained:
        return None
    try:
        with torch.no_grad(), uncast():
            now = at(rule, max(count - 1, 0))  # with the hyperparameters of the last step
            value = now.evaluation_any(record.state, x)
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

"""Any data as epochs of batches, and what a batch holds."""

import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import trainables
from .core import modules_in, open_data, outside, require_batches, takes

TARGETS = ("target", "targets", "label", "labels", "y")


class Source:
    """Batches for each epoch, of any data that `Learner.fit` takes."""

    def __init__(self, data: Any, name: str) -> None:
        self.data, self.name = data, name
        self.loader: Any = None  # what is gone through at present
        self.last: Any = None  # the last batch that was skipped, or that came while others go on
        self.makes = callable(data) and not hasattr(data, "__iter__")
        if not self.makes:
            require_batches(data, name)
        self.each = isinstance(data, list | tuple) and len(data) > 0 and all(map(_holds_batches, data))
        if not self.makes and not self.each:
            self.loader = data

    def length(self, epoch: int | None = None) -> int | None:
        """How many batches an epoch has, by default the present one, if that is known."""
        try:
            return len(self.data[epoch] if self.each and epoch is not None else self.loader)
        except (TypeError, NotImplementedError):  # also of a torch DataLoader over what has no length
            return None

    def total(self, epochs: int) -> int | None:
        """How many batches all epochs have together, if known. Where a callable makes them: all like the present."""
        if self.each:
            lengths = [self.length(epoch) for epoch in range(epochs)]
            return None if None in lengths else sum(n for n in lengths if n is not None)
        length = self.length(0)
        return None if length is None else length * epochs

    def need(self, epochs: int, left: int) -> None:
        """ValueError where this cannot last for so many epochs, of which some are left."""
        if self.each and len(self.data) < epochs:
            raise ValueError(f"{self.name} has the data of {len(self.data)} epochs, but epochs={epochs}")
        if self.each and len(self.data) > epochs:
            warnings.warn(
                f"{self.name} is a list of {len(self.data)}, of which each epoch takes one: with epochs={epochs} the "
                "rest is not used. Other data to validate on: learner.validate(data), in a callback at epoch_end",
                stacklevel=outside(),
            )
        if any(self.length(epoch) == 0 for epoch in (range(epochs - left, epochs) if self.each else (0,))):
            raise ValueError(f"{self.name} {_EMPTY}")
        if left > 1 and isinstance(self.data, Iterator):
            raise ValueError(
                f"{self.name} is an iterator, which lasts for one epoch, but epochs={epochs}; pass what can be gone "
                "through again, or a callable that makes a fresh iterable for each epoch"
            )

    def make(self, epoch: int) -> None:
        """Set `loader` to this epoch's iterable."""
        if self.each:
            self.loader = self.data[epoch]
        elif self.makes:
            self.loader = self.data(epoch) if _takes_epoch(self.data) else self.data()
        if self.each or self.makes:
            require_batches(self.loader, f"what {self.name} has for epoch {epoch}")

    def tell_epoch(self, epoch: int) -> None:
        """Have each part of the loader that has a `set_epoch`, as samplers that give processes their share, take it."""
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        parts = [getattr(self.loader, name, None) for name in ("dataset", "sampler")]
        parts += [batch_sampler, getattr(batch_sampler, "sampler", None), self.loader]
        for part in {id(part): part for part in parts}.values():
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)

    def batches(self, skip: int = 0, may_end: bool = False) -> Iterator[Any]:
        """The batches of this epoch after the first `skip`, of which there may be fewer if `may_end`. The first is
        fetched at once, so that the order of the data is drawn here and not after events that may draw too."""
        batches = iter(self.loader)
        for skipped in range(skip):
            batch = next(batches, _END)
            if batch is _END and skipped and may_end:
                break
            if batch is _END:
                raise ValueError(f"{self.name} has {skipped} batches, but the saved run had done {skip} of this epoch")
            self.last = batch
        if skip:
            return batches
        first = next(batches, _END)
        if first is _END:
            raise ValueError(f"{self.name} {_EMPTY}")
        return chain([first], batches)

    def generators(self) -> list[Any]:
        """What the data is drawn from, wherever the loader holds it: in samplers, in the data set, in lists of them."""
        found: list[Any] = []
        seen: dict[int, Any] = {}
        todo = [(self.loader, 0)]
        while todo and len(seen) < _MOST:
            x, depth = todo.pop(0)
            if id(x) in seen or depth > _DEEP:
                continue
            seen[id(x)] = x
            if isinstance(x, _GENERATORS):
                found.append(x)
            elif isinstance(x, list | tuple | Mapping):
                inside = list(x.values() if isinstance(x, Mapping) else x) if len(x) <= _MANY else []
                todo += [(part, depth + 1) for part in inside]
            elif hasattr(x, "__dict__") and not isinstance(x, Tensor | nn.Module | type | ModuleType):
                todo += [(part, depth + 1) for part in vars(x).values()]
        return found


_END = object()
_EMPTY = "has no batch: it is empty, or an iterator that was used up before"
_GENERATORS = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
_DEEP, _MANY, _MOST = 5, 64, 2000  # how far, in how long lists and in how many objects generators are looked for


def split(batch: Any) -> tuple[Any, Any]:
    """Input and target of a batch; target None where it cannot be told.

    Of a tuple or list the last is the target; of a dict what is called `target`, `label` or `y` (or their plurals).
    One thing before the target of a tuple is the input as it is; several stay a tuple. What is left of a dict is one.
    """
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    if isinstance(batch, Mapping):
        names = [name for name in batch if name in TARGETS]
        if len(names) == 1 and len(batch) > 1:
            return {name: x for name, x in batch.items() if name != names[0]}, batch[names[0]]
    return batch, None


def samples_of(*parts: Any) -> int:
    """How many samples a batch has: the rows of the first tensor that has some, or how many dicts are listed."""
    for part in parts:
        if is_by_sample(part):
            return len(part)
        for tensor in [part] if isinstance(part, Tensor) else open_data(part)[0]:
            if tensor.ndim:
                return tensor.shape[0]
    return 1


def is_by_sample(x: Any) -> bool:
    """Whether this lists a dict for each sample, as detection has it: rows in one are not samples."""
    return isinstance(x, list | tuple) and len(x) > 0 and all(isinstance(part, Mapping) for part in x)


def call(model: Any, input: Any) -> Any:
    """The output: a tuple is several arguments, a dict keywords."""
    try:
        if isinstance(input, Mapping):
            return model(**input)
        return model(*input) if type(input) is tuple else model(input)
    except TypeError as error:
        if isinstance(input, Mapping):
            error.add_note(f"of a batch that is a dict the model gets keywords: {', '.join(map(str, input))}")
        elif type(input) is tuple:
            error.add_note(f"of a batch of {len(input) + 1} the last is the target, and the model gets the others")
        raise


def kind(batch: Any) -> str:
    """What a batch is, in messages."""
    if isinstance(batch, Mapping):
        return f"a dict with {', '.join(map(repr, batch))}"
    return f"a tensor of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Modules in evaluation mode for a while, then each as it was."""
    before = [(module, module.training) for module in modules_in(model)]
    for module, _ in before:
        module.eval()
    try:
        yield
    finally:
        for module, training in before:
            if module.training != training:
                module.train(training)  # in its own way, as it went into evaluation mode
        for module, training in before:
            module.training = training


def move(model: Any, device: torch.device, held: bool) -> None:
    """Put a model on a device, in place."""
    tensors = trainables(model)
    if all(t.device.type == device.type and device.index in (None, t.device.index) for t in tensors):
        return
    if held:
        raise ValueError(f"the model is not on {device}, for which its state was not made; move it before setup")
    if not isinstance(model, nn.Module):
        raise ValueError(f"device={str(device)!r} moves modules; put the tensors of this model there yourself")
    model.to(device)


def _takes_epoch(make: Callable[..., Any]) -> bool:
    """Whether its first argument is an epoch: one that it needs, or that is called so."""
    try:
        return next(iter(inspect.signature(make).parameters), None) == "epoch" or not takes(make)
    except ValueError:  # it has no signature to look at
        return False


def _holds_batches(x: Any) -> bool:
    """Whether this is itself an iterable of batches, and no batch."""
    if isinstance(x, list):
        return all(isinstance(part, tuple | list | Mapping) for part in x)
    return hasattr(x, "__iter__") and not isinstance(x, Tensor | np.ndarray | tuple | Mapping | str | bytes)

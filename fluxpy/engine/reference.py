"""The reference path: a rule's `apply`, leaf by leaf. All other ways are tested against it.

Everything that can fail is worked out first, into new tensors; then it is written, in place or into copies.
"""

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..context import Context, remembered, require_finite
from ..leaf import Numbers, Record
from ..pytree import apart, are_apart, is_unseen, is_wrapped, partition, shares
from ..rule import Assign, Reduce, Rule, at
from ..text import note
from .step import Prepare, Request


class ReferenceUnit:
    """One leaf on its way through its rule. Unless `inplace`, its result is not written where the leaf is, but given to
    another record by `store`."""

    laid_out = False

    def __init__(
        self, record: Record, x: Tensor, place: int, path: str, context: Context, *, inplace: bool = True
    ) -> None:
        self.inplace = inplace
        self.record, self.x, self.place, self.path, self.context = record, x, place, path, context
        self.dx: Tensor | None = None
        self.value: Any = None  # what the parameter becomes, once that is worked out
        self.change: Any = None  # or what will be subtracted from it where it is
        self.own: Numbers | None = None  # what it gave the record last

    def prepare(self, grads: Sequence[Any]) -> Prepare:
        self.dx = grads[self.place]
        self.rule = self._rule_now()
        record = self.record
        self.state = record.fresh_state(self.x, self.path) if record.tensors is None else record.state
        steps, answer = self.rule.steps(self.state, self.x, self.dx), None
        while True:
            try:
                reduce = steps.send(answer)
                parts = self._parts(reduce)
            except StopIteration as done:
                self._work_out(done.args[0] if done.args else None)
                return
            except Exception as error:
                note(error, f"in the rule {self.rule!r} of the parameter {self.path!r}")
                raise
            if reduce.rule.over == "tree":
                answer = yield Request(self.rule, reduce, parts, (self.place,), (self.path,))
            elif self.context.spread:
                answer = (yield Request(self.rule, reduce, parts, (self.place,), (self.path,)))[0]
            else:
                answer = parts[0]
                require_finite(answer, reduce, self.context, lambda parts=parts: ([self.path], parts))

    def _parts(self, reduce: Reduce) -> Tensor:
        """What the leaf gives to a total."""
        value = reduce.tensor()
        if self.record.sharding is not None and not value.numel():
            value = value.new_zeros((1,) * value.ndim)  # the empty part of an array, of which nothing is taken
        return reduce.rule.parts([value])

    def _rule_now(self) -> Rule:
        rule, count = self.record.rule, self.record.numbers.count
        assert rule is not None
        try:
            return at(rule, count)
        except Exception as error:
            note(error, f"in a schedule of the parameter {self.path!r}, at its count {count}")
            raise

    def _work_out(self, result: Any) -> None:
        """What is to be written, so that writing it cannot fail."""
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"{self._who()} must return (state, change), but gave {result!r}")
        state, change = result
        self.moved = change is not None
        news, self.skeleton = partition(state)
        held = self.record.numbers.skeleton
        if held is not None and held.spec == self.skeleton.spec and all(map(is_, held.parts, self.skeleton.parts)):
            self.skeleton = held  # which others may hold
        olds, before = partition(self.state) if self.record.tensors is None else (self.record.tensors, held)
        if any([t.device != self.x.device and t.ndim for t in news]):
            raise ValueError(f"{self._who()} gave a state on another device than the parameter's {self.x.device}")
        given = [self.x] if self.dx is None else [self.x, self.dx]
        own = are_apart([*given, *olds, *news, *([change] if type(change) is Tensor else [])])
        self.change = change if self.inplace and self._can_subtract(change, [] if own else given) else None
        self.value = self._new_value(change) if self.change is None else None
        self.olds = olds if before == self.skeleton and all(map(_alike, olds, news)) else []
        if not own:  # never keep memory that others write to: the parameter, the gradient, or the old state's
            news = apart(news, [*given, *([] if self.olds and self.inplace else olds)])
        if self.olds:
            if self.inplace and not own:  # a rule may let its buffers change places
                news = [t.clone() if t is not old and shares(t, olds) else t for old, t in zip(olds, news, strict=True)]
            news = [t if t.dtype == old.dtype else t.to(old.dtype) for old, t in zip(olds, news, strict=True)]
        self.news = news

    def _can_subtract(self, change: Any, others: Sequence[Tensor]) -> bool:
        """Whether it can be subtracted in place: of the same form, and not in memory that is written to by others."""
        x = self.x
        if type(change) is not Tensor or x.is_meta or is_unseen(x) or is_wrapped(change):
            return False
        same = (change.dtype, change.shape, change.device, change.layout) == (x.dtype, x.shape, x.device, torch.strided)
        return same and not shares(change, others)

    def _new_value(self, change: Any) -> Tensor:
        """What the parameter becomes."""
        value = change.value if isinstance(change, Assign) else self.x if change is None else change
        if not isinstance(value, Tensor) or (value.shape, value.device) != (self.x.shape, self.x.device):
            got = f"shape {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else repr(value)
            want = f"it must have the parameter's shape {tuple(self.x.shape)}, on {self.x.device}"
            raise ValueError(f"{self._who()} gave a change of {got}; {want}")
        if value.layout != torch.strided or value.is_meta != self.x.is_meta:
            raise ValueError(f"{self._who()} gave a change that is not a dense tensor: {value.layout}, {value.device}")
        return value.clone() if value is self.x or isinstance(change, Assign) else (self.x - value).to(self.x.dtype)

    def _who(self) -> str:
        return f"the rule {self.rule!r} of the parameter {self.path!r}"

    def store(self, record: Record) -> None:
        """Give a record the new state. In place, each tensor keeps its memory where its shape allows."""
        if self.context.late is not None:
            self.context.late.undo += remembered(record, "tensors", "numbers", "pending", "spread_flags")
        if self.context.flag.up is not None:  # since another leaf was worked out, perhaps
            mask = self.context.flag.mask
            value = self.value if self.change is None else self.x - self.change
            self.value, self.change = mask(self.x, value), None
            self.news = [mask(old, t) for old, t in zip(self.olds, self.news, strict=True)] if self.olds else self.news
        if self.inplace and self.olds:
            self.news = [old if old is t else old.copy_(t) for old, t in zip(self.olds, self.news, strict=True)]
        count = self.record.numbers.count + int(self.moved)
        if self.inplace and record.numbers is not self.own:
            self.context.structure += 1  # another plan may have the leaf in a cohort
        record.tensors, record.numbers, record.pending = self.news, Numbers(count, self.skeleton), None
        self.own = record.numbers

    def drop(self) -> None:
        self.dx = self.state = self.value = self.change = None
        self.news, self.olds = [], []

    def commit(self) -> None:
        if self.change is not None and self.context.flag.up is None:
            self.x.sub_(self.change)  # first: the change may be a tensor of the state
        self.store(self.record)
        if self.moved and self.value is not None:
            self.x.copy_(self.value)
        self.drop()


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.dtype == b.dtype or torch.can_cast(b.dtype, a.dtype))

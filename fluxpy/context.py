"""Context: what all leaves of one state tree share. A copy of a tree, or the result of a pure update, has its own."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .pytree import is_wrapped
from .rule import Reduce
from .text import EVALUATION_WEIGHTS


class SkipUpdate(Exception):
    """Raised inside an update that is to change nothing."""


def reads_at_once(x: Tensor) -> bool:
    """Whether the host may read a number without waiting for a device; under `torch.compile` it cannot read any."""
    return x.is_cpu and not torch.compiler.is_compiling()


class FiniteFlag:
    """Remembers on the device that a number was not finite: which one, where, and in which update.

    On the CPU a bad number raises at once. Elsewhere nothing is read during a step: the flag goes up, masks that update
    and all after it, and `check` reads it when the user asks. What is to be skipped is masked in that update alone.
    """

    def __init__(self) -> None:
        self.bad: Tensor | None = None  # whether a number was bad, 0-dim, on the device
        self.skipped: Tensor | None = None  # whether the update that is under way is to change nothing
        self.up: Tensor | None = None  # either of the two: this masks
        self.first: Tensor | None = None  # of the first bad number: its place among its paths, its kind, the update
        self.kinds: dict[tuple[str, tuple[str, ...]], int] = {}  # what can go wrong, and at which paths, numbered

    def copy(self) -> "FiniteFlag":
        other = FiniteFlag()  # not copy.copy, which torch.compile does not follow before PyTorch 2.13
        other.bad, other.skipped, other.up, other.first = self.bad, self.skipped, self.up, self.first
        other.kinds |= self.kinds
        return other

    def require(self, ok: Tensor, update: int, what: str, paths: tuple[str, ...] = (), place: Tensor | int = 0) -> None:
        """Raise the flag unless `ok`, which the host does not read, or the update is skipped anyway."""
        ok = ok if self.skipped is None else ok | self.skipped.to(ok.device)
        record = torch.full((3,), update, device=ok.device)
        record[0], record[1] = place, self.kinds.setdefault((what, paths), len(self.kinds))
        self.first = record if self.bad is None or self.first is None else torch.where(self.bad, self.first, record)
        self.bad = _either(~ok, self.bad)
        self.up = _either(self.bad, self.skipped)

    def skip(self, ok: Tensor) -> None:
        """Mask the update that is under way unless `ok`, which the host does not read."""
        self.skipped = _either(~ok, self.skipped)
        self.up = _either(self.skipped, self.bad)

    def lower(self) -> None:
        """The update is over; that it was skipped does not concern the next."""
        self.skipped, self.up = None, self.bad

    def read_skip(self) -> None:
        """Wait for the device: SkipUpdate where the update that is under way is to change nothing."""
        skipped = self.skipped
        self.lower()
        if skipped is not None and skipped:
            raise SkipUpdate

    def mask(self, old: Tensor, new: Tensor) -> Tensor:
        """`new`, or `old` where the flag is up."""
        return new if self.up is None else torch.where(self.up.to(old.device), old, new.to(old.dtype))

    def check(self) -> None:
        """Read the flag; where it is up, lower it and raise FloatingPointError."""
        bad, self.bad, self.up = self.bad, None, None
        if bad is not None and self.first is not None and bad:
            place, kind, update = self.first.tolist()
            what, paths = list(self.kinds)[kind]
            where = f" of {paths[place]!r}" if paths else ""
            raise FloatingPointError(f"{what}{where} is not finite, in update {update}; nothing was updated since")


def _either(one: Tensor, other: Tensor | None) -> Tensor:
    return one if other is None else one | other.to(one.device)


def remembered(held: Any, *names: str) -> list[Callable[[], None]]:
    """Calls that set these attributes back to what they are now."""
    return [partial(setattr, held, name, getattr(held, name)) for name in names]


class Late:
    """An update that the device may have skipped, which the host does not know yet. The host counts it; `undo` takes
    that back. It keeps no model and no plan alive."""

    def __init__(self, skipped: Tensor, undo: list[Callable[[], None]]) -> None:
        self.skipped, self.undo, self.event = skipped, undo, None
        if skipped.is_cuda:  # read where it is, it would come after all that is queued by then
            self.skipped = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(skipped, non_blocking=True)
            self.event = torch.cuda.current_stream(skipped.device).record_event()

    def is_skipped(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return bool(self.skipped)


class Context:
    """What all leaves of one tree share.

    `structure` counts the changes of anything but hyperparameters (frozen flags, states, what steps together), and
    `hyper` those of hyperparameters: a plan is valid while both are what they were. `updates` counts the updates asked
    for; `late` is the last one while it may turn out to have been skipped. `size` is the number of leaves. `aside` are
    the training weights of the parameters that hold their weights to evaluate with, by the identity of their records.
    """

    def __init__(self, compile: bool = False, size: int = 1) -> None:
        self.compile, self.size = compile, size
        self.spread = False  # whether any parameter is spread over processes
        self.structure = self.hyper = self.updates = 0
        self.recorded = 0  # pure updates in a row that were recorded to differentiate through
        self.flag = FiniteFlag()
        self.late: Late | None = None
        self.aside: dict[int, Tensor] = {}
        self.partial = False  # whether an update comes leaf by leaf, so that there is no total over the tree
        self.reference_only: set[Any] = set()  # rules that only the reference path can run
        self.uncompiled: set[Any] = set()  # rules that cannot be compiled
        self.not_shared: set[Any] = set()  # rules whose kernel cannot take a number for each leaf
        self.traceable: dict[Any, bool] = {}  # answers to questions about rules (see the engine's tape.py), by question

    def fork(self, size: int | None = None) -> "Context":
        """A context for another tree, with the same options."""
        other = Context(self.compile, self.size if size is None else size)
        other.updates, other.recorded, other.flag = self.updates, self.recorded, self.flag.copy()
        other.reference_only, other.uncompiled = self.reference_only.copy(), self.uncompiled.copy()
        other.not_shared, other.spread = self.not_shared.copy(), self.spread
        return other

    def settle(self) -> None:
        """Take the last update back if the device skipped it. Nobody may look at counts and states before this."""
        if self.late is not None and self.late.is_skipped():
            self.structure += 1
            for back in reversed(self.late.undo):
                back()
        self.late = None

    def require_training_weights(self, records: Iterable[Any], what: str) -> None:
        """RuntimeError where one of these leaves' parameters holds its weights to evaluate with."""
        if self.aside and any(id(record) in self.aside for record in records):
            raise RuntimeError(EVALUATION_WEIGHTS.format(what))

    def __reduce__(self) -> Any:
        return Context, (self.compile,), {"updates": self.updates, "flag": self.flag}


def require_finite(
    total: Tensor, reduce: Reduce, context: Context, shares: Callable[[], tuple[list[str], Tensor]]
) -> None:
    """Act on a total that is not finite as `reduce.nonfinite` says: raise, skip the update, or ignore it.

    `shares` gives the paths of the leaves and what each gave to the total.
    """
    compiling, readable = torch.compiler.is_compiling(), reads_at_once(total)
    if reduce.nonfinite == "ignore" or total.is_meta or (not compiling and is_wrapped(total)):
        return
    if readable and not total.ndim and math.isfinite(total.item()):
        return  # faster than isfinite() of a tensor
    what = f"{type(reduce.rule).__name__}: the norm of the gradient"
    if compiling and reduce.nonfinite == "skip":
        raise ValueError('under torch.compile no number can be read: write nonfinite="raise" or "ignore", not "skip"')
    if readable:
        _refuse(total, reduce, what, shares)
    elif reduce.nonfinite == "skip":
        context.flag.skip(total.isfinite().all())
    else:
        paths, parts = shares()
        context.flag.require(total.isfinite().all(), context.updates, what, tuple(paths), _first_bad(parts))


def require_all_finite(parts: Tensor, reduce: Reduce, context: Context, paths: Sequence[str]) -> None:
    """`require_finite` of totals that each concern one leaf."""
    if reduce.nonfinite == "ignore" or (not torch.compiler.is_compiling() and is_wrapped(parts)):
        return
    if not reads_at_once(parts):
        require_finite(parts, reduce, context, lambda: (list(paths), parts))
    elif len(bad := (~parts.isfinite()).nonzero()):
        place = int(bad[0, 0])
        require_finite(parts[place], reduce, context, lambda: ([paths[place]], parts[place : place + 1]))


def _first_bad(parts: Tensor) -> Tensor:
    bad = ~parts.isfinite()
    return (bad.flatten(1).any(1) if bad.ndim > 1 else bad).long().argmax()


def _refuse(total: Tensor, reduce: Reduce, what: str, shares: Callable[[], tuple[list[str], Tensor]]) -> None:
    if total.isfinite().all():
        return
    if reduce.nonfinite == "skip":
        raise SkipUpdate
    paths, parts = shares()
    where = f"{what}s together"
    if not parts.isfinite().all():
        where = f"{what} of {paths[int(_first_bad(parts))]!r}"
    shown = total.item() if not total.ndim else total.tolist()
    raise FloatingPointError(f'{where} is {shown}; nothing was updated (nonfinite="skip" would go on)')

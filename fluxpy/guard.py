"""Numbers that must be finite. On the CPU a bad one raises at once. Elsewhere nothing is read in a step: a flag on the
device goes up and holds back that update and all after it, and `check` reads it when the user asks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .pytree import is_wrapped
from .rule import Ask


class Skip(Exception):
    """Raised inside an update that is to move nothing."""


def reads_at_once(x: Tensor) -> bool:
    """Whether the host may look at a number without waiting for a device."""
    return x.is_cpu


class Guard:
    """The flag of one state tree: whether a number was bad, and of the first one which, where and when."""

    def __init__(self) -> None:
        self.updates = 0  # how many were asked for
        self.kinds: list[tuple[str, tuple[str, ...]]] = []  # what can go wrong, and at which paths
        self.bad: Tensor | None = None  # 0-dim, on the device, as `first`: kind, place among its paths, update
        self.first: Tensor | None = None
        self.fits: dict[int, Any] = {}  # the model that each view was last used with, by its spec
        self.slow: set[type] = set()  # rules that only the plain path can run
        self.compile = False
        self.uncompiled: set[type] = set()  # rules that cannot be compiled
        self.exact: set[type] = set()  # and those that cannot with other numbers for each leaf

    def __getstate__(self) -> Any:
        return self.__dict__ | {"fits": {}}

    def note(self, ok: Tensor, what: str, paths: tuple[str, ...] = (), place: Tensor | int = 0) -> None:
        """Raise the flag unless `ok`, which the host does not read."""
        if (what, paths) not in self.kinds:
            self.kinds.append((what, paths))
        record = torch.full((3,), self.updates, device=ok.device)
        record[0], record[1] = place, self.kinds.index((what, paths))
        if self.bad is None or self.first is None:
            self.bad, self.first = ~ok, record
        else:
            self.first = torch.where(self.bad, self.first, record)
            self.bad = self.bad | ~ok

    def held(self, old: Tensor, new: Tensor) -> Tensor:
        """`new`, or `old` where the flag is up."""
        return new if self.bad is None else torch.where(self.bad.to(old.device), old, new.to(old.dtype))

    def check(self) -> None:
        """Read the flag; where it is up, take it down and raise."""
        bad, self.bad = self.bad, None
        if bad is not None and self.first is not None and bad:
            place, kind, update = self.first.tolist()
            what, paths = self.kinds[kind]
            where = f" of {paths[place]!r}" if paths else ""
            raise FloatingPointError(f"{what}{where} is not finite, in update {update}; nothing was updated since")


def require_finite(total: Tensor, ask: Ask, shares: Callable[[], list[tuple[str, Tensor]]], guard: Guard) -> None:
    """Act on a total that is not finite as `ask.nonfinite` says: raise, skip the update, or ignore it. `shares` gives
    what each leaf gave to it, by path."""
    if ask.nonfinite == "ignore" or is_wrapped(total):
        return
    name = f"{type(ask.rule).__name__}: the norm of the gradient"
    if ask.nonfinite == "raise" and not reads_at_once(total):
        parts = shares()
        bad = torch.stack([~part.isfinite() for _, part in parts])
        guard.note(total.isfinite(), name, tuple(path for path, _ in parts), bad.long().argmax())
    elif not math.isfinite(total.item()):  # faster than a tensor that says so
        if ask.nonfinite == "skip":
            raise Skip
        path = next((path for path, part in shares() if not part.isfinite()), None)
        where = f"{name} of {path!r}" if path is not None else f"{name}s together"
        raise FloatingPointError(f'{where} is {total.item()}; nothing was updated (nonfinite="skip" would go on)')

"""Schedules: a hyperparameter as a function of the count.

Any callable `count -> value` is one. Those here are plain data, so they print, compare, pickle and can be saved.

The indexing: counts start at 0, and the first update sees `schedule(0)`. What takes n steps is at its start at count 0,
k/n of the way at count k, and at its end from count n on. So a part of n steps takes exactly the n counts 0 to n-1; the
next part begins at count n, where this one would be at its end; no two share a count. A warm-up from 0 spends only the
first update at 0; where that is one too many, give it a `start` such as `peak / warmup`.
"""

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from itertools import pairwise
from typing import Any, dataclass_transform

from .fields import plain

_SHAPES: dict[Any, Any] = {"linear": lambda t: t, "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2}

# A field's name says what it allows, in every class of this file.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("steps", "every", "total", "grow"), ("a whole number above 0", lambda v: v > 0 and v % 1 == 0)),
    **dict.fromkeys(("rate", "power", "div_factor", "final_div_factor"), ("a finite number above 0", lambda v: v > 0)),
    **dict.fromkeys(("start", "end", "peak", "factor", "decay"), ("a finite number", lambda _: True)),
    "warmup": ("a whole number, 0 or more", lambda v: v >= 0 and v % 1 == 0),
    "pct_start": ("a number in [0, 1)", lambda v: 0 <= v < 1),
    "schedule": ("a callable, count -> value", callable),
}


@dataclass_transform(frozen_default=True)
class _Data:
    """A frozen dataclass of plain data, checked when made."""

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = plain(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            if field.name in _ALLOWED and not (value is None and field.default is None):
                want, allows = _ALLOWED[field.name]
                number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
                self._require((number or allows is callable) and allows(value), field.name, want)

    def _require(self, ok: bool, name: str, want: str) -> None:
        if not ok:
            raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r} is not allowed; it must be {want}")


class Schedule(_Data):
    """Base class of the schedules here."""

    def __call__(self, count: int) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, count) -> value")

    def with_total(self, total: int) -> "Schedule":
        """This schedule, with the number of updates filled in where a `segments` leaves it open."""
        return self


class constant(Schedule):
    """`value` at every count."""

    value: Any

    def __call__(self, count: int) -> Any:
        return self.value


class linear(Schedule):
    """From `start` to `end` in `steps` equal steps, then `end`."""

    start: float
    end: float
    steps: int

    def __call__(self, count: int) -> float:
        return _mix(self.start, self.end, min(count / self.steps, 1.0))


class cosine(linear):
    """From `start` to `end` in `steps` steps along half a cosine, then `end` [Loshchilov & Hutter 2017]."""

    def __call__(self, count: int) -> float:
        return _wave(self.start, self.end, count / self.steps)


class polynomial(linear):
    """`end + (start - end) · (1 - count/steps)^power` for `steps` steps, then `end`."""

    power: float = 1.0

    def __call__(self, count: int) -> float:
        return _mix(self.end, self.start, (1 - min(count / self.steps, 1.0)) ** self.power)


class exponential(Schedule):
    """`start · rate^(count/steps)`."""

    start: float
    rate: float
    steps: int = 1

    def __call__(self, count: int) -> float:
        return self.start * self.rate ** (count / self.steps)


class step_decay(Schedule):
    """`start`, times `factor` after every `every` steps."""

    start: float
    factor: float
    every: int

    def __call__(self, count: int) -> float:
        return self.start * self.factor ** (count // self.every)


class warmup_cosine(Schedule):
    """Linearly from `start` to `peak` in `warmup` steps, then along half a cosine to `end` at count `total`."""

    peak: float
    warmup: int
    total: int
    end: float = 0.0
    start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.warmup < self.total, "warmup", f"less than total={self.total}")

    def __call__(self, count: int) -> float:
        if count < self.warmup:
            return _mix(self.start, self.peak, count / self.warmup)
        return _wave(self.peak, self.end, (count - self.warmup) / (self.total - self.warmup))


class one_cycle(Schedule):
    """Up to `peak` in the first `pct_start` of `total` steps, then down, along half a cosine each [Smith 2018].

    From `peak / div_factor` to a `final_div_factor`th of that. PyTorch's `OneCycleLR` has both ends one count earlier.
    A momentum that dips from 0.95 to 0.85 and back: `one_cycle(0.85, n, div_factor=0.85 / 0.95, final_div_factor=1)`.
    """

    peak: float
    total: int
    _: KW_ONLY
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def __call__(self, count: int) -> float:
        start, up = self.peak / self.div_factor, int(self.pct_start * self.total)
        if count < up:
            return _wave(start, self.peak, count / up)
        return _wave(self.peak, start / self.final_div_factor, (count - up) / (self.total - up))


class cosine_restarts(linear):
    """`cosine(start, end, steps)`, again and again [Loshchilov & Hutter 2017, SGDR].

    Each cycle is `grow` times as long as the one before (PyTorch's `T_mult`) and starts `decay` times as high.
    """

    _: KW_ONLY
    grow: int = 1
    decay: float = 1.0

    def __call__(self, count: int) -> float:
        steps = self.steps
        cycle, count = divmod(count, steps) if self.grow == 1 else (0, count)
        while count >= steps:
            cycle, count, steps = cycle + 1, count - steps, steps * self.grow
        return _wave(self.start * self.decay**cycle, self.end, count / steps)


class join(Schedule):
    """One schedule after another: from each boundary on the next, which sees the count since that boundary."""

    schedules: Sequence[Callable[[int], Any]]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(all(map(callable, self.schedules)), "schedules", "callables, count -> value")
        rising = all(a < b and b % 1 == 0 for a, b in pairwise((0, *self.boundaries)))
        want = f"{len(self.schedules) - 1} rising whole numbers above 0, one for each schedule but the first"
        self._require(rising and len(self.boundaries) == len(self.schedules) - 1, "boundaries", want)

    def __call__(self, count: int) -> Any:
        i = bisect_right(self.boundaries, count)
        return self.schedules[i](count - (0, *self.boundaries)[i])


class shifted(Schedule):
    """`schedule`, begun at count `start` (`adjust` restarts none by itself); before that, what it begins with."""

    schedule: Callable[[int], Any]
    start: int

    def __call__(self, count: int) -> Any:
        return self.schedule(max(count - self.start, 0))


class scaled(Schedule):
    """`factor` times what `schedule` gives, of a tuple each element."""

    schedule: Callable[[int], Any]
    factor: float

    def __call__(self, count: int) -> Any:
        value = self.schedule(count)
        return tuple(self.factor * v for v in value) if isinstance(value, tuple) else self.factor * value

    def with_total(self, total: int) -> Schedule:
        inner = self.schedule
        return scaled(inner.with_total(total), self.factor) if isinstance(inner, Schedule) else self


class Segment(_Data):
    """A part of `segments`: `shape`, stretched so that it goes from `start` to `end` in `steps` steps.

    `shape` is "linear", "cosine" (these can be saved) or any function on [0, 1] whose values at 0 and 1 differ.
    """

    shape: str | Callable[[float], float]
    _: KW_ONLY
    end: float
    start: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = (callable(self.shape) or self.shape in _SHAPES) and self._curve(0.0) != self._curve(1.0)
        self._require(ok, "shape", "'linear', 'cosine' or a function on [0, 1] whose values at 0 and 1 differ")

    def _curve(self, t: float) -> float:
        return _SHAPES.get(self.shape, self.shape)(t)

    def at(self, start: float, t: float) -> float:
        """The value at the fraction `t` of the way."""
        first, last = self._curve(0.0), self._curve(1.0)
        return _mix(start, self.end, (self._curve(t) - first) / (last - first))


class segments(Schedule):
    """`Segment`s one after another, then the last one's end. A start left out is the end before it; the first one's, 0.

    The last may leave out its steps and fills up to `total`, the number of updates, which the Learner fills in.

    >>> rate = segments([Segment("linear", end=1.0, steps=2), Segment("cosine", end=0.0)], total=6)
    >>> [round(rate(n), 3) for n in range(7)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    parts: Sequence[Segment]
    total: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = all(isinstance(part, Segment) for part in self.parts) and all(part.steps for part in self.parts[:-1])
        self._require(ok and len(self.parts) > 0, "parts", "Segments, all with steps but perhaps the last")
        taken = sum(part.steps or 0 for part in self.parts)
        fits = self.total is None or (self.total == taken if self.parts[-1].steps else self.total > taken)
        self._require(fits, "total", f"{taken} with these steps, or more where the last segment leaves its steps out")

    def __call__(self, count: int) -> float:
        if self.total is None and self.parts[-1].steps is None:
            raise ValueError("segments: the last segment has no steps; write them, or segments(..., total=10_000)")
        value, left = 0.0, self.total or 0
        for part in self.parts:
            value, steps = value if part.start is None else part.start, part.steps or left
            if count < steps:
                return part.at(value, count / steps)
            value, count, left = part.end, count - steps, left - steps
        return value

    def with_total(self, total: int) -> Schedule:
        return segments(self.parts, total) if self.total is None and self.parts[-1].steps is None else self


def _mix(start: float, end: float, t: float) -> float:
    """The value at the fraction `t` of the way; exactly `start` at 0 and `end` at 1."""
    return (1 - t) * start + t * end


def _wave(start: float, end: float, t: float) -> float:
    return _mix(start, end, _SHAPES["cosine"](min(t, 1.0)))

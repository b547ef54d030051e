"""Rule: an optimiser, or one link of it, written once on one tensor.

A rule is plain data (a frozen dataclass of hyperparameters) with two methods, `init` and `apply`.
It knows nothing of models, trees or training; everything else in fluxpy is built around it.

    Rule                 init, apply on one tensor
    └── StagedRule       steps instead of apply: may ask for a total over the whole tree
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Generator, Iterator
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeAlias, dataclass_transform

import numpy as np
import torch
from torch import Tensor

from .text import unknown

# A hyperparameter as the user writes it is a number, a tuple, a tensor or a schedule (count -> value);
# by the time `apply` sees it, schedules have become values. No static type says both.
Hyper: TypeAlias = Any


def hyper(
    *, default: Any = dataclasses.MISSING, allowed: str | tuple[str, ...] | None = None, fixed: bool = False
) -> Any:
    """Declare a hyperparameter of a rule with the values it allows.

    `allowed` is an interval in the notation of the docs (`"[0, 1)"`, for a tuple: of each element), `"1, 2, ..."` for a
    positive integer, or a tuple of words. A `fixed` field shapes the state, so `adjust` refuses it.

    >>> class Halve(Rule):
    ...     lr: float = hyper(default=0.5, allowed="(0, 1]")
    >>> Halve(lr=2.0)
    Traceback (most recent call last):
        ...
    ValueError: Halve: lr=2.0 is not allowed; it must lie in (0, 1]
    """
    return dataclasses.field(default=default, metadata={"allowed": allowed, "fixed": fixed})


class Ask(NamedTuple):
    """What a `StagedRule` asks between two of its lines: to check a number, and to total it over the tree.

    `part` is this tensor's share, 0-dim. With `across`, the answer is `rule.combine` of the parts of all leaves that
    ask the same in this update; without, it is the part itself. Either way `nonfinite` says what happens where that is
    not finite: "raise", "skip" (the whole update: nothing moves) or "ignore".
    """

    rule: "StagedRule"
    part: Tensor
    across: bool = True
    nonfinite: str = "ignore"


Steps: TypeAlias = Generator[Ask, Tensor, tuple[Any, Any]]


class Assign(NamedTuple):
    """A change that says what the parameter becomes, where subtracting would round differently."""

    value: Tensor


@dataclass_transform(frozen_default=True, field_specifiers=(hyper, dataclasses.field))
@dataclasses.dataclass(frozen=True)
class Rule:
    """Base class of all rules. A subclass is a frozen dataclass by itself; it writes two methods.

    `elementwise = True` promises that each element of the result depends on that element of the inputs alone. The
    engine may then run the rule on many tensors laid side by side, and complex parameters reach it as real ones.

    >>> class Sign(Rule):
    ...     lr: float = 0.01
    ...     elementwise = True
    ...
    ...     def apply(self, state, x, dx):
    ...         return state, self.lr * dx.sign()
    >>> Sign(lr=0.5).apply((), torch.zeros(2), torch.tensor([3.0, -4.0]))
    ((), tensor([ 0.5000, -0.5000]))
    """

    elementwise: ClassVar[bool] = False
    # True for a rule that must see every update, those without a gradient (`dx` is None) too.
    gathers: ClassVar[bool] = False

    def __new__(cls, *args: Any, **kwargs: Any) -> "Rule":
        for name in kwargs:
            if name not in cls.__dataclass_fields__:
                raise TypeError(unknown(cls.__name__, (f.name for f in dataclasses.fields(cls)), name))
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        dataclasses.dataclass(frozen=True, init="__init__" not in own, repr="__repr__" not in own)(cls)
        del cls.__setattr__, cls.__delattr__  # Rule's own say more; and a user may write @dataclass(frozen=True) too

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _plain(getattr(self, field.name))
            if field.metadata.get("allowed"):
                _check(type(self).__name__, field, value)
            object.__setattr__(self, field.name, value)

    def init(self, x: Tensor) -> Any:
        """The state for a parameter `x` (shape, dtype and device as `x`): any pytree of tensors and numbers."""
        return ()

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        """One step: the new state, and the change that will be subtracted from `x`.

        `dx` is the gradient, or what the rule before this one in the chain made of it. None of the three inputs may be
        written to. None as the change stops the chain: the parameter is not touched.
        """
        raise NotImplementedError(f"{type(self).__name__} must define apply(self, state, x, dx) -> (state, change)")

    def steps(self, state: Any, x: Tensor, dx: Any) -> Steps:
        """`apply` as the engine runs it: a generator, so that rules which need the whole tree can wait for it."""
        if not (self.elementwise and x.is_complex()):
            return self.apply(state, x, dx)
        real: Any = None if dx is None else torch.view_as_real(dx.resolve_conj())
        state, change = self.apply(state, torch.view_as_real(x.resolve_conj()), real)
        return state, None if change is None else torch.view_as_complex(change)
        yield

    def start(self, x: Tensor) -> Any:
        """`init` as the engine runs it."""
        return self.init(torch.view_as_real(x.resolve_conj()) if self.elementwise and x.is_complex() else x)

    def miss(self, state: Any, updates: int) -> Any:
        """The state after `updates` updates in which the leaf was frozen. Only a rule that `gathers` minds."""
        return state

    @cached_property
    def inner(self) -> tuple["Rule", ...]:
        """The rules directly inside it."""
        return tuple(v for _, value in _items(self) for v in _elements(value) if isinstance(v, Rule))

    @cached_property
    def traced(self) -> bool:
        """Whether a tensor stands for any hyperparameter, of inner rules too."""
        return any(isinstance(v, Tensor) for rule in walk(self) for _, value in _items(rule) for v in _elements(value))

    @cached_property
    def scheduled(self) -> bool:
        """Whether any hyperparameter, of inner rules too, is a schedule."""
        return any(callable(v) for rule in walk(self) for _, value in _items(rule) for v in _elements(value))


def _refuse(rule: Rule, name: str, *_: Any) -> None:
    raise dataclasses.FrozenInstanceError(f"rules do not change: write fluxpy.adjust(state, {name}=...)")


Rule.__setattr__ = Rule.__delattr__ = _refuse  # after dataclass has made its own


class StagedRule(Rule):
    """A rule that asks the engine for a total between two of its lines. It writes `steps` instead of `apply`.

    `steps` is a generator: `total = yield Ask(self, part)`, then `return state, change`.
    """

    def combine(self, parts: list[Tensor]) -> Tensor:
        """The total of the parts of all leaves. Default: their sum."""
        return torch.stack(parts).sum()

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        """`steps` on one tensor that is its own whole tree."""
        steps, total = self.steps(state, x, dx), None
        while True:
            try:
                ask = steps.send(total)  # pyright: ignore[reportArgumentType]
            except StopIteration as done:
                return done.value
            total = ask.rule.combine([ask.part]) if ask.across else ask.part
            if ask.nonfinite == "raise" and not total.isfinite():
                raise FloatingPointError(f"{type(ask.rule).__name__}: the total {total.item()} is not finite")

    def steps(self, state: Any, x: Tensor, dx: Any) -> Steps:
        raise NotImplementedError(f"{type(self).__name__} must define steps(self, state, x, dx)")


def walk(rule: Rule) -> Iterator[Rule]:
    """The rule and all rules inside it, outermost first."""
    yield rule
    for inner in rule.inner:
        yield from walk(inner)


def title(rule: Rule) -> str:
    """The rule by name: `OptimiserChain(ClipNorm, Adam)`."""
    return type(rule).__name__ + (f"({', '.join(map(title, rule.inner))})" if rule.inner else "")


def hyperparameters(rule: Rule) -> dict[str, Any]:
    """The rule's own hyperparameters by name, without those of rules inside it."""
    return {name: value for name, value in _items(rule) if not any(isinstance(v, Rule) for v in _elements(value))}


def no_hyperparameter(rule: Rule, name: str) -> str:
    """The message for a hyperparameter that neither the rule nor any inside it has."""
    return unknown(title(rule), (own for inner in walk(rule) for own in hyperparameters(inner)), name)


def replace(rule: Rule, change: Callable[[Rule, str, Any], Any], validate: bool = True) -> Rule:
    """A copy of `rule` in which each hyperparameter, of inner rules too, is `change(rule, name, value)`."""

    def new(name: str, value: Any) -> Any:
        if isinstance(value, Rule):
            return replace(value, change, validate)
        if isinstance(value, tuple) and value and isinstance(value[0], Rule):
            return tuple(replace(inner, change, validate) for inner in value)
        return change(rule, name, value)

    fresh = copy.copy(rule)
    fresh.__dict__.clear()  # also what was cached
    fresh.__dict__.update({name: new(name, value) for name, value in _items(rule)})
    if validate:
        fresh.__post_init__()
    return fresh


def at(rule: Rule, count: int) -> Rule:
    """The rule with every schedule replaced by its value at `count`."""
    if not rule.scheduled:
        return rule

    def value(v: Any) -> Any:
        if isinstance(v, tuple):
            return tuple(map(value, v))
        return at(v, count) if isinstance(v, Rule) else _plain(v(count)) if callable(v) else v

    fresh = object.__new__(type(rule))
    for field in dataclasses.fields(rule):
        old = getattr(rule, field.name)
        new = fresh.__dict__[field.name] = value(old)
        if new is not old and field.metadata.get("allowed"):
            _check(type(rule).__name__, field, new)
    if type(rule).__post_init__ is not Rule.__post_init__:  # which would check the others again
        fresh.__post_init__()
    return fresh


def eps_for(x: Tensor, eps: Hyper) -> Hyper:
    """`eps`, at least 1e-7 in float16, where the usual 1e-8 is zero."""
    if x.dtype != torch.float16:
        return eps
    return eps.clamp(min=1e-7) if isinstance(eps, Tensor) else max(eps, 1e-7)


def field_of(rule: Rule, name: str) -> dataclasses.Field[Any]:
    return rule.__dataclass_fields__[name]


def _items(rule: Rule) -> Iterator[tuple[str, Any]]:
    return ((f.name, getattr(rule, f.name)) for f in dataclasses.fields(rule))


def _elements(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _plain(value: Any) -> Any:
    """Lists become tuples and NumPy's numbers Python's own, so that a rule can be saved and compared."""
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return _plain(value.tolist()) if isinstance(value, np.generic | np.ndarray) else value


def _check(rule: str, field: dataclasses.Field[Any], value: Any) -> None:
    allowed = field.metadata["allowed"]
    if isinstance(field.default, tuple) and not callable(value):
        value = tuple(value) if isinstance(value, Tensor) and value.ndim else value
        pair = isinstance(value, tuple) and len(value) == len(field.default)
        ok = pair and all(_allows(allowed, v) for v in value)
        want = f"it must be {len(field.default)} numbers, each in {allowed}"
    elif isinstance(allowed, tuple):
        ok, want = callable(value) or value in allowed, f"it must be one of {', '.join(map(repr, allowed))}"
    else:
        ok = _allows(allowed, value)
        want = f"it must be one of {allowed}" if allowed[0] not in "[(" else f"it must lie in {allowed}"
    if not ok:
        raise ValueError(f"{rule}: {field.name}={value!r} is not allowed; {want}")


def _allows(interval: str, value: Any) -> bool:
    if callable(value) or isinstance(value, Tensor):
        return True  # a schedule is checked when it gives a value; a tensor never, which would read the device
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return False
    if interval[0] not in "[(":
        return math.isfinite(value) and value == int(value) >= 1
    low, high = map(float, interval[1:-1].split(","))
    inside = low < value < high
    return inside or (interval[0] == "[" and value == low) or (interval[-1] == "]" and value == high)

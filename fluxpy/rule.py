"""Rule: an optimiser, or one link of it, written once on one tensor.

A rule is plain data (a frozen dataclass of hyperparameters) with two methods, `init` and `apply`.
It knows nothing of models, trees or training; everything else in fluxpy is built around it.

    Rule                 init and apply, on one tensor
    └── ReducingRule     steps instead of apply: may ask for a total over the array or the whole tree

What a rule declares (`elementwise`, `accumulates`, what it reduces) is all that the engine goes by: it never asks for a
rule's class.
"""

import dataclasses
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, dataclass_transform

import torch
from torch import Tensor

from .cached import cached
from .fields import check, hyper, plain, validate
from .pytree import is_wrapped, partition
from .text import SET_FIELD, SET_OTHER, form, unknown


class Reduce(NamedTuple):
    """What a `ReducingRule` asks for between two of its lines: the total of `value`, a tensor of the parameter's shape,
    or a function that gives it, called only where the total is not known yet. `nonfinite` says what happens where that
    is not finite: "raise", "skip" (the whole update: nothing changes) or "ignore".
    """

    rule: "ReducingRule"
    value: Any
    nonfinite: str = "ignore"

    def tensor(self) -> Any:
        """The value, worked out."""
        return self.value() if callable(self.value) else self.value


Steps: TypeAlias = Generator[Reduce, Any, tuple[Any, Any]]


class Assign(NamedTuple):
    """A change that says what the parameter becomes, where subtracting would round differently."""

    value: Tensor


@dataclass_transform(frozen_default=True, field_specifiers=(hyper, dataclasses.field))
@dataclasses.dataclass(frozen=True)
class Rule:
    """Base class of all rules. A subclass is a frozen dataclass by itself; it writes two methods.

    `elementwise = True` promises that each element of the result depends on that element of the inputs alone (and on
    totals it asks for and 0-dim tensors of its state). The engine may then run the rule on many tensors packed into
    one, and complex parameters reach it as real ones. A rule around another is elementwise only if it says so itself.

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
    accumulates: ClassVar[bool] = False
    # True for a rule around others whose own arithmetic is elementwise, whatever the rules inside are.
    delegates: ClassVar[bool] = False
    # True for a rule around others whose `evaluation` is theirs, passed on.
    passes_evaluation: ClassVar[bool] = False
    # True for a rule around one other (`rule`) that steps a copy in `dtype` instead of the parameter. The copy is the
    # first tensor of the state; `master_for(copy, x)` brings it up to date, and the parameter becomes the rounded copy.
    keeps_master: ClassVar[bool] = False
    # True for a rule around one other (`rule`) that steps as that does, and keeps a shadow of the parameter: an average
    # of it, or slow weights. Its state is (shadow, t, the state of `rule`). `shadow_step(t)` gives t after a step, and
    # a function of the old shadow and the stepped parameter that gives both anew, or None where they stay.
    keeps_shadow: ClassVar[bool] = False

    _names: ClassVar[tuple[str, ...]] = ()  # of the hyperparameters and the rules inside

    def __new__(cls, *args: Any, **kwargs: Any) -> "Rule":
        for name in kwargs:
            if name not in cls.__dataclass_fields__:
                raise TypeError(unknown(cls.__name__, (f.name for f in dataclasses.fields(cls)), name))
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        dataclasses.dataclass(frozen=True, init="__init__" not in own, repr="__repr__" not in own)(cls)
        cls._names = tuple(f.name for f in dataclasses.fields(cls))
        del cls.__setattr__, cls.__delattr__  # Rule's own say more; a user's @dataclass(frozen=True) would refuse these

    def __post_init__(self) -> None:
        validate(self)

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
        """`apply` as the engine runs it: a generator, so that rules which need a total can wait for it."""
        seen = self.as_seen(x)
        if seen is x:
            return self.apply(state, x, dx)
        real: Any = None if dx is None else torch.view_as_real(dx.resolve_conj())
        state, change = self.apply(state, seen, real)
        if isinstance(change, Assign):
            return state, Assign(torch.view_as_complex(change.value))
        return state, None if change is None else torch.view_as_complex(change)
        yield  # never reached: it makes this function a generator

    def as_seen(self, x: Tensor) -> Tensor:
        """The parameter as `init`, `apply` and `evaluation` see it: to an elementwise rule a complex one is real."""
        return torch.view_as_real(x.resolve_conj()) if self.elementwise and x.is_complex() else x

    def init_any(self, x: Tensor) -> Any:
        """`init` as the engine runs it."""
        return self.init(self.as_seen(x))

    def skip_frozen(self, state: Any) -> Any:
        """The state after an update in which the leaf was frozen. Changes numbers alone: the tensors may be missing.
        Called only of a rule that `accumulates`."""
        return state

    def restart(self, before: Any, state: Any) -> Any:
        """`state`, new from `init`, with what it must keep of the numbers in `before`, the state that it replaces.
        Called only of a rule that `accumulates`."""
        return state

    def evaluation(self, state: Any, x: Tensor) -> Tensor:
        """The weights to evaluate with, which `averaged` puts in the place of the parameter `x`. Default: `x` itself.
        Nobody writes to what is returned, so it may be a tensor of the state. A rule around others passes it on."""
        if any(rule.evaluates for rule in self.inner):
            inside = ", ".join(title(rule) for rule in self.inner if rule.evaluates)
            why = f"{type(self).__name__} holds {inside}, which has weights to evaluate with, and hides them"
            raise NotImplementedError(f"{why}: define evaluation(self, state, x)")
        return x

    def evaluation_any(self, state: Any, x: Tensor) -> Tensor:
        """`evaluation` as it is called."""
        seen = self.as_seen(x)
        value = self.evaluation(state, seen)
        if value is seen:
            return x
        return value if seen is x else torch.view_as_complex(value)

    def flushing(self) -> "Rule":
        """The rule that `flush` runs once in its place, without a gradient. Called only of one that `accumulates`."""
        if not self.inner:
            raise NotImplementedError(f"{type(self).__name__} does not say how it is flushed: define flushing(self)")
        return map_inner(self, lambda rule: rule.flushing() if rule.accumulates else rule)

    def take(self, state: Any, x: Tensor, index: Tensor, dim: int) -> Any:
        """The state for `x.index_select(dim, index)`, made of that for `x`: what `fluxpy.surgery` asks for.

        By default tensors of the shape of `x` are taken along, numbers and 0-dim tensors stay, and another shape is a
        ValueError. A rule whose state has other shapes, or for which a row of the state is not one of the parameter,
        defines this and `grow`; a rule around others passes the call on. The inputs may not be written to.
        """
        tensors, skeleton = partition(state)
        return skeleton.combine(t.index_select(dim, index) if _has_rows(self, t, x) else t for t in tensors)

    def grow(self, state: Any, x: Tensor, rows: Tensor, dim: int) -> Any:
        """The state for `torch.cat([x, rows], dim)`, made of that for `x`. By default the new rows of each tensor of
        the shape of `x` are those of `init` for `rows`. See `take`."""
        return self.joined(state, self.init_any(rows), x, dim)

    def joined(self, state: Any, new: Any, x: Tensor, dim: int) -> Any:
        """A state for `x`, with the rows of a new one after its own."""
        tensors, skeleton = partition(state)
        return skeleton.combine(
            torch.cat([t, rows.to(t.dtype)], dim) if _has_rows(self, t, x) else t
            for t, rows in zip(tensors, partition(new)[0], strict=True)
        )

    def map_inner_states(self, f: Callable[..., Any], *states: Any) -> Any:
        """The last of `states`, all of this rule, in which each rule directly inside has `f(rule, *its parts)` in place
        of its part. Defined by rules around others whose state has a part for each."""
        return states[-1]

    @cached
    def inner(self) -> tuple["Rule", ...]:
        """The rules directly inside it."""
        return tuple([v for v in self._elements if isinstance(v, Rule)])

    @cached
    def _elements(self) -> list[Any]:
        """Its hyperparameters and the rules directly inside it, those in tuples one by one."""
        return [v for _, value in _items(self) for v in (value if isinstance(value, tuple) else (value,))]

    @property
    def shadow_rule(self) -> "Rule | None":
        """The rule that keeps a shadow, where there is one: this one, or the last of a chain."""
        return self if self.keeps_shadow else None

    def without_shadow(self, state: Any) -> tuple["Rule", Any]:
        """The rule that steps, and its part of the state, if one is given. Called only where there is a shadow."""
        (rule,) = self.inner
        return rule, None if state is None else state[2]

    @cached
    def evaluates(self) -> bool:
        """Whether it, or a rule inside it, has weights to evaluate with."""
        own = type(self).evaluation is not Rule.evaluation and not self.passes_evaluation
        return own or any(rule.evaluates for rule in self.inner)

    @cached
    def traced(self) -> bool:
        """Whether a tensor stands for any hyperparameter, of inner rules too."""
        return any([isinstance(v, Tensor) for v in self._elements]) or any([rule.traced for rule in self.inner])

    @cached
    def scheduled(self) -> bool:
        """Whether any hyperparameter, of inner rules too, is a schedule."""
        return any(map(callable, self._elements)) or any([rule.scheduled for rule in self.inner])


def _refuse(rule: Rule, name: str, *_: Any) -> None:
    raise dataclasses.FrozenInstanceError((SET_FIELD if name in rule._names else SET_OTHER).format(name=name))


Rule.__setattr__ = Rule.__delattr__ = _refuse  # in the place of those that dataclass made


class ReducingRule(Rule):
    """A rule that asks for a total between two of its lines. It writes `steps` instead of `apply`.

    `steps` is a generator: `total = yield Reduce(self, value)`, then `return state, change`. `part` is what one array
    gives to the total. With `over = "array"` that is the answer; with `over = "tree"`, the default, the answer is
    `combine` of the parts of all arrays whose rules ask the same in this update: equal rules at the same place among
    those of their chains that ask for a total over the tree.

    >>> class UnitNorm(ReducingRule):
    ...     elementwise = True
    ...
    ...     def part(self, value):
    ...         return value.square().sum()
    ...
    ...     def steps(self, state, x, dx):
    ...         total = yield Reduce(self, dx)
    ...         return state, dx / total**0.5
    >>> UnitNorm().apply((), torch.zeros(2), torch.tensor([3.0, 4.0]))[1]
    tensor([0.6000, 0.8000])
    """

    over: ClassVar[Literal["array", "tree"]] = "tree"
    # True where `combine` of the parts of an array's pieces is the part of the array: so for sums, norms and extremes,
    # not for means. Without it, arrays that are spread over processes are put together first.
    splittable: ClassVar[bool] = False
    # True for a rule that takes a total as a number too, where the host may read it: cheaper than a tensor.
    takes_numbers: ClassVar[bool] = False

    def as_seen(self, x: Tensor) -> Tensor:
        """The steps of a reducing rule see complex parameters as they are, and so does its state."""
        return x

    def part(self, value: Tensor) -> Tensor:
        """What one array gives to the total: a 0-dim tensor. Default: the sum of its elements."""
        return value.sum()

    def parts(self, values: Sequence[Tensor] | Tensor) -> Tensor:
        """`part` of each of many arrays, stacked; they come in a list, or stacked. Override it where there is a faster
        way to the same numbers."""
        return torch.stack([self.part(value) for value in values])

    def combine(self, parts: Tensor) -> Tensor:
        """The total of the parts of all arrays, which come stacked, in the order of the model. Default: their sum."""
        return parts.sum(0)

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        """`steps` on one tensor that is its own whole tree."""
        return run_alone(self, state, x, dx, strict=True)

    def steps(self, state: Any, x: Tensor, dx: Any) -> Steps:
        raise NotImplementedError(f"{type(self).__name__} must define steps(self, state, x, dx)")


def reducing(rule: Rule, over: Literal["array", "tree"] | None = None) -> list["ReducingRule"]:
    """The rules inside one that ask for a total, in the order of its steps; with `over`, for one over that."""
    return [inner for inner in rules_in(rule) if isinstance(inner, ReducingRule) and over in (None, inner.over)]


def run_alone(rule: Rule, state: Any, x: Tensor, dx: Any, *, strict: bool = False) -> tuple[Any, Any]:
    """Run `rule.steps` on one tensor that is its own whole tree: `(state, change)`. A total may be what it is, unless
    `strict`: then FloatingPointError for one that must be finite."""
    run = Run(rule.steps(state, x, dx))
    while run.asks is not None:
        asking, parts = run.asks.rule, run.asks.rule.parts([run.asks.tensor()])
        answer = parts[0] if asking.over == "array" else asking.combine(parts)
        if strict and run.asks.nonfinite == "raise" and not answer.isfinite().all():
            raise FloatingPointError(f"{type(asking).__name__}: the total {answer.tolist()} is not finite")
        run.tell(answer)
    return run.result


class Run:
    """A rule's `steps` while they run: what they ask for now (`asks`), or, where that is None, their `result`.

    Rules around others use it in place of `yield from`, whose result `torch.compile` loses.
    """

    def __init__(self, steps: Steps) -> None:
        self.steps, self.result = steps, None
        self.tell(None)

    def tell(self, answer: Any) -> None:
        self.asks: Reduce | None = None
        try:
            self.asks = self.steps.send(answer)
        except StopIteration as done:
            self.result: Any = done.args[0] if done.args else None


def rules_in(rule: Rule) -> Iterator[Rule]:
    """The rule and all rules inside it, outermost first."""
    yield rule
    for inner in rule.inner:
        yield from rules_in(inner)


def title(rule: Rule) -> str:
    """The rule by name: `OptimiserChain(ClipNorm, Adam)`."""
    return type(rule).__name__ + (f"({', '.join(map(title, rule.inner))})" if rule.inner else "")


def hyperparameters(rule: Rule) -> dict[str, Any]:
    """The rule's own hyperparameters by name, without those of rules inside it."""
    return {name: value for name, value in _items(rule) if not _holds_rules(value)}


def all_hyperparameters(rule: Rule) -> dict[str, list[Any]]:
    """Those of the rule and of all inside it, by name, with each value that one has, outermost first."""
    found: dict[str, list[Any]] = {}
    for inner in rules_in(rule):
        for name, value in hyperparameters(inner).items():
            found.setdefault(name, []).append(value)
    return found


def replace(rule: Rule, change: Callable[[Rule, str, Any], Any], validate: bool = True) -> Rule:
    """A copy of `rule` in which each hyperparameter, of inner rules too, is `change(rule, name, value)`."""

    def new(name: str, value: Any) -> Any:
        if isinstance(value, Rule):
            return replace(value, change, validate)
        if isinstance(value, tuple) and value and isinstance(value[0], Rule):
            return tuple(replace(inner, change, validate) for inner in value)
        return change(rule, name, value)

    return _copy(rule, new, validate)


def _copy(rule: Rule, new: Callable[[str, Any], Any], validate: bool = True) -> Rule:
    """A copy with `new(name, value)` for each value; ValueError where one that is another is not allowed."""
    fresh = object.__new__(type(rule))
    for name, old in _items(rule):
        value = fresh.__dict__[name] = plain(new(name, old))
        if validate and not torch.compiler.is_compiling() and value is not old:
            check(type(rule).__name__, field_of(rule, name), value)
    if validate and type(rule).__post_init__ is not Rule.__post_init__:  # Rule's own would check every field again
        fresh.__post_init__()
    return fresh


def is_packable(rule: Rule) -> bool:
    """Whether the engine may run a rule on many real tensors packed into one, 0-dim ones of its state repeated."""
    return (rule.elementwise or rule.delegates) and all(map(is_packable, rule.inner))


def map_inner(rule: Rule, f: Callable[[Rule], Rule]) -> Rule:
    """A copy of `rule` with `f` of each rule directly inside it. Nothing is validated."""

    def new(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(new, value))
        return f(value) if isinstance(value, Rule) else value

    return _copy(rule, lambda _, value: new(value), validate=False)


def title_key(rule: Rule) -> tuple[type, ...]:
    """The classes of a rule and of all inside it."""
    return tuple(map(type, rules_in(rule)))


def at(rule: Rule, count: int) -> Rule:
    """The rule with every schedule replaced by its value at `count`."""
    if not rule.scheduled:
        return rule

    def value(v: Any) -> Any:
        if isinstance(v, tuple):
            return tuple(map(value, v))
        if isinstance(v, Rule):
            return at(v, count)
        return v(count) if callable(v) else v

    return _copy(rule, lambda _, v: value(v))


def rule_key(rule: Rule, loose: bool = False) -> Any:
    """A key to compare and hash a rule by: two rules with one key take the same steps.

    Schedules are compared by value where they are plain data, other functions by identity. With `loose`, real numbers
    are left out, except in rules that ask for totals.
    """
    loose = loose and not isinstance(rule, ReducingRule)
    return type(rule), tuple((name, value_key(value, loose)) for name, value in _items(rule))


def value_key(v: Any, loose: bool = False) -> Any:
    """A key to compare and hash a hyperparameter by, or a number in a state."""
    if isinstance(v, Rule):
        return rule_key(v, loose)
    if isinstance(v, tuple | list):
        return tuple(value_key(x, loose) for x in v)
    if loose and type(v) is float:
        return float
    if isinstance(v, Tensor):
        return v.item() if v.numel() == 1 and v.is_cpu and not is_wrapped(v) else id(v)
    if callable(v):
        if dataclasses.is_dataclass(v) and not isinstance(v, type):
            return type(v), tuple(value_key(getattr(v, f.name)) for f in dataclasses.fields(v))
        return id(v)
    return v if isinstance(v, Hashable) else id(v)


def tensors_of(rule: Rule) -> list[Tensor]:
    """The tensors that stand for hyperparameters, of inner rules too, in the order of `replace`."""
    found: list[Tensor] = []
    for v in rule._elements if rule.traced else ():
        if isinstance(v, Tensor):
            found.append(v)
        elif isinstance(v, Rule):
            found += tensors_of(v)
    return found


def _has_rows(rule: Rule, t: Tensor, x: Tensor) -> bool:
    """Whether a tensor of the state of `x` has its rows (elementwise rules see a complex `x` as a real one), or is a
    number. ValueError where it is neither."""
    if t.ndim and t.shape != x.shape and not (x.is_complex() and t.shape == (*x.shape, 2)):
        raise ValueError(
            f"{title(rule)} keeps {form(t.shape, t.dtype)} for a parameter of shape {list(x.shape)}, and does not say "
            "how its rows change: a rule with such a state defines take(self, state, x, index, dim) and "
            "grow(self, state, x, rows, dim)"
        )
    return t.ndim > 0


def field_of(rule: Rule, name: str) -> dataclasses.Field[Any]:
    """The declaration of a hyperparameter."""
    return rule.__dataclass_fields__[name]


def _items(rule: Rule) -> list[tuple[str, Any]]:
    return [(name, getattr(rule, name)) for name in rule._names]


def _holds_rules(value: Any) -> bool:
    return isinstance(value, Rule) or (isinstance(value, tuple) and (not value or isinstance(value[0], Rule)))

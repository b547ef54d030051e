"""Rules made of rules, and rules that hold a step back: chains, accumulation, master copies."""

import dataclasses
from dataclasses import KW_ONLY
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rule import Assign, Hyper, Rule, StagedRule, Steps, hyper, walk


class _Wrapper(StagedRule):
    """A rule with rules inside; the hyperparameters of those are its own: `chain.lr`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in (names := _names(self)):
            raise AttributeError(f"{type(self).__name__} has no hyperparameter {name!r}")
        first, *rest = names[name]
        if any(value != first for value in rest):
            raise AttributeError(
                f"{name!r} stands more than once in {self!r}, with different values; ask one member: chain[0].{name}"
            )
        return first


def _names(wrapper: _Wrapper) -> dict[str, list[Any]]:
    names: dict[str, list[Any]] = {}
    for rule in walk(wrapper):
        if not isinstance(rule, _Wrapper):
            for field in dataclasses.fields(rule):
                names.setdefault(field.name, []).append(getattr(rule, field.name))
    return names


class OptimiserChain(_Wrapper):
    """Rules one after another: each takes what the one before made of the gradient. An empty chain is the identity.

    The order matters: a penalty stands before the step, `OptimiserChain(WeightDecay(1e-4), Adam(1e-3))`.

    >>> chain = OptimiserChain(ClipGrad(1.0), Descent(0.5))
    >>> chain.apply(chain.init(x := torch.zeros(1)), x, torch.tensor([3.0]))[1]
    tensor([0.5000])
    >>> chain[1], chain.lr
    (Descent(lr=0.5), 0.5)
    """

    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule) -> None:
        object.__setattr__(self, "rules", rules)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        for i, rule in enumerate(self.rules):
            if isinstance(rule, list | tuple):
                raise TypeError("OptimiserChain takes rules one by one: write OptimiserChain(*rules)")
            if not isinstance(rule, Rule):
                hint = f"; write {rule.__name__}()" if isinstance(rule, type) and issubclass(rule, Rule) else ""
                raise TypeError(f"OptimiserChain takes rules, but number {i} is {rule!r}{hint}")
            if any(isinstance(inner, MixedPrecision) for inner in walk(rule)):
                raise ValueError(
                    "MixedPrecision must be outermost, since it replaces the parameter by its master copy: "
                    "write MixedPrecision(OptimiserChain(...)), not OptimiserChain(..., MixedPrecision(...))"
                )

    def __repr__(self) -> str:
        return f"OptimiserChain({', '.join(map(repr, self.rules))})"

    def __getitem__(self, i: int) -> Rule:
        return self.rules[i]

    def __len__(self) -> int:
        return len(self.rules)

    @property
    def elementwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(rule.elementwise for rule in self.rules)

    @property
    def gathers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(rule.gathers for rule in self.rules)

    def init(self, x: Tensor) -> tuple[Any, ...]:
        return tuple(rule.start(x) for rule in self.rules)

    start = init  # each member sees complex parameters in its own way

    def steps(self, state: tuple[Any, ...], x: Tensor, dx: Any) -> Steps:
        new = list(state)
        for i, rule in enumerate(self.rules):
            if dx is None and not rule.gathers:
                continue  # no gradient: nothing to do before a member that gathers
            new[i], dx = yield from rule.steps(state[i], x, dx)
            if dx is None:
                break
        return tuple(new), dx

    def miss(self, state: tuple[Any, ...], updates: int) -> tuple[Any, ...]:
        return tuple(rule.miss(s, updates) for rule, s in zip(self.rules, state, strict=True))


class Gathered(NamedTuple):
    """State of `AccumGrad`: the sum so far, of how many gradients, over how many updates."""

    total: Tensor
    gradients: int
    updates: int


class AccumGrad(Rule):
    """The mean of the gradients of `n` updates, passed on once every `n` updates; in between, nothing behind it moves.

    The window counts updates, alike for all leaves: a leaf without a gradient in one of them adds zero, and a leaf that
    was frozen for a while is in step with the others when it thaws. A new `n` acts at once: the window ends as soon as
    it holds `n` updates or more, and what it passes on is the mean over those it holds.

    >>> rule, x = AccumGrad(2), torch.zeros(1)
    >>> state, change = rule.apply(rule.init(x), x, torch.tensor([1.0]))
    >>> change is None
    True
    >>> rule.apply(state, x, torch.tensor([3.0]))[1]
    tensor([2.])
    """

    n: Hyper = hyper(allowed="1, 2, ...")
    elementwise = True
    gathers = True

    def init(self, x: Tensor) -> Gathered:
        return Gathered(torch.zeros_like(x), 0, 0)

    def apply(self, state: Gathered, x: Tensor, dx: Tensor | None) -> tuple[Any, Any]:
        total = state.total if dx is None else state.total + dx
        gradients, updates = state.gradients + (dx is not None), state.updates + 1
        if updates < self.n:
            return Gathered(total, gradients, updates), None
        return Gathered(torch.zeros_like(total), 0, 0), total / updates if gradients else None

    def miss(self, state: Gathered, updates: int) -> Gathered:
        if state.updates + updates < self.n:
            return state._replace(updates=state.updates + updates)
        return Gathered(torch.zeros_like(state.total), 0, (state.updates + updates) % self.n)


class Master(NamedTuple):
    """State of `MixedPrecision`: the parameter in `dtype`, and the state of the rule that steps it."""

    x: Tensor
    state: Any


class MixedPrecision(_Wrapper):
    """`rule`, run on a master copy of the parameter in `dtype`; the parameter becomes the rounded master.

    For parameters in bfloat16 or float16, where a small step would be lost to rounding. Must be outermost. Where
    somebody wrote to the parameter since the last step (loaded weights, an average), the master follows, element by
    element. Complex parameters are refused. [Micikevicius et al. 2018]
    """

    rule: Rule
    _: KW_ONLY
    dtype: torch.dtype = hyper(default=torch.float32, fixed=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rule, Rule):
            raise TypeError(f"MixedPrecision takes a rule, but got {self.rule!r}")
        if any(isinstance(inner, MixedPrecision) for inner in walk(self.rule)):
            raise ValueError("MixedPrecision must be outermost: there can be only one master copy")
        if not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ValueError(f"MixedPrecision: dtype={self.dtype!r} is not allowed; it must be a floating-point dtype")

    @property
    def gathers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.gathers

    def init(self, x: Tensor) -> Master:
        if x.is_complex():
            raise ValueError("MixedPrecision takes real parameters, but this one is complex")
        master = x.detach().to(self.dtype, copy=True)
        return Master(master, self.rule.start(master))

    def steps(self, state: Master, x: Tensor, dx: Any) -> Steps:
        written = state.x.to(x.dtype) != x
        master = torch.where(written, x.to(self.dtype), state.x)
        inner, change = yield from self.rule.steps(state.state, master, None if dx is None else dx.to(self.dtype))
        if change is None:
            return Master(master, inner), None
        master = change.value if isinstance(change, Assign) else master - change
        return Master(master, inner), Assign(master.to(x.dtype))

    def miss(self, state: Master, updates: int) -> Master:
        return state._replace(state=self.rule.miss(state.state, updates))

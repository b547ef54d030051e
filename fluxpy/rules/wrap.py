"""Rules made of rules, and rules that hold a step back: chains, accumulation, master copies."""

from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..fields import Hyper, hyper
from ..rule import Assign, Rule, Run, Steps, all_hyperparameters, rules_in, run_alone
from ..text import named
from .average import average, is_differentiable, like, real


class Wrapper(Rule):
    """A rule with rules inside, which it runs step by step; their hyperparameters are its own: `chain.lr`.

    It writes `steps`.
    """

    # True for one that says what the parameter becomes, so that nothing can come after it in a chain.
    assigns: ClassVar[bool] = False
    # Why nothing may go around it, for one that must see the parameter itself.
    outermost: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        dtype = self.dtype if "dtype" in self._names else torch.float32
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
            want = "it must be a floating-point dtype of 16 bits or more"
            raise ValueError(f"{type(self).__name__}: dtype={dtype!r} is not allowed; {want}")
        if "rule" in self._names:
            refuse_outermost(self, self.rule)
            if self.rule.evaluates and not self.passes_evaluation:
                name = type(self).__name__
                own = f"{name}: {self.rule!r} has weights of its own to evaluate with"
                raise ValueError(f"{own}, which {name} would pass over")

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        return run_alone(self, state, x, dx)

    def as_seen(self, x: Tensor) -> Tensor:
        """Each rule inside sees complex parameters in its own way."""
        return x

    def skip_frozen(self, state: Any) -> Any:
        return self.map_inner_states(lambda rule, s: rule.skip_frozen(s), state)

    def restart(self, before: Any, state: Any) -> Any:
        return self.map_inner_states(lambda rule, b, s: rule.restart(b, s), before, state)

    def map_inner_states(self, f: Callable[..., Any], *states: Any) -> Any:
        """Of a wrapper around one rule, whose state has that rule's as `state`."""
        (rule,) = self.inner
        return states[-1]._replace(state=f(rule, *(s.state for s in states)))

    # Of the state, what belongs to the rules inside goes as they say, and the rest as that of any rule.
    def take(self, state: Any, x: Tensor, index: Tensor, dim: int) -> Any:
        own = super().take(self._own(state), x, index, dim)
        return self.map_inner_states(lambda rule, s, _: rule.take(s, x, index, dim), state, own)

    def grow(self, state: Any, x: Tensor, rows: Tensor, dim: int) -> Any:
        own = self.joined(self._own(state), self._own(self.init_any(rows)), x, dim)
        return self.map_inner_states(lambda rule, s, _: rule.grow(s, x, rows, dim), state, own)

    def _own(self, state: Any) -> Any:
        return self.map_inner_states(lambda rule, s: (), state)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in (names := all_hyperparameters(self)):
            raise AttributeError(f"{type(self).__name__} has no hyperparameter {name!r}")
        first, *rest = names[name]
        if any(value != first for value in rest):
            raise AttributeError(
                f"{name!r} stands more than once in {self!r}, with different values; ask one member: chain[0].{name}"
            )
        return first


# For wrappers that accumulate where the rules inside do.
inner_accumulates: Any = property(lambda wrapper: any(rule.accumulates for rule in wrapper.inner))
# For wrappers that are elementwise where the rules inside are.
inner_elementwise: Any = property(lambda wrapper: all(rule.elementwise for rule in wrapper.inner))


def refuse_outermost(wrapper: Wrapper, rule: Any, form: str = "{}") -> None:
    """TypeError for what is no rule inside a wrapper, ValueError for what must be outermost there. `form` is how it
    stands among the arguments of the wrapper."""
    name = type(wrapper).__name__
    if not isinstance(rule, Rule):
        raise TypeError(f"{name} takes a rule, but got {rule!r}")
    for inner in rules_in(rule):
        if isinstance(inner, Wrapper) and inner.outermost:
            own = type(inner).__name__
            way = f"write {own}({name}(...)), not {name}({form.format(own + '(...)')})"
            if wrapper.outermost:
                way = f"so must {name}, since {wrapper.outermost}: take one of them"
            raise ValueError(f"{own} must be outermost, since {inner.outermost}: {way}")


class OptimiserChain(Wrapper):
    """Rules one after another: each takes what the one before made of the gradient. An empty chain is the identity.

    The order matters: a penalty stands before the step, `OptimiserChain(WeightDecay(1e-4), Adam(1e-3))`.

    >>> chain = OptimiserChain(ClipGrad(1.0), Descent(0.5))
    >>> chain.apply(chain.init(x := torch.zeros(1)), x, torch.tensor([3.0]))[1]
    tensor([0.5000])
    >>> chain[1], chain.lr
    (Descent(lr=0.5), 0.5)
    """

    rules: tuple[Rule, ...]
    delegates = passes_evaluation = True
    accumulates, elementwise = inner_accumulates, inner_elementwise

    def __init__(self, *rules: Rule) -> None:
        object.__setattr__(self, "rules", rules)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        for i, rule in enumerate(self.rules):
            if isinstance(rule, list | tuple):
                raise TypeError("OptimiserChain takes rules one by one: write OptimiserChain(*rules)")
            if not isinstance(rule, Rule):
                raise TypeError(f"OptimiserChain takes rules, but number {i} is {named(rule)}")
            refuse_outermost(self, rule, "..., {}")
            last = [type(r).__name__ for r in rules_in(rule) if isinstance(r, Wrapper) and r.assigns]
            if last and i + 1 < len(self.rules):
                raise ValueError(
                    f"{last[0]} must be last in its chain, since it says what the parameter becomes: write "
                    f"OptimiserChain(..., {last[0]}(...)), or put what follows inside"
                )

    def __repr__(self) -> str:
        return f"OptimiserChain({', '.join(map(repr, self.rules))})"

    def __getitem__(self, i: int) -> Any:  # a rule, whose class the user knows: `chain[0].lr`
        return self.rules[i]

    def __len__(self) -> int:
        return len(self.rules)

    def init(self, x: Tensor) -> tuple[Any, ...]:
        return tuple(rule.init_any(x) for rule in self.rules)

    def steps(self, state: tuple[Any, ...], x: Tensor, dx: Any) -> Steps:
        new = list(state)
        for i, rule in enumerate(self.rules):
            if dx is None and not rule.accumulates:
                continue  # no gradient: nothing to do before a member that accumulates
            run = Run(rule.steps(state[i], x, dx))
            while run.asks is not None:
                run.tell((yield run.asks))
            new[i], dx = run.result
            if dx is None:
                break
            if isinstance(dx, Assign) and i + 1 < len(self.rules):
                own = type(rule).__name__
                raise TypeError(f"{own} says what the parameter becomes, so it must be last in its chain")
        return tuple(new), dx

    def evaluation(self, state: tuple[Any, ...], x: Tensor) -> Tensor:
        for rule, own in zip(self.rules, state, strict=True):
            x = rule.evaluation_any(own, x)
        return x

    @property
    def shadow_rule(self) -> Rule | None:
        return self.rules[-1].shadow_rule if self.rules else None

    def without_shadow(self, state: tuple[Any, ...] | None) -> tuple[Rule, Any]:
        last, own = self.rules[-1].without_shadow(state and state[-1])
        return OptimiserChain(*self.rules[:-1], last), state and (*state[:-1], own)

    def map_inner_states(self, f: Callable[..., Any], *states: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(f(*parts) for parts in zip(self.rules, *states, strict=True))


class Accumulated(NamedTuple):
    """State of `AccumGrad`: the sum so far, of how many gradients, over how many updates of the window."""

    total: Tensor
    gradients: int
    updates: int


class AccumGrad(Rule):
    """The mean of the gradients of `n` updates, passed on once every `n` updates; in between, nothing behind it moves.

    The window counts updates, alike for all leaves of a tree: a leaf without a gradient in one of them adds zero, and
    one that is frozen, reset or new stays in step with the others. What a leaf holds when a window ends while it is
    frozen is dropped. A new `n` acts at once: the window ends as soon as it holds `n` updates or more, and what it
    passes on is the mean over those it holds.

    >>> rule, x = AccumGrad(2), torch.zeros(1)
    >>> state, change = rule.apply(rule.init(x), x, torch.tensor([1.0]))
    >>> change is None
    True
    >>> rule.apply(state, x, torch.tensor([3.0]))[1]
    tensor([2.])
    """

    n: Hyper = hyper(allowed="1, 2, ...")
    elementwise = True
    accumulates = True

    def init(self, x: Tensor) -> Accumulated:
        return Accumulated(torch.zeros_like(x), 0, 0)

    def apply(self, state: Accumulated, x: Tensor, dx: Tensor | None) -> tuple[Any, Any]:
        total, gradients, updates = state
        if dx is not None:
            total, gradients = total + dx if gradients else dx * 1.0, gradients + 1
        if updates + 1 < self.n:
            return Accumulated(total, gradients, updates + 1), None
        mean = total / (updates + 1) if gradients else None
        return Accumulated(total, 0, 0), mean  # of no gradients the sum does not count

    def skip_frozen(self, state: Accumulated) -> Accumulated:
        if state.updates + 1 < self.n:
            return state._replace(updates=state.updates + 1)
        return state._replace(gradients=0, updates=0)

    def restart(self, before: Accumulated, state: Accumulated) -> Accumulated:
        return state._replace(updates=before.updates)

    def flushing(self) -> Rule:
        return WindowEnd(1)


class WindowEnd(AccumGrad):
    """`AccumGrad` where a window is ended early, which is no update: the mean over those that it holds."""

    def apply(self, state: Accumulated, x: Tensor, dx: Tensor | None) -> tuple[Any, Any]:
        mean = state.total / state.updates if state.gradients else None
        return Accumulated(state.total, 0, 0), mean


class Master(NamedTuple):
    """State of `MixedPrecision`: the parameter in `dtype` or a wider one, and the state of the rule that steps it."""

    x: Tensor
    state: Any


class MixedPrecision(Wrapper):
    """`rule`, run on a master copy of the parameter in `dtype`; the parameter becomes the rounded master.

    For parameters in bfloat16 or float16, where a small step would be lost to rounding, and in float16 squares of
    gradients too. A master is never narrower than its parameter: that of a float64 one is in float64. Must be
    outermost. Where somebody wrote to the parameter since the last step (loaded weights, an average), the master
    follows, element by element. Complex parameters are refused. [Micikevicius et al. 2018]
    """

    rule: Rule
    _: KW_ONLY
    dtype: torch.dtype = hyper(default=torch.float32, fixed=True)
    delegates = keeps_master = assigns = passes_evaluation = True
    outermost = "it replaces the parameter by its master copy"
    accumulates = inner_accumulates

    def init(self, x: Tensor) -> Master:
        if x.is_complex():
            raise ValueError("MixedPrecision takes real parameters, but this one is complex")
        narrow = x.dtype.itemsize == 1  # of these PyTorch gives no common dtype
        master = x.detach().to(self.dtype if narrow else torch.promote_types(x.dtype, self.dtype), copy=True)
        return Master(master, self.rule.init_any(master))

    def steps(self, state: Master, x: Tensor, dx: Any) -> Steps:
        master = self.master_for(state.x, x)
        run = Run(self.rule.steps(state.state, master, None if dx is None else dx.to(master.dtype)))
        while run.asks is not None:
            run.tell((yield run.asks))
        inner, change = run.result
        if change is None:
            return Master(master, inner), None
        master = change.value if isinstance(change, Assign) else master - change
        return Master(master, inner), Assign(master.to(x.dtype))

    def master_for(self, master: Tensor, x: Tensor) -> Tensor:
        """The master copy of `x`: as it was, but where somebody wrote to the parameter."""
        new = torch.where(master.to(x.dtype) != x, x.to(master.dtype), master)
        if not is_differentiable() or master.requires_grad:
            return new
        wide = x.to(master.dtype)  # a copy without a history has that of the parameter: what is added is zero
        return new.detach() + (wide - wide.detach())

    def evaluation(self, state: Master, x: Tensor) -> Tensor:
        master = self.master_for(state.x, x)
        value = self.rule.evaluation_any(state.state, master)
        return x if value is master else value.to(x.dtype)


class Shadowed(Wrapper):
    """`rule`, with a shadow of the parameter beside it, which gives the weights to evaluate with.

    The state is a named tuple (shadow, t, state), the last of them that of `rule`. A subclass writes `init` and
    `shadow_step`, see `Rule.keeps_shadow`.
    """

    rule: Rule
    delegates = keeps_shadow = assigns = True
    accumulates, elementwise = inner_accumulates, inner_elementwise

    def steps(self, state: Any, x: Tensor, dx: Any) -> Steps:
        run = Run(self.rule.steps(state.state, x, dx))
        while run.asks is not None:
            run.tell((yield run.asks))
        inner, change = run.result
        if change is None:
            return state._replace(state=inner), None
        shadow, t, _ = state
        t, then = self.shadow_step(t)
        if then is not None:
            stepped = real(change.value if isinstance(change, Assign) else x - change)
            shadow, becomes = then(shadow, stepped)
            change = change if becomes is stepped else Assign(like(becomes, x))
        return type(state)(shadow, t, inner), change

    def shadow_step(self, t: int) -> tuple[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None]:
        raise NotImplementedError

    def evaluation(self, state: Any, x: Tensor) -> Tensor:
        """The weights to evaluate with: the shadow."""
        return like(state[0].to(real(x).dtype), x)


class Average(NamedTuple):
    """State of `Averaged`: the average, of how many steps it is, and the state of the rule that steps."""

    x: Tensor
    t: int
    state: Any


class Averaged(Shadowed):
    """`rule`, with an exponential average of the parameter beside it: the weights to evaluate with, see `averaged`.

    After the first step the average is the parameter, and after each later one `decay · average + (1 - decay) · x`. A
    large decay keeps the first for long, so a schedule may stand for it: `lambda count: min(0.999, (1 + count) / (10 +
    count))` rises to it, and `lambda count: count / (1 + count)` gives the mean of all steps [Polyak & Juditsky 1992].

    Numbers of `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)`, of the parameters.

    What makes no step, as an `AccumGrad` inside does, does not count. The average is in float32 at least, whatever the
    parameter is. Last in a chain; `MixedPrecision(Averaged(...))` averages the master copy.
    """

    decay: Hyper = hyper(default=0.999, allowed="[0, 1]")

    def init(self, x: Tensor) -> Average:
        own = real(x).detach()
        start = own.to(torch.promote_types(own.dtype, torch.float32), copy=True)
        return Average(start, 0, self.rule.init_any(x))

    def shadow_step(self, t: int) -> tuple[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        decay = self.decay if t else 0.0
        return t + 1, lambda old, x: (average(decay, old, x if x.dtype == old.dtype else x.to(old.dtype)), x)

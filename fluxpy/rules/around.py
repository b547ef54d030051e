"""Rules around one other rule that change what its step does: Lookahead, Cautious."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fields import Hyper, hyper
from ..rule import Assign, Reduce, ReducingRule, Rule, Run, Steps
from .average import average, like, real, wide
from .wrap import Shadowed, Wrapper, inner_elementwise


class Slow(NamedTuple):
    """State of `Lookahead`: the slow weights, how many steps the fast ones went since, and the state of the rule."""

    slow: Tensor
    steps: int
    state: Any


class Lookahead(Shadowed):
    """Lookahead [Zhang et al. 2019]: `k` steps of `rule`, then back to a point between where they began and ended.

    The slow weights are at first the parameter. After each `k` steps they go by `alpha` of the way to the parameter,
    which becomes them; the state of `rule` stays as it is. `evaluation` gives the slow weights, the paper's choice.
    A new `k` acts at once. Must be last in a chain.

    >>> rule, x = Lookahead(Descent(1.0), k=2), torch.zeros(1)
    >>> state, change = rule.apply(rule.init(x), x, torch.tensor([-1.0]))
    >>> rule.apply(state, x - change, torch.tensor([-1.0]))[1]  # half of the way from 0 to 2
    Assign(value=tensor([1.]))
    """

    _: KW_ONLY
    k: Hyper = hyper(default=6, allowed="1, 2, ...")
    alpha: Hyper = hyper(default=0.5, allowed="[0, 1]")

    def init(self, x: Tensor) -> Slow:
        return Slow(real(x).clone(), 0, self.rule.init_any(x))

    def shadow_step(self, t: int) -> tuple[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None]:
        return (t + 1, None) if t + 1 < self.k else (0, self._meet)

    def _meet(self, slow: Tensor, fast: Tensor) -> tuple[Tensor, Tensor]:
        slow = average(1 - self.alpha, slow, fast)
        return slow, slow


class _Size(ReducingRule):
    """How many elements an array has."""

    over = "array"
    splittable = True

    def part(self, value: Tensor) -> Tensor:
        return self.parts([value])[0]

    def parts(self, values: Sequence[Tensor] | Tensor) -> Tensor:
        first = wide(real(values[0]))
        return torch.tensor([real(value).numel() for value in values], dtype=first.dtype, device=first.device)


_SIZE = _Size()


class Cautious(Wrapper, ReducingRule):
    """Cautious [Liang et al. 2024]: the change of `rule`, without the elements that go against the gradient.

    Where the change and `dx` differ in sign, that element rests; the others grow, so that the mean step of the array
    stays: the change is divided by the share of elements that move, at least 1e-3. The state is that of `rule`. With
    the decay of an `AdamW` inside, the decay rests too: `OptimiserChain(Cautious(Adam(lr)), WeightDecay(lr * λ))` keeps
    it out. Numbers of the authors' code; the paper's formula has `+ 1` in the count of elements instead of the 1e-3.

    >>> rule, x = Cautious(Momentum(1.0, 0.5)), torch.zeros(2)
    >>> state, _ = rule.apply(rule.init(x), x, torch.tensor([4.0, 4.0]))
    >>> rule.apply(state, x, torch.tensor([4.0, -1.0]))[1]
    tensor([12.,  0.])
    """

    rule: Rule
    over = "array"
    splittable = True
    elementwise = inner_elementwise

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule.accumulates:
            raise ValueError(
                "Cautious compares each change with its gradient, and a rule inside that gathers gradients has none "
                "for most: write OptimiserChain(AccumGrad(n), Cautious(...))"
            )

    def init(self, x: Tensor) -> Any:
        return self.rule.init_any(x)

    def map_inner_states(self, f: Callable[..., Any], *states: Any) -> Any:
        return f(self.rule, *states)

    def part(self, value: Tensor) -> Tensor:
        return wide(real(value)).sum()

    def parts(self, values: Sequence[Tensor] | Tensor) -> Tensor:
        if not isinstance(values, Tensor):
            return super().parts(values)
        return wide(real(values)).reshape(len(values), -1).sum(1)

    def steps(self, state: Any, x: Tensor, dx: Any) -> Steps:
        # A total too: of an array that is spread over processes, each has a part. First, as a large array starts over
        # after each total.
        size = yield Reduce(_SIZE, dx)
        run = Run(self.rule.steps(state, x, dx))
        while run.asks is not None:
            run.tell((yield run.asks))
        state, change = run.result
        if change is None:
            return state, None
        change = real(x - change.value if isinstance(change, Assign) else change)
        agrees = (change * real(dx)).sign().clamp(min=0)  # without booleans, which take four times as long
        moving = yield Reduce(self, agrees)
        share = (moving / size.clamp(min=1)).clamp(min=1e-3)
        return state, like(change * agrees / share.to(change.dtype), x)

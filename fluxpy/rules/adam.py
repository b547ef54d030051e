"""Adam and its relatives: a step along the mean of the gradients, divided by the root of the mean of their squares.

All keep `m` and `v`, exponential averages of the gradient and of its square, in the shape and dtype of the parameter,
and `t`, how often they were applied. `betas` are the decays of the two averages; `eps` keeps the division finite.

    Adam                 m̂ / (√v̂ + eps)
    ├── AdamW            and beside it a pull towards zero
    ├── AMSGrad          v̂ never shrinks
    ├── NAdam            m̂ looks one step ahead
    ├── RAdam            no division until v is known well enough
    ├── AdaMax           v is a running maximum
    ├── AdaBelief        v is the variance of the gradient around m
    ├── OAdam            twice this step less the one before
    ├── AdEMAMix         beside m a second, much slower average
    └── ADOPT            divides by the v before, and only then averages

A relative overrides what differs: `averages` (what is kept), `denominator` (what `m̂` is divided by) or `apply` itself.
"""

from dataclasses import KW_ONLY
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fields import Hyper, hyper
from ..rule import Rule
from .average import average, average_square, eps_for, plus, root


class Moments(NamedTuple):
    """State of the Adam family."""

    m: Tensor
    v: Tensor
    t: int


class Adam(Rule):
    """Adam [Kingma & Ba 2015]: `lr · m̂ / (√v̂ + eps)`, with `m̂`, `v̂` free of the bias towards their start at zero.

    Numbers of `torch.optim.Adam`. Weight decay as a penalty: `OptimiserChain(WeightDecay(λ), Adam(...))`.

    >>> Adam(1e-3, betas=(0.8, 0.99))
    Adam(lr=0.001, betas=(0.8, 0.99), eps=1e-08)
    """

    lr: Hyper = hyper(default=1e-3, allowed="[0, inf)")
    betas: Hyper = hyper(default=(0.9, 0.999), allowed="[0, 1)")
    _: KW_ONLY
    eps: Hyper = hyper(default=1e-8, allowed="[0, inf)")
    elementwise = True

    def init(self, x: Tensor) -> Any:
        return Moments(torch.zeros_like(x), torch.zeros_like(x), 0)

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        state = self.averages(state, x, dx)
        return state, self.lr / (1 - self.betas[0] ** state.t) * state.m / self.denominator(state, x)

    def averages(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        beta1, beta2 = self.betas
        return Moments(average(beta1, state.m, dx), average_square(beta2, state.v, dx), state.t + 1)

    def denominator(self, state: Any, x: Tensor) -> Hyper:
        return root(state.v) / (1 - self.betas[1] ** state.t) ** 0.5 + eps_for(x, self.eps)


class AdamW(Adam):
    """AdamW [Loshchilov & Hutter 2019]: Adam's step, and beside it `lr · weight_decay · x`, free of its averages.

    Numbers of `torch.optim.AdamW`.
    """

    _: KW_ONLY  # that of the parent does not reach here
    weight_decay: Hyper = hyper(default=1e-2, allowed="[0, inf)")

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        state, step = super().apply(state, x, dx)
        return state, plus(step, self.lr * self.weight_decay, x)


class PeakMoments(NamedTuple):
    """State of `AMSGrad`: `peak` is the largest `v` so far, element by element."""

    m: Tensor
    v: Tensor
    t: int
    peak: Tensor


class AMSGrad(Adam):
    """AMSGrad [Reddi et al. 2018]: Adam with the largest `v` so far in place of `v`: no element speeds up again.

    Numbers of `torch.optim.Adam(amsgrad=True)`, which corrects the bias after it takes the maximum. The paper has no
    correction, and Flux starts all averages at eps besides.
    """

    def init(self, x: Tensor) -> PeakMoments:
        return PeakMoments(*super().init(x), peak=torch.zeros_like(x))

    def averages(self, state: PeakMoments, x: Tensor, dx: Tensor) -> PeakMoments:
        m, v, t = super().averages(state, x, dx)
        return PeakMoments(m, v, t, torch.maximum(state.peak, v))

    def denominator(self, state: PeakMoments, x: Tensor) -> Hyper:
        return super().denominator(state._replace(v=state.peak), x)


class NesterovMoments(NamedTuple):
    """State of `NAdam`: `mu_product` is the product of all momenta `μ` so far."""

    m: Tensor
    v: Tensor
    t: int
    mu_product: float


class NAdam(Adam):
    """NAdam [Dozat 2016]: Adam that looks ahead as `Nesterov` does, with a momentum that grows towards `beta1`.

    `μ_t = beta1 · (1 - 0.96^(t · momentum_decay) / 2)` weighs the gradient and `m` of the step:
    `lr · ((1 - μ_t) / (1 - μ_1⋯μ_t) · dx + μ_t₊₁ / (1 - μ_1⋯μ_t₊₁) · m) / (√v̂ + eps)`.

    Numbers of `torch.optim.NAdam`. Flux has a constant momentum and a factor `beta2` in `v̂`.
    """

    lr: Hyper = hyper(default=2e-3, allowed="[0, inf)")
    _: KW_ONLY
    momentum_decay: Hyper = hyper(default=4e-3, allowed="[0, inf)")

    def init(self, x: Tensor) -> NesterovMoments:
        return NesterovMoments(*super().init(x), mu_product=1.0)

    def apply(self, state: NesterovMoments, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        m, v, t = super().averages(state, x, dx)
        mu, mu_next = (self.betas[0] * (1 - 0.5 * 0.96 ** (i * self.momentum_decay)) for i in (t, t + 1))
        state = NesterovMoments(m, v, t, state.mu_product * mu)
        ahead = plus((1 - mu) / (1 - state.mu_product) * dx, mu_next / (1 - state.mu_product * mu_next), m)
        return state, self.lr * ahead / self.denominator(state, x)


class RAdam(Adam):
    """RAdam [Liu et al. 2020]: `lr · m̂` alone until enough gradients are known to trust `v`, then Adam, eased in.

    With `ρ∞ = 2 / (1 - beta2) - 1` and `ρ = ρ∞ - 2t · beta2^t / (1 - beta2^t)`, the step is `lr · m̂` while `ρ <= 5`,
    and `lr · r · m̂ · √(1 - beta2^t) / (√v + eps)` after, where `r² = (ρ-4)(ρ-2)ρ∞ / ((ρ∞-4)(ρ∞-2)ρ)`.

    Numbers of `torch.optim.RAdam`. The paper and Flux switch at 4, which with the default betas is a step earlier.
    """

    def denominator(self, state: Moments, x: Tensor) -> Hyper:
        beta2, t = self.betas[1], state.t
        unbias = 1 - beta2**t
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / unbias
        known = length > 5
        # Any number above 4 keeps the root real where it will not be used.
        longest, length = _where(known, longest, 6.0), _where(known, length, 6.0)
        rectify = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
        return _where(known, (root(state.v) + eps_for(x, self.eps)) / (unbias**0.5 * rectify), 1.0)


def _where(condition: Any, yes: Hyper, no: Hyper) -> Hyper:
    """`torch.where`, also of numbers."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


class AdaMax(Adam):
    """AdaMax [Kingma & Ba 2015]: `lr · m̂ / v`, with `v = max(beta2 · v, |dx| + eps)` a maximum that fades.

    Numbers of `torch.optim.Adamax`. Flux adds eps to the divisor instead.
    """

    lr: Hyper = hyper(default=2e-3, allowed="[0, inf)")

    def averages(self, state: Moments, x: Tensor, dx: Tensor) -> Moments:
        beta1, beta2 = self.betas
        peak = torch.maximum(beta2 * state.v, dx.abs() + eps_for(x, self.eps))
        return Moments(average(beta1, state.m, dx), peak, state.t + 1)

    def denominator(self, state: Moments, x: Tensor) -> Hyper:
        return state.v


class AdaBelief(Adam):
    """AdaBelief [Zhuang et al. 2020]: Adam with `v` the average of `(dx - m)²`: bold where gradients are as expected.

    Numbers of the paper: eps is added to `v` at every step, and to `√v̂` again.
    """

    _: KW_ONLY
    eps: Hyper = hyper(default=1e-16, allowed="[0, inf)")

    def averages(self, state: Moments, x: Tensor, dx: Tensor) -> Moments:
        beta1, beta2 = self.betas
        m = average(beta1, state.m, dx)
        return Moments(m, average_square(beta2, state.v, dx - m) + eps_for(x, self.eps), state.t + 1)


class Optimism(NamedTuple):
    """State of `OAdam`: Adam's, and the step that Adam made last."""

    moments: Moments
    step: Tensor


class OAdam(Adam):
    """Optimistic Adam [Daskalakis et al. 2018]: twice Adam's step less the one before; for games, where Adam circles.

    Numbers of the paper and Flux: the step before the first is zero, so the first is doubled. A new lr does not rescale
    the step before.
    """

    betas: Hyper = hyper(default=(0.5, 0.9), allowed="[0, 1)")

    def init(self, x: Tensor) -> Optimism:
        return Optimism(super().init(x), torch.zeros_like(x))

    def apply(self, state: Optimism, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        moments, step = super().apply(state.moments, x, dx)
        return Optimism(moments, step), 2 * step - state.step


class MixedMoments(NamedTuple):
    """State of `AdEMAMix`: `slow` is the slow average of the gradient."""

    m: Tensor
    v: Tensor
    t: int
    slow: Tensor


class AdEMAMix(Adam):
    """AdEMAMix [Pagliardini et al. 2024]: AdamW with a second average of the gradient that remembers far longer.

    `lr · ((m̂ + alpha · slow) / (√v̂ + eps) + weight_decay · x)`. `betas` are the decays of `m`, `v` and `slow`; `slow`
    has no bias correction.

    Numbers of the paper, without its warm-ups of alpha and beta3: any schedule may stand for `alpha`, as
    `alpha=schedules.linear(0.0, 5.0, steps)`.
    """

    betas: Hyper = hyper(default=(0.9, 0.999, 0.9999), allowed="[0, 1)")
    _: KW_ONLY
    alpha: Hyper = hyper(default=5.0, allowed="[0, inf)")
    weight_decay: Hyper = hyper(default=1e-2, allowed="[0, inf)")

    def init(self, x: Tensor) -> MixedMoments:
        return MixedMoments(*super().init(x), slow=torch.zeros_like(x))

    def apply(self, state: MixedMoments, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        beta1, beta2, beta3 = self.betas
        m, slow = average(beta1, state.m, dx), average(beta3, state.slow, dx)
        state = MixedMoments(m, average_square(beta2, state.v, dx), state.t + 1, slow)
        mixed = plus(self.lr / (1 - beta1**state.t) * m, self.lr * self.alpha, slow)
        return state, plus(mixed / self.denominator(state, x), self.lr * self.weight_decay, x)


class ADOPT(Adam):
    """ADOPT [Taniguchi et al. 2024]: `lr · m`, with `m` the average of `dx / max(√v, eps)`, `v` as it was before `dx`.

    So the gradient and what it is divided by are independent, and it converges whatever `betas[1]` is. The first
    gradient only sets `v`: nothing moves. No bias corrections.

    Numbers of the paper's second version, in which the quotient is clamped to `±t^(1/4)`, `t` counting from the second
    gradient; the first version has no clamp.

    >>> rule, x, dx = ADOPT(1.0), torch.zeros(1), torch.ones(1)
    >>> state, change = rule.apply(rule.init(x), x, dx)
    >>> change, rule.apply(state, x, dx)[1]
    (tensor([0.]), tensor([0.1000]))
    """

    betas: Hyper = hyper(default=(0.9, 0.9999), allowed="[0, 1)")
    _: KW_ONLY
    eps: Hyper = hyper(default=1e-6, allowed="[0, inf)")

    def apply(self, state: Moments, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        beta1, beta2 = self.betas
        bound = state.t**0.25  # 0 at first, when there is no v yet
        scaled = (dx / root(state.v).clamp(min=eps_for(x, self.eps))).clamp(-bound, bound)
        m, v = average(beta1, state.m, scaled), average_square(beta2 if state.t else 0.0, state.v, dx)
        return Moments(m, v, state.t + 1), self.lr * m

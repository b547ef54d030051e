"""Schedule-Free [Defazio et al. 2024]: an average of the iterates in place of a schedule that sinks to zero.

Three sequences: `z` takes the steps, their average is what one evaluates with, and the parameter, where gradients are
taken, lies between the two: `x = (1 - beta) · z + beta · average`. Only `z` is kept beside the parameter; `evaluation`
works the average out.

Each `z` weighs in the average by `t^r · (the largest rate so far)^weight_lr_power`, `t` counting from 1. The rate grows
from 0 to `lr` over the first `warmup_steps` applications.
"""

from dataclasses import KW_ONLY
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..fields import Hyper, hyper
from ..rule import Rule
from .average import average_square, decayed, eps_for, larger, like, plus, quotient, root


class Mean(NamedTuple):
    """State of `ScheduleFreeSGD`: `total` is the sum of all weights so far, `peak` the largest rate."""

    z: Tensor
    t: int
    total: float
    peak: float


class MomentMean(NamedTuple):
    """State of `ScheduleFreeAdamW`: `v` is the average of the squared gradient."""

    z: Tensor
    t: int
    total: float
    peak: float
    v: Tensor


S = TypeVar("S", Mean, MomentMean)


class ScheduleFreeSGD(Rule):
    """Schedule-Free SGD [Defazio et al. 2024]: `z` goes by `lr · (dx + weight_decay · x)`; see the head of this module.

    `momentum` is the `beta` that places the parameter between `z` and the average: the weights to evaluate with are
    those of `evaluation`, not the parameter. Do not add a schedule that sinks.

    Numbers of `schedulefree.SGDScheduleFree`.
    """

    lr: Hyper = hyper(default=1.0, allowed="[0, inf)")
    momentum: Hyper = hyper(default=0.9, allowed="(0, 1)")
    _: KW_ONLY
    weight_decay: Hyper = hyper(default=0.0, allowed="[0, inf)")
    warmup_steps: Hyper = hyper(default=0, allowed="0, 1, ...")
    r: Hyper = hyper(default=0.0, allowed="[0, inf)")
    weight_lr_power: Hyper = hyper(default=2.0, allowed="[0, inf)")
    elementwise = True

    def init(self, x: Tensor) -> Mean:
        return Mean(x.clone(), 0, 0.0, 0.0)

    def apply(self, state: Mean, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        return _go(self, self.momentum, state, x, dx)

    def evaluation(self, state: Mean, x: Tensor) -> Tensor:
        """The weights to evaluate with: the average of all `z`."""
        return _mean(self.momentum, state, x)


class ScheduleFreeAdamW(Rule):
    """Schedule-Free AdamW [Defazio et al. 2024]: `z` goes by `lr · (dx / (√v̂ + eps) + weight_decay · x)`.

    Like `ScheduleFreeSGD`, with the second average of Adam; `betas[0]` places the parameter between `z` and the average
    that `evaluation` gives, `betas[1]` is the decay of `v`.

    Numbers of `schedulefree.AdamWScheduleFree`.
    """

    lr: Hyper = hyper(default=0.0025, allowed="[0, inf)")
    betas: Hyper = hyper(default=(0.9, 0.999), allowed="(0, 1)")
    _: KW_ONLY
    eps: Hyper = hyper(default=1e-8, allowed="[0, inf)")
    weight_decay: Hyper = hyper(default=0.0, allowed="[0, inf)")
    warmup_steps: Hyper = hyper(default=0, allowed="0, 1, ...")
    r: Hyper = hyper(default=0.0, allowed="[0, inf)")
    weight_lr_power: Hyper = hyper(default=2.0, allowed="[0, inf)")
    elementwise = True

    def init(self, x: Tensor) -> MomentMean:
        return MomentMean(x.clone(), 0, 0.0, 0.0, torch.zeros_like(x))

    def apply(self, state: MomentMean, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        beta1, beta2 = self.betas
        v = average_square(beta2, state.v, dx)
        dx = dx / (root(v) / (1 - beta2 ** (state.t + 1)) ** 0.5 + eps_for(x, self.eps))
        return _go(self, beta1, state._replace(v=v), x, dx)

    def evaluation(self, state: MomentMean, x: Tensor) -> Tensor:
        """The weights to evaluate with: the average of all `z`."""
        return _mean(self.betas[0], state, x)


def _go(rule: ScheduleFreeSGD | ScheduleFreeAdamW, beta: Hyper, state: S, x: Tensor, dx: Tensor) -> tuple[S, Tensor]:
    """One step of `z` along `dx`, and what the parameter, which also moves towards `z`, is to lose."""
    t, warmup = state.t + 1, rule.warmup_steps
    lr = rule.lr * (t / warmup) if t < warmup else rule.lr
    peak = larger(lr, state.peak)
    weight = t**rule.r * peak**rule.weight_lr_power
    total = state.total + weight
    share = quotient(weight, total)  # of the new z in the average
    dx = decayed(dx, rule.weight_decay, x)
    change = plus(share * (x - state.z), lr * (1 - beta * (1 - share)), dx)
    return state._replace(z=plus(state.z, -lr, dx), t=t, total=total, peak=peak), change


def _mean(beta: Hyper, state: Mean | MomentMean, x: Tensor) -> Tensor:
    return x + (1 / beta - 1) * (x - like(state.z, x))

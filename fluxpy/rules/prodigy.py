"""Prodigy: Adam that finds its rate by itself."""

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fields import Hyper, hyper
from ..rule import Reduce, ReducingRule, Steps
from .average import decayed, known, larger, like, plus, plus_square, quotient, real, root, wide


class Distance(NamedTuple):
    """State of `Prodigy`: Adam's averages, of `d · dx`; the sum `s` of the gradients, which fades; the parameter at the
    start; this array's share `r` of how far the gradients agree with the way gone; and the estimate `d`."""

    m: Tensor
    v: Tensor
    s: Tensor
    x0: Tensor
    r: Tensor
    d: Tensor


class _Sum(ReducingRule):
    """The sum over the array."""

    over = "array"
    takes_numbers = splittable = True

    def part(self, value: Tensor) -> Tensor:
        return real(value).sum()

    def parts(self, values: Sequence[Tensor] | Tensor) -> Tensor:
        return real(values).reshape(len(values), -1).sum(1) if isinstance(values, Tensor) else super().parts(values)


class _TotalSum(_Sum):
    """The sum over the tree, whatever the hyperparameters of those who ask are."""

    over = "tree"


class _Largest(ReducingRule):
    """The largest number of the tree: of numbers, each of one array."""

    takes_numbers = True

    def part(self, value: Tensor) -> Tensor:
        return real(value).amax()

    def parts(self, values: Sequence[Tensor] | Tensor) -> Tensor:
        return real(values).reshape(len(values), -1).amax(1) if isinstance(values, Tensor) else super().parts(values)

    def combine(self, parts: Tensor) -> Tensor:
        return parts.amax(0)


class _TotalNumber(_Largest):
    """The sum of numbers, each of one array: its part is itself, however many elements it stands for."""

    def combine(self, parts: Tensor) -> Tensor:
        return parts.sum(0)


_SUM, _TOTAL_SUM, _LARGEST, _TOTAL_NUMBER = _Sum(), _TotalSum(), _Largest(), _TotalNumber()


class Prodigy(ReducingRule):
    """Prodigy [Mishchenko & Defazio 2024]: Adam with the rate `lr · d`, where `d` estimates the distance to a solution.

    `d` grows from `d0` to `d_coef · Σ r / Σ |s|` wherever that is more, with both sums over the whole tree. `r` and `s`
    are sums that fade by `√betas[1]`, weighted by `lr · d²/d0`: `r` of `dx · (x0 - x)`, `s` of `dx`. The step is
    `lr · d · (m / (√v + d · eps) + weight_decay · x)`. Leave `lr` at 1; a schedule from 1 to 0 is fine.

    Leaves that are not stepped have no part in the sums. One that comes later (thawed, new) takes over the largest
    estimate of all that step with it. Leaves share it whatever their hyperparameters, at the same place in their
    chains. A gradient that holds a NaN spoils those elements alone, and the estimate grows no more. Four numbers are
    kept for each of a parameter's, in float32 where that is bfloat16 or float16.

    Numbers of `prodigyopt.Prodigy` with its defaults: no bias correction, decoupled decay.
    """

    lr: Hyper = hyper(default=1.0, allowed="[0, inf)")
    betas: Hyper = hyper(default=(0.9, 0.999), allowed="[0, 1)")
    _: KW_ONLY
    eps: Hyper = hyper(default=1e-8, allowed="(0, inf)")
    weight_decay: Hyper = hyper(default=0.0, allowed="[0, inf)")
    d0: Hyper = hyper(default=1e-6, allowed="(0, inf)", fixed=True)
    d_coef: Hyper = hyper(default=1.0, allowed="(0, inf)")
    elementwise = True

    def init(self, x: Tensor) -> Distance:
        x = wide(real(x))
        m, v, s = (torch.zeros_like(x) for _ in range(3))
        return Distance(m, v, s, x.clone(), x.new_zeros(()), x.new_zeros(()) + self.d0)

    def steps(self, state: Distance, x: Tensor, dx: Any) -> Steps:
        (beta1, beta2), given = self.betas, x
        x, dx = wide(real(x)), wide(real(dx))
        d = _beside((yield Reduce(_LARGEST, state.d)), state.d)
        rate, fade = self.lr * d, beta2**0.5
        weight = d / self.d0 * rate
        r = fade * state.r + weight * (yield Reduce(_SUM, lambda: dx * (state.x0 - x)))
        agreement = _beside((yield Reduce(_TOTAL_NUMBER, r)), state.d)
        s = plus(fade * state.s, weight, dx)
        # Not a 1-norm, which takes PyTorch five times as long.
        length = _beside((yield Reduce(_TOTAL_SUM, lambda: s.abs())), state.d)
        m, v = plus(beta1 * state.m, (1 - beta1) * d, dx), plus_square(beta2 * state.v, (1 - beta2) * d * d, dx)
        d = larger(d, self.d_coef * known(quotient(agreement, length)))
        change = rate * decayed(m / (root(v) + d * self.eps), self.weight_decay, x)
        return Distance(m, v, s, state.x0, r, larger(state.d, d)), like(change, given).to(given.dtype)


def _beside(total: Any, own: Tensor) -> Any:
    """A total, where it is no number, in the dtype and on the device of the state."""
    return total if isinstance(total, float) else total.to(own)

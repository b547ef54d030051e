"""Rules that divide the gradient by the size it used to have, element by element."""

from dataclasses import KW_ONLY
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fields import Hyper, hyper
from ..rule import Rule
from .average import average, average_square, eps_for, root


class Square(NamedTuple):
    """State of `RMSProp`: the average of the squared gradient."""

    v: Tensor


class Moments(NamedTuple):
    """State of centered `RMSProp`: the average of the gradient too."""

    v: Tensor
    m: Tensor


class RMSProp(Rule):
    """RMSProp [Tieleman & Hinton 2012]: `lr · dx / (√v + eps)`, with `v` the average of `dx²`.

    `centered` takes the square of the average gradient `m` from `v`: the variance [Graves 2013].

    Numbers of `torch.optim.RMSprop` without its momentum, except that the variance is at least `v` times a few
    roundings of the dtype: where it rounds to zero or below, torch gives steps without bound or NaN.

    >>> RMSProp(centered=True).init(torch.zeros(1))
    Moments(v=tensor([0.]), m=tensor([0.]))
    """

    lr: Hyper = hyper(default=1e-2, allowed="[0, inf)")
    _: KW_ONLY
    alpha: Hyper = hyper(default=0.99, allowed="[0, 1]")
    eps: Hyper = hyper(default=1e-8, allowed="[0, inf)")
    centered: bool = hyper(default=False, fixed=True)
    elementwise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.centered) is not bool:
            raise ValueError(f"RMSProp: centered={self.centered!r} is not allowed; it must be True or False")

    def init(self, x: Tensor) -> Square | Moments:
        return Moments(torch.zeros_like(x), torch.zeros_like(x)) if self.centered else Square(torch.zeros_like(x))

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        v = average_square(self.alpha, state.v, dx)
        if self.centered:
            state = Moments(v, average(self.alpha, state.m, dx))
            # The difference of two averages is no more precise than they are: it may not round to zero or below.
            least = 4 * torch.finfo(v.dtype).eps * v
            v = torch.maximum(v - state.m * state.m, least)
        else:
            state = Square(v)
        return state, self.lr * dx / (root(v) + eps_for(x, self.eps))


class AdaGrad(Rule):
    """AdaGrad [Duchi et al. 2011]: `lr · dx / (√v + eps)`, with `v` the sum of all `dx²`: a rate that only sinks.

    Numbers of `torch.optim.Adagrad`. Flux starts `v` at eps.
    """

    lr: Hyper = hyper(default=1e-2, allowed="[0, inf)")
    _: KW_ONLY
    eps: Hyper = hyper(default=1e-10, allowed="[0, inf)")
    elementwise = True

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def apply(self, state: Tensor, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        v = state + dx * dx
        return v, self.lr * dx / (root(v) + eps_for(x, self.eps))


class Squares(NamedTuple):
    """State of `AdaDelta`: the averages of the squared gradient and of the squared step."""

    v: Tensor
    u: Tensor


class AdaDelta(Rule):
    """AdaDelta [Zeiler 2012]: a step in the units of the parameter, `lr · dx · √(u + eps) / √(v + eps)`.

    `v` is the average of `dx²`, `u` that of the squared step before lr; `rho` is the decay of both.

    Numbers of `torch.optim.Adadelta`. Flux has no lr.
    """

    lr: Hyper = hyper(default=1.0, allowed="[0, inf)")
    _: KW_ONLY
    rho: Hyper = hyper(default=0.9, allowed="[0, 1]")
    eps: Hyper = hyper(default=1e-6, allowed="[0, inf)")
    elementwise = True

    def init(self, x: Tensor) -> Squares:
        return Squares(torch.zeros_like(x), torch.zeros_like(x))

    def apply(self, state: Squares, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        eps = eps_for(x, self.eps)
        v = average_square(self.rho, state.v, dx)
        step = (state.u + eps).sqrt() / (v + eps).sqrt() * dx
        return Squares(v, average_square(self.rho, state.u, step)), self.lr * step

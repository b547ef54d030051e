"""Gradient descent, plain and with momentum."""

from typing import Any

import torch
from torch import Tensor

from ..fields import Hyper, hyper
from ..rule import Rule


class Descent(Rule):
    """Gradient descent: `lr · dx`. Numbers of `torch.optim.SGD`, default of Flux.

    >>> Descent(0.5).apply((), torch.zeros(2), torch.tensor([1.0, -4.0]))[1]
    tensor([ 0.5000, -2.0000])
    """

    lr: Hyper = hyper(default=0.1, allowed="[0, inf)")
    elementwise = True

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        return state, self.lr * dx


class Momentum(Rule):
    """Descent with momentum [Polyak 1964]: `lr · v`, with `v = momentum · v + dx`.

    Numbers of `torch.optim.SGD(momentum=...)`, defaults of Flux. The rate stays outside of `v`, so a new one acts on
    the whole step at once; in Flux `v` holds the old one for a while.

    >>> rule, x, dx = Momentum(lr=1.0, momentum=0.5), torch.zeros(1), torch.ones(1)
    >>> v, change = rule.apply(rule.init(x), x, dx)
    >>> rule.apply(v, x, dx)[1]
    tensor([1.5000])
    """

    lr: Hyper = hyper(default=0.01, allowed="[0, inf)")
    momentum: Hyper = hyper(default=0.9, allowed="[0, 1]")
    elementwise = True

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def apply(self, state: Tensor, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        v = self.momentum * state + dx
        return v, self.lr * v


class Nesterov(Momentum):
    """Nesterov's momentum [Nesterov 1983; Sutskever et al. 2013]: `lr · (dx + momentum · v)`, `v` as in `Momentum`.

    Numbers of `torch.optim.SGD(momentum=..., nesterov=True)`, defaults of Flux.
    """

    lr: Hyper = hyper(default=0.001, allowed="[0, inf)")

    def apply(self, state: Tensor, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        v, step = super().apply(state, x, dx)
        return v, self.lr * dx + self.momentum * step

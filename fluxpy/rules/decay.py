"""Penalties on large parameters. They stand before the step: `OptimiserChain(WeightDecay(1e-4), Adam(1e-3))`."""

from typing import Any

from torch import Tensor

from ..fields import Hyper, hyper
from ..rule import Rule


class WeightDecay(Rule):
    """`dx + weight_decay · x`: the gradient of a loss with `weight_decay / 2 · Σx²` added (L2, ridge).

    That of the `weight_decay` of `torch.optim.SGD`, `Adam` and others. `AdamW`'s stands beside the step instead.

    >>> WeightDecay(0.5).apply((), torch.tensor([2.0, -4.0]), torch.zeros(2))[1]
    tensor([ 1., -2.])
    """

    weight_decay: Hyper = hyper(default=5e-4, allowed="[0, inf)")
    elementwise = True

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        return state, dx + self.weight_decay * x


class SignDecay(Rule):
    """`dx + sign_decay · sign(x)`: the gradient of a loss with `sign_decay · Σ|x|` added (L1, lasso).

    >>> SignDecay(0.5).apply((), torch.tensor([2.0, -4.0]), torch.zeros(2))[1]
    tensor([ 0.5000, -0.5000])
    """

    sign_decay: Hyper = hyper(default=1e-3, allowed="[0, inf)")
    elementwise = True

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        return state, dx + self.sign_decay * x.sign()

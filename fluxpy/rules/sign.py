"""Rules that follow the sign of the gradient and choose the size of the step themselves."""

from dataclasses import KW_ONLY
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fields import Hyper, hyper
from ..rule import Rule
from .average import average


class Lion(Rule):
    """Lion [Chen et al. 2023]: `lr · sign(beta1 · m + (1 - beta1) · dx)`, then `m = beta2 · m + (1 - beta2) · dx`.

    Numbers of the paper, its weight decay left out: `lr · λ · x` beside the step is not a penalty in front of it.
    Flux weighs `m` and `dx` the other way round.

    >>> Lion(0.1).apply(torch.zeros(2), torch.zeros(2), torch.tensor([3.0, -4.0]))[1]
    tensor([ 0.1000, -0.1000])
    """

    lr: Hyper = hyper(default=1e-4, allowed="[0, inf)")
    betas: Hyper = hyper(default=(0.9, 0.99), allowed="[0, 1)")
    elementwise = True

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def apply(self, state: Tensor, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        beta1, beta2 = self.betas
        return average(beta2, state, dx), self.lr * average(beta1, state, dx).sign()


class Sizes(NamedTuple):
    """State of `Rprop`: the gradient before (zero where it just turned) and the size of each element's next step."""

    dx: Tensor
    size: Tensor


class Rprop(Rule):
    """Rprop [Riedmiller & Braun 1993; without backtracking: Igel & Hüsken 2000]: `size · sign(dx)`, for full batches.

    Where the gradient keeps its sign, `size` grows by `etas[1]`; where it turns, `size` shrinks by `etas[0]` and that
    element rests for a step. `size` begins at `lr`, which acts at no other time and so cannot be adjusted, and stays
    within `step_sizes`.

    Numbers of `torch.optim.Rprop`.

    >>> rule, x = Rprop(0.1), torch.zeros(2)
    >>> state, _ = rule.apply(rule.init(x), x, torch.tensor([1.0, 1.0]))
    >>> rule.apply(state, x, torch.tensor([1.0, -1.0]))[1]
    tensor([0.1200, 0.0000])
    """

    lr: Hyper = hyper(default=1e-2, allowed="[0, inf)", fixed=True)
    _: KW_ONLY
    etas: Hyper = hyper(default=(0.5, 1.2), allowed="(0, inf)")
    step_sizes: Hyper = hyper(default=(1e-6, 50.0), allowed="(0, inf)")
    elementwise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        turns = not _known(self.etas) or self.etas[0] < 1 < self.etas[1]
        rising = not _known(self.step_sizes) or self.step_sizes[0] <= self.step_sizes[1]
        for ok, name, want in (
            (not callable(self.lr), "lr", "it acts at init only, so it cannot be a schedule"),
            (turns, "etas", "the first must lie in (0, 1), the second in (1, inf)"),
            (rising, "step_sizes", "the first must not be above the second"),
        ):
            if not ok:
                raise ValueError(f"Rprop: {name}={getattr(self, name)!r} is not allowed; {want}")

    def init(self, x: Tensor) -> Sizes:
        return Sizes(torch.zeros_like(x), self.lr * torch.ones_like(x))

    def apply(self, state: Sizes, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        (shrink, grow), (smallest, largest) = self.etas, self.step_sizes
        turn = state.dx.sign() * dx.sign()  # not the sign of the product, which may underflow
        size = torch.where(turn > 0, grow * state.size, torch.where(turn < 0, shrink * state.size, state.size))
        size = size.clamp(min=smallest).clamp(max=largest)
        dx = torch.where(turn < 0, 0.0, dx)
        return Sizes(dx, size), size * dx.sign()


def _known(values: Hyper) -> bool:
    return isinstance(values, tuple) and all(isinstance(v, int | float) for v in values)

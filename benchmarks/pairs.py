"""Pairs of contenders for `cliff`: fluxpy, and what one would write by hand with torch for the same."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fluxpy

from .harness import Contender
from .sets import apart
from .sides import fused

Without = Callable[[int], range]  # step -> the leaves that have no gradient in it
SIZES = (1, 2, 3)  # of gradients: were they alike, Adam would hide whether anything clips them


def everything(step: int) -> range:
    """No leaf is without a gradient."""
    return range(0)


class Layers:
    """100 small layers: an encoder of 50 and two heads of 25. Three sets of gradients come in turn."""

    encoder, first, second = range(0, 100), range(100, 150), range(150, 200)  # the leaves of each, two a layer

    def __init__(self, device: str, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        encoder, *heads = (nn.ModuleList(make() for _ in range(n)) for n in (50, 25, 25))
        self.model = nn.ModuleDict({"encoder": encoder, "heads": nn.ModuleList(heads)}).to(device)
        self.start = [p.detach().clone() for p in self.model.parameters()]
        self.grads = [[torch.randn_like(x) * size for x in self.start] for size in SIZES]

    def fresh(self) -> Any:
        return copy.deepcopy(self.model)


class Side(Contender):
    """`update(n)` makes step n of its own `parameters()`; before it, untimed, their gradients are made anew."""

    def __init__(
        self,
        layers: Layers,
        parameters: Callable[[], Iterable[Tensor]],
        update: Callable[[int], object],
        without: Without = everything,
    ) -> None:
        self.parameters, self._step = parameters, -1

        def prepare() -> None:
            self._step += 1
            absent, grads = without(self._step), layers.grads[self._step % len(layers.grads)]
            for leaf, (p, g) in enumerate(zip(parameters(), grads, strict=True)):
                p.grad = None if leaf in absent else g.clone()

        super().__init__(lambda: update(self._step), prepare)


class Sides(NamedTuple):
    """fluxpy, and what it is measured against. Where that does less than fluxpy, `same` does the same, untimed."""

    ours: Side
    theirs: Side
    same: Side | None = None

    def agree(self, layers: Layers, tolerance: float) -> None:
        """Let both make as many steps. Then the parameters must be the same, up to `tolerance` of the way they went."""
        other = self.same or self.theirs
        steps = max(self.ours.steps, other.steps)
        for side in (self.ours, other):
            if side.steps < steps:
                side.run(steps - side.steps)
        off = apart(layers.start, self.ours.parameters(), other.parameters())
        assert off <= tolerance, f"the two sides differ by {off:.2%} of the way that {steps} steps go"


def by_fluxpy(
    layers: Layers,
    rule: fluxpy.Rule,
    before: Callable[[int, Any], object] | None = None,
    without: Without = everything,
) -> Side:
    """`update` with `rule`. What `before(step, state)` does is part of the step."""
    model = layers.fresh()
    state = fluxpy.setup(rule, model)

    def update(step: int) -> None:
        if before:
            before(step, state)
        fluxpy.update(state, model)

    return Side(layers, model.parameters, update, without)


def by_torch(
    layers: Layers,
    before: Callable[[int, list[Tensor], torch.optim.Optimizer], object] | None = None,
    make: Callable[[list[Tensor]], torch.optim.Optimizer] = fused,
    without: Without = everything,
) -> Side:
    """The optimiser that `make(params)` gives. What `before(step, params, optimiser)` does is part of the step."""
    params: list[Tensor] = list(layers.fresh().parameters())
    optimiser = make(params)

    def update(step: int) -> None:
        if before:
            before(step, params, optimiser)
        optimiser.step()

    return Side(layers, lambda: params, update, without)


def by_hand(
    layers: Layers, make: Callable[[list[Any]], Callable[[int], object]], without: Without = everything
) -> Side:
    """`make(params)` gives the function that makes a step."""
    params: list[Tensor] = list(layers.fresh().parameters())
    step = make(params)
    return Side(layers, lambda: params, torch.no_grad()(step), without)

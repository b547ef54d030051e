"""Data, `train`, schedules, rules and the Learner, as a user writes them: everything here must pass a type checker."""

from collections.abc import Callable
from typing import Any, NamedTuple, assert_type

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fluxpy
from fluxpy import State
from fluxpy.learner import Callback, EarlyStopping, History, Learner
from fluxpy.rules import Assign, Reduce, ReducingRule, Steps, hyper
from fluxpy.schedules import Schedule, Segment, segments, shifted, warmup_cosine
from fluxpy.testing import assert_frozen


class Batch(NamedTuple):
    x: Tensor
    y: Tensor


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse_loss(model(x), y)


def loss_and_error(model: nn.Linear, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    error = model(x) - y
    return error.square().mean(), error


def data(x: Tensor, y: Tensor) -> None:
    """Batches of tensors have the type of the data; those of NumPy arrays are Any."""
    for batch in fluxpy.DataLoader((x, y), batch_size=2, shuffle=True):
        assert_type(batch, tuple[Tensor, Tensor])
    for batch in fluxpy.DataLoader({"x": x}, 2, drop_last=True, generator=torch.Generator()):
        assert_type(batch, dict[str, Tensor])
    for batch in fluxpy.DataLoader(Batch(x, y)):
        assert_type(batch, Batch)
    assert_type(next(iter(fluxpy.DataLoader(x))), Tensor)
    for batch in fluxpy.DataLoader((np.zeros((4, 2)), x)):
        assert_type(batch, Any)
    loader: fluxpy.DataLoader[tuple[Tensor, Tensor]] = fluxpy.DataLoader((np.zeros((4, 2)), np.zeros(4)))
    assert_type(len(loader), int)


def train(model: nn.Linear, state: State, x: Tensor, y: Tensor) -> None:
    loader = fluxpy.DataLoader((x, y), batch_size=2)
    assert_type(fluxpy.train(loss, model, loader, state), list[float])
    fluxpy.train(lambda m, x, y: mse_loss(m(x), y), model, [(x, y)], state, progress=False)
    assert_type(fluxpy.trainstep(loss, model, (x, y), state), Tensor)
    value, error = fluxpy.trainstep(loss_and_error, model, (x, y), state)
    assert_type(value, Tensor)
    assert_type(error, Tensor)
    assert_frozen(state, frozen=False)


def schedules(state: State) -> None:
    rate = warmup_cosine(1e-3, 10, total=100)
    assert_type(rate(3), float)
    schedule: Schedule = shifted(rate, 5)
    any_callable: Callable[[int], Any] = schedule
    fluxpy.adjust(state, any_callable)
    fluxpy.adjust(state, lambda count: 0.1 / (1 + count))
    fluxpy.adjust(state, segments([Segment("linear", end=1e-3, steps=5), Segment("cosine", end=0.0)], total=10))
    fluxpy.adjust(state, rate)


class SignDescent(fluxpy.Rule):
    """A rule of one's own is a dataclass, without saying so."""

    lr: float = 0.01
    momentum: float = hyper(default=0.9, allowed="[0, 1)")
    elementwise = True

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def apply(self, state: Tensor, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        state = self.momentum * state + dx
        return state, self.lr * state.sign()


class UnitNorm(ReducingRule):
    elementwise = True
    over = "tree"

    def part(self, value: Tensor) -> Tensor:
        return value.square().sum()

    def steps(self, state: Any, x: Tensor, dx: Any) -> Steps:
        total = yield Reduce(self, dx, nonfinite="skip")
        return state, Assign(x - dx / total**0.5)


def rules() -> None:
    rule = SignDescent(lr=0.5, momentum=0.8)
    assert_type(rule, SignDescent)
    assert_type(rule.lr, float)
    assert_type(fluxpy.Adam(1e-3, (0.8, 0.99)), fluxpy.Adam)
    chain = fluxpy.OptimiserChain(UnitNorm(), rule)
    assert_type(chain, fluxpy.OptimiserChain)
    assert chain.lr == 0.5 and chain[1].lr == 0.5
    assert isinstance(fluxpy.setup(chain, torch.ones(2)).rule, fluxpy.Rule)
    assert fluxpy.MixedPrecision(fluxpy.AccumGrad(2)).n == 2


class Counter(Callback):
    def __init__(self) -> None:
        self.seen = 0

    def on_training_end(self, learner: Learner) -> None:
        self.seen += learner.stats["loss"] >= 0.0


def learner(model: nn.Linear, x: Tensor, y: Tensor) -> None:
    batches = fluxpy.DataLoader((x, y), batch_size=2)
    made = fluxpy.Learner(
        model, mse_loss, fluxpy.Adam(), callbacks=[Counter(), EarlyStopping()], default_callbacks=False
    )
    assert_type(made, Learner)
    history = made.fit(batches, batches, epochs=2)
    assert_type(history, History)
    fluxpy.adjust(made.state.weight, 1e-4)
    assert made.state.weight.rule.lr == 1e-4
    assert_type(made.epoch_index, int)
    assert_type(fluxpy.__version__, str)


def main() -> None:
    model, x, y = nn.Linear(2, 1), torch.randn(4, 2), torch.randn(4, 1)
    state = fluxpy.setup(fluxpy.Adam(), model)
    data(x, y)
    train(model, state, x, y)
    schedules(state)
    rules()
    learner(model, x, y)

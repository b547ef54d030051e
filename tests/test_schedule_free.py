"""ScheduleFreeAdamW and ScheduleFreeSGD beside their package: the weights to evaluate with, and what users do."""

import dataclasses
import inspect
from typing import Any

import pytest
import schedulefree
import torch
from helpers import assert_close, grads_of, model_of, needs_compiler
from torch import nn

import fluxpy
from fluxpy import AccumGrad, MixedPrecision, OptimiserChain, ScheduleFreeAdamW, ScheduleFreeSGD

PAIRS = [
    (ScheduleFreeAdamW(0.05, betas=(0.8, 0.99), weight_decay=0.1, warmup_steps=5, r=0.5), "AdamWScheduleFree"),
    (ScheduleFreeSGD(0.1, 0.7, weight_decay=0.1, warmup_steps=5, weight_lr_power=1.0), "SGDScheduleFree"),
]
each_pair = pytest.mark.parametrize("rule, name", PAIRS, ids=[name for _, name in PAIRS])


def twin_of(model: nn.ParameterDict, rule: Any, name: str) -> tuple[nn.ParameterDict, Any]:
    """A copy of the model and the package's optimiser on it."""
    twin = nn.ParameterDict({key: nn.Parameter(x.detach().clone()) for key, x in model.items()})
    optimizer = getattr(schedulefree, name)(twin.parameters(), **dataclasses.asdict(rule))
    optimizer.train()
    return twin, optimizer


def averages(state: Any, model: Any) -> dict[str, torch.Tensor]:
    """What the rule evaluates with, by path."""
    return {name: state[name].rule.evaluation(state[name].state, x.detach()) for name, x in model.items()}


@each_pair
def test_the_weights_to_evaluate_with_are_the_packages(rule, name):
    model = model_of()
    twin, optimizer = twin_of(model, rule, name)
    state = fluxpy.setup(rule, model)
    for i in range(20):
        fluxpy.update(state, model, grads_of(model, i))
        for key, dx in grads_of(model, i).items():
            twin[key].grad = dx
        optimizer.step()
        assert_close(dict(model), dict(twin))
        optimizer.eval()
        assert_close(averages(state, model), dict(twin))
        apart = (model["a"] - twin["a"]).abs().max()
        optimizer.train()
    assert apart > 1e-3  # the training weights are others


@each_pair
def test_the_defaults_are_the_packages(rule, name):
    theirs = {key: p.default for key, p in inspect.signature(getattr(schedulefree, name)).parameters.items()}
    for key, value in vars(type(rule)()).items():
        assert theirs[key] == value, key


@each_pair
def test_the_weights_of_complex_parameters(rule, name):
    model = {"w": torch.randn(3, 2, dtype=torch.complex128)}
    pairs = {"w": torch.view_as_real(model["w"]).clone()}
    states = fluxpy.setup(rule, model), fluxpy.setup(rule, pairs)
    for _ in range(4):
        dx = torch.randn(3, 2, dtype=torch.complex128)
        fluxpy.update(states[0], model, {"w": dx})
        fluxpy.update(states[1], pairs, {"w": torch.view_as_real(dx)})
    found = averages(states[0], model)["w"]
    torch.testing.assert_close(torch.view_as_real(found), averages(states[1], pairs)["w"])


@each_pair
def test_a_rate_of_zero_at_first_has_no_weight(rule, name):
    """Where all weights so far are zero the average is the start."""
    model = model_of()
    start = {key: x.detach().clone() for key, x in model.items()}
    state = fluxpy.setup(rule, model)
    fluxpy.adjust(state, lambda count: min(count, 3) * 0.01)
    fluxpy.update(state, model, grads_of(model))
    assert_close(dict(model), start, 0.0)
    for i in range(5):
        fluxpy.update(state, model, grads_of(model, i))
    assert all(x.isfinite().all() for x in model.values())
    assert (model["a"] - start["a"]).abs().max() > 1e-3


ROADS: dict[str, Any] = {
    "as it is": (lambda rule: rule, {}, 1),
    "gathering": (lambda rule: OptimiserChain(AccumGrad(2), rule), {}, 2),
    "master": (lambda rule: MixedPrecision(rule, dtype=torch.float64), {}, 1),
    "compiled": (lambda rule: rule, {"compile": True}, 1),
}


@each_pair
@pytest.mark.parametrize("road", [pytest.param(r, marks=needs_compiler if r == "compiled" else ()) for r in ROADS])
def test_leaves_of_different_rates_and_times(rule, name, road):
    """Each leaf has an average of its own: two of another rate, one that thaws late, each like a run of its own."""
    wrap, options, window = ROADS[road]
    model = model_of()
    state = fluxpy.setup(wrap(rule), model, **options)
    fluxpy.adjust(fluxpy.select(state, "[ab]"), 0.02)
    fluxpy.freeze(state["e"])
    alone = {key: {key: nn.Parameter(x.detach().clone())} for key, x in model.items()}
    states = {key: fluxpy.setup(wrap(rule), one) for key, one in alone.items()}
    for key in "ab":
        fluxpy.adjust(states[key], 0.02)
    for i in range(8 * window):
        if i == 2 * window:
            fluxpy.thaw(state["e"])
        grads = grads_of(model, i)
        fluxpy.update(state, model, grads)
        for key, one in alone.items():
            if key != "e" or i >= 2 * window:
                states[key], alone[key] = fluxpy.update(states[key], one, {key: grads[key]}, inplace=False)
    for key, one in alone.items():
        assert_close({key: model[key]}, one, 1e-11)
        assert state[key].count == (6 if key == "e" else 8), key

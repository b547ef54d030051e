"""Prodigy beside prodigyopt: one estimate for the whole tree, whoever steps in it and when."""

import contextlib
import inspect
import io
from typing import Any

import prodigyopt
import pytest
import torch
from helpers import Run, assert_close, grads_of, model_of, needs_compiler, values_of
from torch import Tensor, nn

import fluxpy
from fluxpy import ClipGlobalNorm, MixedPrecision, OptimiserChain, Prodigy
from fluxpy.testing.tree_promises import leaf_by_leaf

RULE = Prodigy(d0=1e-3)


def slopes(model: Any) -> dict[str, Tensor]:
    """Gradients of a bowl around 3, so that there is a distance to find."""
    return {name: (x.detach() - 3) * (1 + i) for i, (name, x) in enumerate(model.items())}


def of_package(params: Any, **values: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it decays
        return prodigyopt.Prodigy(params, **values)


def test_the_defaults_are_the_packages() -> None:
    theirs = {key: p.default for key, p in inspect.signature(prodigyopt.Prodigy).parameters.items()}
    assert all(theirs[key] == value for key, value in vars(Prodigy()).items())


def test_the_way_to_a_solution_is_the_packages() -> None:
    model = model_of()
    start, twin = values_of(model), {name: nn.Parameter(x) for name, x in values_of(model).items()}
    optimizer = of_package(twin.values(), weight_decay=0.01, d_coef=0.5)
    state = fluxpy.setup(Prodigy(weight_decay=0.01, d_coef=0.5), model)
    for _ in range(60):
        grads = slopes(model)
        for name, p in twin.items():
            p.grad = slopes(twin)[name]
        fluxpy.update(state, model, grads)
        optimizer.step()
    estimates = [state[name].state.d.item() for name in model]
    assert estimates == pytest.approx([optimizer.param_groups[0]["d"]] * len(estimates), rel=1e-9)
    assert estimates[0] > 1e-2  # from 1e-6
    for name, x in model.items():
        torch.testing.assert_close(x - start[name], twin[name] - start[name], rtol=1e-8, atol=1e-10)


def test_a_leaf_that_comes_late_has_the_estimate_of_all() -> None:
    """As in the package; and other rates and decays still have one estimate."""
    model = model_of({"a": (4, 3), "b": (7,), "late": (5,)})
    twin = {name: nn.Parameter(x) for name, x in values_of(model).items()}
    groups = [{"params": [twin["a"]], "weight_decay": 0.1}, {"params": [twin["b"], twin["late"]]}]
    optimizer = of_package(groups, d0=1e-3)
    state = fluxpy.setup({"a": Prodigy(d0=1e-3, weight_decay=0.1), "*": RULE}, model)
    fluxpy.freeze(state["late"])
    for i in range(30):
        if i == 25:
            fluxpy.thaw(state["late"])
            assert state["late"].state is None
        fluxpy.update(state, model, slopes(model))
        for name, dx in slopes(twin).items():
            twin[name].grad = None if name == "late" and i < 25 else dx
        optimizer.step()
        if i <= 25:
            assert_close(dict(model), twin, 1e-9)
    assert len({state[name].state.d.item() for name in model}) == 1 and state["a"].state.d > 0.05
    fluxpy.adjust(state["b"], 0.5)
    fluxpy.update(state, model, slopes(model))
    assert len({state[name].state.d.item() for name in model}) == 1


def test_gradients_of_zero_leave_the_estimate() -> None:
    model = {"w": torch.ones(3)}
    state = fluxpy.setup(Prodigy(weight_decay=0.0), model)
    for _ in range(3):
        fluxpy.update(state, model, {"w": torch.zeros(3)})
    assert model["w"].tolist() == [1, 1, 1] and state["w"].state.d == pytest.approx(1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("way", ["apart", "flat", "pure", "reference", pytest.param("compiled", marks=needs_compiler)])
def test_a_gradient_that_is_not_finite_ends_the_search(way: str, bad: float) -> None:
    """As in the package: those elements are lost, all others go on at the estimate that there was."""
    model = model_of()
    twin = {name: nn.Parameter(x) for name, x in values_of(model).items()}
    optimizer = of_package(twin.values(), d0=1e-3)
    if way == "flat":
        fluxpy.flatten_parameters(model)
    state = fluxpy.setup(RULE, model, compile=way == "compiled")
    state = leaf_by_leaf(state, RULE) if way == "reference" else state
    for turn in range(12):
        grads = slopes(model)
        for name, p in twin.items():
            p.grad = slopes(twin)[name]
        if turn == 8:
            for dx in grads["a"], twin["a"].grad:
                dx.view(-1)[3] = bad
        state, model = fluxpy.update(state, model, grads, inplace=way != "pure")
        optimizer.step()
    for name, x in model.items():
        torch.testing.assert_close(x, twin[name], rtol=1e-9, atol=1e-10, equal_nan=True)
        assert int(x.isnan().sum()) == (name == "a")
        assert state[name].state.d.item() == pytest.approx(optimizer.param_groups[0]["d"], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_finds_the_same_estimate(dtype: torch.dtype) -> None:
    """Of steps that the parameter does not round away; for smaller ones there is MixedPrecision."""
    model, exact = model_of(dtype=dtype), model_of(dtype=dtype).float()
    rule = Prodigy(d0=1e-2)
    states = fluxpy.setup(rule, model), fluxpy.setup(rule, exact)
    for _ in range(40):
        fluxpy.update(states[0], model, slopes(model))
        fluxpy.update(states[1], exact, slopes(exact))
    d = [state["a"].state.d for state in states]
    assert d[0].dtype == torch.float32 and d[0].item() == pytest.approx(d[1].item(), rel=0.2) and d[0] > 0.05


def test_complex_parameters_are_pairs() -> None:
    model = {"w": torch.randn(4, 3, dtype=torch.complex128)}
    pairs = {"w": torch.view_as_real(model["w"]).clone()}
    states = fluxpy.setup(RULE, model), fluxpy.setup(RULE, pairs)
    for _ in range(8):
        dx = model["w"] - 1
        fluxpy.update(states[0], model, {"w": dx})
        fluxpy.update(states[1], pairs, {"w": torch.view_as_real(dx)})
    torch.testing.assert_close(torch.view_as_real(model["w"]), pairs["w"])


@pytest.mark.parametrize(
    "rule",
    [
        OptimiserChain(ClipGlobalNorm(0.5), Prodigy(fluxpy.schedules.cosine(1.0, 0.0, 9), d0=1e-3)),
        OptimiserChain(fluxpy.AccumGrad(2), RULE),
        MixedPrecision(RULE, dtype=torch.float64),
    ],
    ids=["clipped", "gathering", "master"],
)
def test_in_chains_in_place_and_not(rule: Any) -> None:
    run, compiled = Run(rule), Run(rule, compile=True)
    state, model = fluxpy.setup(rule, run.model), run.model
    for i in range(8):
        state, model = fluxpy.update(state, model, grads_of(model, i), inplace=False)
    run.step(8).equals(compiled.step(8), 1e-12)
    assert_close(run.model, model, 1e-12)

"""The numbers of every rule: 50 steps in float64 against torch.optim, or against the paper in NumPy.

What is compared is the change of the parameters, element by element, relative to the way each element went.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from rule_table import ROWS, Row, values
from torch import Tensor

import fluxpy

STEPS, SHAPES = 50, [(3, 4), (5,)]
Values = dict[str, Any]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """torch.optim.NAdam keeps its product of momenta in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def problem(row: Row) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters and gradients of many sizes, a tenth of the gradients zero."""
    rng = torch.Generator().manual_seed(0)
    scales = [10 ** (10 * torch.rand(row.fit(shape), generator=rng) - 9) for shape in SHAPES]
    xs = [s * torch.randn(s.shape, generator=rng) for s in scales]
    gate = [[(torch.rand(s.shape, generator=rng) > 0.1) * s for s in scales] for _ in range(STEPS)]
    return xs, [[g * torch.randn(g.shape, generator=rng) for g in gates] for gates in gate]


def follow(row: Row, hyper: Callable[[int], Values]) -> list[list[np.ndarray]]:
    """The parameters at each step as the oracle has them, with the hyperparameters `hyper(step)`."""
    xs, grads = problem(row)
    trace = [[x.numpy().copy() for x in xs]]
    if row.oracle is not None:
        step = row.oracle()
        for i, gs in enumerate(grads):
            trace.append(step(trace[-1], [g.numpy() for g in gs], **hyper(i)))
        return trace
    assert row.twin is not None
    names = values(row.rule).keys() - {"dtype"}
    params = [torch.nn.Parameter(x) for x in xs]
    optimizer = row.twin(params, **{name: hyper(0)[name] for name in names})
    for i, gs in enumerate(grads):
        for group in optimizer.param_groups:
            group.update({name: hyper(i)[name] for name in names})
        for p, g in zip(params, gs, strict=True):
            p.grad = g
        optimizer.step()
        trace.append([p.detach().numpy().copy() for p in params])
    return trace


def train(row: Row, rule: fluxpy.Rule, adjusted: Values | None = None) -> list[list[np.ndarray]]:
    """The parameters at each step as fluxpy has them; half-way, `adjusted` is adjusted."""
    model, grads = problem(row)
    state = fluxpy.setup(rule, model)
    trace = [[x.numpy().copy() for x in model]]
    for i, gs in enumerate(grads):
        if adjusted and i == STEPS // 2:
            fluxpy.adjust(state, **adjusted)
        fluxpy.update(state, model, gs)
        trace.append([x.numpy().copy() for x in model])
    return trace


def assert_same_way(ours: list[list[np.ndarray]], theirs: list[list[np.ndarray]]) -> None:
    for a, b in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        ours_, theirs_ = np.array(a), np.array(b)
        way = np.abs(np.diff(theirs_, axis=0)).cumsum(0)
        error = np.abs((ours_ - ours_[0]) - (theirs_ - theirs_[0]))[1:]
        assert way[-1].max() > 0
        assert (error <= 1e-10 * way).all(), f"relative error {np.nanmax(error / np.maximum(way, 1e-300)):.1e}"


each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


@each_row
def test_numbers_with_defaults(row: Row) -> None:
    rule = row.given({"dtype": torch.float64})
    assert_same_way(train(row, rule), follow(row, lambda _: values(row.rule)))


@each_row
def test_numbers_with_other_hyperparameters(row: Row) -> None:
    rule = row.given(row.adjusted | row.fixed)
    assert_same_way(train(row, rule), follow(row, lambda _: values(rule)))


@each_row
def test_numbers_when_adjusted_half_way(row: Row) -> None:
    rule = row.given({"dtype": torch.float64})
    before, after = values(row.rule), values(row.rule) | row.adjusted
    assert_same_way(train(row, rule, row.adjusted), follow(row, lambda i: before if i < STEPS // 2 else after))


@each_row
def test_numbers_under_schedules(row: Row) -> None:
    """Every number that can be adjusted follows a schedule of its own, which counts applications from zero."""
    base = values(row.rule)

    def hyper(count: int) -> Values:
        moving = {n: v for i, (n, v) in enumerate(row.adjusted.items()) if count % (i + 2) == 0}
        return base | {n: v for n, v in moving.items() if n not in ("n", "nonfinite")}

    schedules = {n: (lambda count, n=n: hyper(count)[n]) for n in row.adjusted if n not in ("n", "nonfinite")}
    rule = row.given({"dtype": torch.float64} | schedules)
    assert_same_way(train(row, rule), follow(row, lambda i: hyper(i // row.window)))


def test_a_master_copy_has_the_numbers_of_its_dtype() -> None:
    """float32 parameters, stepped in float64: the master is exact, and the parameter is the master rounded."""
    row, (start, grads) = ROWS["MixedPrecision"], problem(ROWS["MixedPrecision"])
    model = [x.float() for x in start]
    master = [torch.nn.Parameter(x.double()) for x in model]
    optimizer = torch.optim.AdamW(master)
    state = fluxpy.setup(row.given({"dtype": torch.float64}), model)
    for gs in grads:
        small = [g.float() for g in gs]
        fluxpy.update(state, model, small)
        for p, g in zip(master, small, strict=True):
            p.grad = g.double()
        optimizer.step()
    for (_, leaf), x, p in zip(fluxpy.leaves(state), model, master, strict=True):
        torch.testing.assert_close(leaf.state.x, p.detach(), rtol=1e-12, atol=0)
        assert torch.equal(leaf.state.x.float(), x)

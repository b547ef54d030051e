"""Pure updates under autograd, `torch.func` and `torch.compile`."""

from typing import Any

import pytest
import rule_table
import torch
from rule_table import ROWS, Row
from torch import Tensor
from torch.func import grad, hessian, jacfwd, vmap

import fluxpy
from fluxpy import Adam, ClipGlobalNorm, Descent, MixedPrecision, Momentum, OptimiserChain, RMSProp, setup, update

F64 = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


MATRIX = drawn(5, 5)


def curved(m: dict[str, Tensor]) -> Tensor:
    """A loss in which all parameters bear on each other's gradients."""
    return (m["w"] @ MATRIX).tanh().square().sum() + m["w"].sum() * m["b"].sum() / 10 + (m["b"] - 1).pow(4).sum() / 10


# --- Gradients through steps --------------------------------------------------------------------------------------


def reals(row: Row) -> dict[str, Any]:
    """The hyperparameters of a rule that one can differentiate by, away from their defaults."""
    floats = lambda v: all(isinstance(part, float) for part in (v if isinstance(v, tuple) else (v,)))  # noqa: E731
    return {name: v for name, v in row.adjusted.items() if floats(v) and name != "norm_type"}


def after_steps(row: Row, w: Tensor, b: Tensor, numbers: Tensor, steps: int = 10) -> Tensor:
    """The loss after some steps, by the parameters at first and the hyperparameters."""
    left = iter(numbers)
    given = {
        name: tuple(next(left) for _ in v) if isinstance(v, tuple) else next(left) for name, v in reals(row).items()
    }
    rule = row.given({**row.fixed, **given})
    if "lr" not in rule_table.values(rule) and "step_sizes" not in given:
        rule = OptimiserChain(rule, Descent(0.1))
    model: Any = {"w": w, "b": b}
    state = setup(rule, model)
    for _ in range(steps):
        state, model = update(state, model, fluxpy.gradient(curved, model, create_graph=True), inplace=False)
    return curved(model)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_gradients_through_ten_steps(row: Row) -> None:
    """To the parameters at first and to each hyperparameter, against differences along two directions of each."""
    flat = [x for v in reals(row).values() for x in (v if isinstance(v, tuple) else (v,))]
    at = [drawn(5, seed=1), drawn(3, seed=2), torch.tensor(flat, dtype=F64)]
    found = torch.autograd.grad(after_steps(row, *(x.requires_grad_() for x in at)), at)
    at = [x.detach() for x in at]
    for i, (x, slope) in enumerate(zip(at, found, strict=True)):
        for seed in (3, 4):
            along = drawn(len(x), seed=seed) * (1.0 if i < 2 else x)
            there, back = ([*at[:i], x + step * along, *at[i + 1 :]] for step in (1e-6, -1e-6))
            difference = (after_steps(row, *there) - after_steps(row, *back)) / 2e-6
            torch.testing.assert_close(slope @ along, difference.detach(), rtol=1e-5, atol=1e-7)
            assert slope.any()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own forward mode
@pytest.mark.parametrize(
    "rule",
    [Adam(0.1), MixedPrecision(Momentum(0.1), dtype=F64), OptimiserChain(ClipGlobalNorm(0.5), RMSProp(0.1))],
    ids=lambda rule: type(rule).__name__,
)
def test_forward_mode_and_second_derivatives(rule: Any) -> None:
    def outer(w: Tensor) -> Tensor:
        model: Any = {"w": w}
        state = setup(rule, model)
        for _ in range(3):
            grads = grad(lambda m: (m["w"] ** 4).sum() + m["w"].prod())(model)
            state, model = update(state, model, grads, inplace=False)
        return model["w"].square().sum()

    w, room = torch.tensor([1.0, -0.7, 0.3], dtype=F64), 1e-5
    points = [(w + room * e, w - room * e) for e in torch.eye(3, dtype=F64)]
    slope = torch.stack([(outer(a) - outer(b)) / (2 * room) for a, b in points])
    bend = torch.stack([(grad(outer)(a) - grad(outer)(b)) / (2 * room) for a, b in points])
    torch.testing.assert_close(grad(outer)(w), slope, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(jacfwd(outer)(w), slope, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(hessian(outer)(w), bend, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vmap(grad(outer))(torch.stack([w, -w]))[0], grad(outer)(w))

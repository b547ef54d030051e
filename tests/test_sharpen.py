"""sharpened: against the paper's formula by hand, and what it leaves as it was."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fluxpy
from fluxpy import Momentum, setup, sharpened, update


def by_hand(model: nn.Module, x: Tensor, y: Tensor, rho: float) -> list[Tensor]:
    """The paper's gradient, on a copy."""
    params = dict(model.named_parameters())
    names = [name for name, p in params.items() if p.requires_grad]

    def loss(values: list[Tensor]) -> Tensor:
        moved = {**{k: p.detach() for k, p in params.items()}, **dict(zip(names, values, strict=True))}
        return cross_entropy(torch.func.functional_call(model, moved, x), y)

    here = [params[name].detach().clone().requires_grad_() for name in names]
    grads = torch.autograd.grad(loss(here), here)
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    there = [(p.detach() + rho * g / norm).requires_grad_() for p, g in zip(here, grads, strict=True)]
    return list(torch.autograd.grad(loss(there), there))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


def test_the_papers_gradient_over_many_steps() -> None:
    model, (x, y) = net(), batch()
    state = setup(Momentum(0.1), model)
    for _ in range(20):
        expected, plain = by_hand(model, x, y, 0.3), fluxpy.gradient(loss_of, model, x, y)
        value, grads = sharpened(loss_of, model, 0.3, x, y)
        assert torch.equal(value, loss_of(model, x, y))
        for (path, p), want in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(grads[path], want, rtol=0, atol=1e-12)
            assert not torch.allclose(grads[path], plain[path]), p
        update(state, model, grads)


def test_a_radius_of_zero_is_the_plain_gradient() -> None:
    model, (x, y) = net(), batch()
    grads, plain = sharpened(loss_of, model, 0.0, x, y)[1], fluxpy.gradient(loss_of, model, x, y)
    assert all(torch.equal(grads[path], plain[path]) for path, _ in model.named_parameters())


def test_frozen_leaves_stay_where_they_are() -> None:
    model, (x, y) = net(), batch()
    state = setup(Momentum(0.1), model)
    fluxpy.freeze(state[0])
    model[0].requires_grad_(False)
    expected = by_hand(model, x, y, 0.3)
    model[0].requires_grad_(True)
    _, grads = sharpened(loss_of, model, 0.3, x, y, state=state)
    assert grads[0].weight is None
    torch.testing.assert_close([grads[2].weight, grads[2].bias], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inside", [False, True], ids=["a module", "modules in a tree"])
def test_parameters_and_buffers_are_put_back_bit_for_bit(inside: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    before = [p.clone() for p in model.parameters()]
    twin = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    twin.load_state_dict(model.state_dict())
    twin(x)
    if inside:
        sharpened(lambda m: loss_of(m["net"][0], x, y), {"net": [model]}, 0.1)
    else:
        sharpened(loss_of, model, 0.1, x, y)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(map(torch.equal, model.buffers(), twin.buffers()))  # as after one pass


def test_a_buffer_that_the_pass_replaces_is_put_back() -> None:
    class Centred(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("centre", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.centre = 0.9 * self.centre + 0.1 * y.detach().mean(0)
            return y - self.centre

    model, (x, y) = Centred().double(), batch()
    twin = Centred().double()
    twin.load_state_dict(model.state_dict())
    twin(x)
    sharpened(loss_of, model, 0.1, x, y)
    assert torch.equal(model.centre, twin.centre)


def test_put_back_where_the_second_pass_fails() -> None:
    model, (x, y) = net(), batch()
    before = [p.clone() for p in model.parameters()]
    passes: list[int] = []

    def loss(m: nn.Module) -> Tensor:
        passes.append(1)
        if len(passes) == 2:
            raise RuntimeError("second")
        return loss_of(m, x, y)

    with pytest.raises(RuntimeError, match="second"):
        sharpened(loss, model, 0.1)
    assert all(map(torch.equal, before, model.parameters()))


def test_at_the_bottom_there_is_nowhere_to_go() -> None:
    value, grads = sharpened(lambda m: m["w"].square().sum(), {"w": torch.zeros(3)}, 0.5)
    assert value == 0
    assert torch.equal(grads["w"], torch.zeros(3))


def test_low_precision_and_tied_parameters() -> None:
    shared = torch.randn(3, 3, dtype=torch.bfloat16)
    model = {"a": shared, "b": shared, "c": torch.randn(3)}
    _, grads = sharpened(lambda m: (m["a"] @ m["b"]).float().sum() * m["c"].sum(), model, 0.1)
    assert grads["a"].dtype == torch.bfloat16
    assert grads["a"] is grads["b"]


@pytest.mark.parametrize("rho", [-0.1, True, "0.1", math.nan])
def test_a_radius_that_is_none(rho: object) -> None:
    with pytest.raises(ValueError, match="rho"):
        sharpened(lambda m: m.sum(), torch.ones(2), rho)  # pyright: ignore[reportArgumentType]

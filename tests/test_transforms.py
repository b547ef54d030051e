"""Pure updates under autograd, `torch.func` and `torch.compile`."""

from typing import Any

import pytest
import rule_table
import torch
import torch._dynamo
from rule_table import ROWS, Row
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, vmap

import fluxpy
from fluxpy import (
    Adam,
    AdamW,
    ClipGlobalNorm,
    ClipNorm,
    Descent,
    Lion,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    RMSProp,
    setup,
    update,
)
from fluxpy.rule import Rule

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


COPIES = [ROWS[name].rule for name in ("Lookahead", "ScheduleFreeAdamW", "ScheduleFreeSGD") if name in ROWS]


def after_steps(row: Row, w: Tensor, b: Tensor, numbers: Tensor) -> Tensor:
    """The loss after some steps, by the parameters at first and the hyperparameters."""
    left = iter(numbers)
    given = {
        name: tuple(next(left) for _ in v) if isinstance(v, tuple) else next(left) for name, v in reals(row).items()
    }
    rule = row.given({**row.fixed, **given})
    if "lr" not in rule_table.values(rule) and "step_sizes" not in given:
        rule = OptimiserChain(rule, Descent(0.1))
    model: Any = {"w": w[None], "b": b[None]}
    # What a rule copies from the parameters is a constant: a state has no history when it is made.
    first = row.rule in COPIES
    state = setup(rule, {"w": drawn(1, 5, seed=1), "b": drawn(1, 3, seed=2)} if first else model)
    for _ in range(10):
        state, model = update(state, model, fluxpy.gradient(curved, model, create_graph=True), inplace=False)
    return curved(model)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_gradients_through_ten_steps(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the parameters at first and to each hyperparameter, against differences along two directions of each."""
    # Muon works in bfloat16, where there are no differences to compare with: here it stays in float64.
    monkeypatch.setattr(Tensor, "bfloat16", lambda x: x)
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


def stepped(rule: Rule, x: Tensor, dx: Tensor, *, inplace: bool) -> Tensor:
    """A parameter after three updates."""
    model: Any = {"w": x}
    state = setup(rule, model)
    for i in range(3):
        state, model = update(state, model, {"w": dx * (i + 1) + drawn(4, 5, seed=i)}, inplace=inplace)
    return model["w"]


def tangent(value: Tensor) -> Tensor:
    found = forward_ad.unpack_dual(value).tangent
    assert found is not None
    return found


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own forward mode
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_dual_numbers_go_through_updates(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parameter and gradient, by both kinds of update, with gradients recorded besides and without."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda x: x)  # as above
    rule = row.given({**row.fixed, **row.adjusted})
    x, dx, along, turn = (drawn(4, 5, seed=seed) for seed in range(5, 9))
    there, back = (stepped(rule, x + s * along, dx + s * turn, inplace=False) for s in (1e-6, -1e-6))
    slope = (there - back) / 2e-6
    for inplace, recorded in [(False, False), (False, True), (True, False), (True, True)]:
        with forward_ad.dual_level(), torch.set_grad_enabled(recorded):
            x_dual = forward_ad.make_dual(x.clone(), along.clone())
            found = tangent(stepped(rule, x_dual, forward_ad.make_dual(dx, turn), inplace=inplace)).clone()
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-7)
    by_func = torch.func.jvp(lambda x, dx: stepped(rule, x, dx, inplace=False), (x, dx), (along, turn))[1]
    torch.testing.assert_close(by_func, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own forward mode
@pytest.mark.parametrize("row", [row for row in ROWS.values() if "lr" in row.adjusted], ids=lambda row: repr(row.rule))
def test_a_rate_may_be_a_dual_number(row: Row) -> None:
    def given(lr: Any) -> Rule:
        return row.given({**row.fixed, **row.adjusted, "lr": lr})

    x, dx = drawn(4, 5, seed=5), drawn(4, 5, seed=6)
    there, back = (stepped(given(0.05 + step), x, dx, inplace=False) for step in (1e-6, -1e-6))
    for inplace in (False, True):
        with forward_ad.dual_level():
            lr = forward_ad.make_dual(torch.tensor(0.05, dtype=F64), torch.ones((), dtype=F64))
            found = tangent(stepped(given(lr), x.clone(), dx, inplace=inplace)).clone()
        torch.testing.assert_close(found, (there - back) / 2e-6, rtol=1e-5, atol=1e-7)


# --- torch.compile ------------------------------------------------------------------------------------------------


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 1)).double()


INPUT, TARGET = drawn(6, 3), drawn(6, 1, seed=1)


def squared(m: Any) -> Tensor:
    return (m(INPUT) - TARGET).square().mean()


def by_name(params: dict[str, Tensor]) -> Tensor:
    return (functional_call(NET, params, (INPUT,)) - TARGET).square().mean()


NET = small()


follows = pytest.mark.skipif(torch.__version__ < "2.13", reason="older versions do not follow a rule in a rule")


def pure_step(state: Any, params: Any) -> Any:
    return update(state, params, grad(by_name)(params), inplace=False)


COMPILED = {
    "chain": (OptimiserChain(ClipNorm(1.0), ClipGlobalNorm(0.1), AdamW(fluxpy.schedules.linear(0.1, 0.01, 4))), 4),
    "master": (MixedPrecision(Lion(0.01)), 2),
}


@follows
@pytest.mark.parametrize(("rule", "most"), COMPILED.values(), ids=COMPILED)
def test_a_whole_step_is_one_graph(rule: Any, most: int) -> None:
    """From the loss to the new state, and used again from step to step: counts are no constants."""
    torch.compiler.reset()
    graphs = CompileCounter()
    compiled = torch.compile(pure_step, fullgraph=True, backend=graphs)
    params: Any = {name: x.detach().clone() for name, x in NET.named_parameters()}
    a, b = [setup(rule, params), params], [setup(rule, params), params]
    for _ in range(5):
        a, b = compiled(*a), pure_step(*b)
    assert graphs.frame_count <= most
    for name, x in b[1].items():
        torch.testing.assert_close(a[1][name], x, rtol=1e-12, atol=1e-14)
    assert [leaf.count for _, leaf in fluxpy.leaves(a[0])] == [leaf.count for _, leaf in fluxpy.leaves(b[0])]
    # What comes out of a graph is a state like any other.
    assert str(fluxpy.state_dict(a[0]).keys()) == str(fluxpy.state_dict(b[0]).keys())
    for state, model in (a, b):
        update(state, model, grad(by_name)(model))
    for name, x in b[1].items():
        torch.testing.assert_close(a[1][name], x, rtol=1e-12, atol=1e-14)


@torch._dynamo.config.patch(trace_autograd_ops=True)
@follows
def test_a_module_is_stepped_in_place_in_one_graph() -> None:
    for compiled in (
        torch.compile(fluxpy.trainstep, fullgraph=True, backend="aot_eager"),
        torch.compile(lambda f, m, _, s: update(s, m, fluxpy.withgradient(f, m, state=s)[1]), backend="eager"),
    ):
        torch.compiler.reset()
        a, b = small(), small()
        rule = OptimiserChain(ClipGlobalNorm(0.1), Adam(0.1))
        state_a, state_b = setup(rule, a), setup(rule, b)
        for _ in range(4):
            compiled(squared, a, (), state_a)
            fluxpy.trainstep(squared, b, (), state_b)
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
        assert state_a["0"].weight.count == 4


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # PyTorch's own, of what is between two graphs
def test_a_graph_that_breaks_gives_the_same_numbers() -> None:
    """As PyTorch is set up, it does not follow `autograd.grad`: it compiles what is before and after."""
    torch.compiler.reset()
    a, b = small(), small()
    state_a, state_b = setup(Adam(0.1), a), setup(Adam(0.1), b)
    compiled = torch.compile(fluxpy.trainstep, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(squared, a, (), state_a), fluxpy.trainstep(squared, b, (), state_b))
    torch.compiler.reset()
    stateless = torch.compile(lambda s, m: update(s, m, fluxpy.gradient(squared, m)), backend="eager")
    for _ in range(3):
        stateless(state_a, a)
        fluxpy.trainstep(squared, b, (), state_b)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@follows
def test_what_a_graph_cannot_do_is_said() -> None:
    torch.compiler.reset()
    model = small()
    state = setup(Adam(0.1), model)
    grads = fluxpy.gradient(squared, model)
    step = torch.compile(lambda s, m, g: update(s, m, g, inplace=False), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="a pure update takes the parameters as a dict of tensors"):
        step(state, model, grads)
    state = setup(OptimiserChain(ClipNorm(1.0, nonfinite="skip"), Adam(0.1)), model)
    with pytest.raises(Exception, match="no number"):
        torch.compile(update, fullgraph=True, backend="eager")(state, model, grads)
    fluxpy.freeze(state["0"])
    with pytest.raises(TypeError, match="inside torch.func and torch.compile, set requires_grad before"):
        torch.compile(fluxpy.trainstep, backend="eager")(squared, model, (), state)


@follows
def test_in_a_graph_a_flag_goes_up_for_what_is_not_finite() -> None:
    torch.compiler.reset()
    params: Any = {name: x.detach().clone() for name, x in NET.named_parameters()}
    state = setup(OptimiserChain(ClipGlobalNorm(1.0), Adam(0.1)), params)
    compiled = torch.compile(lambda s, p, g: update(s, p, g, inplace=False), fullgraph=True, backend="eager")
    grads = {name: torch.ones_like(x) for name, x in params.items()}
    state, params = compiled(state, params, grads)
    before = {name: x.clone() for name, x in params.items()}
    state, params = compiled(state, params, grads | {"0.bias": grads["0.bias"] * torch.nan})
    state, params = compiled(state, params, grads)
    assert all(torch.equal(x, before[name]) for name, x in params.items())
    with pytest.raises(FloatingPointError, match=r"'0\.bias' is not finite, in update 1"):
        fluxpy.check_finite(state)


# --- Memory -------------------------------------------------------------------------------------------------------


def steps_back(x: Tensor) -> int:
    """How many nodes of a graph hang on a tensor."""
    todo, seen = [x.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [below for below, _ in node.next_functions]
    return len(seen)


def run(model: Any, grads: Any, steps: int = 120) -> Tensor:
    state = setup(Adam(0.01), model)
    for _ in range(steps):
        state, model = update(state, model, grads(model), inplace=False)
    return model["w"]


def total(m: Any) -> Tensor:
    return m["w"].square().sum()


def test_a_pure_loop_keeps_nothing() -> None:
    by_fluxpy = lambda m: fluxpy.gradient(total, m)  # noqa: E731
    for start in (torch.ones(3), nn.Parameter(torch.ones(3))):
        assert steps_back(run({"w": start}, by_fluxpy)) == 0
    assert steps_back(run({"w": torch.ones(3)}, grad(total))) == 0
    with torch.no_grad():
        assert steps_back(run({"w": torch.ones(3, requires_grad=True)}, by_fluxpy)) == 0


@pytest.mark.parametrize("grads", [grad(total), lambda m: fluxpy.gradient(total, m)], ids=["func", "fluxpy"])
def test_a_pure_loop_that_keeps_all_is_warned_of(grads: Any) -> None:
    with pytest.warns(UserWarning, match="100 updates in a row were recorded") as found:
        run({"w": torch.ones(3, requires_grad=True)}, grads, 250)
    assert len(found) == 1 and found[0].filename == __file__
    run({"w": torch.ones(3, requires_grad=True)}, grads, 100)  # is meant, perhaps


def test_cutting_the_history_is_no_reason_to_warn() -> None:
    rate = torch.tensor(0.01, requires_grad=True)
    model: Any = {"w": torch.ones(3)}
    state: Any = setup(Momentum(rate), model)
    for step in range(150):
        state, model = update(state, model, fluxpy.gradient(total, model, create_graph=True), inplace=False)
        if step % 10 == 9:
            total(model).backward()
            model = {"w": model["w"].detach()}
            state = setup(Momentum(rate), model, keep=None)
    assert rate.grad is not None and rate.grad != 0


@pytest.mark.parametrize(
    "make", [fluxpy.Adam, fluxpy.Momentum, fluxpy.AdaGrad, fluxpy.Lion, lambda lr: fluxpy.Averaged(fluxpy.AdamW(lr))]
)
def test_sixteen_models_with_sixteen_rates_are_sixteen_runs(make: Any) -> None:
    """By `vmap` over stacked models and rates; each row is compared with a run of its own."""
    starts = torch.randn(16, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rates = torch.linspace(0.01, 0.3, 16, dtype=torch.float64)

    def run(start: Tensor, lr: Any) -> tuple[Tensor, Tensor]:
        model = {"w": start.clone()}
        state = fluxpy.setup(make(lr), model)
        for _ in range(6):
            grads = {"w": torch.func.grad(lambda w: (w.sin() * w).sum())(model["w"])}
            state, model = fluxpy.update(state, model, grads, inplace=False)
        return model["w"] - start, next(t for t in torch.utils._pytree.tree_leaves(state) if t.shape == start.shape)

    together = torch.func.vmap(run)(starts, rates)
    for row in range(16):
        alone = run(starts[row], rates[row].item())
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[row], other, rtol=0, atol=1e-12)

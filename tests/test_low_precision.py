"""bfloat16 and float16: what is rounded, and where."""

import math
from contextlib import nullcontext
from typing import Any

import optree
import pytest
import torch
from helpers import Own, Run, assert_alike, assert_close, grads_of, image, model_of, needs_compiler
from torch import Tensor, nn

from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    Averaged,
    ClipGlobalNorm,
    Lion,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    RMSProp,
    Rule,
    WeightDecay,
    flatten_parameters,
    flush,
    gradient,
    leaves,
    load,
    save,
    setup,
    sharpened,
    surgery,
    trainstep,
    update,
)  # fmt: skip

HALVES = [torch.bfloat16, torch.float16]
every_half = pytest.mark.parametrize("dtype", HALVES)

# --- A difference of averages -------------------------------------------------------------------------------------


CENTERED = [(torch.bfloat16, 0.1, way) for way in ("apart", "flat", "pure", "behind a penalty")]
CENTERED += [(torch.bfloat16, noise, "apart") for noise in (0.0, 0.01, 1.0)] + [(torch.float16, 0.1, "apart")]


@pytest.mark.parametrize("dtype, noise, way", CENTERED)
def test_centered_rmsprop_does_not_run_away(dtype, noise, way):
    """Gradients with a mean that is large against their spread: `v - m²` is a small number, and may not become none by
    rounding. As far as torch goes at most, which rounds the difference once."""
    rule = RMSProp(1e-2, centered=True)
    g = torch.Generator().manual_seed(0)
    model = {"a": torch.randn(50, generator=g).to(dtype), "b": torch.randn(20, 3, generator=g).to(dtype)}
    theirs = [x.clone().requires_grad_() for x in model.values()]
    if way == "flat":
        flatten_parameters(model)
    state = setup(OptimiserChain(WeightDecay(0.0), rule) if "behind" in way else rule, model)
    optimizer = torch.optim.RMSprop(theirs, lr=1e-2, centered=True, foreach=False)
    for _ in range(300):
        grads = {name: (1 + noise * torch.randn(x.shape, generator=g)).to(dtype) for name, x in model.items()}
        for x, dx in zip(theirs, grads.values(), strict=True):
            x.grad = dx.clone()
        optimizer.step()
        state, model = update(state, model, grads, inplace=way != "pure")
    for x, y in zip(model.values(), theirs, strict=True):
        assert x.isfinite().all() and x.abs().max() <= 2 * y.abs().max(), (x.abs().max(), y.abs().max())


# --- Master copies ------------------------------------------------------------------------------------------------

MASTERS = {
    "Momentum": MixedPrecision(Momentum(1e-3)),
    "AdamW": MixedPrecision(AdamW(1e-4)),
    "clip all, Lion": MixedPrecision(OptimiserChain(ClipGlobalNorm(0.5), Lion(1e-4))),
    "own": MixedPrecision(OptimiserChain(WeightDecay(0.1), Own(1e-4))),
}
SHAPES = {"a": (4, 3), "b": (37,), "c": (2, 1, 3)}


def small_steps(run: Run, rule: MixedPrecision, steps: int = 40) -> None:
    """Each step is lost to rounding; together they are not. The parameter is always the rounded master, which is a run
    in float32 on the same gradients."""
    exact = model_of(SHAPES, run.model["a"].dtype).float()
    state = setup(rule.rule, exact)
    start = {name: x.detach().clone() for name, x in run.model.items()}
    for i in range(steps):
        grads = grads_of(run.model, i % 2)
        update(run.state, run.model, grads)
        update(state, exact, {name: dx.float() for name, dx in grads.items()})
        for name, x in run.model.items():
            master: Tensor = run.state[name].state.x
            assert torch.equal(x, master.to(x.dtype)), (name, i)
            torch.testing.assert_close(master, exact[name].detach(), rtol=1e-5, atol=1e-6, msg=f"{name} {i}")
    for name, x in run.model.items():
        assert not torch.equal(x, start[name]), name
        if name == "b":  # somebody writes to the parameter: the master follows, element by element
            with torch.no_grad():
                x[3] = 2.0
                exact[name][3] = 2.0
    for i in range(2):
        grads = grads_of(run.model, i)
        update(run.state, run.model, grads)
        update(state, exact, {name: dx.float() for name, dx in grads.items()})
        for name, x in run.model.items():
            torch.testing.assert_close(run.state[name].state.x, exact[name].detach(), rtol=1e-5, atol=1e-6, msg=name)
            assert torch.equal(x, run.state[name].state.x.to(x.dtype))


@every_half
@pytest.mark.parametrize("layout", ["apart", "flat"])
@pytest.mark.parametrize("rule", MASTERS.values(), ids=MASTERS.keys())
def test_a_master_copy_gathers_what_the_parameter_would_round_away(rule, dtype, layout):
    small_steps(Run(rule, layout, SHAPES, dtype), rule)


@needs_compiler
@pytest.mark.parametrize("name, dtype", [*((name, torch.bfloat16) for name in MASTERS), ("AdamW", torch.float16)])
def test_a_compiled_master_copy_gathers_what_the_parameter_would_round_away(name, dtype):
    """Where the compiler computes in float32 throughout and leaves a rounding out, the master starts over each time."""
    small_steps(Run(MASTERS[name], "apart", SHAPES, dtype, compile=True), MASTERS[name])


# --- Rules that round on purpose ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["apart", "flat", "pure"])
@pytest.mark.parametrize("dtype, master, copy", [
    (torch.float64, torch.float32, torch.float64),
    (torch.float64, torch.bfloat16, torch.float64),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
])  # fmt: skip
def test_a_master_copy_is_never_narrower_than_its_parameter(dtype, master, copy, way):
    """Of what the parameter holds nothing is rounded away: the steps are those of the rule in the copy's dtype."""
    model, wide = model_of(dtype=dtype), model_of(dtype=dtype).to(copy)
    if way == "flat":
        flatten_parameters(model)
    state, other = setup(MixedPrecision(Adam(0.1), dtype=master), model), setup(Adam(0.1), wide)
    for turn in range(5):
        grads = grads_of(model, turn)
        state, model = update(state, model, grads, inplace=way != "pure")
        update(other, wide, {name: dx.to(copy) for name, dx in grads.items()})
    for _, leaf in leaves(state):
        assert leaf.state.x.dtype == leaf.state.state.m.dtype == copy
    assert_close(model, wide.to(dtype), 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32])
def test_a_master_copy_has_16_bits_at_least(dtype):
    with pytest.raises(ValueError, match="floating-point dtype of 16 bits or more"):
        MixedPrecision(Adam(), dtype=dtype)


class Coarse(Rule):
    """A user's rule that keeps the error of its own rounding (Kahan's), and so relies on it."""

    lr: float = 1e-3
    elementwise = True

    def init(self, x):
        return torch.zeros_like(x)

    def apply(self, state, x, dx):
        wanted = self.lr * dx + state
        change = wanted.to(torch.bfloat16).to(x.dtype)
        return wanted - change, change


@pytest.mark.parametrize("options", [{}, pytest.param({"compile": True}, marks=needs_compiler)], ids=["", "compiled"])
@pytest.mark.parametrize("layout", ["apart", "flat"])
def test_a_rule_may_rely_on_its_own_rounding(layout, options):
    rule = Coarse()
    run = Run(rule, layout, SHAPES, torch.float32, **options)
    expected = {name: (x.detach().clone(), torch.zeros_like(x)) for name, x in run.model.items()}
    for _ in range(5):
        for name, dx in run.grads().items():
            x, state = expected[name]
            state, change = rule.apply(state, x, dx)
            expected[name] = x - change, state
        run.step()
    for name, (x, state) in expected.items():
        torch.testing.assert_close(run.model[name].detach(), x, rtol=1e-6, atol=1e-7, msg=name)
        assert state.abs().max() > 0
        torch.testing.assert_close(run.state[name].state, state, rtol=1e-2, atol=1e-8, msg=name)


# --- A scaled loss, and a window of uneven batches ----------------------------------------------------------------


class Unscale(Rule):
    scale: float = 1.0
    elementwise = True

    def apply(self, state, x, dx):
        return state, dx / self.scale


def test_a_loss_in_float16_is_scaled_and_gradients_are_divided_in_float32():
    """Gradients of 1e-9 are zero in float16, and zero again where they are divided there."""
    size, scale = 1e-9, 2.0**16
    exact, model = {"w": torch.zeros(4)}, {"w": torch.zeros(4, dtype=torch.float16)}
    slopes = torch.tensor([1.0, -2.0, 3.0, 0.5])
    chain = OptimiserChain(ClipGlobalNorm(math.inf, nonfinite="skip"), Unscale(scale), AdamW(1e-2, eps=1e-12))
    state, other = setup(MixedPrecision(chain), model), setup(AdamW(1e-2, eps=1e-12), exact)
    for turn in range(5):
        grads = (slopes * (turn + 1) * size * scale).half()
        assert not (grads / scale).any()
        update(state, model, {"w": grads})
        update(other, exact, {"w": grads.float() / scale})
    torch.testing.assert_close(state["w"].state.x, exact["w"], rtol=1e-5, atol=1e-7)
    before = image(state, model)
    update(state, model, {"w": torch.tensor([1.0, math.inf, 0.0, 0.0], dtype=torch.float16)})
    assert_alike(before, image(state, model))


@pytest.mark.parametrize("n, sizes", [(4, (7, 3, 5, 1)), (4, (7, 3)), (2, (4, 9))])
def test_a_window_of_uneven_batches_weighted_by_their_share_is_one_large_batch(n, sizes):
    """By AccumGrad and a flush, where the window is not full: each loss times its tokens over the mean tokens."""
    data = [(torch.randn(k, 3, dtype=torch.float64), torch.randn(k, 1, dtype=torch.float64)) for k in sizes]
    rules = Adam(0.1), OptimiserChain(AccumGrad(n), Adam(0.1))
    large, small = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
    small.load_state_dict(large.state_dict())
    one, other = setup(rules[0], large), setup(rules[1], small)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    trainstep(lambda m, x, y: (m(x) - y).square().mean(), large, (x, y), one)
    mean = sum(sizes) / len(sizes)
    for x, y in data:
        trainstep(lambda m, x, y: (m(x) - y).square().mean() * len(x) / mean, small, (x, y), other)
    flush(other, small)
    assert other.weight.count == 1
    assert_close(small, large)


# --- An autocast around it all ------------------------------------------------------------------------------------


class Whitened(Rule):
    """A rule of whole matrices, whose products an autocast would round."""

    lr: float = 0.1

    def init(self, x):
        return x.mT @ x

    def apply(self, state, x, dx):
        state = 0.9 * state + 0.1 * (dx.mT @ dx)
        return state, self.lr * dx @ state


def rows_grow(state, model):
    surgery.grow(state["a"], model["a"], torch.ones(2, 3, dtype=model["a"].dtype))


def merge(state, model):
    surgery.merge(state, model, {"w": ("a", "b")})


UNDER_AUTOCAST: list[Any] = [
    (Whitened(), torch.float32, lambda state, model: update(state, model, turn_of(model))),
    (Whitened(), torch.float32, lambda state, model: update(state, model, turn_of(model), inplace=False)),
    (Averaged(Momentum(0.1)), torch.float16, lambda state, model: update(state, model, turn_of(model))),
    (OptimiserChain(AccumGrad(3), Whitened()), torch.float32, flush),
    (Adam(), torch.float32, merge),
    (Adam(), torch.float16, rows_grow),
]


def turn_of(model):
    return {name: torch.cos(x) for name, x in model.items()}


@pytest.mark.parametrize("rule, dtype, step", UNDER_AUTOCAST)
def test_an_autocast_does_not_round_what_rules_and_surgery_compute(rule, dtype, step):
    outcomes = []
    for around in (False, True):
        g = torch.Generator().manual_seed(0)
        model: Any = {name: torch.randn(s, generator=g).to(dtype) for name, s in zip("wab", SIZES, strict=True)}
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            state = setup(rule, model)
            for _ in range(2):
                update(state, model, turn_of(model))
            made = step(state, model)
        outcomes.append((model, made, [leaf.state for _, leaf in leaves(state)]))
    tensors = [optree.tree_leaves(found, namespace="fluxpy") for found in outcomes]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*tensors, strict=True) if isinstance(a, Tensor))


SIZES = (4, 3), (2, 3), (4, 2)


@pytest.mark.parametrize("how", ["sharpened", "flush", "take", "load"])
def test_an_autocast_around_it_casts_the_weights_anew(how, tmp_path):
    """What it has cast before is not taken for what was written since."""
    outcomes = []
    for around in (False, True):
        torch.manual_seed(0)
        model, x = nn.Linear(4, 4), torch.randn(8, 4)
        state = setup(OptimiserChain(AccumGrad(4), Momentum(0.5)), model)
        save(tmp_path / "run.flux", model=nn.Linear(4, 4))

        autocast = torch.autocast("cpu", torch.bfloat16)  # a disabled one around others keeps their casts too

        def loss(m, x=x, inside=nullcontext() if around else autocast):  # noqa: B008
            with inside:
                return m(x).float().square().mean()

        found: Any = None
        with autocast if around else nullcontext():
            update(state, model, gradient(loss, model))
            loss(model)
            if how == "sharpened":
                found = list(sharpened(loss, model, 0.5)[1])
            elif how == "flush":
                flush(state, model)
            elif how == "take":
                surgery.take(state, model, [3, 1, 0])
            else:
                load(tmp_path / "run.flux", model=model)
            outcomes.append((loss(model), found))
    (a, b), (c, d) = outcomes
    assert torch.equal(a, c)
    assert b is None or all(torch.equal(one, other) for (_, one), (_, other) in zip(b, d, strict=True))

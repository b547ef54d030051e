"""StochasticRounding: every bit against a transcription in NumPy, on every path; exact in expectation; and what is next
to it."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    SHAPES,
    Own,
    Run,
    Whole,
    assert_alike,
    every_layout,
    grads_of,
    image,
    model_of,
    needs_compiler,
    since_2_13,
    without,
)
from test_engine import paths_of
from torch import Tensor, nn

import fluxpy
from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    Averaged,
    Cautious,
    ClipGlobalNorm,
    Descent,
    Lion,
    Lookahead,
    Lowered,
    MixedPrecision,
    Momentum,
    Muon,
    OptimiserChain,
    Rule,
    ScheduleFreeAdamW,
    StochasticRounding,
    adjust,
    averaged,
    flush,
    freeze,
    load,
    reset,
    save,
    setup,
    thaw,
    update,
)
from fluxpy.interop import TorchOptimizer, from_torch, to_torch
from fluxpy.rule import title_key
from fluxpy.rules import Assign, rounding
from fluxpy.state import tree_context

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
every_half = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])

# --- The oracle: integers, and float64 ---------------------------------------------------------------------------


def bits(x: Tensor) -> np.ndarray:
    """Of the number in float32, where all but the first 16 or 19 are zero."""
    return x.detach().float().numpy().view(np.uint32).astype(np.uint64)


def lowbias32(h: np.ndarray) -> np.ndarray:
    """https://nullprogram.com/blog/2018/07/31/"""
    h = h.astype(np.uint32)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def oracle(value: np.ndarray, x: Tensor, dx: Tensor, t: int) -> np.ndarray:
    """A float32 `value` on the grid of 16 bits, by its neighbours in float64."""
    lost, digits, least, largest = (16, 8, -133, 2.0**128 - 2.0**120) if x.dtype == BF16 else (13, 11, -24, 65504.0)
    key = (bits(x) + bits(dx) // 2**lost) % 2**32 * 0x9E3779B1 + (t * 0x9E3779) % 2**24
    noise = (lowbias32(key % 2**32) % 2**lost).astype(np.float64) / 2**lost
    size = np.abs(value.astype(np.float64))
    with np.errstate(invalid="ignore"):
        spacing = np.exp2(np.maximum(np.frexp(size)[1] - digits, least))
        if x.dtype == F16:  # of a subnormal number there are 13 bits below the last of float16
            size = np.rint(size * 2.0**37) / 2.0**37
        below = np.floor(size / spacing)
        up = size / spacing - below + noise >= 1
        near = (below + up) * spacing
    near = np.where(near > largest, np.inf, near)
    return np.copysign(np.where(np.isfinite(value), near, np.abs(value)), value)


def hard(dtype: torch.dtype, n: int) -> Tensor:
    """Numbers of all sizes, subnormal ones and those near the largest too, zeros, and what is not finite."""
    g = torch.Generator().manual_seed(0)
    low, high = (-140, 127.9) if dtype == BF16 else (-26, 15.9)
    sizes = torch.exp2(torch.rand(n, generator=g, dtype=F64) * (high - low) + low)
    x = (sizes * torch.randn(n, generator=g, dtype=F64).sign()).to(dtype)
    x[:6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, torch.finfo(dtype).max])
    x[6], x[7] = -torch.finfo(dtype).max, torch.tensor(-1, dtype=torch.int16).view(dtype)  # the NaN of all ones
    x[n // 2 :] = torch.randn(n - n // 2, generator=g).to(dtype)
    return x


def slopes(x: Tensor, turn: int) -> Tensor:
    """Gradients of which steps are a small part of the parameter, some of them zero."""
    g = torch.Generator().manual_seed(turn)
    noise = torch.randn(x.shape, generator=g) * (torch.rand(x.shape, generator=g) > 0.1)
    return (x.float().nan_to_num(1.0, 1.0, 1.0).abs() * noise).to(x.dtype)


def assert_same_bits(x: Tensor, expected: np.ndarray) -> None:
    found = x.detach().double().numpy()
    same = (found == expected) & (np.signbit(found) == np.signbit(expected)) | np.isnan(found) & np.isnan(expected)
    assert same.all(), (np.flatnonzero(~same)[:5], found[~same][:5], expected[~same][:5])


WAYS = ["reference", "apart", "flat", "pure", pytest.param("compiled", marks=[needs_compiler, since_2_13])]


@every_half
@pytest.mark.parametrize("way", WAYS)
def test_every_bit(way: str, dtype: torch.dtype) -> None:
    """Of 40 steps by `Momentum`, whose numbers here make the arithmetic of float32 the same in NumPy."""
    whole, sizes = hard(dtype, 5000), {"a": 3000, "b": 1999, "c": 1}
    parts = dict(zip(sizes, whole.split(list(sizes.values())), strict=True))
    model: Any = nn.ParameterDict({name: nn.Parameter(part.clone()) for name, part in parts.items()})
    if way == "flat":
        fluxpy.flatten_parameters(model)
    state: Any = setup(StochasticRounding(Momentum(2.0**-10, 0.5)), model, compile=way == "compiled")
    if way == "reference":
        tree_context(state).reference_only.add(title_key(state.a.rule))
    momenta = {name: np.zeros(size, np.float32) for name, size in sizes.items()}
    for t in range(40):
        grads = {name: slopes(x.detach(), t) for name, x in model.items()}
        expected = {}
        for name, x in model.items():
            with np.errstate(over="ignore", invalid="ignore"):
                momenta[name] = np.float32(0.5) * momenta[name] + grads[name].float().numpy()
                value = x.detach().float().numpy() - np.float32(2.0**-10) * momenta[name]
            expected[name] = oracle(value, x, grads[name], t)
        state, model = update(state, model, grads, inplace=way != "pure")
        for name, x in model.items():
            assert_same_bits(x, expected[name])
    if way == "compiled":
        assert "Compiled" in paths_of(state)
    assert (model["a"][1500:] != parts["a"][1500:]).any() and state.a.state.t == 40


# --- What it is for ----------------------------------------------------------------------------------------------


@every_half
def test_it_is_exact_in_expectation(dtype: torch.dtype) -> None:
    """Over many elements, and for each of a few over many steps; each within what chance allows."""
    rule = StochasticRounding(Descent(1.0))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400_000, generator=g).to(dtype)
    dx = (torch.randn(400_000, generator=g) * 1e-4).to(dtype)
    wide = x.float() - dx.float()
    size = torch.exp2(wide.abs().log2().floor()).clamp(min=2.0**-14) * torch.finfo(dtype).eps
    error = (rule.apply(rule.init(x), x, dx)[1].value.float() - wide).double() / size
    assert error.abs().max() <= 1 and abs(error.mean()) < 4 * error.std() / error.numel() ** 0.5
    few, turns = slice(0, 50), 4000
    state, total = rule.init(x[few]), 0
    for _ in range(turns):
        state, change = rule.apply(state, x[few], dx[few])
        total = total + ((change.value.float() - wide[few]).double() / size[few])
    assert (total.abs() / turns < 5 * 0.5 / turns**0.5).all()


ALIKE = {"the parameter": 0, "its negative": 1 << 15, "its half": -128, "four times it": 256, "the next number": 1}


@pytest.mark.parametrize("kind", ["free", "parameters alike", "gradients alike", "no gradients", *ALIKE])
def test_the_random_bits_are_even_and_do_not_go_together(kind: str) -> None:
    """Those of neighbours, of one bit and another, and of one step and the next; also where the gradient is a simple
    function of the parameter, as that of a square is. In 2¹⁶ draws a bit is off by 1/256 where chance has it."""
    every, one, g = torch.arange(-(2**15), 2**15), torch.full((2**16,), 0x3F80), torch.Generator().manual_seed(0)
    x, dx = every, every + ALIKE.get(kind, 0)
    if kind == "parameters alike":
        x = one
    elif kind in ("gradients alike", "no gradients"):
        dx = one * (kind == "gradients alike")
    elif kind == "free":
        x, dx = torch.randint(2**16, (2, 2**16), generator=g)
    own, slope = (part.to(torch.int16).view(BF16).float() for part in (x, dx))
    for t in (0, 1, 1000):
        now, later = (signs_of(rounding._noise(own, slope, turn, 16)) for turn in (t, t + 1))
        assert np.abs(now.mean(0)).max() < 5 / 256
        assert np.abs(now.T @ now / 2**16 - np.eye(16)).max() < 5 / 256
        assert np.abs(now.T @ later / 2**16).max() < 5 / 256
        for lag in (1, 2, 128):
            assert np.abs(now[lag:].T @ now[:-lag] / 2**16).max() < 5 / 256, lag


def signs_of(noise: Tensor) -> np.ndarray:
    """1 and -1 for each of 16 bits."""
    return 2.0 * ((noise.numpy()[:, None] >> np.arange(16)) & 1) - 1


def last_loss(rule: Rule, dtype: torch.dtype, steps: int = 1500) -> float:
    """A quadratic whose minimum is far away in small steps."""
    g = torch.Generator().manual_seed(0)
    model, goal = {"w": torch.randn(2000, generator=g).to(dtype)}, torch.randn(2000, generator=g)
    state = setup(rule, model)
    for _ in range(steps):
        update(state, model, {"w": (model["w"].float() - goal).to(dtype)})
    return (model["w"].float() - goal).square().mean().item()


def test_where_rounding_to_nearest_stalls_it_arrives() -> None:
    rule = Descent(2e-3)
    wide, master = last_loss(rule, F32), last_loss(MixedPrecision(rule), BF16)
    assert master == pytest.approx(wide, rel=0.1) and wide < 0.02
    assert last_loss(rule, BF16) > 10 * wide
    assert last_loss(StochasticRounding(rule), BF16) == pytest.approx(wide, rel=0.1)
    assert last_loss(StochasticRounding(Lowered(Momentum(2e-4))), BF16) == pytest.approx(wide, rel=0.2)


@every_half
def test_what_can_be_held_stays_to_the_bit(dtype: torch.dtype) -> None:
    """Numbers of every bit pattern, where the change is zero."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    model = {"w": x.clone()}
    state = setup(StochasticRounding(Descent(0.0)), model)
    for i in range(3):
        update(state, model, {"w": torch.rand(x.shape, generator=torch.Generator().manual_seed(i)).to(dtype)})
        assert_same_bits(model["w"], x.double().numpy())
    rule = StochasticRounding(Descent(0.0))  # and where slopes are kept
    assert_same_bits(rule.apply(rule.init(x), x, torch.ones_like(x))[1].value, x.double().numpy())


# --- Other rules inside, other dtypes beside --------------------------------------------------------------------


RULES: dict[str, Any] = {
    "AdamW": AdamW(1e-3),
    "lowered": Lowered(AdamW(1e-3)),
    "clipped": OptimiserChain(ClipGlobalNorm(0.5), Lion(1e-3)),
    "own": Own(1e-3),
    "whole": OptimiserChain(Whole(0.01), Momentum(0.01)),
    "gathers": OptimiserChain(AccumGrad(2), Momentum(1e-3)),
    "averaged": Averaged(Adam(1e-3), 0.5),
    "assigns": Lookahead(Cautious(Adam(1e-3)), k=2),
    "schedule-free": ScheduleFreeAdamW(1e-3),
}
each_rule = pytest.mark.parametrize("rule", [*map(StochasticRounding, RULES.values())], ids=[*RULES])
MANY: dict[str, Any] = {**SHAPES, **{f"s{i}": (4, 3) for i in range(9)}, "large": (400, 401)}


@every_layout
@each_rule
def test_all_ways_give_the_same_bits(rule: Any, layout: str, tmp_path: Any) -> None:
    """Packed, stacked, leaf by leaf, pure, copied, saved and loaded in mid-run."""
    run, plain = Run(rule, layout, MANY, BF16).step(3), Run(rule, "apart", MANY, BF16)
    tree_context(plain.state).reference_only.add(title_key(rule))
    run.equals(plain.step(3), room=1e-2 if "Clip" in str(rule) else 0.0)  # the norm of pieces rounds differently
    pure = copy.deepcopy(run)
    for _ in range(3):
        pure.state, pure.model = update(pure.state, pure.model, pure.grads(), inplace=False)
        pure.turn += 1
    other = Run(rule, layout, MANY, BF16)
    save(tmp_path / "run", model=run.model, state=run.state)
    load(tmp_path / "run", model=other.model, state=other.state)
    other.turn, copied = run.turn, copy.deepcopy(run)
    run.step(3).equals(other.step(3)).equals(copied.step(3)).equals(pure)
    start = model_of(MANY, BF16)
    assert all(x.dtype == BF16 and x.isfinite().all() for x in run.model.values())
    assert not torch.equal(run.model["large"], start["large"])


@pytest.mark.parametrize("rule", [AdamW(1e-3), Muon(1e-3)], ids=["elementwise", "of whole arrays"])
def test_a_leaf_by_itself_steps_as_among_others(rule: Any) -> None:
    shapes = {f"s{i}": (4, 3) for i in range(9)}
    run = Run(StochasticRounding(rule), shapes=shapes, dtype=BF16).step(5)
    for name in ("s0", "s7"):
        model = {name: model_of(shapes, BF16)[name].detach()}
        state = setup(StochasticRounding(rule), model)
        for i in range(5):
            update(state, model, {name: grads_of(run.model, i)[name]})
        if isinstance(rule, Muon):  # whose products of stacked matrices round in another order
            torch.testing.assert_close(run.model[name].detach(), model[name], rtol=1e-2, atol=1e-2)
        else:
            assert torch.equal(run.model[name], model[name])


@each_rule
def test_freezing_resetting_missing_gradients_and_flushes(rule: Any) -> None:
    run = Run(rule, dtype=BF16).step(2)
    freeze(run.state.b)
    before = run.image()
    run.step(2, without("c"))
    after = run.image()
    for key, old in before.items():
        if key.startswith(("parameter b", "momenta b", "parameter c")) and not run.state.b.rule.accumulates:
            assert torch.equal(old, after[key]) if isinstance(old, Tensor) else old == after[key], key
    thaw(run.state)
    reset(run.state.a)
    adjust(run.state, 0.5)
    run.step(3)
    flush(run.state, run.model)
    assert all(x.isfinite().all() for x in run.model.values())
    assert run.state.a.state.t == (3 if not rule.accumulates else 2)


def test_a_tied_parameter_is_rounded_once() -> None:
    w = nn.Parameter(torch.ones(500, dtype=BF16))
    model: Any = nn.ModuleDict({"a": nn.ParameterList([w]), "b": nn.ParameterList([w])})
    state: Any = setup(StochasticRounding(Descent(1e-3)), model)
    grads = fluxpy.gradient(lambda m: (m["a"][0] * 0.5 + m["b"][0] * 0.5).square().sum(), model)
    update(state, model, grads)
    assert model["a"][0] is model["b"][0] and state["a"][0].state.t == 1
    assert {*w.detach().tolist()} <= {1.0, 1 - 2**-8}


@pytest.mark.parametrize("dtype", [F32, F64, torch.complex64])
@pytest.mark.parametrize("name", ["AdamW", "clipped", "whole", "gathers"])
def test_other_dtypes_step_as_by_the_rule_alone(name: str, dtype: torch.dtype) -> None:
    """To a few roundings: alone, a rule may be one of PyTorch's kernels."""
    run, twin = Run(StochasticRounding(RULES[name]), dtype=dtype).step(4), Run(RULES[name], dtype=dtype).step(4)
    for key, x in run.model.items():
        assert x.dtype == dtype
        torch.testing.assert_close(x, twin.model[key], rtol=1e-5, atol=1e-6)


def test_norms_in_float32_beside_weights_in_bfloat16() -> None:
    model = nn.Sequential(nn.Linear(4, 8).bfloat16(), nn.LayerNorm(8), nn.Linear(8, 2).bfloat16())
    state: Any = setup(StochasticRounding(OptimiserChain(ClipGlobalNorm(1.0), Lowered(AdamW(1e-2)))), model)
    start = copy.deepcopy(model)
    for i in range(3):
        update(state, model, grads_of(model, i))
    dtypes = [x.dtype for x in model.parameters()]
    assert dtypes == [BF16, BF16, F32, F32, BF16, BF16]
    assert state[0].weight.state.state[1].m.dtype == BF16 and state[1].weight.state.state[1].m.dtype == BF16
    assert setup(StochasticRounding(AdamW()), model)[0].weight.state.state.m.dtype == F32
    assert all(not torch.equal(x, y) for x, y in zip(model.parameters(), start.parameters(), strict=True))


def test_weights_to_evaluate_with() -> None:
    """An average inside is in float32; the weights shown are rounded to nearest."""
    model = {"w": torch.linspace(1, 2, 1000).to(BF16)}
    state: Any = setup(StochasticRounding(Averaged(Descent(1e-3), 0.9)), model)
    for i in range(20):
        update(state, model, {"w": torch.ones(1000, dtype=BF16) * (i + 1)})
    held = model["w"].clone()
    with averaged(state, model):
        average = state["w"].state.state.x
        assert average.dtype == F32 and torch.equal(model["w"], average.to(BF16))
    assert torch.equal(model["w"], held)
    plain = {"w": torch.ones(3, dtype=BF16)}
    with averaged(setup(StochasticRounding(Adam()), plain), plain):
        assert torch.equal(plain["w"], torch.ones(3, dtype=BF16))


# --- Compiled ----------------------------------------------------------------------------------------------------


@needs_compiler
@since_2_13
def test_compiled_with_a_kernel_for_all_steps() -> None:
    """The number of the step is an input, not a part of the program. Where a rule's own arithmetic differs in its last
    bit from that of the compiler, an element in tens of thousands is rounded the other way."""
    rule = StochasticRounding(OptimiserChain(ClipGlobalNorm(0.5), Lowered(AdamW(1e-3))))
    shapes = {"a": (4, 3), "b": (7,), "large": (257, 257)}
    run, compiled = (Run(rule, shapes=shapes, dtype=BF16, compile=c) for c in (False, True))
    run.step(40), compiled.step(40)
    assert paths_of(compiled.state) == {"Compiled"}
    for name, x in run.model.items():
        assert (x != compiled.model[name]).float().mean() < 1e-3, name
        assert compiled.state[name].state.t == 40


def test_a_whole_step_under_torch_compile() -> None:
    model = {"w": torch.randn(50, generator=torch.Generator().manual_seed(0)).to(BF16)}
    rule = StochasticRounding(Momentum(2.0**-10, 0.5))
    step = torch.compile(lambda s, m, g: update(s, m, g, inplace=False), fullgraph=True, backend="aot_eager")
    torch.compiler.reset()
    a, b = (setup(rule, model), model), (setup(rule, model), model)
    for i in range(4):
        grads = grads_of(model, i)
        a, b = step(*a, grads), update(*b, grads, inplace=False)
        assert torch.equal(a[1]["w"], b[1]["w"])


# --- Among others ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own forward mode
@since_2_13
def test_slopes_go_straight_through() -> None:
    """As if nothing were rounded: backward, forward, and with vmap over both."""
    rule, start = StochasticRounding(Momentum(0.1, 0.5)), torch.tensor([1.0, -0.7, 0.3], dtype=BF16)

    def outer(w: Tensor, rule: Rule = rule) -> Tensor:
        model: Any = {"w": w}
        state: Any = setup(rule, model)
        for _ in range(2):
            state, model = update(state, model, {"w": model["w"] * 2}, inplace=False)
        return model["w"].float().sum()

    exact = torch.func.grad(lambda w: outer(w, Momentum(0.1, 0.5)))(start.float())
    torch.testing.assert_close(torch.func.grad(outer)(start).float(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(torch.func.jacfwd(outer)(start).float(), exact, rtol=1e-2, atol=1e-2)
    starts = torch.stack([start, -start, start * 3])
    values, each = torch.func.vmap(outer)(starts), torch.stack([outer(w) for w in starts])
    assert torch.equal(values, each)
    assert torch.func.vmap(torch.func.grad(outer))(starts).shape == (3, 3)


def test_as_an_optimizer_of_torch(tmp_path: Any) -> None:
    def trained(model: nn.Module, optimizer: Any, turns: range) -> nn.Module:
        for i in turns:
            for name, x in model.named_parameters():
                x.grad = grads_of(model, i)[name]
            optimizer.step()
        return model

    rule = StochasticRounding(Lowered(AdamW(1e-3)))
    models = [nn.Linear(30, 20).bfloat16() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    first = TorchOptimizer(rule, models[0])
    trained(models[0], first, range(2))
    torch.save((models[0].state_dict(), first.state_dict()), tmp_path / "run")
    weights, held = torch.load(tmp_path / "run")
    second = TorchOptimizer(rule, models[1])
    models[1].load_state_dict(weights)
    second.load_state_dict(held)
    state = setup(rule, models[2])
    for i in range(5):
        update(state, models[2], grads_of(models[2], i))
    trained(models[0], first, range(2, 5))
    trained(models[1], second, range(2, 5))
    assert all(
        torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(*(m.parameters() for m in models), strict=True)
    )


def test_rows_taken_and_grown() -> None:
    model: Any = nn.Linear(4, 6, bias=False).bfloat16()
    state: Any = setup(StochasticRounding(AdamW(1e-3)), model)
    update(state, model, grads_of(model))
    fluxpy.surgery.take(state, model, [0, 2, 5])
    fluxpy.surgery.grow(state, model, {"weight": torch.zeros(2, 4, dtype=BF16)})
    assert state.weight.state.state.m.shape == (5, 4) and state.weight.state.state.m.dtype == F32
    assert not state.weight.state.state.m[3:].any() and state.weight.state.t == 1
    update(state, model, grads_of(model))


class Bits(Rule):
    def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        return state, Assign(torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000], dtype=torch.int32).view(F32))


@every_half
@torch.no_grad()
def test_what_is_not_a_number_becomes_none(dtype: torch.dtype) -> None:
    """Whatever its bits: some have a carry into the sign, some none left when the last are gone."""
    x, rule = torch.ones(4, dtype=dtype), StochasticRounding(Bits())
    for t in range(20):
        new = rule.apply(rule.init(x)._replace(t=t), x, x)[1].value
        assert new[:3].isnan().all() and new[3] == math.inf


class Rate(Rule):
    """Assigns, and in float64."""

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        return state, Assign((x - 1e-3 * dx).double())


def test_a_rule_that_assigns_in_another_dtype() -> None:
    model = {"w": torch.linspace(1, 2, 300).to(BF16)}
    state = setup(StochasticRounding(Rate()), model)
    update(state, model, {"w": torch.ones(300, dtype=BF16)})
    assert model["w"].dtype == BF16 and 0 < (model["w"] != torch.linspace(1, 2, 300).to(BF16)).sum() < 300


def test_what_it_refuses() -> None:
    rounding = StochasticRounding(Adam())
    with pytest.raises(ValueError, match=r"StochasticRounding must be outermost, .* write StochasticRounding\(Lowered"):
        Lowered(rounding)
    with pytest.raises(ValueError, match=r"StochasticRounding\(OptimiserChain\(...\)\), not OptimiserChain\(..., "):
        OptimiserChain(AccumGrad(2), rounding)
    for wrap in (Averaged, Lookahead, Cautious):
        with pytest.raises(ValueError, match=rf"write StochasticRounding\({wrap.__name__}"):
            wrap(rounding)
    with pytest.raises(ValueError, match=r"so must MixedPrecision, since .* master copy: take one of them"):
        MixedPrecision(rounding)
    with pytest.raises(ValueError, match=r"MixedPrecision must be outermost, .* so must Stoch.*: take one"):
        StochasticRounding(MixedPrecision(Adam()))
    with pytest.raises(ValueError, match="so must StochasticRounding"):
        StochasticRounding(rounding)
    with pytest.raises(TypeError, match="StochasticRounding takes a rule"):
        StochasticRounding(Adam)  # pyright: ignore[reportArgumentType]


def test_torch_has_no_such_optimizer() -> None:
    """A state of torch.optim in bfloat16 has its momenta in that, and no steps of rounding."""
    model = nn.Linear(3, 2).bfloat16()
    with pytest.raises(ValueError, match="StochasticRounding"):
        to_torch(setup(StochasticRounding(Adam()), model), model, torch.optim.Adam(model.parameters()))
    assert not isinstance(from_torch(torch.optim.Adam(model.parameters()), model)["weight"].rule, StochasticRounding)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_refused_update_changes_nothing(bad: float) -> None:
    run = Run(StochasticRounding(OptimiserChain(ClipGlobalNorm(1.0), AdamW(1e-3))), dtype=BF16).step(2)
    before = image(run.state, run.model)
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        run.step(1, lambda grads: {**grads, "b": grads["b"] * bad})
    assert_alike(before, run.image())

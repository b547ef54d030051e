"""Lowered: momenta in less memory, arithmetic in as much as before."""

import copy

import pytest
import torch
from helpers import SHAPES, Own, Run, Whole, every_layout, grads_of, image, model_of, needs_compiler, without
from torch import Tensor

from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    Averaged,
    ClipGlobalNorm,
    Lion,
    Lowered,
    MixedPrecision,
    Momentum,
    NAdam,
    OptimiserChain,
    Rule,
    adjust,
    flush,
    freeze,
    load,
    reset,
    save,
    setup,
    thaw,
    update,
)
from fluxpy.pytree import entries_of
from fluxpy.rules import Assign

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def by_hand(rule: Rule, x: Tensor, grads: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The rule's own `apply` in float32 or more, its momenta rounded to `dtype` between the steps."""
    wide = torch.promote_types(x.dtype, F32)
    state = rule.init(x.to(wide))
    for dx in grads:
        state, change = rule.apply(state, x.to(wide), dx.to(wide))
        x = x - change.to(x.dtype)
        state = type(state)(*(t.to(dtype).to(wide) if isinstance(t, Tensor) and t.ndim else t for t in state))
    return x, {name: t for name, t in state._asdict().items() if isinstance(t, Tensor)}


@every_layout
@pytest.mark.parametrize("kept", [BF16, F16])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_the_arithmetic_is_wide_and_the_momenta_are_rounded(dtype, kept, layout):
    for rule in (AdamW(0.02), NAdam(0.02)):
        run, start = Run(Lowered(rule, dtype=kept), layout, dtype=dtype), model_of(dtype=dtype)
        run.step(6)
        for name, x in start.items():
            expected, momenta = by_hand(rule, x.detach(), [grads_of(start, i)[name] for i in range(6)], kept)
            room = 1e-12 if dtype == F64 else 1e-5
            torch.testing.assert_close(run.model[name].detach(), expected, rtol=room, atol=room / 10)
            for field, t in momenta.items():
                held = getattr(run.state[name].state, field)
                if x.ndim:
                    assert held.dtype == kept, field
                    assert held.shape == x.shape
                # The two may differ where a number lies half-way: by one place of the narrow dtype.
                assert (held.to(t.dtype) - t).abs().le(2**-7 * t.abs() + 1e-7).all(), field


RULES = {
    "AdamW": Lowered(AdamW(0.02)),
    "clipped": OptimiserChain(ClipGlobalNorm(0.5), Lowered(AdamW(0.02))),
    "clipped inside": Lowered(OptimiserChain(ClipGlobalNorm(0.5), Lion(0.02))),
    "own": Lowered(Own()),
    "whole": Lowered(OptimiserChain(Whole(0.1), Momentum(0.1))),
    "gathers": OptimiserChain(AccumGrad(2), Lowered(Momentum(0.1))),
    "gathers inside": Lowered(OptimiserChain(AccumGrad(2), Momentum(0.1))),
    "master": MixedPrecision(Lowered(Adam(0.02))),
    "averaged": Averaged(Lowered(Adam(0.02))),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@every_layout
@each_rule
def test_pure_in_place_saved_and_copied(rule, layout, tmp_path):
    run, twin = Run(rule, layout, dtype=F32).step(3), Run(rule, dtype=F32)
    for i in range(3):
        twin.state, twin.model = update(twin.state, twin.model, grads_of(twin.model, i), inplace=False)
        twin.turn += 1
    run.equals(twin, room=1e-2)  # a rounding that goes the other way
    forms = {path: t.dtype for path, t in image(run.state, run.model).items() if isinstance(t, Tensor)}
    assert BF16 in forms.values()
    other = Run(rule, layout, dtype=F32)
    save(tmp_path / "run", model=run.model, state=run.state)
    load(tmp_path / "run", model=other.model, state=other.state)
    other.turn = run.turn
    copied = copy.deepcopy(run)
    run.step(3)
    run.equals(other.step(3)).equals(copied.step(3))
    assert {path: t.dtype for path, t in image(run.state, run.model).items() if isinstance(t, Tensor)} == forms


@each_rule
def test_freezing_resetting_missing_gradients_and_flushes(rule):
    run = Run(rule, dtype=F32).step(2)
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
    assert run.state.a.rule.lr == 0.5


@needs_compiler
def test_compiled():
    """Rounded where the rule says so, on the way too."""
    run, compiled = (Run(Lowered(Adam(0.02)), dtype=F32, compile=c).step(6) for c in (False, True))
    assert compiled.state.a.state.m.dtype == BF16
    run.equals(compiled, room=1e-2)
    for name in SHAPES:
        moved = (run.model[name] - model_of(dtype=F32)[name]).abs().max()
        assert (run.model[name] - compiled.model[name]).abs().max() < 0.01 * moved


class Counting(Rule):
    """A state with all that is no momentum; it assigns."""

    def init(self, x):
        return {
            "m": torch.zeros_like(x),
            "seen": torch.zeros(x.shape, dtype=torch.int64),
            "size": x.new_ones(()),
            "t": 0,
        }

    def apply(self, state, x, dx):
        m = state["m"] + dx
        assert m.dtype == F32
        return {"m": m, "seen": state["seen"] + 1, "size": state["size"] * 1.0001, "t": state["t"] + 1}, Assign(x - m)


def test_momenta_only():
    model = {"w": torch.ones(3, dtype=BF16), "z": torch.ones(2, dtype=torch.complex64)}
    state = setup({"w": Lowered(Counting()), "z": Lowered(Adam())}, model)
    for i in range(3):
        update(state, model, grads_of(model, i))
    held = dict(entries_of(state["w"].state))
    assert [t.dtype for t in held.values() if isinstance(t, Tensor)] == [BF16, torch.int64, F32]
    assert held["['t']"] == 3 and held["['seen']"].tolist() == [3, 3, 3]
    assert held["['size']"].item() == pytest.approx(1.0001**3, rel=1e-6)
    assert model["w"].dtype == BF16
    assert state["z"].state.m.dtype == BF16 and state["z"].state.m.shape == (2, 2)


def test_half_the_memory():
    states = [setup(rule, model_of(dtype=F32)) for rule in (Adam(), Lowered(Adam()))]
    sizes = [sum(t.nbytes for _, t in entries_of(s.a.state) if isinstance(t, Tensor)) for s in states]
    assert sizes[0] == 2 * sizes[1]


def test_what_lowered_refuses():
    with pytest.raises(ValueError, match=r"write MixedPrecision\(Lowered"):
        Lowered(MixedPrecision(Adam()))
    with pytest.raises(ValueError, match=r"keeps weights beside its momenta.*as in Averaged\(Lowered"):
        Lowered(Averaged(Adam()))
    with pytest.raises(ValueError, match="must be a floating-point dtype of 16 bits or more"):
        Lowered(Adam(), dtype=torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="Lowered takes a rule"):
        Lowered(Adam)  # pyright: ignore[reportArgumentType]


def second_moment(beta2):
    """After large gradients, long under small ones: how many times too large `v` is."""
    rule, models = Adam(1e-3, betas=(0.9, beta2)), [{"w": torch.ones(1000)} for _ in range(2)]
    states = [setup(Lowered(rule), models[0]), setup(rule, models[1])]
    g = torch.Generator().manual_seed(0)
    for i in range(3000):
        dx = torch.randn(1000, generator=g) * (10 if i < 100 else 1)
        for state, model in zip(states, models, strict=True):
            update(state, model, {"w": dx})
    return (states[0]["w"].state.v.float() / states[1]["w"].state.v).median().item()


def test_what_the_docs_say_of_stalling():
    assert second_moment(0.999) > 2
    assert second_moment(0.99) == pytest.approx(1, abs=0.1)

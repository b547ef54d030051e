"""Totals over the tree: those of the leaves that are stepped, in the model's order, for rules of a user's own too."""

import math

import pytest
import torch
from helpers import (
    CHAINS,
    SHAPES,
    Own,
    Run,
    assert_alike,
    by_hand,
    every_layout,
    tensors_of,
    values_of,
    without,
)

import fluxpy
from fluxpy import (
    Adam,
    AdamW,
    ClipGlobalNorm,
    ClipGrad,
    ClipNorm,
    Descent,
    Lion,
    Momentum,
    OptimiserChain,
    RMSProp,
    WeightDecay,
    adjust,
    flatten_parameters,
    freeze,
    schedules,
    thaw,
    update,
)  # fmt: skip
from fluxpy.rules import Reduce, ReducingRule

# --- Totals -------------------------------------------------------------------------------------------------------

MANY = {f"{i:02}{kind}": shape for i in range(12) for kind, shape in (("weight", (7, 5)), ("bias", (5,)))}


# A rule with a schedule and a weight decay, as people write it: no decay on biases, one clip over all.
STEPS = {
    "AdamW": lambda rate, decay: AdamW(rate, weight_decay=decay),
    "Adam": lambda rate, decay: OptimiserChain(WeightDecay(decay), Adam(rate)),
    "Momentum": lambda rate, decay: OptimiserChain(WeightDecay(decay), Momentum(rate)),
    "Lion": lambda rate, decay: OptimiserChain(WeightDecay(decay), Lion(rate)),
    "RMSProp": lambda rate, decay: OptimiserChain(WeightDecay(decay), RMSProp(rate)),
    "own": lambda rate, decay: OptimiserChain(WeightDecay(decay), Own(rate)),
}
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())


def two_decays(step, rate):
    return {
        "*weight": OptimiserChain(ClipGlobalNorm(0.3), step(rate(), 0.1)),
        "*bias": OptimiserChain(ClipGlobalNorm(0.3), step(rate(), 0.0)),
    }


RATES = {
    "a schedule": lambda: schedules.cosine(0.1, 0.01, 20),
    "a function": lambda: lambda count: 0.1 / (1 + count),
    "a number": lambda: 0.1,
}


RESUMED = [(step, rate, layout) for rate in RATES for step, layout in zip(STEPS, ["apart", "flat"] * 3, strict=True)]
RESUMED += [(step, "a schedule", "flat") for step in ("AdamW", "Momentum")]


@pytest.mark.parametrize("name, rate, layout", RESUMED)
def test_a_resumed_run_is_the_same_bit_for_bit(name, rate, layout, tmp_path):
    """With a clip over all leaves, a schedule and two weight decays; the script makes its schedules anew."""
    step, rate = STEPS[name], RATES[rate]
    one = rate()
    for shared in (True, False):
        whole = Run(two_decays(step, (lambda: one) if shared else rate), layout, MANY, torch.float32).step(8)
        half = Run(two_decays(step, (lambda: one) if shared else rate), layout, MANY, torch.float32).step(3)
        fluxpy.save(tmp_path / "run.flux", model=half.model, state=half.state)
        resumed = Run(two_decays(step, rate), layout, MANY, torch.float32)
        fluxpy.load(tmp_path / "run.flux", model=resumed.model, state=resumed.state)
        resumed.turn = 3
        resumed.step(5)
        for (path, x), y in zip(whole.model.items(), resumed.model.values(), strict=True):
            assert torch.equal(x, y), path


@every_layout
@every_step
def test_a_run_resumed_after_a_freeze_and_missing_gradients_is_the_same_bit_for_bit(step, layout):
    """Leaves that went apart and came together again are grouped otherwise than those of a state that was loaded."""
    rules = two_decays(step, lambda: 0.1)
    run = Run(rules, layout, MANY, torch.float32).step(2)
    freeze(run.state["03weight"])
    run.step()
    thaw(run.state)
    run.step(1, without("05bias", "07weight"))
    run.step()
    adjust(run.state["02weight"], lr=0.05)
    run.step()
    resumed = Run(rules, "apart", MANY, torch.float32)
    resumed.model.load_state_dict(run.model.state_dict())
    if layout == "flat":
        flatten_parameters(resumed.model)
    fluxpy.load_state_dict(resumed.state, fluxpy.state_dict(run.state))
    resumed.turn = run.turn
    resumed.step(3)
    run.step(3)
    for (path, x), y in zip(run.model.items(), resumed.model.values(), strict=True):
        assert torch.equal(x, y), path


@every_layout
def test_a_total_does_not_hang_on_how_leaves_are_grouped(layout):
    """One rule for all, one for each leaf, schedules of their own, other shapes of the same chain."""
    clip, step = ClipGlobalNorm(0.3), Lion(0.1)
    one = OptimiserChain(clip, step)
    found = []
    for rules in (
        one,
        {name: OptimiserChain(ClipGlobalNorm(0.3), Lion(0.1)) for name in MANY},
        {name: OptimiserChain(clip, Lion(lambda count: 0.1)) for name in MANY},
        {name: OptimiserChain(ClipGlobalNorm(schedules.constant(0.3)), step) for name in MANY},
        {"*1*": OptimiserChain(clip, OptimiserChain(step)), "*": one},
        {"*weight": OptimiserChain(clip, WeightDecay(0.0), step), "*": one},
    ):
        run = Run(rules, layout, MANY, torch.float32).step(3)
        found.append([*run.model.values(), *tensors_of(run.state)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def norm(*tensors):
    return torch.cat([t.reshape(-1) for t in tensors]).norm()


@every_layout
@pytest.mark.parametrize("last", [Descent(0.1), OptimiserChain(Descent(0.1))])
def test_equal_clips_share_a_norm_across_chains_of_different_length(layout, last):
    """By their place among the chain's global clips, wherever else they stand."""
    clip = ClipGlobalNorm(0.5)
    rules = {
        "a": OptimiserChain(clip, last),
        "b": OptimiserChain(WeightDecay(0.1), clip, ClipGrad(9.0), last),
        "c": OptimiserChain(clip, WeightDecay(0.2), clip, last),
        "d": OptimiserChain(ClipGlobalNorm(0.4), last),
        "e": OptimiserChain(WeightDecay(0.3), WeightDecay(0.1), clip, clip, last),
    }
    run = Run(rules, layout)
    for _ in range(3):
        x, g = values_of(run.model), run.grads()
        g["b"], g["e"] = g["b"] + 0.1 * x["b"], g["e"] + 0.4 * x["e"]
        first = norm(*(g[name] for name in "abce")).clamp(min=0.5) / 0.5
        for name in "abce":
            g[name] = g[name] / first
        g["d"] = g["d"] / (norm(g["d"]).clamp(min=0.4) / 0.4)
        g["c"] = g["c"] + 0.2 * x["c"]
        second = norm(g["c"], g["e"]).clamp(min=0.5) / 0.5
        g["c"], g["e"] = g["c"] / second, g["e"] / second
        run.step()
        for name in SHAPES:
            torch.testing.assert_close(run.model[name].detach(), x[name] - 0.1 * g[name], rtol=1e-12, atol=1e-12)


@every_layout
@pytest.mark.parametrize("step", [Adam, Lion, Momentum, Own])
def test_clips_that_differ_have_norms_of_their_own(step, layout):
    """In a branch, for norms of other kinds, and where they are adjusted."""
    rules = {
        "a": OptimiserChain(ClipGlobalNorm(0.5), Descent(1.0)),
        "b": OptimiserChain(ClipGlobalNorm(0.25), Descent(1.0)),
        "c": OptimiserChain(ClipGlobalNorm(0.5, norm_type=1.0), step(0.1)),
        "d": OptimiserChain(ClipGlobalNorm(0.5, norm_type=math.inf), Descent(1.0)),
        "e": OptimiserChain(ClipGlobalNorm(0.5), step(0.1)),
    }
    run = Run(rules, layout)
    x, g = values_of(run.model), run.grads()
    run.step()
    shared = norm(g["a"], g["e"])
    for name, total in (("a", shared), ("b", norm(g["b"])), ("d", g["d"].abs().max())):
        limit = rules[name][0].max_norm
        torch.testing.assert_close(run.model[name].detach(), x[name] - g[name] / (total / limit).clamp(min=1))
    adjust(run.state.a, max_norm=0.1)
    x, g = values_of(run.model), run.grads()
    run.step()
    torch.testing.assert_close(run.model["a"].detach(), x["a"] - g["a"] / (norm(g["a"]) / 0.1).clamp(min=1))


# --- Reducing rules of a user's own -------------------------------------------------------------------------------


class Squash(ReducingRule):
    """A user's elementwise rule with a total over the tree: the gradient over one and its norm."""

    elementwise = True
    runs = 0

    def part(self, value):
        return value.square().sum()

    def combine(self, parts):
        return parts.sum().sqrt()

    def steps(self, state, x, dx):
        Squash.runs += 1
        total = yield Reduce(self, dx)
        return state, dx / (1 + total)


class Summed(ReducingRule):
    """With the total that is the default, and a second one that needs the first."""

    elementwise = True

    def part(self, value):
        return value.sum()

    def steps(self, state, x, dx):
        total = yield Reduce(self, dx)
        spread = yield Reduce(self, (dx - total) * (dx - total))
        return state, dx / (1 + spread)


class Each(ReducingRule):
    """Each array by itself."""

    over = "array"

    def part(self, value):
        return value.abs().max()

    def steps(self, state, x, dx):
        largest = yield Reduce(self, dx)
        return state, dx / (1 + largest)


class Clip(ClipGlobalNorm):
    """Nothing of its own."""


class EachClip(ClipNorm):
    """Nothing of its own."""


def squashed(g):
    return {k: dx / (1 + norm(*g.values())) for k, dx in g.items()}


def summed(g):
    total = sum(dx.sum() for dx in g.values())
    spread = sum((dx - total).square().sum() for dx in g.values())
    return {k: dx / (1 + spread) for k, dx in g.items()}


def each(g):
    return {k: dx / (1 + dx.abs().max()) for k, dx in g.items()}


def clipped(g):
    return {k: dx / (norm(*g.values()) / 0.5).clamp(min=1) for k, dx in g.items()}


def each_clipped(g):
    return {k: dx / (norm(dx) / 0.5).clamp(min=1) for k, dx in g.items()}


REDUCING = {
    "squash": (Squash(), squashed),
    "summed": (Summed(), summed),
    "each": (Each(), each),
    "clip": (Clip(0.5), clipped),
    "clip each": (EachClip(0.5), each_clipped),
}
FRONT = {**REDUCING, "both": (OptimiserChain(Squash(), WeightDecay(0.0), Summed()), lambda g: summed(squashed(g)))}
BEHIND = {name: CHAINS[name] for name in ("Descent", "AdamW", "Lion", "RMSProp", "own", "whole")}


@every_layout
@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND.keys())
@pytest.mark.parametrize("own, formula", FRONT.values(), ids=FRONT.keys())
def test_a_users_reducing_rule_is_right(own, formula, behind, layout):
    """The total is over the leaves that are stepped: not over those that are frozen, or have no gradient."""
    run = Run(OptimiserChain(own, behind), layout)
    first, history = values_of(run.model), []
    for i in range(6):
        if i == 2:
            freeze(run.state.b)
        if i == 4:
            thaw(run.state.b)
        given = without("d")(run.grads()) if i == 3 else run.grads()
        update(run.state, run.model, given)
        run.turn += 1
        history.append(formula({k: dx for k, dx in given.items() if not run.state[k].frozen}))
    for name in SHAPES:
        x, _, count = by_hand(behind, first[name], [grads.get(name) for grads in history])
        torch.testing.assert_close(run.model[name].detach(), x, rtol=1e-10, atol=1e-12, msg=name)
        assert run.state[name].count == count


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
@pytest.mark.parametrize("where", ["tree", "array"])
def test_what_a_users_reducing_rule_does_with_a_total_that_is_not_finite(nonfinite, where):
    class Judge(ReducingRule):
        elementwise = True
        over = where

        def part(self, value):
            return value.square().sum()

        def steps(self, state, x, dx):
            total = yield Reduce(self, dx, nonfinite)
            return state, dx / (1 + total)

    run = Run(OptimiserChain(Judge(), Adam(0.1))).step(2)
    before = run.image()
    bad = run.grads()
    bad["d"][1, 1] = math.nan
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="'d'"):
            update(run.state, run.model, bad)
    else:
        update(run.state, run.model, bad)
    if nonfinite == "ignore":
        assert run.model["d"].isnan().any() and run.state.a.count == 3
    else:
        assert_alike(run.image(), before)


WIDE = {f"{i:03}": (8, 8) for i in range(500)}


@pytest.mark.parametrize("behind, layout", [(AdamW(0.02), "apart"), (Lion(0.01), "flat"), (Own(0.01), "apart")])
@pytest.mark.parametrize("name", ["squash", "clip"])
def test_a_users_elementwise_reducing_rule_is_not_run_leaf_by_leaf(name, behind, layout, monkeypatch):
    """Counted, not timed: how often its generator, and the user's own rule behind it, are run for 500 leaves."""
    runs = {"steps": 0, "apply": 0}

    def counted(cls, method):
        inside = getattr(cls, method)

        def call(*args):
            runs[method] += 1
            return inside(*args)

        monkeypatch.setattr(cls, method, call)

    rule = REDUCING[name][0]
    run = Run(OptimiserChain(rule, behind), layout, WIDE, torch.float32).step(2)
    counted(Squash if name == "squash" else ClipGlobalNorm, "steps")
    counted(Own, "apply")
    run.step(2)
    assert runs["steps"] <= 50 and runs["apply"] <= 50


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("last", [Descent(1.0), RMSProp(0.1)], ids=repr)
@every_layout
def test_a_total_of_what_was_clipped_array_by_array(order, last, layout, monkeypatch):
    """Some arrays are above the limit of the first clip and some below, whichever of them comes first."""
    monkeypatch.setattr(fluxpy.engine.layout, "SIZE", 8)  # so that each array is worked on by itself
    run = Run(OptimiserChain(ClipNorm(1.0), ClipGlobalNorm(0.5), last), layout, dict.fromkeys(order, (4, 3)))
    start = values_of(run.model)
    grads = {"a": torch.full((4, 3), 0.1, dtype=torch.float64), "b": torch.full((4, 3), 5.0, dtype=torch.float64)}
    run.step(1, lambda _: grads)
    clipped = {"a": grads["a"], "b": grads["b"] / grads["b"].norm()}
    total = torch.cat([dx.flatten() for dx in clipped.values()]).norm()
    for name, dx in clipped.items():
        expected = by_hand(last, start[name], [dx * 0.5 / total])[0]
        torch.testing.assert_close(run.model[name].detach(), expected, rtol=1e-12, atol=1e-13)


# --- A wrapper of a user's that hides a total ---------------------------------------------------------------------


class ByApply(fluxpy.Rule):
    """Runs the rule inside by `apply`, on one array."""

    rule: fluxpy.Rule

    def init(self, x):
        return self.rule.init(x)

    def apply(self, state, x, dx):
        return self.rule.apply(state, x, dx)


class SaysElementwise(ByApply):
    elementwise = True


class BySteps(ByApply):
    def steps(self, state, x, dx):
        return (yield from self.rule.steps(state, x, dx))


GLOBAL = OptimiserChain(ClipGlobalNorm(1.0), Descent(1.0))


@pytest.mark.parametrize(
    "rule",
    [
        ByApply(GLOBAL),
        SaysElementwise(GLOBAL),
        SaysElementwise(ClipNorm(1.0)),
        OptimiserChain(ByApply(ClipGlobalNorm(1.0)), Descent(1.0)),
        fluxpy.MixedPrecision(ByApply(ByApply(GLOBAL))),
    ],
    ids=repr,
)
def test_a_wrapper_that_hides_a_total_is_refused(rule):
    """It would be the total of one array, or of what happens to be packed with it."""
    with pytest.raises(TypeError, match=r"apply.*Clip(Global)?Norm.*total.*yield from self.rule.steps\("):
        fluxpy.setup(rule, {"a": torch.zeros(2), "b": torch.zeros(1)})
    with pytest.raises(TypeError, match="yield from"):
        fluxpy.setup({"a": rule, "*": Adam()}, {"a": torch.zeros(2), "b": torch.zeros(1)})


@pytest.mark.parametrize(
    "rule", [BySteps(GLOBAL), ByApply(OptimiserChain(ClipNorm(13.0), Descent(1.0 / 13)))], ids=repr
)
def test_a_wrapper_that_passes_a_total_on_or_needs_its_array_alone_is_taken(rule):
    model = {"a": torch.zeros(2), "b": torch.zeros(1)}
    update(fluxpy.setup(rule, model), model, {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0])})
    torch.testing.assert_close(torch.cat([*model.values()]), -torch.tensor([3.0, 4.0, 12.0]) / 13)


@pytest.mark.parametrize("outer", [ByApply, BySteps])
def test_a_wrapper_that_hides_an_accumulation_is_refused(outer):
    """`flush` would pass it by, and its windows would get out of step with those of leaves that have no gradient."""
    rule = outer(OptimiserChain(fluxpy.AccumGrad(2), Descent(1.0)))
    with pytest.raises(TypeError, match=r"AccumGrad.*OptimiserChain\(AccumGrad\(...\), " + outer.__name__):
        fluxpy.setup(rule, {"a": torch.zeros(2)})

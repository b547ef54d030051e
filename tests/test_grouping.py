"""Which leaves are stepped together is nobody's affair: every leaf is as if stepped by itself, and totals are those of
the tree, whatever came before and however gradients and momenta lie."""

import copy
import gc
import itertools
import math
import random
import warnings

import optree
import pytest
import torch
from helpers import (
    CHAINS,
    FEW,
    SHAPES,
    Own,
    Run,
    assert_alike,
    by_hand,
    every_layout,
    few_chains,
    grads_of,
    model_of,
    tensors_of,
    without,
)
from torch import nn

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
    leaves,
    reset,
    schedules,
    setup,
    thaw,
    update,
    value,
)  # fmt: skip
from fluxpy.rules import Reduce, ReducingRule, Rule

# Chains in which each leaf is stepped by itself, so that `apply` leaf by leaf is the reference.
ALONE = {name: CHAINS[name] for name in ("Momentum", "AdamW", "clip each, Nesterov", "NAdam", "own", "whole", "master")}
every_lonely_chain = pytest.mark.parametrize("rule", ALONE.values(), ids=ALONE.keys())


def follows(run, rule_of, first, history, room=1e-12):
    """The run is what `apply` makes leaf by leaf of the gradients it was given."""
    for path, leaf in leaves(run.state):
        x, state, count = by_hand(rule_of(path), first[path], [grads.get(path) for grads in history])
        torch.testing.assert_close(run.model[path].detach(), x, rtol=room, atol=room, msg=path)
        mine, theirs = (optree.tree_leaves(s, none_is_leaf=True, namespace="fluxpy") for s in (leaf.state, state))
        assert leaf.count == count and len(mine) == len(theirs), path
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=room, atol=room, msg=path)


def values_of(model):
    return {path: x.detach().clone() for path, x in fluxpy.trainables(model, path=True)}


# --- Wrappers -----------------------------------------------------------------------------------------------------


class Scaled(Rule):
    """A user's wrapper that is not elementwise: the mean size of each array's change is one."""

    rule: Rule

    def init(self, x):
        return self.rule.init(x)

    def apply(self, state, x, dx):
        state, change = self.rule.apply(state, x, dx)
        return state, change * (0.1 / (change.abs().mean() + 1e-6))


class Halved(Rule):
    """A user's wrapper that says that it is elementwise."""

    rule: Rule
    elementwise = True

    def init(self, x):
        return self.rule.init(x)

    def apply(self, state, x, dx):
        state, change = self.rule.apply(state, x, dx)
        return state, change / 2


INNER = {name: CHAINS[name] for name in ("Momentum", "AdamW", "Lion", "NAdam", "own", "whole")}
WRAPPED = {
    "alone": lambda rule: Scaled(rule),
    "of a chain": lambda rule: Scaled(OptimiserChain(WeightDecay(0.1), rule)),
    "in a chain": lambda rule: OptimiserChain(ClipGrad(1.0), Scaled(rule)),
    "before a step": lambda rule: OptimiserChain(Scaled(rule), Momentum(0.1)),
    "in itself": lambda rule: Scaled(Halved(Scaled(rule))),
    "elementwise": lambda rule: Halved(rule),
}


@every_layout
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_a_wrapper_is_as_elementwise_as_it_says(wrap, layout):
    """Whatever is inside it."""
    for inner in INNER.values():
        rule = wrap(inner)
        run = Run(rule, layout)
        first, history = values_of(run.model), []
        for _ in range(5):
            history.append(run.grads())
            run.step()
        follows(run, lambda path, rule=rule: rule, first, history)


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


@every_layout
@every_step
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES.keys())
def test_a_resumed_run_is_the_same_bit_for_bit(step, rate, layout, tmp_path):
    """With a clip over all leaves, a schedule and two weight decays; the script makes its schedules anew."""
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


@every_layout
@pytest.mark.parametrize("behind", [AdamW(0.02), Lion(0.01), Own(0.01)])
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


# --- Leaves that part and meet again ------------------------------------------------------------------------------


@every_layout
@every_lonely_chain
def test_leaves_with_different_counts_are_each_stepped_by_their_own(rule, layout):
    """Bias corrections too: after gradients that were missing, a reset and a thaw, all are stepped at once."""
    run = Run(rule, layout)
    first, history = values_of(run.model), []

    def go(times, change=lambda grads: grads, frozen=""):
        for _ in range(times):
            given = change(run.grads())
            run.step(1, change)
            history.append({k: v for k, v in given.items() if k not in frozen})

    go(2)
    go(2, without("a"))
    go(2)
    go(1, without("a", "d"))
    freeze(run.state.b)
    go(3, frozen="b")
    thaw(run.state.b)
    go(2)
    follows(run, lambda path: rule, first, history)
    assert [run.state[name].count for name in SHAPES] == [9, 9, 12, 11, 12]
    reset(run.state.e)
    again, later = values_of(run.model)["e"], len(history)
    go(3)
    x, _, count = by_hand(rule, again, [grads["e"] for grads in history[later:]])
    torch.testing.assert_close(run.model["e"].detach(), x, rtol=1e-12, atol=1e-12)
    assert run.state.e.count == count == 3


@every_layout
@pytest.mark.parametrize("rule", [Adam, Momentum, Lion, RMSProp, Own])
def test_a_schedule_sees_the_count_of_each_leaf(rule, layout):
    rate = lambda count: 0.1 / (1 + count)  # noqa: E731
    run = Run(rule(rate), layout)
    first, history = values_of(run.model), []
    for names in ("", "ab", "a", "", "d", "", ""):
        history.append(without(*names)(run.grads()))
        run.step(1, without(*names))
    follows(run, lambda path: lambda count: rule(rate(count)), first, history)
    for _, leaf in leaves(run.state):
        assert value(leaf, "lr") == rate(leaf.count)


@every_layout
@every_lonely_chain
def test_gradients_that_are_missing_in_turn(rule, layout):
    """What was worked out while all were there is right again once all are back."""
    run = Run(rule, layout)
    first, history = values_of(run.model), []
    for i in range(12):
        names = ["", "a", "b", "", "a", "abcde", "", "abcd", "e", "", "a", ""][i]
        if names == "abcde":
            continue
        history.append(without(*names)(run.grads()))
        run.step(1, without(*names))
    follows(run, lambda path: rule, first, history)


@every_layout
@every_lonely_chain
def test_rates_that_differ_and_are_equal_again(rule, layout):
    """Also where the leaves that differ are stepped at different counts."""
    run, rates = Run(rule, layout), dict.fromkeys(SHAPES, rule.lr)
    first, history, used = values_of(run.model), [], []
    for i, change in enumerate([{}, {"a": 0.3}, {"b": 0.2, "d": 0.3}, {}, dict.fromkeys("abd", rule.lr), {"e": 0.01}]):
        for name, rate in change.items():
            adjust(run.state[name], lr=rate)
            rates[name] = rate
        names = "c" if i == 3 else ""
        for _ in range(2):
            history.append(without(*names)(run.grads()))
            used.append(dict(rates))
            run.step(1, without(*names))
    for path in SHAPES:
        x, state, count = first[path], rule.init(first[path]), 0
        for grads, rate in zip(history, used, strict=True):
            now = fluxpy.adjust(setup(rule, torch.zeros(1)), lr=rate[path]).rule
            x, state, count = by_hand(now, x, [grads.get(path)], state, count)
        torch.testing.assert_close(run.model[path].detach(), x, rtol=1e-12, atol=1e-12, msg=path)


# --- Momenta as a user may give them ------------------------------------------------------------------------------


def transposed(t):
    return t.t().contiguous().t() if t.ndim == 2 else t


def backwards(state):
    """The momenta in one buffer, the last leaf's first."""
    tensors = optree.tree_leaves(state, namespace="fluxpy")
    buffer, end = torch.cat([t.reshape(-1) for t in reversed(tensors)]), sum(t.numel() for t in tensors)
    places = []
    for t in tensors:
        places.append(buffer[end - t.numel() : end].view(t.shape))
        end -= t.numel()
    found = iter(places)
    return optree.tree_map(lambda t: next(found), state, namespace="fluxpy")


MOMENTA = {
    "of other strides": (transposed, 1e-12),
    "with gaps": (lambda t: torch.stack([t, t], -1)[..., 0], 1e-12),
    "in one buffer backwards": (backwards, 1e-12),
    "of another dtype": (lambda t: t.float(), 1e-5),
    "with a history": (lambda t: t * torch.ones((), dtype=t.dtype, requires_grad=True), 1e-12),
    "that require grad": (lambda t: t.clone().requires_grad_(), 1e-12),
}
HELD = {name: CHAINS[name] for name in FEW if name != "master"}


@every_layout
@pytest.mark.parametrize("change, room", MOMENTA.values(), ids=MOMENTA.keys())
def test_momenta_of_any_kind_give_the_same_numbers(change, room, layout):
    for rule, name in itertools.product(HELD.values(), ["", "d"]):
        run, twin = Run(rule, layout).step(2), Run(rule, layout).step(2)
        chosen = set(map(id, tensors_of(run.state[name] if name else run.state)))
        if change is backwards:
            run.state = backwards(run.state)
        else:
            run.state = optree.tree_map(lambda t: change(t) if id(t) in chosen else t, run.state, namespace="fluxpy")  # noqa: B023
        for _ in range(3):
            run.step()
            twin.step()
            assert_close(run.model, twin.model, room)
            for (path, mine), (_, theirs) in zip(leaves(run.state), leaves(twin.state), strict=True):
                assert mine.count == theirs.count
                for a, b in zip(tensors_of(mine.state), tensors_of(theirs.state), strict=True):
                    torch.testing.assert_close(a, b, rtol=room, atol=room, check_dtype=False, msg=path)


@every_layout
@pytest.mark.parametrize("rule", HELD.values(), ids=HELD.keys())
def test_momenta_on_another_device_are_refused_by_name(rule, layout):
    for start in (1, 2):
        run = Run(rule, layout).step(start)
        run.state = optree.tree_map(lambda t: t.to("meta") if t.shape == (7,) else t, run.state, namespace="fluxpy")
        before = values_of(run.model)
        for _ in range(2):
            with pytest.raises(ValueError, match="momenta of 'b' are on meta"):
                run.step()
            assert all(torch.equal(before[name], x) for name, x in run.model.items())
            assert {leaf.count for _, leaf in leaves(run.state)} <= {start, start // 2}


# --- Gradients that lie elsewhere ---------------------------------------------------------------------------------


def laid(grads, order, gap=0):
    """The gradients in one buffer, in some order, with gaps between."""
    buffer = torch.zeros(sum(t.numel() + gap for t in grads.values()), dtype=torch.float64)
    found, start = {}, 0
    for name in order:
        t = grads[name]
        found[name] = buffer[start : start + t.numel()].view(t.shape).copy_(t)
        start += t.numel() + gap
    return {name: found[name] for name in grads}


PLACES = {
    "apart": lambda g: g,
    "side by side": lambda g: laid(g, list(g)),
    "backwards": lambda g: laid(g, list(g)[::-1]),
    "two changed": lambda g: laid(g, ["d", "b", "c", "a", "e"]),
    "with gaps": lambda g: laid(g, list(g), gap=3),
    "transposed": lambda g: {k: transposed(v) for k, v in g.items()},
    "expanded": lambda g: {k: v.reshape(-1)[:1].expand(v.numel()).view(v.shape) for k, v in g.items()},
}


def apart(grads):
    return {name: t.clone(memory_format=torch.contiguous_format) for name, t in grads.items()}


@every_layout
@few_chains
def test_gradients_may_lie_anywhere_from_step_to_step(rule, layout):
    run, twin = Run(rule, layout), Run(rule, layout)
    chance, turns = random.Random(0), [*PLACES] * 3
    chance.shuffle(turns)
    for name in turns:
        run.step(1, PLACES[name])
        twin.step(1, lambda grads, name=name: apart(PLACES[name](grads)))
        run.equals(twin, room=1e-12)


@every_layout
@few_chains
@pytest.mark.parametrize("by", ["name", "grad"])
def test_the_same_tensors_as_gradients_in_other_memory(rule, layout, by):
    """Kept from step to step, side by side, and then one of them moves, as `.data =` does; or another takes its
    address."""
    run, twin = Run(rule, layout), Run(rule, layout)
    kept = laid(run.grads(), list(SHAPES))
    if by == "grad":
        for name, x in run.model.items():
            x.grad = kept[name]

    def go(times=2):
        for _ in range(times):
            for name, dx in run.grads().items():
                kept[name].copy_(dx)
            run.step(1, lambda _: None if by == "grad" else kept)
            twin.step()
        run.equals(twin, room=1e-12)

    def put(name, t):
        kept[name] = t
        if by == "grad":
            run.model[name].grad = t

    go()
    kept["b"].data = kept["b"].clone()  # out of the buffer
    go()
    kept["b"].data, kept["d"].data = kept["b"].clone(), torch.zeros(3, 4, dtype=torch.float64).t()  # other strides
    go()
    put("a", kept["a"].as_strided((4, 3), (1, 4)))  # the same address, in other strides
    go()
    put("a", kept["a"].as_strided((4, 3), (3, 1)))
    go()
    for name, t in laid(kept, list(SHAPES)).items():
        put(name, t)
    go()
    put("b", torch.zeros(7, dtype=torch.float64))  # the first of the buffer stays where it was, its neighbour does not
    go()
    for name, t in laid(kept, ["d", "b", "c", "a", "e"]).items():  # every one at the place of another
        kept[name].data = t
    go()


@every_layout
@few_chains
def test_gradients_by_name_in_any_order(rule, layout):
    run, twin = Run(rule, layout), Run(rule, layout)
    chance = random.Random(0)
    for i in range(8):
        order = list(SHAPES)
        if i % 2:
            chance.shuffle(order)
        run.step(1, lambda grads, order=order: {name: grads[name] for name in order})
        twin.step()
    run.equals(twin)
    nested = nn.ModuleDict({"x": nn.Linear(3, 3), "y": nn.Linear(3, 3)}).double()
    other, state = copy.deepcopy(nested), setup(rule, nested)
    pure = setup(rule, other)
    for i in range(4):
        grads = grads_of(nested, i)
        if i % 2:
            parts = {layer: {x: grads[f"{layer}.{x}"] for x in ("bias", "weight")} for layer in "yx"}
            update(state, nested, parts)
        else:
            update(state, nested, dict(reversed(grads.items())))
        update(pure, other, grads)
    assert_close(nested, other)


def assert_close(model, other, room=1e-12):
    for (path, x), y in zip(fluxpy.trainables(model, path=True), fluxpy.trainables(other), strict=True):
        torch.testing.assert_close(x, y, rtol=room, atol=room, msg=path)


# --- Models whose parts change places -----------------------------------------------------------------------------


def two(kind="module"):
    """Two layers of one shape."""
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    if kind == "dict":
        return {name: {"weight": make(3, 3), "bias": make(3)} for name in ("one", "two")}
    model = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)}).double()
    for x in model.parameters():
        x.data = make(*x.shape)
    return model


def swap_layers(model):
    model["one"], model["two"] = model["two"], model["one"]


def swap_in_other_order(model):
    """As one does to rename: out, and in again."""
    one, two = model.pop("one"), model.pop("two")
    model["two"], model["one"] = one, two


def swap_weights(model):
    if isinstance(model, dict):
        one, two = model["one"], model["two"]
        one["weight"], two["weight"] = two["weight"], one["weight"]
    else:
        model["one"].weight, model["two"].weight = model["two"].weight, model["one"].weight


@few_chains
@pytest.mark.parametrize("kind", ["module", "dict"])
@pytest.mark.parametrize("swap", [swap_layers, swap_in_other_order, swap_weights])
@pytest.mark.parametrize("laid_out", [False, True])
def test_parts_that_change_names_are_stepped_by_their_new_ones(rule, kind, swap, laid_out):
    """A state belongs to places: momenta and gradients of a name go to what stands there now."""
    model, twin = two(kind), two(kind)
    if laid_out:
        flatten_parameters(model)
    state, other = setup(rule, model), setup(rule, twin)
    for i in range(3):
        update(state, model, grads_of(model, i))
        update(other, twin, grads_of(twin, i))
    swap(model)
    swapped = values_of(model)
    with torch.no_grad():
        for path, x in fluxpy.trainables(twin, path=True):
            x.copy_(swapped[path])
    before = {path: x for path, x in fluxpy.trainables(model, path=True)}
    if kind == "module" and swap is swap_in_other_order:  # which is another module to iterate over
        with pytest.raises(ValueError, match="the model children 'two', 'one'"):
            update(state, model, grads_of(twin, 3))
        assert all(torch.equal(swapped[path], x) for path, x in before.items())
        return
    for i in range(3, 6):
        grads = grads_of(twin, i)
        update(state, model, grads)
        update(other, twin, grads)
    now, expected = dict(fluxpy.trainables(model, path=True)), dict(fluxpy.trainables(twin, path=True))
    for path, x in now.items():
        assert x is before[path]
        torch.testing.assert_close(x, expected[path], rtol=1e-12, atol=1e-12, msg=path)


class Box(nn.Module):
    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))


@few_chains
@pytest.mark.parametrize("kind", ["module", "dict"])
def test_a_parameter_that_moves_to_another_dict_is_refused_until_it_is_back(rule, kind):
    """Also where all dicts one after another hold the same names and tensors as before."""
    if kind == "module":
        model = nn.ModuleDict({"one": Box(a=(3, 3), b=(3,)), "two": Box(c=(3, 3)), "zoo": Box(d=(2,))})
        held = {name: box._parameters for name, box in model.items()}
    else:
        make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
        held = model = {"one": {"a": make(3, 3), "b": make(3)}, "two": {"c": make(3, 3)}, "zoo": {"d": make(2)}}
    state = setup(rule, model)
    update(state, model, grads_of(model))
    update(state, model, grads_of(model))
    before = values_of(model)
    for source, name, target in (("two", "c", "one"), ("one", "b", "two"), ("zoo", "d", "two"), ("one", "a", "zoo")):
        order = list(held[source])
        held[target][name] = held[source].pop(name)
        for grads in (grads_of(model), {}):
            with pytest.raises(ValueError, match="does not fit the state|unknown name"):
                update(state, model, grads)
        held[source][name] = held[target].pop(name)
        for key in order:  # as it was
            held[source][key] = held[source].pop(key)
        assert all(torch.equal(before[path], x) for path, x in fluxpy.trainables(model, path=True))
    counts = {path: leaf.count for path, leaf in leaves(state)}
    for _ in range(2):
        update(state, model, grads_of(model))
    step = 1 if "Accum" in repr(rule) else 2
    assert all(leaf.count == counts[path] + step for path, leaf in leaves(state))


@pytest.mark.parametrize("rule", [AdamW(0.1), Lion(0.1), CHAINS["whole"]])
def test_layers_of_other_names_are_refused(rule):
    for kind in ("module", "dict"):
        model = two(kind)
        state = setup(rule, model)
        for _ in range(2):
            update(state, model, grads_of(model))
        before = values_of(model)
        model["twin"] = model.pop("two")
        with pytest.raises(ValueError, match="the model children 'one', 'twin'"):
            update(state, model, grads_of(model))
        model["two"] = model.pop("twin")
        assert all(torch.equal(before[path], x) for path, x in fluxpy.trainables(model, path=True))
        grads = {path: torch.ones_like(x) for path, x in fluxpy.trainables(model, path=True)}
        update(state, model, grads)
        assert not any(torch.equal(before[path], x) for path, x in fluxpy.trainables(model, path=True))


# --- Taking over --------------------------------------------------------------------------------------------------


@few_chains
@pytest.mark.parametrize(
    "old, new", [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_keep_starts_anew_where_the_dtype_changed(rule, old, new):
    run = Run(rule, dtype=old).step(3)
    model = model_of(dtype=new)
    model["e"] = nn.Parameter(run.model["e"].detach().clone())  # which is what it was
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = setup(rule, model, keep=run.state)
        twin_model = copy.deepcopy(model)
        twin = setup(rule, twin_model)
    for path, leaf in leaves(state):
        kept = path == "e"
        assert leaf.count == (run.state[path].count if kept else 0) and leaf.dtype == model[path].dtype, path
        for a, b in zip(tensors_of(leaf.state), tensors_of(twin[path].state), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and (kept or torch.equal(a, b)), path
    # And goes on as one that was set up for it, but for the leaf that was kept.
    if "clip all" not in repr(rule) and "Accum" not in repr(rule) and "GlobalNorm" not in repr(rule):
        for i in range(3):
            grads = grads_of(model, i)
            update(state, model, grads)
            update(twin, twin_model, grads)
        for path in "abcd":
            torch.testing.assert_close(model[path], twin_model[path])


# --- What is kept -------------------------------------------------------------------------------------------------


def alive():
    """How many objects of fluxpy's classes there are."""
    gc.collect()
    return sum(str(type(x).__module__).startswith("fluxpy") for x in gc.get_objects())


@pytest.mark.parametrize("name", ["AdamW", "clip all, Lion", "whole"])
def test_what_is_kept_between_steps_does_not_grow(name):
    """With views of all parts in turn, gradients missing anywhere, verbs, and models that come and go."""
    rule, chance = CHAINS[name], random.Random(0)
    make = lambda: nn.ModuleList([nn.Linear(2, 2) for _ in range(20)])  # noqa: E731
    model = make()
    state = setup(rule, model)
    grads = grads_of(model)

    def round_of_steps():
        for _ in range(20):
            update(state, model, {k: v for k, v in grads.items() if chance.random() < 0.7})
        for i in range(20):
            update(state[i], model[i], grads_of(model[i]))
            update(state[i].weight, model[i].weight, torch.ones(2, 2))
        for i in range(20):
            adjust(freeze(state[i]), lr=0.1 / (1 + i % 3))
            update(state, model, grads)
            thaw(state)
        for _ in range(20):
            other = make()
            update(state, other, grads)
        adjust(state, lr=0.1)
        reset(state)
        update(state, model, grads)

    round_of_steps()
    first = alive()
    for _ in range(2):
        round_of_steps()
    assert alive() <= first * 1.2 + 200

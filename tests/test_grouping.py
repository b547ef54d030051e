"""Which leaves are stepped together is nobody's affair: every leaf is as if stepped by itself, whatever came before."""

import copy
import dataclasses
import gc
import random
import warnings

import optree
import pytest
import torch
from helpers import (
    CHAINS,
    SHAPES,
    Own,
    Run,
    Scaled,
    assert_alike,
    by_hand,
    every_layout,
    few_chains,
    grads_of,
    image,
    inside,
    model_of,
    needs_compiler,
    tensors_of,
    values_of,
    without,
)
from torch import nn

import fluxpy
from fluxpy import (
    AccumGrad,
    Adam,
    ClipGlobalNorm,
    ClipGrad,
    Lion,
    Momentum,
    OptimiserChain,
    RMSProp,
    WeightDecay,
    adjust,
    freeze,
    leaves,
    reset,
    setup,
    thaw,
    update,
    value,
)  # fmt: skip
from fluxpy.rules import Rule

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


# --- Wrappers -----------------------------------------------------------------------------------------------------


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


OTHER = {
    "lr": 0.3, "momentum": 0.0, "betas": (0.5, 0.8), "eps": 1e-2, "weight_decay": 0.5, "alpha": 0.5, "max_norm": 0.1,
    "norm_type": 1.0, "decay": 0.3, "n": 1, "momentum_decay": 0.1, "nonfinite": "skip",
}  # fmt: skip


@every_layout
@few_chains
def test_each_hyperparameter_of_one_leaf_may_be_another(rule, layout):
    """In the middle of a run, and back; against a state that was made with it."""
    names = {f.name for inner in inside(rule) for f in dataclasses.fields(inner)} & OTHER.keys()
    assert names
    for name in sorted(names):
        run = Run(rule, layout).step(3)
        old = next(getattr(inner, name) for inner in inside(rule) if hasattr(inner, name))
        for new in (OTHER[name], old):
            adjust(run.state.d, **{name: new})
            twin = Run({"d": run.state.d.rule, "*": rule})
            fluxpy.load_state_dict(twin.state, fluxpy.state_dict(run.state), hyperparameters="keep")
            twin.model.load_state_dict(run.model.state_dict())
            twin.turn = run.turn
            run.step(2).equals(twin.step(2), room=1e-12)


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
    if not any(isinstance(inner, ClipGlobalNorm | AccumGrad) for inner in inside(rule)):  # which look at all leaves
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
    make = lambda: nn.ModuleList([nn.Linear(2, 2) for _ in range(12)])  # noqa: E731
    model = make()
    state = setup(rule, model)
    grads = grads_of(model)

    def round_of_steps():
        for _ in range(12):
            update(state, model, {k: v for k, v in grads.items() if chance.random() < 0.7})
        for i in range(12):
            update(state[i], model[i], grads_of(model[i]))
            update(state[i].weight, model[i].weight, torch.ones(2, 2))
        for i in range(12):
            adjust(freeze(state[i]), lr=0.1 / (1 + i % 3))
            update(state, model, grads)
            thaw(state)
        for _ in range(12):
            view = optree.tree_map(torch.clone, state[0], namespace="fluxpy")  # a tree of its own
            update(view, model[0], grads_of(model[0]))
        for _ in range(12):
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


@pytest.mark.parametrize("name", ["AdamW", "clip all, Lion", "whole"])
def test_stepping_one_branch_after_another_keeps_little_of_each(name):
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(100)])
    state, kept = setup(CHAINS[name], model), []
    for branches in (range(20), range(20, 100)):
        for i in branches:
            update(state[i], model[i], grads_of(model[i]))
            update(state[i], model[i], grads_of(model[i]))
        kept.append(alive())
    assert kept[1] - kept[0] < 160


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=needs_compiler)], ids=["", "compiled"])
@pytest.mark.parametrize("name", ["AdamW", "whole", "gather, Momentum", "clip all, decay, Adam"])
def test_a_leaf_that_steps_with_others_and_by_itself(name, compile):
    """By the whole tree, and by a branch in which it is alone, with and without a gradient: each sees what the other
    did. The twin never has a plan of an earlier update."""
    model, twin = ({"a": model_of({str(i): (2, 2) for i in range(9)}), "b": model_of({"w": (2, 2)})} for _ in range(2))
    state, other = (setup(CHAINS[name], m, compile=compile) for m in (model, twin))
    for turn in range(12):
        grads = {"a": grads_of(model["a"], turn), "b": grads_of(model["b"], turn)}
        if turn in (2, 5, 7, 9, 10):
            grads = {"w": None if turn in (2, 7) else grads["b"]["w"]}
            update(state["b"], model["b"], grads), update(other["b"], twin["b"], grads)
        else:
            update(state, model, grads), update(other, twin, grads)
        other = copy.deepcopy(other)
        room = 1e-12 if compile else 0.0
        assert_alike(image(state, model), image(other, twin), room)


class Cleans(Rule):
    """Elementwise, but not arithmetic alone: it looks at the numbers."""

    elementwise = True

    def apply(self, state, x, dx):
        return state, dx.nan_to_num() if dx.isnan().any() else dx


@pytest.mark.parametrize("around", [lambda rule: rule, lambda rule: fluxpy.Averaged(rule)])
def test_each_leaf_keeps_its_rate_behind_a_rule_that_looks_at_numbers(around):
    model = {"a": torch.zeros(3), "b": torch.zeros(3)}
    rates = {"a": 0.1, "b": 0.5}
    state = setup({name: around(OptimiserChain(Cleans(), Adam(lr))) for name, lr in rates.items()}, model)
    update(state, model, {"a": torch.ones(3), "b": torch.ones(3)})
    assert [round(-model[name][0].item(), 4) for name in "ab"] == [0.1, 0.5]
    fluxpy.adjust(state["b"], 0.25)
    before = model["b"].clone()
    update(state, model, {"a": torch.ones(3), "b": torch.ones(3)})
    assert torch.allclose(before - model["b"], torch.full((3,), 0.25))

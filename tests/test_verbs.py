"""setup, adjust, scale, freeze, thaw, reset, value: each acts on the leaves under a view, all or nothing."""

import copy
import dataclasses
import operator
import pickle

import numpy as np
import optree
import pytest
import torch
from torch import nn

import fluxpy
from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    ClipNorm,
    Descent,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    RMSProp,
    Rprop,
    Rule,
    WeightDecay,
    adjust,
    freeze,
    leaves,
    reset,
    scale,
    schedules,
    select,
    setup,
    thaw,
    update,
    value,
)
from fluxpy.testing import assert_hyper, assert_only_changed, snapshot


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


def step(state, model, times=1):
    for _ in range(times):
        update(state, model, {name: torch.ones_like(p) for name, p in model.named_parameters()})


def test_setup_by_patterns():
    state = setup({"0.*": Descent(0.5), "*.bias": None, "*": Adam()}, net())
    assert [leaf.rule for _, leaf in leaves(state)] == [Descent(0.5), Descent(0.5), Adam(), None]
    fixed = state["2.bias"]
    assert fixed.frozen and fixed.state is None
    adjust(select(state, "2.*"), 0.3)
    assert fixed.rule is None and state["2.weight"].rule.lr == 0.3
    with pytest.raises(ValueError, match=r"no rule.*'2.bias'"):
        thaw(state)
    with pytest.raises(ValueError, match=r"'2.weight', '2.bias'.*pattern 'x.\*' matches no parameter"):
        setup({"0.*": Adam(), "x.*": Adam()}, net())


LATE = [
    ({"*": Adam(), "0.*": Descent()}, "'*'"),
    ({"0.*": Adam(), "*.bias": Adam(), "0.bias": None, "*": Adam()}, "'0.*'"),
]


@pytest.mark.parametrize("late, first", LATE)
def test_a_pattern_that_others_leave_nothing_for_is_warned_of(late, first):
    """The first match wins, so it would be without effect, in silence."""
    with pytest.warns(UserWarning, match=r"the pattern '0\.(\*|bias)' has no effect: .* taken by") as caught:
        state = setup(late, net())
    assert len(caught) == 1 and first in str(caught[0].message) and caught[0].filename == __file__
    assert {leaf.rule for _, leaf in leaves(state)} == {Adam()}


def test_a_pattern_that_takes_nothing_where_nothing_is_lost_is_no_matter():
    """A `*` for what is left where nothing is, and a pattern whose parameters have that rule already."""
    setup({"0.*": Adam(), "2.*": Descent(), "*": Adam(0.1)}, net())
    setup({"0.*": Adam(0.1), "0.bias": Adam(0.1), "*": Adam()}, net())
    setup({"0.*": None, "0.bias": None, "*": Adam()}, net())


def test_setup_is_pure_and_lazy():
    """A parameter that does not require grad gets a frozen leaf, which holds no momenta until it first trains."""
    model = net()
    model[0].requires_grad_(False)
    before = snapshot(model)
    state = setup(Adam(), model)
    assert_only_changed(before, model)
    assert state[0].weight.frozen and state[0].weight.state is None and state[2].weight.state.t == 0
    thaw(state)
    assert state[0].weight.state is None
    step(state, model)
    assert state[0].weight.state.t == 1


def test_keep_takes_over_what_is_still_there():
    model = net()
    state = adjust(setup(Adam(), model), 0.02)
    step(state, model, 3)
    freeze(state[0])
    model[2] = nn.Linear(3, 5)
    match = r"starts anew .*: '2.weight' was float32\[1, 3\] and is float32\[5, 3\]; '2.bias' .*fluxpy.surgery"
    with pytest.warns(UserWarning, match=match):
        new = setup(Descent(), model, keep=state)
    assert new[0].weight.rule.lr == 0.02 and new[0].weight.state.t == 3 and new[0].weight.frozen
    assert new[0].weight.state.m is not state[0].weight.state.m
    assert new[2].weight.rule == new[2].bias.rule == Descent()


@pytest.mark.parametrize("before", [False, True])
def test_keep_takes_over_what_was_thawed_but_a_flag_that_was_lowered_since_freezes(before):
    model = net()
    model[0].requires_grad_(before)
    state = thaw(setup(Adam(), model))
    model[0].requires_grad_(False)
    assert setup(Adam(), model, keep=state)[0].weight.frozen == before


def test_keep_of_a_frozen_leaf_whose_flag_was_set_since_says_what_counts():
    model = net()
    model[0].requires_grad_(False)
    state = setup(Adam(), model)
    model[0].requires_grad_(True)
    state = setup(Adam(), model, keep=state)
    with pytest.warns(UserWarning, match="'0.weight', '0.bias' was changed after setup"):
        step(state, model)
    assert state[0].weight.frozen


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m, s: setup(m, Adam()), "rule comes first"),
        (lambda m, s: setup(Adam, m), r"write Adam\(\)"),
        (lambda m, s: setup([Adam(), Descent()], m), "OptimiserChain"),
        (lambda m, s: setup({"*": 0.1}, m), "needs a rule or None"),
        (lambda m, s: setup(Adam(), s), "takes the model"),
        (lambda m, s: freeze(m), "state tree"),
        (lambda m, s: thaw(m), "state tree"),
        (lambda m, s: adjust(m, 0.1), "state tree"),
        (lambda m, s: reset(Adam()), "state tree"),
        (lambda m, s: adjust(s), "needs a hyperparameter"),
        (lambda m, s: adjust(s, 0.1, lr=0.2), "twice"),
        (lambda m, s: update(Adam(), m, {}), "setup"),
        (lambda m, s: value(s, "lr"), "one leaf"),
    ],
)
def test_the_wrong_thing_in_a_place_says_so(call, match):
    model = net()
    with pytest.raises(TypeError, match=match):
        call(model, setup(Adam(), model))


def test_adjust_a_branch_keeps_momenta_and_counts():
    model = net()
    state = setup(OptimiserChain(WeightDecay(0.1), ClipNorm(5.0), AdamW(1e-3)), model)
    step(state, model, 2)
    kept = state[0].weight.state
    assert adjust(state[0], 3e-4, betas=(0.8, 0.99)) is not None
    assert_hyper(state, "0.*", lr=3e-4, betas=(0.8, 0.99))
    assert_hyper(state, "2.*", lr=1e-3, betas=(0.9, 0.999))
    assert all(map(operator.is_, optree.tree_leaves(state[0].weight.state), optree.tree_leaves(kept)))
    with pytest.raises(ValueError, match="member=WeightDecay or member=AdamW"):
        adjust(state, weight_decay=0.3)
    adjust(adjust(state, weight_decay=0.3, member=0), weight_decay=0.3, member=AdamW)
    assert [r.weight_decay for r in (state[0].bias.rule[0], state[0].bias.rule[2])] == [0.3, 0.3]
    adjust(select(state, "*bias"), weight_decay=0.0, max_norm=1.0)
    assert state[0].weight.rule.weight_decay == 0.3 and state[2].bias.rule.max_norm == 1.0
    freeze(state[2])
    adjust(state, 0.7)
    assert_hyper(state, lr=0.7)


def test_scale_keeps_ratios_and_scales_schedules():
    state = setup({"0.*": Adam(0.1), "2.weight": Adam(lambda count: 1.0 + count), "*": AccumGrad(4)}, net())
    adjust(select(state, "*weight"), scale(0.5))
    assert state["0.weight"].rule.lr == 0.05 and value(state["2.weight"], "lr") == 0.5
    adjust(state["2.bias"], n=scale(0.5))
    assert state["2.bias"].rule.n == 2
    adjust(state["0.weight"], betas=scale(0.5))
    assert state["0.weight"].rule.betas == (0.45, 0.4995)


@pytest.mark.parametrize(
    ("rule", "change", "match"),
    [
        (Adam(), {"eta": 0.1}, "Adam has no hyperparameter 'eta'; here it is called 'lr'"),
        (Adam(), {"beta": (0.1, 0.2)}, "'betas'"),
        (Adam(), {"epps": 0.1}, "did you mean 'eps'"),
        (Momentum(), {"rho": 0.1}, "'momentum'"),
        (OptimiserChain(ClipNorm(1.0), Descent()), {"omega": 0.1}, "'max_norm'"),
        (ClipNorm(1.0), {"throw": False}, "called 'nonfinite'"),
        (WeightDecay(), {"lr": 0.1}, "WeightDecay has no hyperparameter 'lr'"),
        (Adam(), {"lr": -0.1}, r"lr=-0.1 .* \[0, inf\)"),
        (Adam(), {"lr": float("nan")}, "lr=nan"),
        (Adam(), {"lr": "0.1"}, "lr='0.1'"),
        (Adam(), {"betas": (0.9,)}, "2 numbers"),
        (Adam(), {"lr": scale(-1.0)}, "lr=-0.001"),
        (RMSProp(), {"centered": True}, "cannot be adjusted"),
        (Rprop(), {"lr": 0.1}, "cannot be adjusted"),
        (MixedPrecision(Adam()), {"dtype": torch.float64}, "cannot be adjusted"),
        (AccumGrad(2), {"n": scale(0.25)}, "n=0.5"),
    ],
)
def test_adjust_is_strict_and_changes_nothing_on_error(rule, change, match):
    state = setup({"0.*": Descent(), "*": rule}, net())
    before = [leaf.rule for _, leaf in leaves(state)]
    with pytest.raises(ValueError, match=match) as caught:
        adjust(state[2], **change)
    assert "'weight', 'bias'" in str(caught.value)
    with pytest.raises(ValueError):
        adjust(state, **change)
    assert [leaf.rule for _, leaf in leaves(state)] == before


def test_schedules_count_applications():
    """The first update sees schedule(0); frozen, skipped and gathering updates do not advance it."""
    model = net()
    state = setup(OptimiserChain(AccumGrad(2), Descent(lambda count: 1.0 / (1 + count))), model)
    seen = []
    for i in range(8):
        seen.append(round(value(state["0.weight"], "lr"), 3))
        freeze(state[2]) if i in (2, 3) else thaw(state)
        step(state, model)
    assert seen == [1, 1, 0.5, 0.5, 0.333, 0.333, 0.25, 0.25]
    assert value(state["0.bias"], "lr") == 0.2 and value(state["2.weight"], "lr") == 0.25
    adjust(state, schedules.shifted(lambda count: 10.0 + count, 4))
    assert value(state["0.weight"], "lr") == 10.0
    adjust(state, lambda count: -1.0)
    with pytest.raises(ValueError, match="lr=-1.0") as caught:
        step(state, model, 2)
    assert "'0.weight'" in "".join(caught.value.__notes__)


def test_reset_empties_momenta_and_counts():
    model = net()
    state = setup(Adam(lambda count: 0.1 + count), model)
    step(state, model, 2)
    freeze(reset(state[0]))
    assert state[0].weight.state is None and value(state[0].weight, "lr") == 0.1 and state[2].weight.state.t == 2
    thaw(state[0])
    fresh, other = copy.deepcopy(model), setup(Adam(lambda count: 0.1 + count), model)
    step(state[0], model[0])
    step(other[0], fresh[0])
    assert torch.equal(model[0].weight, fresh[0].weight)


def test_leaf_is_read_only_and_names_the_verb():
    leaf = setup(Adam(), torch.ones(1))
    for name, verb in (
        ("rule", "adjust"),
        ("frozen", "freeze"),
        ("state", "reset"),
        ("count", "thaw"),
        ("shape", "setup"),
    ):
        with pytest.raises(AttributeError, match=verb):
            setattr(leaf, name, None)
    assert {name for name in dir(leaf) if not name.startswith("_")} == {
        "rule",
        "state",
        "frozen",
        "count",
        "shape",
        "dtype",
    }


def test_rules_are_data_that_does_not_change():
    """One may write @dataclass(frozen=True) above a rule; assigning to a rule names the verb."""

    @dataclasses.dataclass(frozen=True)
    class Mine(fluxpy.Rule):
        lr: float = 0.1

        def apply(self, state, x, dx):
            return state, self.lr * dx

    with pytest.raises(AttributeError, match=r"adjust\(state, lr=...\)"):
        Adam().lr = 0.1
    assert Mine(lr=0.5).apply((), None, 2.0) == ((), 1.0)
    with pytest.raises(TypeError, match="here it is called 'lr'"):
        Adam(eta=0.1)


def test_odd_hyperparameters():
    assert Adam(betas=np.array([0.8, 0.9])).betas == (0.8, 0.9) and type(Adam(np.float64(0.1)).lr) is float
    x = torch.ones(1)
    update(setup(Adam(betas=torch.tensor([0.8, 0.9])), x), x, torch.ones(1))
    every = setup(OptimiserChain(AccumGrad(schedules.linear(1, 3, 2)), Descent(1.0)), y := torch.zeros(1))
    for _ in range(6):
        update(every, y, torch.ones(1))
    assert y.item() == -3
    two = setup(OptimiserChain(Adam(1e-3), Descent(0.5)), torch.ones(1))
    assert "0.001, 0.5" in fluxpy.summary(two)
    assert "?" in fluxpy.summary(adjust(setup(Adam(), x), lambda count: -1.0))
    with pytest.warns(UserWarning, match="no parameters"):
        setup({"*": Adam()}, nn.ReLU())
    kept = setup({"0.*": None, "*": Adam()}, model := net(), keep=setup(Adam(), model))
    assert kept[0].weight.rule is None and kept[0].weight.frozen


def test_complex_gradients_may_be_lazily_conjugated():
    model = {"z": torch.ones(2, dtype=torch.complex64)}
    state = setup(Adam(0.1), model)
    update(state, model, fluxpy.gradient(lambda m: (m["z"].conj() * torch.tensor([1j, 2.0])).real.sum(), model))
    torch.testing.assert_close(model["z"], torch.tensor([1 - 0.1j, 0.9 + 0j]))


def test_value_in_a_chain():
    leaf = setup(OptimiserChain(WeightDecay(0.1), AdamW(weight_decay=0.2)), torch.ones(1))
    assert value(leaf, "lr") == 1e-3 and leaf.rule[1].weight_decay == 0.2
    with pytest.raises(ValueError, match="more than once"):
        value(leaf, "weight_decay")
    with pytest.raises(ValueError, match="did you mean"):
        value(leaf, "lrr")
    with pytest.raises(ValueError, match="no rule"):
        value(setup({"*": None}, torch.ones(1)), "lr")
    assert fluxpy.setup(Adam(), torch.ones(1), compile=True).rule == Adam()


# --- Members of a chain -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "member", "rates"),
    [
        (OptimiserChain(RMSProp(1.0), Momentum(0.01)), Momentum, [1.0, 0.5]),
        (OptimiserChain(RMSProp(1.0), Momentum(0.01)), 0, [0.5, 0.01]),
        (OptimiserChain(RMSProp(1.0), Momentum(0.01)), -1, [1.0, 0.5]),
        (OptimiserChain(Descent(1.0), Descent(0.1)), 1, [1.0, 0.5]),
        (MixedPrecision(OptimiserChain(ClipNorm(), Descent(1.0), Descent(0.1))), 2, [1.0, 0.5]),
        (OptimiserChain(OptimiserChain(Descent(1.0), ClipNorm()), Descent(0.1)), 0, [0.5, 0.1]),
        (OptimiserChain(*[Descent(1.0)] * 2), 0, [0.5, 1.0]),
        (OptimiserChain(*[Descent(1.0)] * 2), None, [0.5, 0.5]),
    ],
)
def test_adjust_one_member(rule, member, rates):
    """A member is a class or a place; one rule object that stands at two places is two members."""
    state = setup(rule, net())
    adjust(state, 0.5, member=member)
    for _, leaf in leaves(state):
        found = [own["lr"] for own in map(fluxpy.rule.hyperparameters, fluxpy.rule.rules_in(leaf.rule)) if "lr" in own]
        assert found == rates
    if member is not None:
        assert value(state[0].bias, "lr", member=member) == 0.5
        adjust(state, scale(0.5), member=member)
        assert value(state[0].bias, "lr", member=member) == 0.25


def test_adjust_of_members_that_differ_changes_nothing():
    state = setup({"0.*": Adam(0.1), "*": OptimiserChain(RMSProp(1.0), Momentum(0.01))}, net())
    before = [leaf.rule for _, leaf in leaves(state)]
    with pytest.raises(ValueError, match=r"member=RMSProp or member=Momentum \(at '2.weight', '2.bias'\)"):
        adjust(state, 0.5)
    with pytest.raises(ValueError, match=r"Adam has no member Momentum \(at '0.weight', '0.bias'\)"):
        adjust(state, 0.5, member=Momentum)
    with pytest.raises(ValueError, match="fixed|made|setup"):
        adjust(state[2], centered=True, member=RMSProp)
    assert [leaf.rule for _, leaf in leaves(state)] == before
    adjust(state[2], 0.5, momentum=0.8, member=Momentum)
    assert state[2].bias.rule == OptimiserChain(RMSProp(1.0), Momentum(0.5, 0.8))


# --- What was frozen before it trained ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Adam(), Momentum(), OptimiserChain(AccumGrad(2), Adam()), MixedPrecision(Adam())])
def test_a_leaf_that_is_frozen_before_it_trained_holds_no_momenta(rule):
    """Nor does its file; and thawed it trains as if it had never been frozen."""
    model, other = net(), net()
    state, never = setup(rule, model), setup(rule, other)
    freeze(state[0])
    assert state[0].weight.state is None and state[2].weight.state is not None
    assert "state" not in fluxpy.state_dict(state)["leaves"]["0.weight"]
    thaw(state)
    step(state, model, 3), step(never, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("rule", [Momentum(), Descent(), OptimiserChain(AccumGrad(3), Momentum())])
@pytest.mark.parametrize("restart", [False, True])
def test_a_leaf_that_trained_keeps_its_momenta(rule, restart):
    """Also in its first accumulation window, and with a count that was set back."""
    model = net()
    state = setup(rule, model)
    step(state, model)
    if restart:
        thaw(state, count=0)
    before = optree.tree_leaves(copy.deepcopy(state[0].weight.state), namespace="fluxpy")
    freeze(state)
    after = optree.tree_leaves(state[0].weight.state, namespace="fluxpy")
    assert state[0].weight.state is not None and len(after) == len(before)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(after, before, strict=True))


class InTensors(Rule):
    """The mean of two gradients; how many there are is a tensor too."""

    lr: float = 0.1
    elementwise = True
    whole = False

    def init(self, x):
        return torch.zeros_like(x), torch.zeros((), dtype=x.dtype) if self.whole else torch.zeros_like(x)

    def apply(self, state, x, dx):
        total, n = state[0] + dx, state[1] + 1
        if n.max() < 2:
            return (total, n), None
        return (torch.zeros_like(total), torch.zeros_like(n)), self.lr * total / 2


class InOneTensor(InTensors):
    elementwise = False
    whole = True


@pytest.mark.parametrize("rule", [InTensors(), InOneTensor(), OptimiserChain(InTensors(), Momentum())])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("between", [lambda state: state, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_what_was_gathered_in_tensors_alone_stays_when_frozen(rule, inplace, between):
    """Neither count nor numbers of the state tell that an update was there."""
    model = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    state = setup(rule, model)
    grads = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    state, model = update(state, model, grads, inplace=inplace)
    state = between(state)
    freeze(state)
    assert state["a"].state is not None and state["a"].count == 0
    thaw(state)
    freeze(state["a"])  # now and then, of one that steps with others
    thaw(state["a"])
    state, model = update(state, model, {name: 3 * dx for name, dx in grads.items()}, inplace=inplace)
    twin = {name: torch.zeros_like(x) for name, x in model.items()}
    other = setup(rule, twin)
    for factor in (1, 3):
        update(other, twin, {name: factor * dx for name, dx in grads.items()})
    assert all(torch.equal(model[name], twin[name]) and model[name].any() for name in model)


def test_what_a_refused_update_reached_is_as_it_was_made():
    model = {"a": torch.zeros(3), "b": torch.zeros(2)}
    state = setup(OptimiserChain(ClipNorm(1.0), Momentum()), model)
    with pytest.raises(FloatingPointError):
        update(state, model, {"a": torch.ones(3), "b": torch.full((2,), torch.nan)})
    freeze(state)
    assert state["a"].state is None


def test_what_a_user_put_into_momenta_stays():
    """By a map over the state, or from a file."""
    state = optree.tree_map(torch.ones_like, setup(Momentum(), net()), namespace="fluxpy")
    freeze(state)
    assert bool(optree.tree_leaves(state, namespace="fluxpy")[0].all())
    loaded = setup(Momentum(), net())
    fluxpy.load_state_dict(loaded, fluxpy.state_dict(state))
    thaw(loaded), freeze(loaded)
    assert bool(optree.tree_leaves(loaded, namespace="fluxpy")[0].all())

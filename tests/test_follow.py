"""A state goes where its model went."""

import copy
from typing import Any

import pytest
import torch
from helpers import CHAINS, grads_of, model_of, tensors_of
from torch import nn

import fluxpy
from fluxpy import AccumGrad, Adam, AdamW, Descent, MixedPrecision, Momentum, OptimiserChain, follow, setup, update


def cast(model: nn.ParameterDict, dtype: torch.dtype) -> Any:
    return model.to(dtype)


@pytest.mark.parametrize("rule", CHAINS.values(), ids=CHAINS)
def test_a_run_goes_on_in_another_dtype(rule: Any) -> None:
    """As if the state had been set up there and its momenta copied; here into more digits, so that nothing is lost."""
    model = model_of(dtype=torch.float32)
    state = setup(rule, model)
    for turn in range(3):
        update(state, model, grads_of(model, turn))
    model.double()
    with pytest.raises(ValueError, match=r"'a' was float32.* and is now float64.*fluxpy\.follow\(state, model\)"):
        update(state, model, grads_of(model, 3))
    before = {path: (leaf.count, leaf.rule) for path, leaf in fluxpy.leaves(state)}
    assert follow(state, model) is state
    assert {path: (leaf.count, leaf.rule) for path, leaf in fluxpy.leaves(state)} == before
    twin, twin_state = copy.deepcopy(model), copy.deepcopy(state)
    fresh = setup(rule, model)
    for path, leaf in fluxpy.leaves(state):
        assert leaf.dtype == torch.float64
        assert [t.dtype for t in tensors_of(leaf.state)] == [t.dtype for t in tensors_of(fresh[path].state)]
    for turn in range(3, 8):
        grads = grads_of(model, turn)
        update(state, model, grads)
        twin_state, twin = update(twin_state, twin, grads, inplace=False)
    for x, y in zip(model.values(), twin.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_momenta_keep_their_numbers_and_masters_their_dtype() -> None:
    model = model_of(dtype=torch.float32)
    state = setup(MixedPrecision(Adam(0.1)), model)
    for turn in range(3):
        update(state, model, grads_of(model, turn))
    old = {path: leaf.state for path, leaf in fluxpy.leaves(state)}
    model.bfloat16()
    follow(state, model)
    for path, leaf in fluxpy.leaves(state):
        assert leaf.dtype == torch.bfloat16 and leaf.state.x.dtype == torch.float32
        assert torch.equal(leaf.state.state.m, old[path].state.m)
    update(state, model, grads_of(model, 3))


def test_a_frozen_leaf_one_without_a_rule_and_a_window_follow() -> None:
    model = model_of(dtype=torch.float32)
    state = setup({"a": None, "*": OptimiserChain(AccumGrad(2), Momentum(0.1))}, model)
    fluxpy.freeze(state.b)
    update(state, model, {name: dx for name, dx in grads_of(model).items() if name != "a"})
    model.double()
    follow(state, model)
    assert state.a.rule is None and state.b.frozen and state.d.state[0].updates == 1
    fluxpy.thaw(state.b)
    update(state, model, {name: dx for name, dx in grads_of(model, 1).items() if name != "a"})
    assert [leaf.count for _, leaf in fluxpy.leaves(state)] == [0, 1, 1, 1, 1]


def test_momenta_on_meta_start_anew() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    state = setup(AdamW(0.1), model)
    model.to_empty(device="cpu")
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    grads = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    with pytest.raises(ValueError, match=r"'weight' are on meta.*fluxpy\.follow"):
        update(state, model, grads)
    follow(state, model)
    assert state.weight.state is None
    twin = copy.deepcopy(model)
    update(state, model, grads)
    update(setup(AdamW(0.1), twin), twin, grads)
    assert torch.equal(model.weight, twin.weight) and state.weight.count == 1


def test_another_shape_is_refused_and_changes_nothing() -> None:
    model = model_of(dtype=torch.float32)
    state = setup(Adam(0.1), model)
    other = model_of({"a": (4, 3), "b": (8,), "c": (), "d": (4, 3), "e": (2, 1, 3)})
    with pytest.raises(ValueError, match=r"'b' was float32\[7\] at setup and is now float64\[8\]"):
        follow(state, other)
    assert all(leaf.dtype == torch.float32 for _, leaf in fluxpy.leaves(state))
    with pytest.raises(ValueError, match="does not fit the state"):
        follow(setup(Descent(), {"w": torch.ones(2)}), model)


def test_a_branch_follows_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    state = setup(Adam(0.1), model)
    follow(state[1], model[1].double())
    assert state[0].weight.dtype == torch.float32 and state[1].weight.state.m.dtype == torch.float64

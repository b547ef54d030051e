"""What belongs to one tree belongs to it alone, and nothing is kept alive longer than somebody needs it."""

import contextlib
import copy
import gc
import io
import math
import pickle
import weakref

import optree
import pytest
import torch
from helpers import (
    CHAINS,
    SHAPES,
    Run,
    assert_alike,
    every_layout,
    few_chains,
    grads_of,
    image,
    like_a_device,
    model_of,
    storages,
    tensors_of,
)
from torch import nn

import fluxpy
from fluxpy import (
    Adam,
    AdamW,
    ClipGlobalNorm,
    ClipNorm,
    Lion,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    RMSProp,
    adjust,
    flatten_parameters,
    freeze,
    leaves,
    reset,
    setup,
    state_dict,
    thaw,
    train,
    trainables,
    trainstep,
    update,
    withgradient,
)  # fmt: skip
from fluxpy.leaf import context_of

# --- The flag of numbers that are not finite ----------------------------------------------------------------------

CLIPPED = {
    "Adam": OptimiserChain(ClipGlobalNorm(0.5), Adam(0.1)),
    "Lion": OptimiserChain(ClipGlobalNorm(0.5), Lion(0.1)),
    "each": OptimiserChain(ClipNorm(0.5), RMSProp(0.1)),
    "master": MixedPrecision(OptimiserChain(ClipGlobalNorm(0.5), Momentum(0.1)), dtype=torch.float64),
}
every_clipped = pytest.mark.parametrize("rule", CLIPPED.values(), ids=CLIPPED.keys())


def pure(state, model, grads):
    return update(state, model, grads, inplace=False)


def mapped(state, model, grads):
    return optree.tree_map(torch.clone, state, namespace="fluxpy"), copy.deepcopy(model)


def mapped_by_torch(state, model, grads):
    return torch.utils._pytree.tree_map(torch.clone, state), copy.deepcopy(model)


def copied(state, model, grads):
    return copy.deepcopy(state), copy.deepcopy(model)


def pickled(state, model, grads):
    return pickle.loads(pickle.dumps(state)), copy.deepcopy(model)


def taken_over(state, model, grads):
    return setup(Adam(), model, keep=state), copy.deepcopy(model)


COPIES = [pure, mapped, mapped_by_torch, copied, pickled, taken_over]
every_copy = pytest.mark.parametrize("make", COPIES)


def bad(grads):
    return grads | {"b": grads["b"] * math.nan}


@every_copy
@every_clipped
@pytest.mark.parametrize("stepped", [0, 2])
def test_a_bad_number_in_one_tree_does_not_hold_back_another(make, rule, stepped, monkeypatch):
    """Where nothing is read at once: neither in the copy nor in what it was made from."""
    like_a_device(monkeypatch)
    for spoilt in (0, 1):
        run = Run(rule).step(stepped)
        trees = (run.state, run.model), make(run.state, run.model, run.grads())
        update(*trees[spoilt], bad(run.grads()))
        for i, (state, model) in enumerate(trees):
            before = [x.detach().clone() for x in trainables(model)]
            update(state, model, run.grads())
            moved = [not torch.equal(x, was) for x, was in zip(trainables(model), before, strict=True)]
            assert all(moved) if i != spoilt else not any(moved)
        fluxpy.check_finite(trees[1 - spoilt][0])
        with pytest.raises(FloatingPointError, match="'b' is not finite"):
            fluxpy.check_finite(trees[spoilt][0])
        for state, model in trees:
            before = [x.detach().clone() for x in trainables(model)]
            update(state, model, run.grads())
            assert not any(torch.equal(x, was) for x, was in zip(trainables(model), before, strict=True))


@every_clipped
def test_a_bad_number_in_a_pure_update_is_the_results_affair(rule, monkeypatch):
    like_a_device(monkeypatch)
    run, twin = Run(rule).step(2), Run(rule).step(2)
    state, model = update(run.state, run.model, bad(run.grads()), inplace=False)
    fluxpy.check_finite(run.state)
    run.step(2).equals(twin.step(2))
    with pytest.raises(FloatingPointError, match="'b' is not finite"):
        fluxpy.check_finite(state)
    before, after = Run(rule).step(2), image(state, model)
    for key, was in before.image().items():  # counts are the host's, which knows of nothing yet
        assert not isinstance(was, torch.Tensor) or torch.equal(was, after[key]), key


def test_a_flag_remembers_each_place_once(monkeypatch):
    """However many updates, on however many sets of leaves; and it names the right one."""
    like_a_device(monkeypatch)
    model = {name: torch.zeros(2) for name in "abc"}
    state = setup(OptimiserChain(ClipNorm(1.0), ClipGlobalNorm(1.0), Momentum(0.1)), model)
    whole = {name: torch.ones(2) for name in "abc"}
    for _ in range(4):
        update(state, model, whole)
        update(state, model, {"a": torch.ones(2), "b": None, "c": torch.ones(2)})
    flag = context_of(state["a"]).flag
    kinds = len(flag.kinds)
    update(state, model, whole)
    assert len(flag.kinds) == kinds <= 8
    update(state, model, {"a": torch.ones(2), "b": None, "c": torch.full((2,), torch.nan)})
    with pytest.raises(FloatingPointError, match=r"ClipNorm: .* of 'c' is not finite, in update 9"):
        fluxpy.check_finite(state)


@every_clipped
def test_what_one_tree_did_before_is_not_blamed_on_a_copy(rule, monkeypatch):
    """The count of updates in the error, and its path, are those of the tree that is asked."""
    like_a_device(monkeypatch)
    run = Run(rule).step(3)
    state, model = update(run.state, run.model, run.grads(), inplace=False)
    update(run.state, run.model, bad(run.grads()))
    for _ in range(2):
        update(state, model, run.grads())
    update(state, model, run.grads() | {"e": run.grads()["e"] * math.inf})
    with pytest.raises(FloatingPointError, match="'b' is not finite"):
        fluxpy.check_finite(run.state)
    with pytest.raises(FloatingPointError, match="'e' is not finite"):
        fluxpy.check_finite(state)


# --- Memory of pure results and copies ----------------------------------------------------------------------------


def held_by(state, model):
    return [*trainables(model), *tensors_of(state), *(model.buffers() if isinstance(model, nn.Module) else ())]


def with_all_kinds_of_leaves(rule, layout, stepped):
    """One frozen from the start, one that was frozen later, one without a rule, one without a gradient, one reset."""
    model = model_of(SHAPES | {"f": (3,)})
    model.register_buffer("buffer", torch.ones(2))
    model["f"].requires_grad_(False)
    if layout == "flat":
        flatten_parameters(model)
    state = setup({"c": None, "*": rule}, model)
    for i in range(stepped):
        update(state, model, grads_of(model, i))
    freeze(state.a), reset(state.d)
    return state, model


@every_layout
@few_chains
@pytest.mark.parametrize("make", [pure, mapped, copied, pickled, taken_over])
def test_a_copy_shares_no_memory_with_its_source(rule, layout, make):
    """Neither momenta nor parameters, of leaves that are frozen or were not stepped either; and so none is written."""
    for stepped in (0, 2):
        source = with_all_kinds_of_leaves(rule, layout, stepped)
        grads = {k: v for k, v in grads_of(source[1], 9).items() if k != "e"}
        other = make(*source, grads)
        assert not storages(held_by(*source)) & storages(held_by(*other))
        for one, two in ((source, other), (other, source)):
            before = image(*two)
            for i in range(2):
                update(thaw(one[0]["a"]), one[1]["a"], grads_of(one[1], i)["a"])
                update(*one, grads_of(one[1], i))
                adjust(one[0].b, lr=0.5)
                reset(one[0].b), freeze(one[0].d), thaw(one[0].d)
            assert_alike(image(*two), before)


@every_layout
@few_chains
def test_a_pure_update_in_a_row_shares_nothing_with_any_before_it(rule, layout):
    state, model = with_all_kinds_of_leaves(rule, layout, 2)
    kept = [(state, model, image(state, model))]
    for i in range(4):
        grads = {k: v for k, v in grads_of(model, i).items() if k not in "be"[: i % 3]}
        state, model = update(state, model, grads, inplace=False)
        kept.append((state, model, image(state, model)))
    update(state, model, grads_of(model))
    for s, m, before in kept[:-1]:
        assert_alike(image(s, m), before)
    memory = [storages(held_by(s, m)) for s, m, _ in kept]
    assert sum(map(len, memory)) == len(set().union(*memory))


@pytest.mark.parametrize("way", ["skipped", "raised", "no gradient"])
def test_a_pure_update_that_steps_nothing_shares_nothing(way):
    nonfinite = "raise" if way == "raised" else "skip"
    state, model = with_all_kinds_of_leaves(
        OptimiserChain(ClipGlobalNorm(0.5, nonfinite=nonfinite), AdamW(0.1)), "apart", 2
    )
    before, grads = image(state, model), grads_of(model)
    if way == "no gradient":
        grads = dict.fromkeys(grads)
    else:
        grads["b"][0] = math.nan
    with pytest.raises(FloatingPointError) if way == "raised" else contextlib.nullcontext():
        new, other = update(state, model, grads, inplace=False)
        assert_alike(image(new, other), before)
        assert not storages(held_by(state, model)) & storages(held_by(new, other))
        update(new, other, grads_of(other))
    assert_alike(image(state, model), before)


@few_chains
def test_pure_and_in_place_results_are_the_same_from_any_state(rule):
    for stepped in (0, 2):
        for i in range(3):
            source = with_all_kinds_of_leaves(rule, "apart", stepped)
            grads = {k: v for k, v in grads_of(source[1], 9).items() if k not in "be"[:i]}
            new = update(*source, grads, inplace=False)
            update(*source, grads)
            assert_alike(image(*new), image(*source), room=1e-12)


# --- What a copy of a part weighs ---------------------------------------------------------------------------------


def wide(layout):
    """A model with a small branch, stepped by rules that lay momenta side by side."""
    model = nn.ModuleDict({"small": nn.Linear(2, 1), "large": nn.ModuleList([nn.Linear(32, 32) for _ in range(30)])})
    return flatten_parameters(model) if layout == "flat" else model


def bytes_of(thing):
    return len(pickle.dumps(thing))


def bytes_under(tree):
    tensors = tensors_of(tree)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@every_layout
@few_chains
def test_a_pickle_or_a_copy_of_a_branch_holds_that_branch_alone(rule, layout):
    model = wide(layout)
    state = setup(rule, model)
    branch = bytes_of(state.small)  # before any update, so of momenta that nobody laid anywhere
    for i in range(2):
        update(state, model, grads_of(model, i))
    for view in (state.small, state.small.bias, state.large[3], state.large[3].weight):
        numbers = sum(t.nbytes for t in tensors_of(view))
        assert bytes_under(copy.deepcopy(view)) <= 2 * numbers + 64
        assert bytes_of(view) <= 2 * numbers + 4 * branch
    assert bytes_of(copy.deepcopy(state.small)) <= 2 * branch
    file = io.BytesIO()
    torch.save(state_dict(state.small), file)
    assert file.tell() < 20_000
    everything = sum(t.nbytes for t in tensors_of(state))
    assert bytes_under(copy.deepcopy(state)) <= 1.1 * everything + 64
    assert bytes_of(state) <= 1.5 * everything + 60 * branch
    for other in (copy.deepcopy(state.small), pickle.loads(pickle.dumps(state.small))):
        update(other, copy.deepcopy(model.small), grads_of(model.small))
        assert len(tensors_of(other)) == len(tensors_of(state.small))


@few_chains
def test_a_copy_or_a_pickle_of_a_state_holds_no_parameters(rule):
    model = nn.Linear(1000, 100)
    state = setup(rule, model)
    freeze(reset(state))
    update(thaw(state), model, grads_of(model))
    reset(state)
    assert bytes_of(state) < 20_000 and bytes_under(copy.deepcopy(state)) == 0


# --- Life and death -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_collector():
    """What dies here dies because nobody holds it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def lived(rule, layout, life):
    """A model and a state that have seen things, and weak references to what they hold."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    if layout == "flat":
        flatten_parameters(model)
    state = setup(rule, model)
    life(state, model)
    of_model = [weakref.ref(model), *(weakref.ref(x) for x in model.parameters())]
    of_state = [weakref.ref(t) for t in tensors_of(state)]
    return model, state, of_model, of_state


def some_updates(state, model):
    for i in range(3):
        update(state, model, grads_of(model, i))


def verbs_between(state, model):
    some_updates(state, model)
    freeze(state[0]), adjust(state, lr=0.3)
    some_updates(state, model)
    thaw(state), reset(state[2]), adjust(state[0], lr=lambda count: 0.1)
    some_updates(state, model)


def branches(state, model):
    some_updates(state, model)
    for i in range(2):
        update(state[0], model[0], grads_of(model[0], i))
        update(state[0].bias, model[0].bias, torch.ones(8))


def missing(state, model):
    for i in range(4):
        update(state, model, {k: v for k, v in grads_of(model, i).items() if i % 2 or "bias" in k})


def pure_updates(state, model):
    some_updates(state, model)
    for i in range(2):
        state, model = update(state, model, grads_of(model, i), inplace=False)


def refused(state, model):
    for wrong in ({"0.bias": torch.ones(3)}, {"nobody": torch.ones(1)}, {"0.bias": torch.ones(8).to_sparse()}):
        some_updates(state, model)
        with contextlib.suppress(ValueError):
            update(state, model, wrong)


def loss_of(model, x):
    return model(x).square().mean()


def gradients(state, model):
    for _ in range(2):
        _, grads = withgradient(loss_of, model, torch.ones(3, 4))
        update(state, model, grads)
        model(torch.ones(3, 4)).sum().backward()
        update(state, model)
        trainstep(loss_of, model, torch.ones(3, 4), state)


def trained(state, model):
    train(loss_of, model, [torch.ones(3, 4)] * 3, state, progress=False)


def copies(state, model):
    some_updates(state, model)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        some_updates(other, model)
    fluxpy.load_state_dict(state, state_dict(state))
    some_updates(state, model)


LIVES = [some_updates, verbs_between, branches, missing, pure_updates, refused, gradients, trained, copies]


@every_layout
@few_chains
@pytest.mark.parametrize("life", LIVES)
def test_a_state_does_not_keep_its_model_alive(rule, layout, life):
    """And both die where they are let go of, not when the collector of cycles comes by."""
    with no_collector():
        model, state, of_model, of_state = lived(rule, layout, life)
        del model
        assert not any(ref() is not None for ref in of_model)
        repr(state), state_dict(state)
        del state
        assert not any(ref() is not None for ref in of_state)
        model, state, of_model, of_state = lived(rule, layout, life)
        del state
        assert not any(ref() is not None for ref in of_state)
        del model
        assert not any(ref() is not None for ref in of_model)


@every_layout
@few_chains
def test_models_that_come_and_go_leave_nothing(rule, layout):
    """One state steps a model after another; and a copy of a state dies beside its source."""
    with no_collector():
        model, state, _, _ = lived(rule, layout, some_updates)
        for _ in range(3):
            other = copy.deepcopy(model)
            refs = [weakref.ref(other), *map(weakref.ref, other.parameters())]
            some_updates(state, other)
            del other
            assert not any(ref() is not None for ref in refs)
        for make in COPIES:
            pair = make(state, model, grads_of(model))
            some_updates(*pair)
            refs = [weakref.ref(pair[1]), *map(weakref.ref, [*pair[1].parameters(), *tensors_of(pair[0])])]
            del pair
            assert not any(ref() is not None for ref in refs), make


@few_chains
def test_momenta_that_are_emptied_are_let_go(rule):
    with no_collector():
        run = Run(rule).step(2)
        refs = [weakref.ref(t) for t in tensors_of(run.state)]
        reset(run.state)
        run.step()
        assert not any(ref() is not None for ref in refs)
        leaf_free = [weakref.ref(t) for t in tensors_of(run.state.a)]
        reset(freeze(run.state.a))
        run.step()
        assert not any(ref() is not None for ref in leaf_free)


def side_by_side(model):
    buffer = torch.randn(sum(x.numel() for x in trainables(model)), dtype=torch.float64)
    found, start = {}, 0
    for name, x in trainables(model, path=True):
        found[name] = buffer[start : start + x.numel()].view(x.shape)
        start += x.numel()
    return found


GRADIENTS = {
    "apart": grads_of,
    "side by side": side_by_side,
    "transposed": lambda model: {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in grads_of(model).items()},
}


@every_layout
@few_chains
@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradients_are_let_go_after_the_update(rule, layout, make):
    """Not at the next one; and the memory they lie in with them."""
    with no_collector():
        run = Run(rule, layout)
        for i in range(4):
            grads = make(run.model)
            refs = [weakref.ref(t) for t in grads.values()]
            refs += [weakref.ref(t._base) for t in grads.values() if t._base is not None]
            if i == 3:
                with contextlib.suppress(ValueError):
                    update(run.state, run.model, grads | {"e": torch.ones(1)})
            else:
                update(run.state, run.model, grads)
            del grads
            assert not any(ref() is not None for ref in refs)


@every_layout
@few_chains
def test_gradients_of_the_parameters_are_let_go_after_the_update(rule, layout):
    with no_collector():
        run = Run(rule, layout)
        for _ in range(3):
            grads = side_by_side(run.model)
            for name, x in run.model.items():
                x.grad = grads[name]
            refs = [*map(weakref.ref, grads.values()), weakref.ref(grads["a"]._base)]
            del grads
            update(run.state, run.model)
            for x in run.model.values():
                x.grad = None
            assert not any(ref() is not None for ref in refs)


@pytest.mark.parametrize("name", ["AdamW", "clip all, Lion", "whole"])
def test_a_gradient_tree_is_let_go(name):
    with no_collector():
        model, state, _, _ = lived(CHAINS[name], "apart", some_updates)
        value, grads = withgradient(loss_of, model, torch.ones(3, 4))
        update(state, model, grads)
        refs = [weakref.ref(t) for t in tensors_of(grads)]
        del grads, value
        assert not any(ref() is not None for ref in refs)
        assert all(leaf.count for _, leaf in leaves(state))

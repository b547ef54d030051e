"""AccumGrad: one window for all leaves of a tree, whatever happens to some of them."""

import copy
import itertools
import math
import pickle
import random

import pytest
import torch
from helpers import SHAPES, Own, Run, assert_alike, every_layout, without
from torch import nn

from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    ClipGlobalNorm,
    Descent,
    Lion,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rule,
    adjust,
    flush,
    freeze,
    leaves,
    load_state_dict,
    reset,
    select,
    setup,
    state_dict,
    thaw,
    update,
)  # fmt: skip

CHAINS = {
    "Descent": lambda n: OptimiserChain(AccumGrad(n), Descent(0.1)),
    "AdamW": lambda n: OptimiserChain(AccumGrad(n), AdamW(0.1)),
    "clip all, Momentum": lambda n: OptimiserChain(AccumGrad(n), ClipGlobalNorm(0.5), Momentum(0.1)),
    "clipped first": lambda n: OptimiserChain(ClipGlobalNorm(0.5), AccumGrad(n), Lion(0.1)),
    "own": lambda n: OptimiserChain(AccumGrad(n), Own()),
    "master": lambda n: MixedPrecision(OptimiserChain(AccumGrad(n), Adam(0.1)), dtype=torch.float64),
}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
LAYOUTS = dict(zip(CHAINS, itertools.cycle(["apart", "flat"]), strict=False))
every_way = pytest.mark.parametrize("chain, layout", [(CHAINS[name], way) for name, way in LAYOUTS.items()], ids=CHAINS)


def rhythm(run, names="abcde", updates=7, change=lambda grads: grads):
    """For each of some updates, the leaves whose parameters moved in it."""
    found = []
    for _ in range(updates):
        before = {name: run.model[name].detach().clone() for name in names}
        run.step(1, change)
        found.append("".join(name for name in names if not torch.equal(before[name], run.model[name])))
    return found


def in_step(run, names="abcde", updates=7):
    """All leaves move, in the same updates."""
    found = rhythm(run, names, updates)
    assert set(found) <= {"", names} and names in found, found
    return found


@every_way
def test_a_window_is_the_mean_of_its_gradients(chain, layout):
    run = Run(chain(3), layout)
    assert rhythm(run) == ["", "", "abcde", "", "", "abcde", ""]
    assert all(leaf.count == 2 for _, leaf in leaves(run.state))


@every_way
@pytest.mark.parametrize("held, n", [(2, 2), (3, 2), (1, 2), (2, 3), (3, 1)])
def test_a_new_n_and_a_frozen_leaf(chain, layout, held, n):
    """`n` is lowered to what is held, or below it, while a leaf is frozen; it thaws at any time after."""
    for later in range(5):
        run = Run(chain(4), layout).step(held)
        freeze(run.state.b)
        adjust(run.state, n=n)
        still = run.model["b"].detach().clone()
        run.step(later)
        assert torch.equal(still, run.model["b"])
        thaw(run.state)
        in_step(run)


@every_way
@pytest.mark.parametrize("first, second", [(4, 2), (2, 4), (3, 2), (2, 3), (5, 1)])
def test_a_leaf_without_momenta_that_missed_updates_of_another_n(chain, layout, first, second):
    """Frozen before it ever trained, or reset while it is frozen."""
    kinds = ("at setup", "at once", "reset")
    for i, (missed, kind) in enumerate(itertools.product((0, 1, 2, 4), kinds)):
        later = i % 2  # each comes with every `missed` and every `kind`
        run = Run(chain(first), layout, SHAPES)
        if kind == "at setup":
            run.model["b"].requires_grad_(False)
            run.state = setup(chain(first), run.model)
        freeze(run.state.b)
        run.step(missed)
        if kind == "reset":
            reset(run.state.b)
        adjust(run.state, n=second)
        run.step(later)
        thaw(run.state)
        in_step(run)


@every_way
@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_part_that_is_reset_in_the_middle_of_a_window(chain, layout, n):
    for start, again in itertools.product(range(n + 1), (0, 1)):
        run = Run(chain(n), layout).step(start)
        reset(run.state.d)
        for _ in range(again):
            run.step()
            reset(run.state.b)
        in_step(run)


@every_way
@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_whole_that_is_reset_in_the_middle_of_a_window(chain, layout, n):
    """Then a window begins."""
    for start in range(1, n):
        run = Run(chain(n), layout).step(start)
        reset(run.state)
        assert in_step(run)[:n] == [""] * (n - 1) + ["abcde"]


@every_way
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of leaves whose shape changed
def test_a_new_part_in_the_middle_of_a_window(chain, layout, n):
    """`setup(..., keep=)` with a new head: it joins the window of what is kept."""
    for start in range(n + 1):
        run = Run(chain(n), layout).step(start)
        run.model["b"] = nn.Parameter(torch.randn(2, 5, dtype=torch.float64))
        run.state = setup(chain(n), run.model, keep=run.state)
        found = in_step(run)
        assert found == rhythm(Run(chain(n)).step(start))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("new", CHAINS.values(), ids=CHAINS.keys())
@every_chain
def test_a_new_part_of_another_chain_in_the_middle_of_a_window(chain, new, frozen):
    """It joins the window of what is kept, though its chain has other members, or has them elsewhere."""
    for start in range(4):
        run = Run({"b": new(3), "*": chain(3)}).step(start)
        if frozen:
            run.model["b"].requires_grad_(False)
        run.state = setup({"b": new(3), "*": chain(3)}, run.model, keep=select(run.state, "[acde]"))
        thaw(run.state)
        assert in_step(run) == rhythm(Run(chain(3)).step(start))


def test_a_new_part_with_a_window_of_its_own_begins_it():
    run = Run({"b": CHAINS["AdamW"](4), "*": CHAINS["Descent"](3)}).step(2)
    run.state = setup({"b": CHAINS["AdamW"](4), "*": CHAINS["Descent"](3)}, run.model, keep=select(run.state, "[acde]"))
    assert rhythm(run, updates=5) == ["acde", "", "", "abcde", ""]


@every_way
def test_all_that_is_kept_goes_on_in_its_window(chain, layout):
    for start in range(4):
        run, twin = Run(chain(3), layout).step(start), Run(chain(3), layout).step(start)
        run.state = setup(chain(3), run.model, keep=run.state)
        run.step(5).equals(twin.step(5), room=1e-12)


@every_chain
@pytest.mark.parametrize("copied", ["loaded", "deepcopy", "pickle", "pure", "tree_map"])
def test_a_copy_in_the_middle_of_a_window_goes_on_in_it(chain, copied):
    """With leaves that are frozen, and thaw later."""
    for start, frozen in itertools.product(range(3), (0, 2)):
        run = Run(chain(3)).step(start)
        freeze(run.state.b)
        run.step(frozen)
        other = copy.copy(run)
        other.model = copy.deepcopy(run.model)
        if copied == "loaded":
            other.state = setup(chain(3), other.model)
            load_state_dict(other.state, state_dict(run.state))
        elif copied == "pure":
            # The next update, once in place and once not.
            other.state, other.model = update(run.state, run.model, run.grads(), inplace=False)
            run.step()
            other.turn = run.turn
        else:
            make = {
                "deepcopy": copy.deepcopy,
                "pickle": lambda s: pickle.loads(pickle.dumps(s)),
                "tree_map": lambda s: torch.utils._pytree.tree_map(torch.clone, s),
            }[copied]
            other.state = make(run.state)
        for state in (run.state, other.state):
            thaw(state)
        run.step(4).equals(other.step(4), room=1e-12)
        in_step(run)


SKIPPED = OptimiserChain(ClipGlobalNorm(0.5, nonfinite="skip"), AccumGrad(3), Momentum(0.1))


@every_layout
@pytest.mark.parametrize("inplace", [True, False])
def test_a_skipped_update_is_none_for_a_frozen_leaf_either(inplace, layout):
    for start, frozen in itertools.product(range(3), range(3)):
        run, twin = Run(SKIPPED, layout).step(start), Run(SKIPPED, layout).step(start)
        for each in (run, twin):
            freeze(each.state.b)
            each.step(frozen)
        before = run.image()
        for _ in range(2):
            bad = run.grads() | {"a": run.grads()["a"] * math.nan}
            run.state, run.model = update(run.state, run.model, bad, inplace=inplace)
            assert_alike(run.image(), before)
        thaw(run.state), thaw(twin.state)
        run.step(4).equals(twin.step(4), room=1e-12)  # a pure result is laid out otherwise
        in_step(run)


@pytest.mark.parametrize("error", ["raised", "shape"])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_refused_update_is_none_for_a_frozen_leaf_either(error, inplace):
    rule = OptimiserChain(ClipGlobalNorm(0.5), AccumGrad(3), Momentum(0.1))
    run, twin = Run(rule).step(2), Run(rule).step(2)
    for each in (run, twin):
        freeze(each.state.b)
    wrong = {"a": run.grads()["a"] * math.nan if error == "raised" else torch.ones(2, dtype=torch.float64)}
    for _ in range(2):
        with pytest.raises((FloatingPointError, ValueError)):
            update(run.state, run.model, run.grads() | wrong, inplace=inplace)
    thaw(run.state), thaw(twin.state)
    run.step(4).equals(twin.step(4))
    in_step(run)


class Window:
    """What the window means, in the plainest words: gradients of one leaf, and the change that `Descent(1.0)` makes."""

    def __init__(self, shape):
        self.held, self.shape = [], shape

    def add(self, dx, n):
        self.held.append(torch.zeros(self.shape, dtype=torch.float64) if dx is None else dx)
        if len(self.held) < n:
            return None
        mean, self.held = sum(self.held) / len(self.held), []
        return mean


@every_layout
@pytest.mark.parametrize("seed", range(5))
def test_random_windows(seed, layout):
    """`n` changes at any time, and gradients are missing: numbers and counts, against the definition."""
    chance = random.Random(seed)
    run = Run(OptimiserChain(AccumGrad(3), Descent(1.0)), layout)
    windows = {name: Window(shape) for name, shape in SHAPES.items()}
    expected = {name: x.detach().clone() for name, x in run.model.items()}
    counts, n = dict.fromkeys(SHAPES, 0), 3
    for _ in range(30):
        if chance.random() < 0.3:
            n = chance.randint(1, 5)
            adjust(run.state, n=n)
        given = {name: dx for name, dx in run.grads().items() if chance.random() < 0.7}
        for name, window in windows.items():
            some = any(t.any() for t in window.held) or name in given
            change = window.add(given.get(name), n)
            if change is not None and some:
                expected[name] -= change
                counts[name] += 1
        run.step(1, lambda _, given=given: given if given else dict.fromkeys(SHAPES))
        for name, x in run.model.items():
            torch.testing.assert_close(x.detach(), expected[name], rtol=1e-12, atol=1e-12, msg=name)
            assert run.state[name].count == counts[name]


# --- A window that is ended early ---------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("held", [1, 2, 3])
def test_a_flush_is_the_end_of_a_window_of_so_many_updates(chain, layout, held):
    """In step by step and in all that follows, against a run whose window is as long as what is held."""
    run, twin = Run(chain(4), layout), Run(chain(4), layout)
    run.step(4 + held)
    adjust(twin.step(4).state, n=held)
    twin.step(held)
    adjust(twin.state, n=4)
    assert flush(run.state, run.model) == (run.state, run.model)
    run.equals(twin, room=1e-12)
    run.step(5).equals(twin.step(5), room=1e-12)
    assert all(leaf.rule == chain(4) for _, leaf in leaves(run.state))


@every_way
def test_a_flush_of_nothing_changes_nothing(chain, layout):
    for begun in (0, 3):
        run, twin = Run(chain(3), layout).step(begun), Run(chain(3), layout).step(begun)
        flush(run.state, run.model)
        run.step(4).equals(twin.step(4), room=1e-12)
    plain = Run(Adam(0.1)).step(2)
    before = plain.image()
    flush(plain.state, plain.model)
    assert_alike(before, plain.image())


@every_way
def test_a_flush_and_leaves_that_are_frozen_or_have_no_gradient(chain, layout):
    run = Run(chain(4), layout)
    run.step(1, without("c"))
    freeze(run.state.b)
    run.step(1, without("c"))
    before = {name: x.detach().clone() for name, x in run.model.items()}
    flush(run.state, run.model)
    moved = "".join(name for name, x in run.model.items() if not torch.equal(x, before[name]))
    assert moved == "ade"
    assert [run.state[name].count for name in "abc"] == [1, 0, 0]
    thaw(run.state)
    in_step(run)


def test_a_flush_that_fails_changes_nothing():
    run = Run(OptimiserChain(AccumGrad(3), ClipGlobalNorm(0.5), Momentum(0.1)))
    run.step(2, lambda grads: grads | {"d": grads["d"].abs() * math.inf})
    before = run.image()
    with pytest.raises(FloatingPointError, match="'d'"):
        flush(run.state, run.model)
    assert_alike(before, run.image())
    skips = Run(OptimiserChain(AccumGrad(3), ClipGlobalNorm(0.5, nonfinite="skip"), Momentum(0.1)))
    skips.step(2, lambda grads: grads | {"d": grads["d"].abs() * math.inf})
    before = skips.image()
    flush(skips.state, skips.model)
    assert_alike(before, skips.image())


class Hoarder(Rule):
    """A user's rule that accumulates and says nothing of a flush."""

    accumulates = True

    def apply(self, state, x, dx):
        return state, dx


def test_a_flush_is_refused_where_a_rule_does_not_know_it():
    run = Run(OptimiserChain(Hoarder(), Descent(0.1))).step()
    with pytest.raises(NotImplementedError, match=r"Hoarder does not say how it is flushed: define flushing\(self\)"):
        flush(run.state, run.model)
    with pytest.raises(TypeError, match="flush takes"):
        flush(run.model, run.state)

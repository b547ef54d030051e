"""All or nothing: an update that raises changes nothing, and those after it are as if it had not been asked for."""

import contextlib
import copy
import inspect
import math
import os
import sys
from functools import partial

import pytest
import torch
from helpers import CHAINS, Run, assert_alike, every_chain, every_layout, tensors_of
from torch.utils._python_dispatch import TorchDispatchMode

import fluxpy
from fluxpy import (
    AdaGrad,
    Adam,
    AdamW,
    ClipGlobalNorm,
    ClipNorm,
    Descent,
    Lion,
    Momentum,
    NAdam,
    Nesterov,
    OptimiserChain,
    RMSProp,
    Rule,
    WeightDecay,
    adjust,
    freeze,
    leaves,
    reset,
    setup,
    state_dict,
    summary,
    thaw,
    update,
    value,
)  # fmt: skip
from fluxpy.engine.cohort import Cohort
from fluxpy.leaf import context_of

# --- Refused updates ----------------------------------------------------------------------------------------------


def of_another_shape(grads):
    return grads | {"d": torch.ones(3, 4, dtype=grads["d"].dtype)}


def of_another_dtype(grads):
    return grads | {"d": grads["d"].float()}


def sparse(grads):
    return grads | {"d": grads["d"].to_sparse()}


def of_an_unknown_name(grads):
    return grads | {"nobody": grads["d"]}


def no_tensor(grads):
    return grads | {"d": 3}


REFUSED = [of_another_shape, of_another_dtype, sparse, of_an_unknown_name, no_tensor]


def refuse(run, change, error=ValueError):
    before = run.image()
    with pytest.raises(error):
        update(run.state, run.model, change(run.grads()))
    assert_alike(run.image(), before)


@every_chain
@every_layout
def test_a_refused_update_leaves_no_trace(rule, layout):
    run, twin = Run(rule, layout), Run(rule, layout)
    for change in REFUSED:
        refuse(run, change)
        run.step()
        twin.step()
    run.equals(twin)


@every_chain
@every_layout
def test_adjusting_a_leaf_before_a_refused_update_changes_that_leaf_alone(rule, layout):
    for change in REFUSED:
        run, twin = Run(rule, layout).step(2), Run(rule, layout).step(2)
        for state in (run.state, twin.state):
            adjust(state.a, lr=10.0)
        refuse(run, change)
        assert value(run.state.a, "lr") == 10 and all(value(run.state[name], "lr") < 1 for name in "bcde")
        run.step().equals(twin.step())
        run.step(2).equals(twin.step(2))


@every_layout
@pytest.mark.parametrize("rule", [Momentum(0.1), Nesterov(0.1), OptimiserChain(ClipGlobalNorm(0.5), Momentum(0.1))])
def test_adjusting_the_momentum_to_zero_before_a_refused_update(rule, layout):
    run, twin = Run(rule, layout).step(2), Run(rule, layout).step(2)
    for state in (run.state, twin.state):
        adjust(state.a, momentum=0.0)
    refuse(run, of_another_shape)
    run.step(3).equals(twin.step(3))
    for state in (run.state, twin.state):
        adjust(state, momentum=0.0)
    refuse(run, of_another_shape)
    run.step(3).equals(twin.step(3))


CLIPPED = {
    "Adam": OptimiserChain(ClipGlobalNorm(0.5), Adam(0.02)),
    "RMSProp": OptimiserChain(ClipGlobalNorm(0.5), RMSProp(0.02)),
    "each": OptimiserChain(ClipNorm(0.5), AdamW(0.02)),
    "Lion": OptimiserChain(ClipGlobalNorm(0.5), Lion(0.01)),
}


@every_layout
@pytest.mark.parametrize("rule", CLIPPED.values(), ids=CLIPPED.keys())
def test_verbs_before_a_norm_that_is_not_finite(rule, layout):
    run, twin = Run(rule, layout).step(2), Run(rule, layout).step(2)
    for verb in (lambda s: adjust(s.a, lr=10.0), lambda s: reset(s.b), lambda s: reset(adjust(s, lr=0.2))):
        for state in (run.state, twin.state):
            verb(state)
        for _ in range(2):  # also of leaves that had no momenta yet: they have none again
            refuse(run, lambda grads: grads | {"b": grads["b"] * math.nan}, FloatingPointError)
        run.step(2).equals(twin.step(2))


@every_chain
def test_verbs_around_a_refused_update(rule):
    """Whatever was changed before it counts after it, and nothing else does."""
    verbs = [
        lambda s: freeze(s.b),
        lambda s: adjust(s, lr=fluxpy.scale(0.5)),
        lambda s: (thaw(s), reset(s.d)),
        lambda s: adjust(s.e, lr=lambda count: 0.01 * (1 + count)),
        lambda s: freeze(s),
        lambda s: thaw(s.a),
        lambda s: thaw(s),
    ]
    run, twin = Run(rule).step(2), Run(rule).step(2)
    for verb in verbs:
        for state in (run.state, twin.state):
            verb(state)
        refuse(run, of_another_shape)
        run.step(2)
        twin.step(2)
        for (path, mine), (_, theirs) in zip(leaves(run.state), leaves(twin.state), strict=True):
            assert mine.count == theirs.count and mine.frozen == theirs.frozen, path
        for x, y in zip(run.model.values(), twin.model.values(), strict=True):
            assert torch.equal(x, y)


# --- Schedules that give no number --------------------------------------------------------------------------------

RATES = {
    "Descent": Descent, "Momentum": Momentum, "AdamW": AdamW, "AdaGrad": AdaGrad, "Lion": Lion, "RMSProp": RMSProp,
    "NAdam": NAdam,
    "clip all, Adam": lambda lr: OptimiserChain(ClipGlobalNorm(0.5), Adam(lr)),
    "clip each, Momentum": lambda lr: OptimiserChain(ClipNorm(0.5), Momentum(lr)),
    "clip all, Lion": lambda lr: OptimiserChain(ClipGlobalNorm(0.5), Lion(lr)),
}  # fmt: skip
every_rate = pytest.mark.parametrize("name", RATES)
NO_RATES = {
    "of another shape": torch.full((5,), 0.1, dtype=torch.float64),
    "too long": torch.full((8,), 0.1, dtype=torch.float64),
    "empty": torch.zeros(0, dtype=torch.float64),
    "sparse": torch.full((5,), 0.1, dtype=torch.float64).to_sparse(),
    "meta": torch.empty((), device="meta", dtype=torch.float64),
    "meta, for each element": torch.empty((2, 3), device="meta", dtype=torch.float64),
    "that broadcasts": torch.full((4, 1, 1), 0.1, dtype=torch.float64),
    "no number": "fast",
}


class Late:
    """A schedule that gives a rate until its count, and something else from then on."""

    def __init__(self, count, odd):
        self.count, self.odd = count, odd

    def __call__(self, count):
        return 0.1 if count < self.count else self.odd


SMALL = {"a": (2, 3), "b": (2, 3), "c": (4,)}


RATES_LAID = [*((name, "apart") for name in RATES), *((name, "flat") for name in ("AdamW", "Lion", "clip all, Adam"))]


@pytest.mark.parametrize("name, layout", RATES_LAID)
@pytest.mark.parametrize("odd", NO_RATES.values(), ids=NO_RATES.keys())
def test_a_schedule_that_gives_no_rate_stops_all_leaves(name, odd, layout):
    """At the first update or later, before its neighbours or after them, of the same rule or of another: each two of
    these together."""
    rule = RATES[name]
    for start, scheduled, neighbour in ((0, "a", rule), (0, "b", RMSProp), (2, "a", RMSProp), (2, "b", rule)):
        rules = {scheduled: rule(0.1), "*": neighbour(0.1)}
        run, twin = (Run(rules, layout, SMALL) for _ in range(2))
        adjust(run.state[scheduled], lr=Late(start, odd))
        run.step(start), twin.step(start)
        before = run.image()
        for _ in range(2):
            with pytest.raises(Exception):  # noqa: B017 - which one is the rule's affair
                update(run.state, run.model, run.grads())
            assert_alike(run.image(), before)
        adjust(run.state[scheduled], 0.1)
        run.step(2).equals(twin.step(2), room=1e-12)


def by_hand(rule, x, grads):
    """A parameter and its state after these gradients, by the rule's own `apply`."""
    state = rule.init(x)
    for dx in grads:
        state, change = rule.apply(state, x, dx)
        x = x - change
    return x, state


@every_layout
@pytest.mark.parametrize("rule", [Descent, Momentum, AdamW, AdaGrad, Lion, RMSProp, NAdam])
def test_a_rate_for_each_element_is_right_or_refused(rule, layout):
    """Never half: the neighbours are stepped once, or no leaf is."""
    rates = torch.rand(2, 3, dtype=torch.float64)
    for start in (0, 2):
        for neighbour in (rule(0.1), RMSProp(0.1)):
            run = Run({"b": rule(Late(start, rates)), "*": neighbour}, layout, SMALL)
            first = {name: x.detach().clone() for name, x in run.model.items()}
            history = [run.grads()]
            for _ in range(start):
                run.step()
                history.append(run.grads())
            before = run.image()
            try:
                run.step()
            except (ValueError, TypeError, RuntimeError):
                assert_alike(run.image(), before)
                continue
            for key in "ac":
                expected, _ = by_hand(neighbour, first[key], [grads[key] for grads in history])
                torch.testing.assert_close(run.model[key].detach(), expected, rtol=1e-12, atol=1e-12)
            # The rate does not enter the state, so the last step may be taken by itself.
            x, state = by_hand(rule(0.1), first["b"], [grads["b"] for grads in history[:-1]])
            _, change = rule(rates).apply(state, x, history[-1]["b"])
            torch.testing.assert_close(run.model["b"].detach(), x - change, rtol=1e-12, atol=1e-12)
            assert all(leaf.count == start + 1 for _, leaf in leaves(run.state))


@every_layout
@every_rate
@pytest.mark.parametrize("way", ["in the rule", "adjusted", "from a schedule", "integer"])
def test_a_rate_that_is_a_tensor_without_dimensions(name, layout, way):
    rule = RATES[name]
    one = 1 if way == "integer" else 0.1
    given = torch.tensor(one) if way == "integer" else torch.tensor(one, dtype=torch.float64)
    run = Run({"b": rule(given if way == "in the rule" else 0.1), "*": rule(0.1)}, layout)
    twin = Run({"b": rule(0.1), "*": rule(0.1)}, layout)
    if way != "in the rule":
        adjust(run.state.b, lr=(lambda count: given) if way == "from a schedule" else given)
        adjust(twin.state.b, lr=one)
    for _ in range(3):
        run.step()
        twin.step()
        assert [leaf.count for _, leaf in leaves(run.state)] == [leaf.count for _, leaf in leaves(twin.state)]
        for x, y in zip(run.model.values(), twin.model.values(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


@every_layout
def test_a_schedule_that_raises_stops_all_leaves(layout):
    def broken(count):
        if count == 2:
            raise ArithmeticError("no rate here")
        return 0.1

    for rule in RATES.values():
        run, twin = (Run({"b": rule(broken), "*": rule(0.1)}, layout, SMALL).step(2) for _ in range(2))
        refuse(run, lambda grads: grads, ArithmeticError)
        for state in (run.state, twin.state):
            adjust(state.b, 0.2)
        run.step(2).equals(twin.step(2))


# --- A rule's change of a wrong shape -----------------------------------------------------------------------------


class Odd(Rule):
    """A user's rule whose change, once it is told so, has not the parameter's shape."""

    lr: float = 0.1
    elementwise = True
    change = staticmethod(lambda dx: dx)

    def init(self, x):
        return torch.zeros_like(x)

    def apply(self, state, x, dx):
        return state + dx, Odd.change(self.lr * dx)


class OddWhole(Odd):
    elementwise = False


WRONG = {
    "one number": lambda dx: dx.mean(),
    "one element": lambda dx: dx.reshape(-1)[:1],
    "one too few": lambda dx: dx.reshape(-1)[1:],
    "doubled": lambda dx: dx.reshape(-1).repeat(2),
    "another dimension": lambda dx: dx[None],
    "python's": lambda dx: 0.1,
    "on another device": lambda dx: dx.to("meta"),
}


@every_layout
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("chain", [lambda r: r, lambda r: OptimiserChain(ClipGlobalNorm(0.5), WeightDecay(0.1), r)])
@pytest.mark.parametrize("own", [Odd, OddWhole])
def test_a_change_of_a_wrong_shape_is_refused_by_name(layout, change, chain, own, monkeypatch):
    for start in (0, 2):
        monkeypatch.setattr(Odd, "change", staticmethod(lambda dx: dx))
        run, twin = (Run({"b": AdamW(0.1), "*": chain(own())}, layout).step(start) for _ in range(2))
        monkeypatch.setattr(Odd, "change", staticmethod(change))
        before = run.image()
        for _ in range(2):
            with pytest.raises((ValueError, TypeError), match=r"'[acde]'"):
                update(run.state, run.model, run.grads())
            assert_alike(run.image(), before)
        monkeypatch.setattr(Odd, "change", staticmethod(lambda dx: dx))
        run.step(2).equals(twin.step(2), room=1e-12)


# --- Interrupted while things are worked out ----------------------------------------------------------------------


@contextlib.contextmanager
def interrupted(after, error):
    """Raise at a call of a function of fluxpy, the one after so many. Generators are left out: what is raised in one
    that is being closed goes nowhere."""
    package, left = os.path.dirname(fluxpy.__file__), after

    def look(frame, event, arg):
        nonlocal left
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and not code.co_flags & inspect.CO_GENERATOR:
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise error("just here")

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)


def every_verb(state, model):
    """None may raise, whatever happened before."""
    twin = copy.deepcopy(state)
    summary(state), repr(state), state_dict(state)
    adjust(freeze(state.a), lr=0.05), thaw(state), reset(twin)
    adjust(state.a, lr=value(state.b, "lr"))
    setup(Descent(), model, keep=state)


STRIDE = 1 if os.environ.get("FLUXPY_NIGHTLY") == "1" else 17
INTERRUPTED = ["Lion", "AdamW", "clip all, decay, Adam", "clip each, Nesterov", "clip all, own", "whole", "master"]


@pytest.mark.parametrize("layout, error", [("apart", KeyboardInterrupt), ("flat", MemoryError)])
@pytest.mark.parametrize("name", INTERRUPTED)
def test_every_verb_works_after_an_update_that_was_interrupted(name, layout, error):
    """At any call within the first update, and within the one after a change. What was being written then is not
    promised, but a state that is given its numbers again goes on as if nothing had been."""
    twin = Run(CHAINS[name], layout).step(3)
    for start in (0, 1):
        calls, whole = 0, False
        while not whole:
            run = Run(CHAINS[name], layout).step(start)
            freeze(run.state.b), thaw(run.state.b)
            kept = copy.deepcopy(state_dict(run.state))
            values = [x.detach().clone() for x in run.model.values()]
            with contextlib.suppress(error), interrupted(calls, error):
                update(run.state, run.model, run.grads())
                whole = True
            every_verb(run.state, run.model)
            fluxpy.load_state_dict(run.state, kept)
            with torch.no_grad():
                for x, was in zip(run.model.values(), values, strict=True):
                    x.copy_(was)
            run.step(3 - start).equals(twin, room=1e-12)
            calls += STRIDE
        assert calls > STRIDE  # it was interrupted


def after_a_reset(run):
    reset(run.state.a)
    grads = run.grads()
    return lambda: update(run.state, run.model, grads)


VERBS = {
    "adjust": lambda run: lambda: adjust(run.state, lr=0.3),
    "freeze": lambda run: lambda: freeze(run.state),
    "thaw": lambda run: lambda: thaw(run.state, count=7),
    "reset": lambda run: lambda: reset(run.state),
    "follow": lambda run: lambda: fluxpy.follow(run.state, run.model),
    "load": lambda run: partial(fluxpy.load_state_dict, run.state, state_dict(adjust(run.step().state, lr=0.3))),
    "update": lambda run: partial(update, run.state, run.model, run.grads()),
    "update after a reset": after_a_reset,
}


@pytest.mark.parametrize("rule", [AdamW(0.02), fluxpy.Averaged(AdamW(0.02), 0.5)], ids=["AdamW", "Averaged"])
@pytest.mark.parametrize("verb", VERBS)
def test_what_a_state_shows_after_an_interrupt_is_what_steps(verb, rule):
    """Whatever was done by then: the next updates are those of a copy."""
    calls, whole = 0, False
    while not whole:
        run = Run(rule).step(2)
        act = VERBS[verb](run)
        with contextlib.suppress(KeyboardInterrupt), interrupted(calls, KeyboardInterrupt):
            act()
            whole = True
        twin = copy.deepcopy(run)
        run.step(2).equals(twin.step(2), room=1e-12)
        calls += 1 if calls < 70 else STRIDE


def test_an_interrupt_while_leaves_are_put_together(monkeypatch):
    """Those that step with others by then are not looked for where they stepped before."""

    def half(members, context, static):
        Cohort(members[:1], context, static)
        raise KeyboardInterrupt

    run = Run(AdamW(0.02)).step(2)
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(fluxpy.engine.plan, "Cohort", half)
        update(run.state.a, run.model.a, run.grads()["a"])
    twin = copy.deepcopy(run)
    run.step(2).equals(twin.step(2), room=1e-12)


def test_an_interrupt_while_averages_are_put_away():
    """The training weights are back, and updates go on."""
    calls, whole = 0, False
    while not whole:
        run = Run(fluxpy.Averaged(Descent(0.1), 0.5)).step(2)
        before = run.image()
        block = fluxpy.averaged(run.state, run.model)
        block.__enter__()
        with contextlib.suppress(KeyboardInterrupt), interrupted(calls, KeyboardInterrupt):
            block.__exit__(None, None, None)
            whole = True
        assert_alike(run.image(), before)
        run.step()
        calls += 1


class OutOfMemory(TorchDispatchMode):
    """From the n-th operation on."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise MemoryError(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["Lion", "clip all, decay, Adam", "own"])
@pytest.mark.parametrize("inplace", [True, False])
def test_memory_that_runs_out_is_what_the_error_says(name, inplace, monkeypatch):
    """Wherever it runs out; and the next steps go their old way."""
    monkeypatch.setattr(fluxpy.engine.layout, "SIZE", 8)  # several chunks, of which some were written before
    twin, n, whole = Run(CHAINS[name]).step(4), 0, False
    while not whole:
        run = Run(CHAINS[name]).step(2)
        kept = copy.deepcopy((state_dict(run.state), run.model.state_dict()))
        grads = run.grads()
        try:
            with OutOfMemory(n):
                update(run.state, run.model, grads, inplace=inplace)
            whole = True
        except MemoryError:
            pass
        fluxpy.load_state_dict(run.state, kept[0]), run.model.load_state_dict(kept[1])
        run.step(2).equals(twin, room=1e-12)
        assert not context_of(run.state.a).reference_only
        n += 1 if n < 30 else STRIDE


# --- Modes of autograd --------------------------------------------------------------------------------------------


@every_chain
@every_layout
@pytest.mark.parametrize("inside", [False, True], ids=["gradients from outside", "gradients from inside"])
def test_an_update_in_inference_mode_leaves_nothing_of_it(rule, layout, inside):
    for first in range(3):
        run, twin = Run(rule, layout).step(first), Run(rule, layout).step(first)
        for verb in (lambda s: s, lambda s: freeze(s.b), thaw):
            verb(run.state), verb(twin.state)
            grads = run.grads()
            with torch.inference_mode():
                update(run.state, run.model, run.grads() if inside else grads)
            run.turn += 1
            twin.step()
            run.step(2).equals(twin.step(2))
        held = [*run.model.values(), *tensors_of(run.state)]
        assert not any(t.is_inference() for t in held)


MODES = {
    "no_grad": (torch.no_grad, False),
    "enable_grad": (torch.enable_grad, True),
    "set_grad_enabled": (lambda: torch.set_grad_enabled(False), False),
    "inference_mode": (torch.inference_mode, False),
}


@every_chain
@pytest.mark.parametrize("mode, tracked", MODES.values(), ids=MODES.keys())
def test_an_update_leaves_the_grad_mode_as_it_is(rule, mode, tracked):
    run = Run(rule)
    for inplace in (True, False):
        for _ in range(2):
            with mode():
                update(run.state, run.model, run.grads(), inplace=inplace)
                assert torch.is_grad_enabled() == tracked
            assert torch.is_grad_enabled()
        with mode():
            for change in (of_another_shape, of_an_unknown_name):
                with pytest.raises(ValueError):
                    update(run.state, run.model, change(run.grads()), inplace=inplace)
                assert torch.is_grad_enabled() == tracked
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("nonfinite, error", [("skip", None), ("raise", FloatingPointError)])
def test_the_grad_mode_after_a_norm_that_is_not_finite(nonfinite, error):
    run = Run(OptimiserChain(ClipGlobalNorm(0.5, nonfinite=nonfinite), Adam(0.1)))
    for mode, tracked in MODES.values():
        for inplace in (True, False):
            with mode(), pytest.raises(error) if error else contextlib.nullcontext():
                bad = run.grads() | {"a": torch.full((4, 3), math.nan, dtype=torch.float64)}
                update(run.state, run.model, bad, inplace=inplace)
            with mode():
                with contextlib.suppress(FloatingPointError):
                    update(run.state, run.model, bad, inplace=inplace)
                assert torch.is_grad_enabled() == tracked
            assert torch.is_grad_enabled()

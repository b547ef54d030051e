"""Compiled updates: the numbers of those that are not, whatever changes between them. Few kernels, for each takes
seconds to make."""

import copy
import gc
import os
import subprocess
import sys
import textwrap
import warnings
import weakref

import optree
import pytest
import torch
from helpers import Own, Run, Scaled, assert_alike, grads_of, like_a_device, needs_compiler, tensors_of, without

import fluxpy
from fluxpy import (
    Adam,
    ClipGlobalNorm,
    Lion,
    OptimiserChain,
    Rule,
    WeightDecay,
    adjust,
    freeze,
    leaves,
    reset,
    schedules,
    setup,
    thaw,
    update,
    value,
)  # fmt: skip
from fluxpy.rules import Reduce, ReducingRule

pytestmark = needs_compiler
SHAPES = {"a": (4, 3), "b": (7,), "d": (4, 3), "e": (2, 1, 3)}
CLIPPED = OptimiserChain(ClipGlobalNorm(0.5), Lion(0.01))  # most tests share its kernel


def both(rule, **options):
    """A compiled run, and its twin."""
    return Run(rule, shapes=SHAPES, compile=True, **options), Run(rule, shapes=SHAPES, **options)


def alike(run, twin, times=2, change=lambda grads: grads, room=1e-10):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a rule runs without being compiled is no matter here
        run.step(times, change)
    twin.step(times, change)
    for (path, mine), (_, theirs) in zip(leaves(run.state), leaves(twin.state), strict=True):
        assert mine.count == theirs.count, path
        for a, b in zip(
            [run.model[path], *tensors_of(mine.state)], [twin.model[path], *tensors_of(theirs.state)], strict=True
        ):
            torch.testing.assert_close(a, b, rtol=room, atol=room, msg=path)


# --- Numbers that are something else from now on ------------------------------------------------------------------

NEW = {
    "a schedule": lambda: schedules.linear(0.1, 0.01, 5),
    "a function": lambda: lambda count: 0.1 / (1 + count),
    "an int": lambda: 1,
    "a schedule of ints": lambda: lambda count: 1,
    "a tensor": lambda: torch.tensor(0.1, dtype=torch.float64),
    "a schedule of tensors": lambda: lambda count: torch.tensor(0.1, dtype=torch.float64),
}


@pytest.mark.parametrize("new", NEW.values(), ids=NEW.keys())
@pytest.mark.parametrize("start", [0, 2])
def test_a_branch_is_adjusted_to_something_that_is_no_float(new, start):
    """And to another one, and back."""
    run, twin = both(CLIPPED)
    alike(run, twin, start)
    for changes in ({"a": new()}, {"d": new(), "b": 0.3}, {"a": 0.2}, {"b": new(), "e": 0.02}, {"d": 0.1, "b": 0.1}):
        for name, lr in changes.items():
            for state in (run.state, twin.state):
                adjust(state[name], lr=lr)
        alike(run, twin)
        for name in SHAPES:
            assert value(run.state[name], "lr") == value(twin.state[name], "lr")


def test_verbs_and_missing_gradients_between_compiled_updates():
    run, twin = both(CLIPPED)
    alike(run, twin)
    for verb in (
        lambda s: freeze(s.b),
        lambda s: adjust(s.a, lr=lambda count: 0.1 / (1 + count)),
        thaw,
        lambda s: adjust(s, betas=(0.8, 0.9)),
        lambda s: adjust(s.d, max_norm=0.1),
        lambda s: reset(s.d),
        lambda s: adjust(s, lr=fluxpy.scale(0.5)),
        lambda s: adjust(s.d, max_norm=0.5),
    ):
        verb(run.state), verb(twin.state)
        alike(run, twin)
        alike(run, twin, 1, without("a"))


def test_a_refused_update_between_compiled_ones_leaves_no_trace():
    run, twin = both(CLIPPED)
    alike(run, twin)
    for lr in (10.0, lambda count: 0.1):
        for state in (run.state, twin.state):
            adjust(state.a, lr=lr)
        before = run.image()
        for wrong in ({"d": torch.ones(2)}, {"b": run.grads()["b"] * float("nan")}):
            with pytest.raises((ValueError, FloatingPointError)):
                update(run.state, run.model, run.grads() | wrong)
            assert_alike(run.image(), before)
        alike(run, twin)


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize(
    "odd",
    [torch.rand(4, 3, dtype=torch.float64), torch.rand(5), torch.zeros(0), torch.empty((), device="meta"), "fast"],
    ids=["each element", "another shape", "empty", "meta", "no number"],
)
def test_a_schedule_that_gives_no_rate(odd, start):
    """Right or refused: never for some leaves alone."""
    run, twin = both(CLIPPED)
    alike(run, twin, start)
    for state in (run.state, twin.state):
        adjust(state.d, lr=lambda count: odd)
    for _ in range(2):
        for each in (run, twin):
            before = each.image()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    each.step()
            except Exception:  # which one is the rule's affair
                assert_alike(each.image(), before)
        if run.turn == twin.turn:
            alike(run, twin, 0)
    if run.turn == twin.turn:
        for state in (run.state, twin.state):
            adjust(state.d, lr=0.1)
        alike(run, twin)


# --- Totals -------------------------------------------------------------------------------------------------------


def test_leaves_with_different_clips_have_norms_of_their_own():
    chain = lambda *clip, **more: OptimiserChain(ClipGlobalNorm(*clip, **more), WeightDecay(0.1), Lion(0.01))  # noqa: E731
    for rules in (
        {"a": CLIPPED, "b": OptimiserChain(ClipGlobalNorm(0.1), Lion(0.01)), "*": CLIPPED},
        {"a": CLIPPED, "b": OptimiserChain(ClipGlobalNorm(0.5, norm_type=1.0), Lion(0.01)), "*": CLIPPED},
        {"a": chain(0.1), "b": chain(0.5), "d": chain(0.1, norm_type=3.0), "e": chain(0.1)},
        {"a": chain(lambda count: 0.1), "b": chain(0.5), "*": chain(lambda count: 0.1 * (1 + count))},
    ):
        # The sign of Lion's step says little of a norm; its momentum says all.
        run, twin = both(rules)
        alike(run, twin, 3)
    run, twin = both(CLIPPED)
    alike(run, twin)
    for state in (run.state, twin.state):
        adjust(state.b, max_norm=0.05)
        adjust(state.d, norm_type=1.0)
    alike(run, twin)


class Integers(Rule):
    """A user's rule that computes with integers, large ones too, of which no float32 may stand for any."""

    lr: float = 0.01
    elementwise = True

    def init(self, x):
        return torch.full(x.shape, 2**31 - 9, dtype=torch.int32, device=x.device), 0

    def apply(self, state, x, dx):
        seen, t = state
        seen = (seen + 2 * t) * 0x7FEB352D - 1
        key = torch.where(seen > 3, seen ^ (seen >> 15) & 0x1FFFF, 7 - seen) << 1
        return (seen, t + 1), self.lr * dx * ((key & 0xFF) / 4 + 1)


def test_integers_stay_integers():
    """And one that is another at each step makes no kernel of its own."""
    run, twin = both(Integers())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.step(40)
    run.equals(twin.step(40), room=1e-12)
    for name in SHAPES:
        assert torch.equal(run.state[name].state[0], twin.state[name].state[0])
    assert len(run.state["a"].state[0].unique()) == 1 and run.state["a"].state[0].dtype == torch.int32


class Squash(ReducingRule):
    """A user's reducing rule."""

    elementwise = True

    def part(self, value):
        return value.square().sum()

    def combine(self, parts):
        return parts.sum().sqrt()

    def steps(self, state, x, dx):
        total = yield Reduce(self, dx)
        return state, dx / (1 + total)


def test_a_users_reducing_rule():
    run, twin = both(OptimiserChain(Squash(), Own(0.1)))
    alike(run, twin, 3)
    for state in (run.state, twin.state):
        freeze(state.b)
    alike(run, twin)


def test_a_flag_stays_in_its_tree(monkeypatch):
    like_a_device(monkeypatch)
    run, twin = both(CLIPPED)
    alike(run, twin)
    state = optree.tree_map(torch.clone, run.state, namespace="fluxpy")
    model = copy.deepcopy(run.model)
    update(state, model, run.grads() | {"b": run.grads()["b"] * float("nan")})
    alike(run, twin)
    fluxpy.check_finite(run.state)
    with pytest.raises(FloatingPointError, match="'b' is not finite"):
        fluxpy.check_finite(state)


# --- What is not elementwise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [Adam(0.1), Own(0.1), OptimiserChain(WeightDecay(0.1), Lion(0.1))])
def test_a_wrapper_that_is_not_elementwise(inner):
    run, twin = both({"a": Scaled(inner), "b": OptimiserChain(WeightDecay(0.1), Scaled(inner)), "*": Scaled(inner)})
    alike(run, twin, 3)
    for name in "de":  # and by hand, leaf by leaf
        x, state = Run(inner, shapes=SHAPES).model[name].detach(), Scaled(inner).init(run.model[name])
        for i in range(3):
            state, change = Scaled(inner).apply(state, x, grads_of(run.model, i)[name])
            x = x - change
        torch.testing.assert_close(run.model[name].detach(), x, rtol=1e-10, atol=1e-10)


# --- Life, and threads --------------------------------------------------------------------------------------------


def test_a_compiled_state_does_not_keep_its_model_alive():
    gc.disable()
    try:
        run, twin = both(CLIPPED)
        alike(run, twin)
        adjust(freeze(run.state.a), lr=0.1)
        run.step()
        of_model = [weakref.ref(x) for x in run.model.values()]
        of_state = [weakref.ref(t) for t in tensors_of(run.state)]
        state = run.state
        del run
        assert not any(ref() is not None for ref in of_model)
        del state
        assert not any(ref() is not None for ref in of_state)
    finally:
        gc.enable()


def test_a_state_that_was_never_compiled_for_a_model_may_be():
    """Taking over into a compiled state, and out of one."""
    run, twin = both(CLIPPED)
    alike(run, twin)
    run.state = setup(CLIPPED, run.model, keep=run.state)
    alike(run, twin)
    run.state = setup(CLIPPED, run.model, keep=run.state, compile=True)
    alike(run, twin)


THREADS = """
    import os, torch, fluxpy
    torch.set_num_threads(2)
    x = torch.ones(1 << 21)
    state = fluxpy.setup(fluxpy.OptimiserChain(fluxpy.WeightDecay(0.1), fluxpy.Lion(0.01)), x, compile=True)
    dx = torch.ones_like(x)
    fluxpy.update(state, x, dx)
    def used():
        ticks = {}
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            ticks[int(task)] = int(fields[11]) + int(fields[12])
        return ticks
    def updates(own=40):
        before = used()
        while used()[os.getpid()] - before[os.getpid()] < own:
            for _ in range(20):
                fluxpy.update(state, x, dx)
        after = used()
        gained = {task: ticks - before.get(task, 0) for task, ticks in after.items()}
        return gained.pop(os.getpid()), max(gained.values(), default=0)
    print(*updates())
"""


@pytest.mark.skipif(sys.platform != "linux" or (os.cpu_count() or 1) < 2, reason="needs two processors and /proc")
def test_a_large_compiled_update_uses_the_second_thread():
    """By the time that each thread of a process was running, which does not depend on who else is at work."""
    env = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    script = [sys.executable, "-c", textwrap.dedent(THREADS)]
    run = subprocess.run(script, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    own, other = map(int, run.stdout.split()[-2:])
    assert other > 0.4 * own, (own, other)

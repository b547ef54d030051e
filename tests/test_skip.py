"""nonfinite="skip" on a device: the device skips, the host goes on, and learns of it before anyone looks.

The CPU, which knows at once, is the oracle; so is a run that never saw the bad gradients.
"""

import contextlib
import copy
import gc
import math
import os
import pickle
import random
import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import optree
import pytest
import torch
from helpers import (
    SHAPES,
    Own,
    Run,
    Scaled,
    Whole,
    assert_alike,
    every_layout,
    grads_of,
    image,
    like_a_device,
    model_of,
    needs_compiler,
    tensors_of,
    values_of,
)
from torch import Tensor, nn

import fluxpy
from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    Averaged,
    ClipGlobalNorm,
    ClipNorm,
    Learner,
    Lion,
    Lookahead,
    MixedPrecision,
    Momentum,
    Muon,
    OptimiserChain,
    Prodigy,
    RMSProp,
    Rule,
    ScheduleFreeAdamW,
    WeightDecay,
    adjust,
    averaged,
    flush,
    freeze,
    leaves,
    reset,
    setup,
    surgery,
    thaw,
    update,
    value,
)  # fmt: skip
from fluxpy.context import Late
from fluxpy.interop import TorchOptimizer
from fluxpy.leaf import context_of

ALL = ClipGlobalNorm(0.5, nonfinite="skip")
EACH = ClipNorm(0.5, nonfinite="skip")


class Lazy(Rule):
    """Makes its state at the first step only, so that the structure of the state changes."""

    lr: float = 0.01
    elementwise = True

    def init(self, x: Tensor) -> Any:
        return None

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        state = dx.clone() if state is None else 0.9 * state + dx
        return state, self.lr * state


def falling(count: int) -> float:
    return 0.1 / (1 + count)


CHAINS: dict[str, Any] = {
    "Adam": OptimiserChain(ALL, Adam(0.05)),
    "AdamW, a schedule": OptimiserChain(ALL, AdamW(falling)),
    "Momentum": OptimiserChain(EACH, Momentum(0.1)),
    "Lion": OptimiserChain(ALL, Lion(0.02)),
    "two clips that skip": OptimiserChain(EACH, WeightDecay(0.1), ALL, RMSProp(0.02)),
    "skips, then raises": OptimiserChain(ALL, ClipNorm(0.3), Adam(0.05)),
    "gathers what is clipped": OptimiserChain(ALL, AccumGrad(3), Adam(0.05)),
    "clips what is gathered": OptimiserChain(AccumGrad(3), ALL, Momentum(0.1)),
    "master": MixedPrecision(OptimiserChain(ALL, Adam(0.05)), dtype=torch.float64),
    "shadowed": Averaged(OptimiserChain(ALL, AdamW(falling)), decay=0.6),
    "shadowed, eager": OptimiserChain(ALL, Averaged(RMSProp(0.02), decay=0.6)),
    "own": OptimiserChain(ALL, Own()),
    "whole": OptimiserChain(ALL, Whole()),
    "a wrapper of one's own": OptimiserChain(EACH, Scaled(Own())),
    "lazy": OptimiserChain(ALL, Lazy()),
    "Prodigy": OptimiserChain(ALL, Prodigy(d0=1e-2)),
    "ScheduleFree": OptimiserChain(ALL, ScheduleFreeAdamW(0.05, warmup_steps=4)),
    "Lookahead": Lookahead(OptimiserChain(ALL, Adam(0.05)), k=2),
    "Muon": OptimiserChain(ALL, Muon(0.02)),
    "by name": {"[ab]": OptimiserChain(ALL, AdamW(falling)), "*": OptimiserChain(ALL, AccumGrad(2), Own())},
}
every_chain = pytest.mark.parametrize("rule", CHAINS.values(), ids=CHAINS.keys())
FEW = ["Adam", "gathers what is clipped", "master", "shadowed", "own", "whole", "lazy", "by name"]
few_chains = pytest.mark.parametrize("rule", [CHAINS[name] for name in FEW], ids=FEW)
MATRICES = {"a": (4, 3), "b": (7, 2), "c": (2, 2), "d": (4, 3), "e": (6, 3)}


def run_of(rule: Any, layout: str = "apart", **options: Any) -> Run:
    inner = [rule] if isinstance(rule, Rule) else [*rule.values()]
    of_matrices = any(isinstance(r, Muon) for outer in inner for r in fluxpy.rule.rules_in(outer))
    return Run(rule, layout, MATRICES if of_matrices else SHAPES, **options)


def spoilt(grads: dict[str, Any], name: str = "d", bad: float = math.nan) -> dict[str, Any]:
    dx = grads[name].clone()
    dx.view(-1)[-1] = bad
    return grads | {name: dx}


@contextlib.contextmanager
def nothing_read() -> Iterator[None]:
    """No tensor answers, but where the host is to learn whether the last update was skipped."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the host read a tensor")

    with pytest.MonkeyPatch.context() as patch:
        ways = {name: getattr(Tensor, name) for name in READS}
        is_skipped = Late.is_skipped

        def allowed(late: Late) -> bool:
            for name, way in ways.items():
                setattr(Tensor, name, way)
            found = is_skipped(late)
            for name in ways:
                setattr(Tensor, name, refuse)
            return found

        patch.setattr(Late, "is_skipped", allowed)
        for name in READS:
            patch.setattr(Tensor, name, refuse)
        yield


READS = ["item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal", "numpy"]
Story = list[Callable[[Any, Any], Any]]  # what happens to a state and its model, one after another


def told(run: Run, story: Story, bad: bool = True, quiet: bool = False) -> Run:
    """A run to which a story happened; not `bad`: without its bad gradients; `quiet`: in which nothing may be read."""
    for event in story:
        if isinstance(event, Step):
            if bad or not event.bad:
                with nothing_read() if quiet else contextlib.nullcontext():
                    update(run.state, run.model, event.grads(run.model))
        else:
            event(run.state, run.model)
    return run


class Step:
    """An update with these gradients."""

    def __init__(self, turn: int, bad: Any = None, without: tuple[str, ...] = ()) -> None:
        self.turn, self.bad, self.without = turn, bad, without

    def grads(self, model: Any) -> dict[str, Any]:
        grads = grads_of(model, self.turn)
        if self.bad is not None:
            grads = spoilt(grads, *self.bad)
        return {name: dx for name, dx in grads.items() if name not in self.without}

    def __call__(self, state: Any, model: Any) -> None:
        update(state, model, self.grads(model))


def some_story(seed: int, verbs: bool) -> Story:
    rng = random.Random(seed)
    story: Story = []
    for turn in range(14):
        bad = (rng.choice("abcde"), rng.choice([math.nan, math.inf, -math.inf])) if rng.random() < 0.45 else None
        without = tuple(rng.sample("abcde", 2)) if rng.random() < 0.2 else ()
        if bad is not None and bad[0] in without:
            without = ()
        story.append(Step(turn, bad, without))
        if verbs and rng.random() < 0.4:
            name, verb = rng.choice("abcde"), rng.choice([freeze, thaw, reset, lambda s: adjust(s, fluxpy.scale(0.9))])
            story.append(lambda state, model, name=name, verb=verb: verb(state[name]))
            story.append(lambda state, model: thaw(state.a))  # one trains at least
    return story


@pytest.mark.parametrize("verbs", [False, True], ids=["updates", "verbs"])
@pytest.mark.parametrize("seed", range(3 if os.environ.get("FLUXPY_NIGHTLY") == "1" else 1))
@every_layout
@every_chain
def test_the_device_skips_as_the_cpu_does(rule: Any, layout: str, seed: int, verbs: bool, monkeypatch: Any) -> None:
    story = some_story(seed, verbs)
    at_once = told(run_of(rule, layout), story)
    if rule is not CHAINS["clips what is gathered"]:  # which holds the bad numbers from then on
        at_once.equals(told(run_of(rule, layout), story, bad=False), 1e-10)
    like_a_device(monkeypatch)
    told(run_of(rule, layout), story, quiet=True).equals(at_once, 1e-10)


@needs_compiler
@pytest.mark.parametrize("name", ["Adam", "own", "master", "gathers what is clipped", "by name"])
def test_compiled(name: str, monkeypatch: Any) -> None:
    story = some_story(1, True)
    at_once = told(run_of(CHAINS[name]), story)
    like_a_device(monkeypatch)
    late = told(run_of(CHAINS[name], compile=True), story)  # which reads where a kernel is made
    told(late.equals(at_once, 1e-9), [Step(20), Step(21, ("b",))], quiet=True)
    late.equals(told(at_once, [Step(20)]), 1e-9)


@needs_compiler
def test_a_compiled_cohort_is_held_back_by_another(monkeypatch: Any) -> None:
    """Which comes to its total when the first has its kernel already."""
    rules = {"a": Own(), "*": OptimiserChain(ALL, Own())}
    like_a_device(monkeypatch)
    for compile in (False, True):
        run = Run(rules, compile=compile).step()
        before = run.image()
        update(run.state, run.model, spoilt(run.grads()))
        assert_alike(run.image(), before)


@few_chains
def test_the_first_update_may_be_the_bad_one(rule: Any, monkeypatch: Any) -> None:
    """In which states are made: after a thaw, or a reset."""

    def story(run: Run) -> Run:
        freeze(run.state)
        thaw(run.state)
        assert run.state.a.state is None
        for event in (
            Step(0, ("b", math.inf)),
            Step(1, ("b", math.inf)),
            reset,
            Step(2),
            Step(3),
            reset,
            Step(4, ("a",)),
        ):
            event(run.state, run.model) if isinstance(event, Step) else event(run.state)
        return run

    at_once = story(run_of(rule))
    like_a_device(monkeypatch)
    late = story(run_of(rule))
    assert late.state.a.state is None and late.state.a.count == 0
    late.equals(at_once, 1e-10)
    late.step(3).equals(at_once.step(3), 1e-9)


# --- Whoever looks sees what the CPU would show -------------------------------------------------------------------


def shown(state: Any, model: Any) -> Any:
    return repr(state), fluxpy.summary(state), state._repr_html_()


def saved(state: Any, model: Any) -> Any:
    run = Run({path: leaf.rule for path, leaf in leaves(state)})
    with tempfile.TemporaryDirectory() as folder:
        fluxpy.save(f"{folder}/file", model=model, state=state)
        fluxpy.load(f"{folder}/file", model=run.model, state=run.state)
    return run.image()


def loaded(state: Any, model: Any) -> None:
    """What is written into a state stays, whatever the update before was."""
    run = Run({path: leaf.rule for path, leaf in leaves(state)}).step(1)
    fluxpy.load_state_dict(state, fluxpy.state_dict(run.state))


def copied_by(make: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda state, model: image(make(state), model)


def evaluated(state: Any, model: Any) -> Any:
    with averaged(state, model) as paths:
        return paths, values_of(model)


def in_inference_mode(state: Any, model: Any) -> None:
    with torch.inference_mode():
        update(state, model, grads_of(model, 7))


def widened(state: Any, model: Any) -> None:
    with torch.no_grad():
        for x in model.values():
            x.data = x.data.float()
    fluxpy.follow(state, model)


def grown(state: Any, model: Any) -> None:
    surgery.grow(state, model, {name: torch.ones(2, x.shape[1], dtype=x.dtype) for name, x in model.items()})


def taken(state: Any, model: Any) -> None:
    surgery.take(state, model, [2, 0, 1])


def functional(state: Any, model: Any) -> Any:
    """The result is of the CPU's numbers, and what it was made from stays as it was."""
    return image(*update(state, model, grads_of(model, 8), inplace=False))


def differentiated(state: Any, model: Any) -> Any:
    grads = {name: dx.requires_grad_() for name, dx in grads_of(model, 8).items()}
    return image(*update(state, model, grads, inplace=False))


def optimized(state: Any, model: Any) -> Any:
    optimizer = TorchOptimizer(state, model)
    parts = [{name: v for name, v in optimizer.state[x].items()} for x in model.values()]
    return [(g["names"], g["lr"]) for g in optimizer.param_groups], parts, optimizer.state_dict()


OBSERVERS: dict[str, Callable[[Any, Any], Any]] = {
    "nobody": lambda state, model: None,
    "count": lambda state, model: [leaf.count for _, leaf in leaves(state)],
    "state": lambda state, model: [leaf.state for _, leaf in leaves(state)],
    "value": lambda state, model: value(state.a, "lr"),
    "shown": shown,
    "state_dict": lambda state, model: fluxpy.state_dict(state),
    "save": saved,
    "load_state_dict": loaded,
    "adjust": lambda state, model: adjust(state, fluxpy.scale(0.5)) and None,
    "freeze": lambda state, model: freeze(state["b"]) and None,
    "freeze and thaw": lambda state, model: thaw(freeze(state)) and None,
    "thaw with a count": lambda state, model: thaw(state.b, count=state.a.count + 5) and None,
    "reset": lambda state, model: reset(state.c) and None,
    "reset of all": lambda state, model: reset(state) and None,
    "deepcopy": copied_by(copy.deepcopy),
    "pickle": copied_by(lambda state: pickle.loads(pickle.dumps(state))),
    "tree_map": copied_by(lambda state: optree.tree_map(torch.clone, state, namespace="fluxpy")),
    "torch's tree_map": copied_by(lambda state: torch.utils._pytree.tree_map(torch.clone, state)),
    "keep": lambda state, model: image(setup(Adam(), model, keep=state), model),
    "follow": widened,
    "surgery.take": taken,
    "surgery.grow": grown,
    "surgery.reset": lambda state, model: surgery.reset(state["a"], rows=[0], model=model["a"]) and None,
    "averaged": evaluated,
    "pure": functional,
    "pure, with a history": differentiated,
    "in inference mode": in_inference_mode,
    "flush": lambda state, model: flush(state, model) and None,
    "check_finite": lambda state, model: fluxpy.check_finite(state),
    "a branch": lambda state, model: update(state["a"], model["a"], grads_of(model, 9)["a"]) and None,
    "TorchOptimizer": optimized,
}
MATRIX = {"a": (4, 3), "b": (4, 3), "c": (4, 2), "d": (4, 3), "e": (4, 3)}
OBSERVED = {
    **{name: CHAINS[name] for name in ("AdamW, a schedule", "gathers what is clipped", "master", "shadowed", "whole")},
    "Prodigy": CHAINS["Prodigy"],
}


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS.keys())
@pytest.mark.parametrize("rule", OBSERVED.values(), ids=OBSERVED.keys())
def test_whoever_looks_after_a_skipped_update_sees_what_the_cpu_shows(
    rule: Any, observer: Callable[[Any, Any], Any], monkeypatch: Any
) -> None:
    story: Story = [
        Step(0),
        lambda state, model: freeze(state["e"]),
        Step(1),
        Step(2, ("d",)),
        Step(3),
        Step(4, ("b",)),
    ]

    def outcome() -> Any:
        shapes = MATRIX if observer in (grown, taken) else SHAPES
        run = told(Run(rule, shapes=shapes), story)
        seen = observer(run.state, run.model)
        first = run.image()
        for turn in (11, 12):
            update(run.state, run.model, grads_of(run.model, turn))
        return seen, first, run.image()

    at_once = outcome()
    like_a_device(monkeypatch)
    late = outcome()
    room = 1e-4 if observer is widened else 1e-9
    ours, theirs = (optree.tree_leaves(x, none_is_leaf=True, namespace="fluxpy") for x in (late, at_once))
    assert len(ours) == len(theirs)
    assert_alike(dict(enumerate(ours)), dict(enumerate(theirs)), room)


def test_of_a_first_update_too(monkeypatch: Any) -> None:
    """What no update stepped gives its momenta back where it is frozen."""

    def outcome() -> list[Any]:
        run = told(Run(OptimiserChain(ALL, Adam(0.1))), [Step(0, ("b",))])
        return [leaf.state for _, leaf in leaves(freeze(run.state))]

    at_once = outcome()
    like_a_device(monkeypatch)
    assert outcome() == at_once == [None] * 5


class Shown(Rule):
    """Has weights to evaluate with that hang on the count."""

    lr: Any = 0.1

    def init(self, x: Tensor) -> Any:
        return x.clone()

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        return x.clone(), self.lr * dx

    def evaluation(self, state: Any, x: Tensor) -> Tensor:
        return state * self.lr


def test_weights_to_evaluate_with_are_those_of_the_last_update_that_counted(monkeypatch: Any) -> None:
    def outcome() -> dict[str, Any]:
        run = told(Run(OptimiserChain(ALL, Shown(falling))), [Step(0), Step(1), Step(2, ("b",))])
        with averaged(run.state, run.model):
            return values_of(run.model)

    at_once = outcome()
    like_a_device(monkeypatch)
    assert_alike(outcome(), at_once, 1e-12)


def test_leaves_of_two_trees_in_one(monkeypatch: Any) -> None:
    like_a_device(monkeypatch)
    one, two = Run(CHAINS["Adam"]).step(), Run(CHAINS["Adam"]).step(2)
    for run in (one, two):
        update(run.state, run.model, spoilt(run.grads()))
    pick = lambda a, b: b if b.shape == (7,) else a  # noqa: E731
    is_leaf = lambda x: isinstance(x, fluxpy.Leaf)  # noqa: E731
    mixed = optree.tree_map(pick, one.state, two.state, is_leaf=is_leaf, namespace="fluxpy")
    assert [leaf.count for _, leaf in leaves(mixed)] == [1, 2, 1, 1, 1]


# --- Pure updates, flush, and other ways that take no plan --------------------------------------------------------


@few_chains
@pytest.mark.parametrize("history", [False, True])
def test_pure_updates(rule: Any, history: bool, monkeypatch: Any) -> None:
    """Each of a tree of its own; in place again at the end. With a history each reads at once."""

    def outcome(quiet: bool) -> dict[str, Any]:
        run = run_of(rule)
        freeze(run.state["e"])
        state, model, found = run.state, run.model, {}
        for turn, bad in enumerate([None, ("b",), None, ("d",), ("a", math.inf), None]):
            grads = Step(turn, bad).grads(model)
            grads = {name: dx.requires_grad_(history) for name, dx in grads.items()}
            with nothing_read() if quiet and not history else contextlib.nullcontext():
                state, model = update(state, model, grads, inplace=False)
            if turn in (0, 1, 4):
                found |= {f"{turn} {key}": value for key, value in image(state, model).items()}
        if not history:
            told(run, [Step(7, ("c",)), Step(8)])  # the first, of which all others were made
            Step(8)(state, model)
        return found | run.image() | {f"last {key}": value for key, value in image(state, model).items()}

    at_once = outcome(False)
    like_a_device(monkeypatch)
    assert_alike(outcome(True), at_once, 1e-9)


class Picky(Rule):
    armed = False

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        if Picky.armed:
            raise ArithmeticError("not now")
        return state, 0.1 * dx


def test_flush(monkeypatch: Any) -> None:
    """A window that holds something bad is not stepped by; and an error leaves nothing behind."""

    def outcome() -> Run:
        run = told(Run(OptimiserChain(AccumGrad(3), ALL, Picky())), [Step(0), Step(1, ("b",))])
        flush(run.state, run.model)
        assert run.state.a.count == 0
        return run

    at_once = outcome()
    like_a_device(monkeypatch)
    late = outcome().equals(at_once, 1e-10)
    monkeypatch.setattr(Picky, "armed", True)
    with pytest.raises(ArithmeticError, match="not now"):
        flush(late.state, late.model)
    monkeypatch.setattr(Picky, "armed", False)
    for run in (late, at_once):
        reset(run.state)
    late.step(3).equals(at_once.step(3), 1e-10)
    assert late.state.a.count == 1


def test_parameters_made_in_inference_mode(monkeypatch: Any) -> None:
    def outcome() -> dict[str, Any]:
        with torch.inference_mode():
            model = {name: x.detach().clone() for name, x in model_of().items()}
            state = setup(OptimiserChain(ALL, Adam(0.1)), model)
            for event in (Step(0), Step(1, ("b",)), Step(2)):
                event(state, model)
        return image(state, model)

    at_once = outcome()
    assert at_once["leaf a"][2] == 2
    like_a_device(monkeypatch)
    assert_alike(outcome(), at_once, 1e-10)


def test_an_error_after_a_skip_leaves_nothing_behind(monkeypatch: Any) -> None:
    like_a_device(monkeypatch)
    run = Run({"a": OptimiserChain(ALL, Adam(0.1)), "*": Picky()}).step()
    before = run.image()
    monkeypatch.setattr(Picky, "armed", True)
    with pytest.raises(ArithmeticError, match="not now"):
        update(run.state, run.model, spoilt(run.grads(), "a"))
    monkeypatch.setattr(Picky, "armed", False)
    assert_alike(run.image(), before)
    run.step()
    assert run.state.a.count == 2 and not torch.equal(run.model["a"], before["parameter a"])


@few_chains
def test_what_is_not_known_yet_keeps_nothing_alive(rule: Any, monkeypatch: Any) -> None:
    like_a_device(monkeypatch)
    gc.disable()
    try:
        run = Run(rule).step()
        update(run.state, run.model, spoilt(run.grads()))
        of_model, of_state = [weakref.ref(x) for x in run.model.values()], tensors_of(run.state)
        of_state = [weakref.ref(context_of(run.state["a"])), *map(weakref.ref, of_state)]
        update(run.state, run.model, run.grads())
        state = run.state
        assert context_of(state["a"]).late is not None
        del run
        assert not any(ref() is not None for ref in of_model)
        del state
        assert not any(ref() is not None for ref in of_state)
    finally:
        gc.enable()


# --- Beside what raises -------------------------------------------------------------------------------------------


def test_what_is_skipped_raises_nothing(monkeypatch: Any) -> None:
    like_a_device(monkeypatch)
    run = Run(OptimiserChain(ALL, ClipNorm(0.3), Adam(0.1))).step()
    update(run.state, run.model, spoilt(run.grads()))
    fluxpy.check_finite(run.state)
    assert run.step().state.a.count == 2


def test_what_raised_before_holds_all_back(monkeypatch: Any) -> None:
    like_a_device(monkeypatch)
    run = Run(OptimiserChain(ClipNorm(0.3), ALL, Adam(0.1))).step()
    before = values_of(run.model)
    update(run.state, run.model, spoilt(run.grads()))
    run.step(2)
    assert_alike(values_of(run.model), before)
    with pytest.raises(FloatingPointError, match="'d' is not finite, in update 1"):
        fluxpy.check_finite(run.state)
    run.step()
    assert not torch.equal(run.model["a"], before["a"])


def test_nothing_is_known_on_meta(monkeypatch: Any) -> None:
    model = nn.Linear(3, 2, device="meta")
    state = setup(CHAINS["Adam"], model)
    update(state, model, {name: torch.ones_like(x) for name, x in model.named_parameters()})
    assert state.weight.count == 1


class Nervous(fluxpy.rules.ReducingRule):
    over, elementwise = "array", True

    def steps(self, state: Any, x: Tensor, dx: Any) -> fluxpy.rules.Steps:
        total = yield fluxpy.rules.Reduce(self, dx, "skip")
        return state, dx / (1 + total.abs())


def test_release_cannot_skip(monkeypatch: Any) -> None:
    like_a_device(monkeypatch)
    model = nn.Linear(3, 2)
    state = setup(Nervous(), model)
    loss = lambda m, x: (m(x).sum() * 0).abs().sqrt()  # noqa: E731  # a loss of 0, whose gradient is not finite
    with pytest.raises(RuntimeError, match="the whole update cannot be skipped"):
        fluxpy.trainstep(loss, model, torch.ones(1, 3), state, release=True)
    assert state.weight.count == state.bias.count == 0


def test_release_after_a_skip(monkeypatch: Any) -> None:
    """A step within the backward pass does not begin before it is known what came before."""

    def outcome() -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
        state = setup(OptimiserChain(EACH, Adam(0.1)), model)
        for x, fine in batches()[:3]:
            fluxpy.trainstep(lambda m, x, fine: rough(m(x), fine), model, (x, fine), state)
        adjust(state, nonfinite="raise")
        fluxpy.trainstep(lambda m, x: m(x).square().mean(), model, batches()[3][:1], state, release=True)
        return image(state, model)

    at_once = outcome()
    like_a_device(monkeypatch)
    assert_alike(outcome(), at_once, 1e-10)


def test_within_a_compiled_region(monkeypatch: Any) -> None:
    """What is not known yet there is of an update before it: it is read, at a break of the graph."""
    torch.compiler.reset()  # of what other tests compiled, which counts towards a limit
    like_a_device(monkeypatch)
    run = Run({"a": OptimiserChain(ALL, Adam(0.1)), "*": Adam(0.1)}).step()
    update(run.state, run.model, spoilt(run.grads(), "a"))
    step = lambda dx: update(run.state["b"], run.model["b"], dx) and None  # noqa: E731
    torch.compile(step, backend="eager")(run.grads()["b"])
    assert (run.state.a.count, run.state.b.count) == (1, 2)


# --- In loops -----------------------------------------------------------------------------------------------------


def batches() -> list[Any]:
    """Of the third and the sixth the loss is finite, and the gradient is not."""
    g = torch.Generator().manual_seed(0)
    inside = [torch.tensor(float(i not in (2, 5)), dtype=torch.float64) for i in range(8)]
    return [(torch.randn(4, 3, generator=g, dtype=torch.float64), fine) for fine in inside]


def rough(y: Tensor, fine: Tensor) -> Tensor:
    return y.square().mean() + (fine * y.sum()).abs().sqrt()


def by_train(rule: Any, model: nn.Module) -> Any:
    state = setup(rule, model)
    fluxpy.train(lambda m, x, fine: rough(m(x), fine), model, batches(), state)
    return state


def by_learner(rule: Any, model: nn.Module) -> Any:
    learner = Learner(model, rough, rule)
    learner.fit(batches())
    return learner.state


def by_torch(rule: Any, model: nn.Module) -> Any:
    optimizer = TorchOptimizer(rule, model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if not callable(rule[1].lr) else None
    for x, fine in batches():
        optimizer.zero_grad()
        rough(model(x), fine).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return optimizer.tree


def test_a_whole_step_reads_nothing(monkeypatch: Any) -> None:
    like_a_device(monkeypatch)
    model = nn.Linear(3, 2).double()
    state = setup(CHAINS["Adam"], model)
    with nothing_read():
        for batch in batches():
            fluxpy.trainstep(lambda m, x, fine: rough(m(x), fine), model, batch, state)
    assert state.weight.count == 6


class Unscale(Rule):
    scale: float
    elementwise = True

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        return state, dx / self.scale


@pytest.mark.parametrize("layout", ["apart", "flat"])
def test_a_scaled_loss_in_float16(layout: str, monkeypatch: Any) -> None:
    """The loop of the docs: it looks at the count between gradient and update, and reads nothing else."""

    def outcome(quiet: bool) -> tuple[float, list[int], dict[str, Any]]:
        checked = ClipGlobalNorm(math.inf, nonfinite="skip")
        rule = MixedPrecision(OptimiserChain(checked, Unscale(2.0**24), ClipGlobalNorm(1.0), Adam(0.05)))
        run = Run(rule, layout, dtype=torch.float16)
        scale, before, counts, first = 2.0**24, -1, [], run.state.a
        for turn in range(30):
            grads = {name: (dx.float() * scale).half() for name, dx in grads_of(run.model, turn).items()}
            with nothing_read() if quiet else contextlib.nullcontext():
                count = first.count
                update(run.state, run.model, grads)
                if count == before:
                    scale = scale / 2
                    adjust(run.state, scale=scale)
                before = count
            counts.append(count)
        return scale, counts, run.image()

    at_once = outcome(False)
    like_a_device(monkeypatch)
    late = outcome(True)
    assert late[:2] == at_once[:2] and late[0] < 2.0**17 and 10 < late[1][-1] < 25
    assert_alike(late[2], at_once[2], 1e-3)


@pytest.mark.parametrize("loop", [by_train, by_learner, by_torch])
@pytest.mark.parametrize("inner", [Adam(0.05), AdamW(falling)])
def test_loops(loop: Callable[[Any, Any], Any], inner: Rule, monkeypatch: Any) -> None:
    def outcome() -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
        return image(loop(OptimiserChain(ALL, inner), model), model)

    at_once = outcome()
    assert at_once["leaf weight"][2] == 6
    like_a_device(monkeypatch)
    assert_alike(outcome(), at_once, 1e-10)

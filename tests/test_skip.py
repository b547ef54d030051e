"""nonfinite="skip" on a device: the device skips, the host goes on, and learns of it before anyone looks.

The CPU, which knows at once, is the oracle; so is a run that never saw the bad gradients.
"""

import contextlib
import copy
import math
import pickle
import random
import tempfile
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
from fluxpy.context import Late, require_finite
from fluxpy.interop import TorchOptimizer
from fluxpy.leaf import context_of, record_of

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
    "followed": Averaged(OptimiserChain(ALL, AdamW(falling)), decay=0.6),
    "followed, eager": OptimiserChain(ALL, Averaged(RMSProp(0.02), decay=0.6)),
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
FEW = ["Adam", "gathers what is clipped", "master", "followed", "own", "whole", "lazy", "by name"]
few_chains = pytest.mark.parametrize("rule", [CHAINS[name] for name in FEW], ids=FEW)
MATRICES = {"a": (4, 3), "b": (7, 2), "c": (2, 2), "d": (4, 3), "e": (6, 3)}


def run_of(rule: Any, layout: str = "apart", **options: Any) -> Run:
    inner = [rule] if isinstance(rule, Rule) else [*rule.values()]
    of_matrices = any(isinstance(r, Muon) for outer in inner for r in fluxpy.rule.walk(outer))
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
@pytest.mark.parametrize("seed", range(3))
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
        for event in (Step(0, ("b", math.inf)), Step(1, ("b", math.inf)), reset, Step(2), Step(3), reset, Step(4, ("a",))):
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
    surgery.grow(state["a"], model["a"], torch.ones(2, 3, dtype=torch.float64))


def taken(state: Any, model: Any) -> None:
    surgery.take(state["a"], model["a"], [2, 0])


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
    **{name: CHAINS[name] for name in ("AdamW, a schedule", "gathers what is clipped", "master", "followed", "whole")},
    "Prodigy": CHAINS["Prodigy"],
}


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS.keys())
@pytest.mark.parametrize("rule", OBSERVED.values(), ids=OBSERVED.keys())
def test_whoever_looks_after_a_skipped_update_sees_what_the_cpu_shows(
    rule: Any, observer: Callable[[Any, Any], Any], monkeypatch: Any
) -> None:
    story: Story = [Step(0), lambda state, model: freeze(state["e"]), Step(1), Step(2, ("d",)), Step(3), Step(4, ("b",))]

    def outcome() -> Any:
        shapes = MATRIX if observer in (grown, taken) else SHAPES
        run = told(Run(rule, shapes=shapes), story)
        seen = observer(run.state, run.model)
        first = run.image()
        for turn in (11, 12):
            update(run.state, run.model, {name: dx.to(run.model[name]) for name, dx in grads_of(run.model, turn).items()})
        return seen, first, run.image()

    at_once = outcome()
    like_a_device(monkeypatch)
    late = outcome()
    room = 1e-4 if observer is widened else 1e-9
    ours, theirs = (optree.tree_leaves(x, none_is_leaf=True, namespace="fluxpy") for x in (late, at_once))
    assert len(ours) == len(theirs)
    assert_alike(dict(enumerate(ours)), dict(enumerate(theirs)), room)

"""The engine: whatever path an update takes, and whatever happens between updates, its numbers are a pure one's."""

import copy
import pickle
import re
import sys
import textwrap
import warnings
import weakref
from typing import Any, NamedTuple

import optree
import pytest
import torch
from helpers import like_a_device, needs_compiler
from rule_table import ROWS
from scripts import run_script
from torch import nn

import fluxpy
from fluxpy import (
    AccumGrad,
    AdaGrad,
    Adam,
    AdamW,
    AMSGrad,
    ClipGlobalNorm,
    ClipGrad,
    ClipNorm,
    Descent,
    Lion,
    MixedPrecision,
    Momentum,
    NAdam,
    Nesterov,
    OptimiserChain,
    RMSProp,
    Rule,
    SignDecay,
    WeightDecay,
    adjust,
    flatten_parameters,
    freeze,
    leaves,
    reset,
    setup,
    thaw,
    trainables,
    update,
    value,
)  # fmt: skip
from fluxpy.engine import kernels, layout
from fluxpy.engine.packed import EagerUnit
from fluxpy.engine.reference import ReferenceUnit
from fluxpy.rule import title_key
from fluxpy.state import tree_bindings, tree_context

SHAPES = [(4, 3), (7,), (), (2, 1, 3), (0,), (1,), (5, 2)]


class Own(Rule):
    """A user's elementwise rule: memory of the gradient's sign, with a state of a tensor and a number."""

    lr: float = 0.01
    decay: float = 0.8
    elementwise = True

    def init(self, x):
        return {"m": torch.zeros_like(x), "t": 0}

    def apply(self, state, x, dx):
        m = self.decay * state["m"] + (1 - self.decay) * dx
        return {"m": m, "t": state["t"] + 1}, self.lr * m.tanh() / (1 - self.decay ** (state["t"] + 1))


class Whole(Rule):
    """A user's rule that needs the whole array."""

    lr: float = 0.01

    def init(self, x):
        return torch.zeros_like(x)

    def apply(self, state, x, dx):
        state = 0.9 * state + dx
        return state, self.lr * state / (state.norm() + 1e-3)


class Keeper(Rule):
    """Keeps the parameter and the gradient as they were, and lets its two buffers change places."""

    lr: float = 0.01
    elementwise = True

    def init(self, x):
        return torch.zeros_like(x), torch.zeros_like(x), torch.ones_like(x), 2 * torch.ones_like(x)

    def apply(self, state, x, dx):
        old_x, old_dx, a, b = state
        return (x, dx, b, a), self.lr * (dx + 0.1 * old_dx + 0.1 * (x - old_x) + 0.01 * a)


class Writes(Rule):
    """Written as people write PyTorch: in place, on tensors of its own."""

    lr: float = 0.01
    elementwise = True

    def init(self, x):
        return torch.zeros_like(x)

    def apply(self, state, x, dx):
        m = state * 0.9
        m.add_(dx, alpha=0.1)
        change = m.abs()
        change.sqrt_()
        change *= self.lr
        return m, change * m.sign()


class Lazy(Rule):
    """Makes its state at the first step only."""

    lr: float = 0.01
    elementwise = True

    def init(self, x):
        return None

    def apply(self, state, x, dx):
        state = dx.clone() if state is None else 0.9 * state + dx
        return state, self.lr * state


FUSED = ["Descent", "Momentum", "Nesterov", "Adam", "AdamW", "AMSGrad", "AdaGrad", "OptimiserChain"]
NATIVE = {
    **{name: ROWS[name].rule for name in FUSED},
    "clip each, penalty, AdamW": OptimiserChain(ClipNorm(0.5), WeightDecay(0.1), AdamW(0.01)),
    "clip all, Adam": OptimiserChain(ClipGlobalNorm(0.5), Adam(0.01)),
    "clip all, penalty, AMSGrad": OptimiserChain(ClipGlobalNorm(0.5), WeightDecay(0.1), AMSGrad(0.01)),
    "penalty, clip all, AdaGrad": OptimiserChain(WeightDecay(0.1), ClipGlobalNorm(0.5), AdaGrad(0.1)),
    "penalty, Nesterov": OptimiserChain(WeightDecay(0.1), Nesterov(0.01)),
    "two clips, Momentum": OptimiserChain(ClipNorm(0.9), ClipGrad(0.3), ClipGlobalNorm(0.5), Momentum(0.1)),
    "global clips, Descent": OptimiserChain(ClipGlobalNorm(0.9), SignDecay(0.1), ClipGlobalNorm(0.5), Descent(0.1)),
    "p-norm, Adam": OptimiserChain(ClipGlobalNorm(0.5, norm_type=3.0), ClipNorm(0.2, norm_type=float("inf")), Adam()),
}
FLAT = {
    **{name: row.rule for name, row in ROWS.items() if name not in NATIVE and not row.matrices},
    "clip all, Lion": OptimiserChain(ClipGlobalNorm(0.5), Lion(0.01)),
    "clip each, penalty, RMSProp": OptimiserChain(ClipNorm(0.5), WeightDecay(0.1), RMSProp(0.01)),
    "Adam, clip all": OptimiserChain(Adam(0.1), ClipGlobalNorm(0.05)),
    "Adam, clip each": OptimiserChain(Adam(0.1), ClipNorm(0.05)),
    "clip all, gather, Adam": OptimiserChain(ClipGlobalNorm(0.5), AccumGrad(3), Adam(0.01)),
    "gather, clip all, NAdam": OptimiserChain(AccumGrad(3), ClipGlobalNorm(0.5), NAdam(0.01)),
    "gather, AdamW": OptimiserChain(AccumGrad(3), AdamW(0.01)),
    "mixed chain": MixedPrecision(
        OptimiserChain(ClipGlobalNorm(0.5), WeightDecay(0.1), Adam(0.01)), dtype=torch.float64
    ),
    "own": Own(),
    "own in a chain": OptimiserChain(ClipGlobalNorm(0.5), WeightDecay(0.1), Own()),
    "keeper": Keeper(),
    "writes": Writes(),
}
PLAIN = {"whole": Whole(), "whole in a chain": OptimiserChain(ClipGlobalNorm(0.5), Whole(), Own()), "lazy": Lazy()}
NUMBERS = {**NATIVE, **FLAT, **PLAIN}
# How leaves of a rule are stepped, where that is not by a fused kernel or by the rule's own arithmetic.
WANTED: dict[str, set[str]] = {
    "whole": set(),
    "whole in a chain": set(),
    "lazy": set(),
    "Adafactor": set(),
    "Averaged": {"Shadow"},
    "Lookahead": {"Shadow"},
}
WANTED |= {name: {"Fused"} for name in ("AccumGrad", "clip all, gather, Adam", "gather, AdamW")}


def paths_of(state):
    """The engine's paths that the leaves took last."""
    found = set()
    for binding in tree_bindings(state).values():
        for unit in binding.plan.route.units if binding.plan and binding.plan.route else ():
            if isinstance(unit, EagerUnit) and unit.stack:
                found.add("Stack")
            elif not isinstance(unit, ReferenceUnit) or unit.x.numel():
                found.add(type(unit).__name__.removesuffix("Unit").removesuffix("List"))
    return found


def model_of(shapes=SHAPES, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return nn.ParameterList(nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes)


class Pair:
    """A model updated in place, and its twin that only pure updates touch."""

    def __init__(self, rule, column="apart", shapes=SHAPES, dtype=torch.float64, model=None):
        self.model = model_of(shapes, dtype) if model is None else model
        self.twin = copy.deepcopy(self.model)
        self.state = setup(rule, self.model, compile=column == "compiled")
        self.pure = setup(rule, self.twin)
        for _, leaf in leaves(self.pure):  # leaf by leaf: else the engine would be compared with itself
            tree_context(self.pure).reference_only.add(title_key(leaf.rule))
        self.column, self.turn = column, 0
        if column.startswith("flat"):
            flatten_parameters(self.model, grad="grads" in column)
        self.start = [x.detach().clone() for x in trainables(self.model)]

    def grads(self):
        g = torch.Generator().manual_seed(1000 + self.turn)
        named = trainables(self.twin, path=True)
        return {name: torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for name, x in named}

    def step(self, times=1, change=None, branch=None):
        for _ in range(times):
            grads = self.grads()
            if change is not None:
                grads = change(grads)
            self.turn += 1
            if "grads" in self.column and all(v is not None for v in grads.values()) and branch is None:
                for x, dx in zip(self.model, grads.values(), strict=True):
                    x.grad.copy_(dx)
                update(self.state, self.model)
            elif branch is None:
                update(self.state, self.model, grads)
            else:
                part = {k.removeprefix(f"{branch}."): v for k, v in grads.items() if k.startswith(f"{branch}.")}
                update(self.state[branch], self.model[branch], part)
                held = {k: (v if k.startswith(f"{branch}.") else None) for k, v in grads.items()}
                self.pure, self.twin = update(self.pure, self.twin, held, inplace=False)
                continue
            self.pure, self.twin = update(self.pure, self.twin, grads, inplace=False)
        return self

    def both(self, verb, *where, **values):
        for state in (self.state, self.pure):
            if where:
                state = fluxpy.select(state, where[0])
            verb(state, **values)
        return self

    def check(self, room=1e-12):
        """Relative to how far each parameter went; momenta relative to the largest number in them."""
        pairs = zip(trainables(self.model, path=True), trainables(self.twin), self.start, strict=True)
        for (name, x), y, was in pairs:
            if x.numel():
                x, y = x.detach().double(), y.detach().double()
                eps = torch.finfo(was.dtype).eps
                allowed = room * (y - was.double()).abs().max() + 8 * eps * y.abs().max()
                assert (x - y).abs().max() <= allowed, (name, self.turn, (x - y).abs().max(), allowed)
        for (name, leaf), (_, other) in zip(leaves(self.state), leaves(self.pure), strict=True):
            assert leaf.count == other.count, name
            mine, theirs = (optree.tree_flatten(z.state, none_is_leaf=True, namespace="fluxpy") for z in (leaf, other))
            assert mine[1] == theirs[1], name
            for a, b in zip(mine[0], theirs[0], strict=True):
                if isinstance(a, torch.Tensor):
                    assert a.dtype == b.dtype and a.shape == b.shape, name
                    if a.numel():
                        assert (a - b).abs().max() <= 4 * room * b.abs().max(), (name, self.turn, a, b)
                else:
                    assert a == b, (name, a, b)
        return self


@pytest.fixture(params=["whole", "cut"])
def size(request, monkeypatch):
    """Pieces as they are, and so small that leaves are cut."""
    if request.param == "cut":
        small_pieces(monkeypatch)


def small_pieces(monkeypatch, size=6):
    monkeypatch.setattr(layout, "SIZE", size)


# --- The matrix ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["apart", "flat", "flat grads"])
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.usefixtures("size")
def test_every_path_gives_the_plain_paths_numbers(name, column):
    rule = NUMBERS[name]
    pair = Pair(rule, column).step(20).check()
    if column == "apart":
        assert paths_of(pair.state) - {"Reference"} == WANTED.get(name, {"Fused" if name in NATIVE else "Eager"})
    else:
        assert {x.untyped_storage().data_ptr() for x in pair.model if x.numel()} == {
            pair.model[0].untyped_storage().data_ptr()
        }
    Pair(rule, column, dtype=torch.float32).step(8).check(2e-5)


COMPILED = {"clip all, Adam": NATIVE["clip all, Adam"], "own": OptimiserChain(Writes(0.1), Keeper(0.1))}


@needs_compiler
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_updates_give_the_plain_paths_numbers(name, monkeypatch):
    shapes = [s for s in SHAPES if s not in ((), (1,), (0,))]
    made = len(kernels._KERNELS)
    pair = Pair(COMPILED[name], "compiled", shapes).step(20).check()
    pair.both(adjust, lr=0.05).both(adjust, lr=lambda count: 0.1 / count).step(3).check()
    assert paths_of(pair.state) == {"Compiled"} and len(kernels._KERNELS) - made == 1
    small_pieces(monkeypatch)
    other = Pair(COMPILED[name], "compiled", [(3, 3), (2,), (2, 2), (11,)]).step(5).check()
    assert paths_of(other.state) == {"Compiled"} and len(kernels._KERNELS) - made == 1


def broken_compiler(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(kernels, "_KERNELS", {})


@pytest.mark.parametrize("rule", [AdamW(0.01), Own(), OptimiserChain(ClipGlobalNorm(0.5), Lion(0.01))])
def test_without_a_compiler_there_is_one_warning_and_the_same_numbers(monkeypatch, rule):
    broken_compiler(monkeypatch)
    pair = Pair(rule, "compiled")
    with pytest.warns(UserWarning, match=r"without being compiled: no compiler here") as seen:
        pair.step(5)
    assert len(seen) == 1
    pair.both(adjust, "0", lr=0.3).step(5).both(freeze, "1").step(2).both(thaw).both(reset).step(5).check()
    assert "Compiled" not in paths_of(pair.state)


@pytest.mark.parametrize("rule", [Lazy(), Whole()])
def test_what_cannot_be_compiled_goes_another_way(rule):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = Pair(rule, "compiled").step(4).check()
    assert "Compiled" not in paths_of(pair.state)


# --- Between steps ------------------------------------------------------------------------------------------------

ROUTES = {
    "native": AdamW(0.02),
    "native chain": OptimiserChain(WeightDecay(0.1), ClipGlobalNorm(0.5), Adam(0.02)),
    "clips each": OptimiserChain(ClipNorm(0.5), Momentum(0.02)),
    "flat": RMSProp(0.02),
    "gathers": OptimiserChain(AccumGrad(2), ClipGlobalNorm(0.5), Momentum(0.1)),
    "own": OptimiserChain(ClipGlobalNorm(0.5), Own()),
    "plain": Whole(),
}
every_route = pytest.mark.parametrize("rule", ROUTES.values(), ids=ROUTES.keys())
COLUMNS = ["apart", "flat", "flat grads"]


@every_route
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.usefixtures("size")
def test_the_verbs_between_steps(rule, column):
    pair = Pair(rule, column).step(3)
    pair.both(freeze, "1").step(2).check()
    pair.both(adjust, "0", lr=0.3).step(2).both(adjust, "[35]", lr=0.1).step(2).check()
    pair.both(adjust, lr=fluxpy.scale(0.5)).step(2).both(thaw).step(2).check()
    pair.both(reset, "3").step(2).check()
    pair.both(adjust, lr=lambda count: 0.1 / (1 + count)).step(3).check()  # the counts differ now
    pair.both(adjust, lr=0.05).both(reset).step(3).check()
    pair.both(freeze).step(2).both(thaw, "[01]").step(2).both(thaw).step(4).check()


@every_route
@pytest.mark.usefixtures("size")
def test_gradients_that_are_missing_now_and_then(rule):
    pair = Pair(rule)
    for i in range(12):
        pair.step(change=lambda g, i=i: {k: None if (int(k) + i) % 4 == 0 and i > 2 else v for k, v in g.items()})
        pair.step(change=lambda g, i=i: {k: v for k, v in g.items() if int(k) != i % 5})
        pair.check()


@every_route
@pytest.mark.usefixtures("size")
def test_gradients_of_other_strides(rule):
    def transposed(grads):
        return {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in grads.items()}

    def expanded(grads):
        return {k: v.reshape(-1)[:1].expand(v.numel()).view(v.shape) if v.numel() else v for k, v in grads.items()}

    def strided(grads):
        return {k: torch.stack([v, v + 1], -1)[..., 0] for k, v in grads.items()}

    for column in ("apart", "flat"):
        pair = Pair(rule, column)
        for change in (None, transposed, expanded, strided, expanded, None):
            pair.step(2, change).check()
        Pair(rule, column).step(3, expanded).check()


@every_route
def test_parameters_of_other_strides(rule):
    model = nn.ModuleList([nn.Conv2d(3, 2, 2), nn.Conv2d(2, 3, 2), nn.Linear(3, 2)]).double()
    model.to(memory_format=torch.channels_last)
    model[2].weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64).t())
    pair = Pair(rule, model=model).step(3).check()
    last = {"0.weight", "1.weight"}
    pair.step(3, lambda g: {k: v.to(memory_format=torch.channels_last) if k in last else v for k, v in g.items()})
    assert pair.check().model[0].weight.is_contiguous(memory_format=torch.channels_last)
    flatten_parameters(pair.model)
    pair.step(3).check()


@every_route
@pytest.mark.usefixtures("size")
def test_parameters_that_move(rule):
    pair = Pair(rule).step(2)
    flatten_parameters(pair.model)
    pair.step(2).check()
    pair.model[0].data = pair.model[0].detach().clone()  # out of the buffer
    pair.step(2).check()
    for x in pair.model:
        x.data = x.detach().clone()
    pair.step(2).check()
    flatten_parameters(pair.model, grad=True)
    pair.column = "flat grads"
    pair.step(2).check()
    pair.model[1] = nn.Parameter(pair.model[1].detach().clone())  # another object
    pair.column = "apart"
    pair.step(2).check()
    pair.model.load_state_dict({k: v + 1 for k, v in pair.model.state_dict().items()})
    pair.twin.load_state_dict({k: v + 1 for k, v in pair.twin.state_dict().items()})
    pair.start = [x + 1 for x in pair.start]
    pair.step(2).check()
    pair.model.float()
    with pytest.raises(ValueError, match=r"'0' was 4x3 float64 at setup and is now 4x3 float32|does not fit the state"):
        update(pair.state, pair.model, {k: v.float() for k, v in pair.grads().items()})
    pair.model.double()
    for x, y in zip(pair.model, pair.twin, strict=True):
        x.data.copy_(y.detach())
    pair.step(2).check()


@every_route
def test_parameters_that_move_there_and_back_while_gradients_change(rule):
    """Each set of gradients has a plan of its own, which sees only some of the moves; all step the same parameters."""
    pair = Pair(rule).step(3)
    homes = [x.data for x in pair.model]
    aways = [x.detach().clone() for x in pair.model]
    half = {str(i) for i in range(len(homes) // 2)}
    kinds = [None, lambda g: {k: v if k in half else None for k, v in g.items()}]
    pair.step(3, kinds[1]).check()
    for places in (aways, homes, aways, homes):
        for kind in (*kinds, kinds[0]):
            for x, place in zip(pair.model, places, strict=True):
                if place is not x.data:
                    place.copy_(x.detach())
                x.data = place
            pair.step(1, kind).check()
            other = aways if places is homes else homes
            for place in other:  # what is not the model's any more
                place.fill_(float("nan"))
    assert all(x.data_ptr() == home.data_ptr() for x, home in zip(pair.model, homes, strict=True))


@every_route
def test_parameters_may_be_swapped(rule):
    """`module.to()` does so with `set_swap_module_params_on_conversion`; it refuses where somebody else has a hold of
    them, and a plan that did would keep the old ones alive."""
    pair = Pair(rule).step(3)
    for x in pair.model:
        torch.utils.swap_tensors(x, nn.Parameter(x.detach().clone()))
    pair.step(3).check()


def test_a_flat_model_that_is_flat_in_part():
    """A large leaf lies elsewhere, the small ones side by side."""
    for rule in ROUTES.values():
        model = nn.ModuleList([model_of([(2 * layout.SIZE,)]), model_of([(3, 2), (4,), (5, 1)])])
        flatten_parameters(model[1])
        Pair(rule, model=model).step(3).check()


@pytest.mark.parametrize("column", COLUMNS)
@every_route
def test_a_state_loaded_copied_or_pickled_in_the_middle(rule, column):
    pair = Pair(rule, column).step(3)
    kept = copy.deepcopy(fluxpy.state_dict(pair.state))
    values = [x.detach().clone() for x in trainables(pair.model)]
    for copied in (copy.deepcopy(pair.state), pickle.loads(pickle.dumps(pair.state))) if rule != Own() else ():
        other = copy.copy(pair)
        other.model, other.state = copy.deepcopy(pair.model), copied
        other.column = "apart"
        other.step(3).check()
        assert all(torch.equal(x, y) for x, y in zip(trainables(pair.model), values, strict=True))
    pair.step(2).check()
    fluxpy.load_state_dict(pair.state, kept)
    with torch.no_grad():
        for x, was in zip(pair.model, values, strict=True):
            x.copy_(was)
    again = Pair(rule, column).step(3)
    pair.twin, pair.pure, pair.turn = again.twin, again.pure, again.turn
    pair.step(3).check()
    new = setup(Descent(), pair.model, keep=pair.state)
    held = [t for t in optree.tree_leaves(new, namespace="fluxpy")]
    assert len({t.data_ptr() for t in held if t.numel()}) == sum(t.numel() > 0 for t in held)
    pair.state = new
    pair.step(2).check()


def test_keep_does_not_copy_the_whole_buffer_for_each_leaf():
    model = model_of([(10,)] * 20)
    flatten_parameters(model)
    state = setup(Adam(), model)
    update(state, model, {str(i): torch.ones_like(x) for i, x in enumerate(model)})
    held = optree.tree_leaves(setup(Adam(), model, keep=state), namespace="fluxpy")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert sum(storages.values()) <= 2 * sum(t.nbytes for t in held)


@every_route
@pytest.mark.parametrize("laid", [False, True])
def test_branches_and_the_whole_in_turn(rule, laid):
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))}).double()
    pair = Pair(rule, model=flatten_parameters(model) if laid else model)
    clips = isinstance(rule, OptimiserChain) and any(isinstance(r, AccumGrad) for r in rule.rules)
    for branch in (None, "a", "b", None, None, "a", "a", None):
        if not (clips and branch):  # there the window counts updates of the whole
            pair.step(2, branch=branch).check()


def test_one_leaf_or_many_views_leave_nothing_behind():
    model = nn.Linear(3, 2).double()
    state = setup(Adam(), model)
    for _ in range(40):
        update(state.weight, model.weight, torch.ones_like(model.weight))
    assert state.weight.state.t == 40 and len(tree_bindings(state)) < 20


@every_route
def test_two_models_in_turn(rule):
    pair, other = Pair(rule), Pair(rule)
    for _ in range(3):
        pair.step(2), other.step(1)
    pair.check(), other.check()
    a, b = model_of(), model_of(seed=1)
    twins = copy.deepcopy(a), copy.deepcopy(b)
    state, pure = setup(rule, a), setup(rule, a)
    for i in range(6):
        grads = Pair(rule).grads()
        update(state, (a, b)[i % 2], grads)
        pure, new = update(pure, twins[i % 2], grads, inplace=False)
        for x, y in zip(twins[i % 2], new, strict=True):
            x.data = y.detach()
    for x, y in zip((*a, *b), (*twins[0], *twins[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@every_route
@pytest.mark.parametrize("laid", [False, True])
def test_ties_and_several_dtypes(rule, laid):
    model = nn.ModuleList([nn.Linear(3, 3).double(), nn.Linear(3, 3), nn.Linear(3, 3).double(), nn.Linear(3, 3)])
    model[2].weight, model[3].bias = model[0].weight, model[1].bias
    model.append(nn.Linear(2, 2).bfloat16())
    pair = Pair(rule, model=model)
    if laid:
        flatten_parameters(pair.model)
    pair.step(6)
    assert pair.model[2].weight is pair.model[0].weight and pair.state[2].weight is pair.state[0].weight
    for x, y in zip(trainables(pair.model), trainables(pair.twin), strict=True):
        # A norm over all is one of float32 where some are in it.
        room = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}[x.dtype]
        torch.testing.assert_close(x, y, rtol=room, atol=room)


@pytest.mark.parametrize("rule", [Adam, RMSProp, Own, Lion])
@pytest.mark.usefixtures("size")
def test_schedules_by_the_count_of_each_leaf(rule):
    pair = Pair(
        OptimiserChain(
            WeightDecay(lambda count: 0.1 * count), ClipGlobalNorm(0.7), rule(lr=lambda count: 0.1 / (1 + count))
        )
    )
    pair.step(3, lambda g: {k: v for k, v in g.items() if k in "013"}).step(3).check()
    for (_, leaf), (_, other) in zip(leaves(pair.state), leaves(pair.pure), strict=True):
        assert value(leaf, "lr") == value(other, "lr") == 0.1 / (1 + other.count)


@every_route
def test_a_leaf_looked_at_in_the_middle_of_training(rule):
    pair = Pair(rule)
    lr = rule.lr
    for i in range(6):
        pair.step()
        leaf, other = pair.state[i % 4], pair.pure[i % 4]
        assert leaf.count == other.count and value(leaf, "lr") == lr
        found = optree.tree_leaves(leaf.state, namespace="fluxpy")
        for a, b in zip(found, optree.tree_leaves(other.state, namespace="fluxpy"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14) if isinstance(a, torch.Tensor) else None
            assert isinstance(a, torch.Tensor) or a == b
    pair.check()


# --- Promises on every path ---------------------------------------------------------------------------------------


@every_route
@pytest.mark.parametrize("column", COLUMNS)
def test_gradients_are_read_and_let_go(rule, column):
    pair = Pair(rule, column)
    for _ in range(3):
        grads = pair.grads()
        before = {k: v.clone() for k, v in grads.items()}
        versions = {k: v._version for k, v in grads.items()}
        update(pair.state, pair.model, grads)
        assert all(torch.equal(grads[k], before[k]) and grads[k]._version == versions[k] for k in grads)
        if not (isinstance(rule, OptimiserChain) and isinstance(rule[0], AccumGrad)):
            refs = [weakref.ref(v) for v in grads.values()]
            del grads
            assert not any(ref() is not None for ref in refs)


@every_route
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.usefixtures("size")
def test_autograd_sees_that_parameters_were_written(rule, column):
    pair = Pair(rule, column)
    for _ in range(3):
        losses = [(x * x).sum() for x in pair.model]
        pair.step(2)
        for i, loss in enumerate(losses):
            if pair.model[i].numel():
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()


@every_route
@pytest.mark.parametrize("column", ["apart", "flat"])
def test_modes_of_autograd(rule, column):
    pair = Pair(rule, column)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            grads = pair.grads()
            update(pair.state, pair.model, grads)
        with torch.no_grad():
            pair.turn += 1
            grads = {k: v.clone() for k, v in grads.items()}
        pair.pure, pair.twin = update(pair.pure, pair.twin, grads, inplace=False)
    pair.check()
    assert not any(t.is_inference() for t in optree.tree_leaves(pair.state, namespace="fluxpy"))
    assert all(x.is_leaf and x.requires_grad for x in pair.model)


def test_inside_torch_func():
    """In a transform nothing is kept from one step to the next."""
    pair = Pair(Adam(0.1)).step(2)
    model = {"w": torch.randn(3, dtype=torch.float64)}
    state = setup(Momentum(0.1), model)
    update(state, model, {"w": torch.ones(3, dtype=torch.float64)})

    def after(x):
        copied, new = copy.deepcopy(state), {"w": x * 1}
        _, new = update(copied, new, {"w": x.cos()})
        return x.square().sum(), new["w"]

    x = torch.randn(3, dtype=torch.float64)
    _, new = torch.func.grad(after, has_aux=True)(x)
    torch.testing.assert_close(new, x - 0.1 * (0.9 + x.cos()))
    update(state, model, {"w": torch.ones(3, dtype=torch.float64)})
    assert state.w.state.shape == (3,) and state.w.count == 2
    pair.step(2).check()


@pytest.mark.parametrize("backend", ["eager"])
def test_inside_torch_compile(backend):
    pair = Pair(Adam(0.1), shapes=[(3,), (2, 2)]).step(2)
    torch._dynamo.reset()

    @torch.compile(backend=backend)
    def step(grads):
        update(pair.state, pair.model, grads)

    for _ in range(2):
        grads = pair.grads()
        pair.turn += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo's own
            step(grads)
        pair.pure, pair.twin = update(pair.pure, pair.twin, grads, inplace=False)
    pair.step(2).check()


class Picky(Rule):
    """Elementwise, but raises at a large gradient, or in `init` at a tensor of three."""

    lr: float = 0.01
    at_init: bool = False
    elementwise = True

    def init(self, x):
        if self.at_init and x.shape == (3,) and Picky.armed:
            raise ArithmeticError("not this one")
        return torch.zeros_like(x)

    def apply(self, state, x, dx):
        if dx.abs().max() > 100:
            raise ArithmeticError("too much")
        return state + dx, self.lr * dx

    armed = False


def everything(state, model):
    tensors = [*trainables(model), *optree.tree_leaves(state, namespace="fluxpy")]
    return [(leaf.rule, leaf.frozen, leaf.count, leaf.state is None) for _, leaf in leaves(state)], [
        t.detach().clone() for t in tensors if isinstance(t, torch.Tensor)
    ]


def unchanged(before, after):
    return (
        before[0] == after[0]
        and len(before[1]) == len(after[1])
        and all(torch.equal(x, y) for x, y in zip(before[1], after[1], strict=True))
    )


@pytest.mark.parametrize("column", ["apart", "flat"])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.usefixtures("size")
def test_a_users_rule_that_raises_changes_nothing(column, fresh):
    for rule in (Picky(), OptimiserChain(ClipGlobalNorm(1e9), Adam(0.01), Picky())):
        for bad in range(4):
            pair = Pair(rule, column, [(3, 2), (4,), (), (9,)])
            if not fresh:
                pair.step(2)
            else:
                pair.both(reset)
            before = everything(pair.state, pair.model)
            rule_scale = 1e6 if isinstance(rule, Picky) else None
            if rule_scale is None:
                pair.both(adjust, lr=1e9)
                before = everything(pair.state, pair.model)
            grads = pair.grads()
            grads[str(bad)] = grads[str(bad)] * (rule_scale or 1)
            with pytest.raises(ArithmeticError, match="too much") as error:
                update(pair.state, pair.model, grads)
            assert "parameter" in "".join(error.value.__notes__)
            assert unchanged(before, everything(pair.state, pair.model))
            pair.both(adjust, lr=0.01).step(3).check()


def test_an_init_that_raises_changes_nothing(monkeypatch):
    pair = Pair(Picky(at_init=True), shapes=[(2,), (3,), (4,)]).step(1).both(reset)
    monkeypatch.setattr(Picky, "armed", True)
    before = everything(pair.state, pair.model)
    with pytest.raises(ArithmeticError, match="not this one"):
        update(pair.state, pair.model, pair.grads())
    assert unchanged(before, everything(pair.state, pair.model))
    monkeypatch.setattr(Picky, "armed", False)
    pair.step(2).check()


@pytest.mark.parametrize("rule", [Adam(0.1), RMSProp(0.1), Own()])
@pytest.mark.parametrize("clip", [ClipNorm, ClipGlobalNorm])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.usefixtures("size")
def test_norms_that_are_not_finite(rule, clip, nonfinite):
    """Also for leaves whose momenta were made by this plan: they are not forgotten at the next bad gradient."""
    for column in ("apart", "flat"):
        pair = Pair(OptimiserChain(clip(0.5, nonfinite=nonfinite), rule), column).step(2).both(reset)
        for good in (0, 2, 1):
            pair.step(good).check()
            before = everything(pair.state, pair.model)
            for bad in (float("nan"), float("inf")):
                grads = pair.grads()
                grads["3"][1, 0, 2] = bad
                if nonfinite == "skip":
                    update(pair.state, pair.model, grads)
                else:
                    with pytest.raises(FloatingPointError, match="nothing was updated") as error:
                        update(pair.state, pair.model, grads)
                    assert "'3'" in str(error.value)
                assert unchanged(before, everything(pair.state, pair.model))
        pair.step(2).check()


@pytest.mark.parametrize("rule", [Adam(0.1), AdaGrad(0.1), Momentum(0.1), RMSProp(0.1), Own(), Whole()])
@pytest.mark.parametrize("column", ["apart", "flat", pytest.param("compiled", marks=needs_compiler)])
def test_a_flag_instead_of_an_error_where_the_host_does_not_read(monkeypatch, rule, column):
    if column == "compiled" and type(rule) is not Own:
        pytest.skip("a kernel for each would take long")
    pair = Pair(OptimiserChain(ClipGlobalNorm(0.5), rule), column).step(2)
    like_a_device(monkeypatch)
    pair.step(1)
    kept = [x.detach().clone() for x in trainables(pair.model)]
    momenta = [t.clone() for t in optree.tree_leaves(pair.state, namespace="fluxpy") if isinstance(t, torch.Tensor)]
    for i in range(3):
        grads = pair.grads()
        grads["3"] = grads["3"] * (float("nan") if i == 0 else 1)
        update(pair.state, pair.model, grads)
    assert all(torch.equal(x, y) for x, y in zip(trainables(pair.model), kept, strict=True))
    now = [t for t in optree.tree_leaves(pair.state, namespace="fluxpy") if isinstance(t, torch.Tensor)]
    assert all(torch.equal(x, y) for x, y in zip(now, momenta, strict=True))
    with pytest.raises(FloatingPointError, match="'3' is not finite, in update 3"):
        fluxpy.check_finite(pair.state)
    update(pair.state, pair.model, pair.grads())
    assert not torch.equal(pair.model[0], kept[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_has_no_say(dtype):
    pair = Pair(Adam(0.1), dtype=torch.float32)
    pair.both(adjust, betas=(0.9, 0.9999))
    torch.set_default_dtype(dtype)
    try:
        pair.step(300)
    finally:
        torch.set_default_dtype(torch.float32)
    pair.check(1e-4)


@pytest.mark.parametrize("name", ["Adam", "Prodigy", "ClipGlobalNorm", "Muon"])
def test_the_default_device_has_no_say(name):
    """Of "meta" no number could be read."""
    ends, shapes = [], [(4, 3)] * 3
    for device in ("cpu", "meta"):
        pair = Pair(ROWS[name].rule, shapes=shapes)
        grads = [pair.grads() for _ in range(3)]
        with torch.device(device):
            for given in grads:
                update(pair.state, pair.model, given)
        ends.append([*pair.model, *optree.tree_leaves(pair.state, namespace="fluxpy")])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "rule",
    [
        Descent(0.1),
        OptimiserChain(WeightDecay(0.1), Nesterov(0.1)),
        AdamW(0.1, eps=1e-2),
        AdaGrad(0.1, eps=1e-2),
        OptimiserChain(ClipGlobalNorm(0.5), Momentum(0.1)),
        RMSProp(0.1, eps=1e-2),
        MixedPrecision(Adam(0.1)),
    ],
)
def test_half_precision(dtype, rule):
    """Also of tensors that are long enough for vector instructions, in which PyTorch's fused SGD is wrong."""
    for column in ("apart", "flat"):
        pair = Pair(rule, column, [*SHAPES, (100,)], dtype=dtype).step(10)
        for x, y in zip(pair.model, pair.twin, strict=True):
            torch.testing.assert_close(x, y, rtol=0.02, atol=0.03)


# --- Compiled -----------------------------------------------------------------------------------------------------


@needs_compiler
def test_numbers_that_differ_beside_a_schedule():
    """A schedule stands for other numbers at each step; the leaves' own are still found."""
    schedule = lambda count: 0.1 if count < 2 else 1  # noqa: E731
    pair = Pair(Adam(schedule, eps=1e-3), "compiled", [(4, 3), (7,), (5,)])
    pair.both(adjust, "1", eps=1e-1).both(adjust, "2", betas=(0.5, 0.9)).step(5).check()
    assert paths_of(pair.state) == {"Compiled"}


@needs_compiler
def test_the_verbs_between_compiled_steps():
    pair = Pair(COMPILED["clip all, Adam"], "compiled").step(2)
    pair.both(freeze, "1").step(2).both(thaw).step(2).check()
    pair.both(adjust, "0", lr=0.3).step(2).both(adjust, "[35]", lr=0.1).step(2).check()
    pair.both(reset, "3").step(2).step(2, lambda g: {k: v for k, v in g.items() if k != "0"}).check()
    pair.step(2, lambda g: {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in g.items()}).check()
    loss = (pair.model[0] ** 2).sum()
    pair.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    flatten_parameters(pair.model)
    pair.step(2).check()
    with torch.inference_mode():
        update(pair.state, pair.model, grads := pair.grads())
    pair.pure, pair.twin = update(pair.pure, pair.twin, {k: v.clone() for k, v in grads.items()}, inplace=False)
    pair.turn += 1
    pair.step(2).check()
    assert "Compiled" in paths_of(pair.state)


@needs_compiler
def test_a_master_copy_is_compiled_in_its_own_precision():
    pair = Pair(MixedPrecision(Adam(0.1), dtype=torch.float64), "compiled", [(4, 3), (7,)], torch.float32).step(10)
    assert paths_of(pair.state) == {"Compiled"}
    for i in range(2):
        torch.testing.assert_close(pair.state[i].state.x, pair.pure[i].state.x, rtol=1e-12, atol=1e-13)


@needs_compiler
@pytest.mark.parametrize("column", ["compiled", "apart"])
def test_a_master_copy_that_is_narrower_changes_nothing_between_steps(column):
    rule = MixedPrecision(OptimiserChain(AccumGrad(2), Descent(0.1)), dtype=torch.float32)
    pair = Pair(rule, column, [(4, 3), (7,)])
    before = [x.detach().clone() for x in pair.model]
    pair.step()
    assert all(map(torch.equal, pair.model, before))
    pair.step().check()


# --- Memory -------------------------------------------------------------------------------------------------------


class Nested(NamedTuple):
    """A state whose second field may hold more than one thing."""

    m: torch.Tensor
    more: Any


class Nests(Rule):
    """Keeps a number of vectors, and a tuple with a tensor and a number of matrices, in the same kind of state."""

    elementwise = True

    def init(self, x):
        return Nested(torch.zeros_like(x), (torch.zeros_like(x), 0) if x.ndim > 1 else 0)

    def apply(self, state, x, dx):
        m = 0.5 * state.m + dx
        if isinstance(state.more, tuple):
            peak, t = state.more
            return Nested(m, (torch.maximum(peak, m), t + 1)), 0.1 * (m + peak) / (t + 1)
        return Nested(m, state.more + 1), 0.1 * m / (state.more + 1)


def test_a_named_tuple_that_holds_tuples_for_some_leaves_alone():
    model = {"a": torch.ones(3), "b": torch.ones(2, 2), "c": torch.ones(4), "d": torch.ones(3, 2)}
    expected, rule = {name: x.clone() for name, x in model.items()}, Nests()
    states, state = {name: rule.init(x) for name, x in model.items()}, setup(rule, model)
    for i in range(4):
        grads = {name: torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for name, x in model.items()}
        update(state, model, grads)
        for name, x in expected.items():
            states[name], change = rule.apply(states[name], x, grads[name])
            expected[name] = x - change
    for name, x in expected.items():
        torch.testing.assert_close(model[name], x)
        found, wanted = (optree.tree_leaves(s, namespace="fluxpy") for s in (state[name].state, states[name]))
        assert type(state[name].state) is Nested and len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


SCRIPT = """
    import resource, optree, torch, fluxpy
    from fluxpy import *
    from fluxpy.state import tree_bindings
    torch.set_num_threads(1)
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    def run(n):
        model = [torch.ones(size) for size in {sizes}] if n else [torch.ones(64, 8), torch.ones(64)]
        if {laid}:
            fluxpy.flatten_parameters(model)
        state = setup({rule}, model, compile={compile})
        grads = [torch.ones_like(x) for x in model]
        if n:
            for leaf in (leaf for _, leaf in leaves(state)):  # all pages are there
                [t.add_(0) for t in optree.tree_leaves(leaf.state, namespace="fluxpy") if isinstance(t, torch.Tensor)]
            update(state, model, grads) if {warm} else None
        before = peak()
        for _ in range(2):
            update(state, model, grads)
        plans = [binding.plan for binding in tree_bindings(state).values()]
        units = {{type(unit).__name__.removesuffix("Unit") for plan in plans for unit in plan.route.units}}
        return (peak() - before) / sum(x.nbytes for x in model), units
    run(0)
    print(*run(1))
"""
CLIPPED = "OptimiserChain(ClipGlobalNorm(1.0), {})"


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize(
    ("path", "rule", "sizes", "laid"),
    [
        ("Fused", CLIPPED.format("AdamW()"), [1 << 20] * 20, False),
        ("Fused", CLIPPED.format("AdamW()"), [1 << 12] * 2048, True),
        ("Eager", CLIPPED.format("RMSProp()"), [20 << 20], False),
        pytest.param("Compiled", CLIPPED.format("Lion()"), [1 << 20] * 20, False, marks=needs_compiler),
    ],
)
def test_temporaries_of_an_update_are_small(path, rule, sizes, laid):
    """The peak of a process over two updates, against the bytes of the parameters."""
    warm = laid  # there momenta are laid side by side once, at the first update
    script = SCRIPT.format(sizes=sizes, laid=laid, rule=rule, compile=path == "Compiled", warm=warm)
    code, out, err = run_script(textwrap.dedent(script))
    assert code == 0, err
    found = re.match(r"(\S+) {'(\w+)'}", out)
    assert found and found[2] == path and float(found[1]) < 0.2, out

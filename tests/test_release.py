"""release=True: each parameter is stepped within the backward pass, as soon as its gradient is there."""

import copy
import math
import weakref
from functools import partial

import pytest
import torch
from helpers import CHAINS, Own, Whole, assert_alike, image, needs_compiler
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import fluxpy
from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    Averaged,
    ClipGlobalNorm,
    ClipNorm,
    Descent,
    Lowered,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rule,
    flush,
    freeze,
    setup,
    thaw,
    train,
    trainstep,
)


def network(seed=0, depth=6, width=8, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, width), nn.Tanh()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 2)).to(dtype)


def batches(count=6, seed=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(5, 4, generator=g, dtype=dtype), torch.randn(5, 2, generator=g, dtype=dtype)) for _ in range(count)
    ]


def loss(m, x, y):
    return mse_loss(m(x), y)


def both(rule, make=network, prepare=lambda state, model: None, data=None, f=loss, **options):
    """The images of a run as usual, and of one with release."""
    found = []
    for release in (False, True):
        model = make()
        state = setup(rule, model, **options)
        prepare(state, model)
        values = [trainstep(f, model, batch, state, release=release) for batch in data or batches()]
        found.append((image(state, model) | {f"loss {i}": v for i, v in enumerate(values)}, state, model))
    return found


def assert_same(rule, room=1e-12, **options):
    (usual, _, _), (released, state, model) = both(rule, **options)
    assert_alike(usual, released, room)
    return state, model


RULES = {name: rule for name, rule in CHAINS.items() if "clip all" not in name}
RULES |= {
    "averaged": Averaged(Momentum(0.1)),
    "lowered": Lowered(Adam(0.02), dtype=torch.float64),
    "gathers": OptimiserChain(AccumGrad(4), Adam(0.02)),
    "clip each, own": OptimiserChain(ClipNorm(0.1), Own()),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_numbers_are_the_same(rule):
    assert_same(rule)


def test_train_and_layouts():
    for flat in (False, True):
        models, losses = [network(), network()], []
        for model, release in zip(models, (False, True), strict=True):
            if flat:
                fluxpy.flatten_parameters(model)
            state = setup(AdamW(0.02), model)
            losses.append(train(loss, model, batches(), state, release=release))
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-12, atol=1e-12)


def test_with_and_without_in_turn():
    """And the other verbs in between."""
    usual, mixed = network(), network()
    states = [setup(OptimiserChain(ClipNorm(1.0), AdamW(0.02)), m) for m in (usual, mixed)]
    for i, batch in enumerate(batches(12)):
        if i == 4:
            [freeze(state[4:8]) for state in states]
        if i == 7:
            [fluxpy.adjust(thaw(state)[2], 0.1) for state in states]
        trainstep(loss, usual, batch, states[0])
        trainstep(loss, mixed, batch, states[1], release=i % 3 != 0)
    assert_alike(image(states[0], usual), image(states[1], mixed), 1e-12)


@needs_compiler
def test_compiled():
    assert_same(Own(), compile=True)


def test_trees_of_tensors_low_precision_and_complex_parameters():
    def tree():
        g = torch.Generator().manual_seed(0)
        return {"a": [torch.randn(3, 3, generator=g), torch.randn(3, generator=g)], "z": torch.ones(3) + 0.5j}

    def f(m, x):
        return ((m["a"][0] @ x + m["a"][1]) * m["z"]).abs().square().sum()

    data = [(torch.randn(3, generator=torch.Generator().manual_seed(i)),) for i in range(4)]
    _, model = assert_same(Adam(0.1), make=tree, data=data, f=f, room=1e-6)
    assert not any(x.requires_grad or x.grad is not None for x in fluxpy.trainables(model))
    for rule in (MixedPrecision(AdamW(1e-2)), AdamW(1e-2)):
        (usual, _, _), (released, _, _) = both(
            rule, make=lambda: network(dtype=torch.bfloat16), data=batches(dtype=torch.bfloat16)
        )
        assert_alike(usual, released, 2e-2)


# --- What must not be lost ----------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight at three places, and a layer that some batches do not use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(4, 4).double()
        self.two = nn.Linear(4, 4).double()
        self.two.weight = self.one.weight
        self.three = nn.Linear(4, 2).double()
        self.spare = nn.Linear(4, 2).double()

    def forward(self, x, spare=False):
        x = torch.tanh(self.two(torch.tanh(self.one(x)))) @ self.one.weight
        return self.three(x) + (self.spare(x) if spare else 0)


def tied_loss(m, x, y):
    return mse_loss(m(x, spare=bool(x[0, 0] > 0)), y)


@pytest.mark.parametrize(
    "rule", [Adam(0.05), OptimiserChain(AccumGrad(3), Momentum(0.1)), Averaged(Own())], ids=["Adam", "gathers", "own"]
)
def test_ties_missing_gradients_and_frozen_leaves(rule):
    def prepare(state, model):
        freeze(state.two.bias)

    data = batches(10)
    assert len({bool(x[0, 0] > 0) for x, _ in data}) == 2
    state, model = assert_same(rule, make=Tied, prepare=prepare, data=data, f=tied_loss)
    assert state.two.bias.count == 0
    thaw(state)
    flush(state, model)


def test_activations_that_are_computed_again():
    """The parameters of a checkpointed part are not stepped before it is run again."""

    def f(m, x, y):
        x = torch.tanh(m.one(x))
        for _ in range(2):
            x = checkpoint(lambda x: torch.tanh(m.two(torch.tanh(m.one(x)))), x, use_reentrant=False)
        return mse_loss(m.three(x), y)

    assert_same(Adam(0.05), make=Tied, f=f)

    def reentrant(m, x, y):
        return mse_loss(m.three(checkpoint(m.one, x.requires_grad_(), use_reentrant=True)), y)

    model = Tied()
    state = setup(Adam(0.05), model)
    before = image(state, model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        trainstep(reentrant, model, batches(1)[0], state, release=True)
    assert_alike(before, image(state, model))


def test_grads_and_flags_are_as_before():
    model = network()
    model[2].weight.requires_grad_(False)
    state = thaw(setup(AdamW(0.02), model))  # the state decides
    freeze(state[0])
    teacher = nn.Linear(4, 2).double()
    held = {name: torch.randn_like(x) if i % 2 else None for i, (name, x) in enumerate(model.named_parameters())}
    for name, x in model.named_parameters():
        x.grad = held[name]
    copies = {name: None if g is None else g.clone() for name, g in held.items()}
    before = {name: x.detach().clone() for name, x in model.named_parameters()}

    def f(m, x, y):
        return mse_loss(m(x), teacher(x) + y)

    def check():
        for name, x in model.named_parameters():
            assert x.grad is held[name] and (x.grad is None or torch.equal(x.grad, copies[name])), name
            assert x.requires_grad == (name != "2.weight") and not x._post_accumulate_grad_hooks
        assert all(x.grad is None for x in teacher.parameters())

    trainstep(f, model, batches(1)[0], state, release=True)
    check()
    moved = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert moved == before.keys() - {"0.weight", "0.bias"}
    with pytest.raises(ZeroDivisionError):
        trainstep(lambda m, x, y: f(m, x, y) / (1 // 0), model, batches(1)[0], state, release=True)
    check()


def test_an_autocast_around_the_loop_casts_the_new_weights():
    outcomes = []
    for release in (False, True):
        model = network(dtype=torch.float32)
        state = setup(Descent(0.1), model)
        if release:
            with torch.autocast("cpu", torch.bfloat16):
                losses = train(loss, model, batches(dtype=torch.float32), state, release=True)
        else:

            def inside(m, x, y):
                with torch.autocast("cpu", torch.bfloat16):
                    return loss(m, x, y)

            losses = train(inside, model, batches(dtype=torch.float32), state)
        outcomes.append(losses)
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-2)
    assert outcomes[1][0] != outcomes[1][-1]


def test_in_a_loss_that_is_not_finite_nothing_is_updated():
    model, data = network(), batches(3)
    state = setup(OptimiserChain(AccumGrad(2), Adam(0.1)), model)
    trainstep(loss, model, data[0], state, release=True)
    before = image(state, model)
    value = trainstep(lambda m, x, y: loss(m, x, y) * math.nan, model, data[1], state, release=True)
    assert value.isnan()
    assert_alike(before, image(state, model))
    with pytest.raises(FloatingPointError, match="item 1"):
        train(loss, model, [data[0], (data[1][0] * math.inf, data[1][1])], state, release=True)


# --- What is refused ----------------------------------------------------------------------------------------------


class Asking(Rule):
    """Asks for a total by a rule that it makes on the way, which nobody can know of."""

    def steps(self, state, x, dx):
        state, change = yield from ClipGlobalNorm(1.0).steps((), x, dx)
        return state, change


class Hidden(Rule):
    def steps(self, state, x, dx):
        state, change = yield from ClipNorm(1.0, nonfinite="skip").steps((), x, dx * math.inf)
        return state, change


@pytest.mark.parametrize(
    "rule, error, message",
    [
        (OptimiserChain(ClipGlobalNorm(1.0), Adam()), ValueError, r"ClipGlobalNorm \(at '0.weight'\) needs a total"),
        (Lowered(OptimiserChain(ClipGlobalNorm(1.0), Adam())), ValueError, "needs a total over all of them"),
        (OptimiserChain(ClipNorm(1.0, nonfinite="skip"), Adam()), ValueError, "cannot hold back the whole update"),
        (Asking(), ValueError, "ClipGlobalNorm needs a total over all gradients"),
        (Hidden(), RuntimeError, "the whole update cannot be skipped"),
    ],
)
def test_totals_over_the_tree_are_refused_and_nothing_is_changed(rule, error, message):
    model = network()
    state = setup(rule, model)
    before = image(state, model)
    with pytest.raises(error, match=message):
        trainstep(loss, model, batches(1)[0], state, release=True)
    assert_alike(before, image(state, model))
    freeze(state)
    thaw(state[0].bias)
    with pytest.raises(error, match=message.replace("0.weight", "0.bias")):
        trainstep(loss, model, batches(1)[0], state, release=True)


def test_a_clip_of_frozen_leaves_is_no_hindrance():
    model = network()
    state = setup({"0.*": OptimiserChain(ClipGlobalNorm(1.0), Adam()), "*": Adam()}, model)
    trainstep(loss, model, batches(1)[0], freeze(state[0]) and state, release=True)


def test_what_else_is_refused(monkeypatch):
    model = network()
    state = setup(Adam(), model)
    before = image(state, model)
    batch = batches(1)[0]
    with pytest.raises(ValueError, match="the loss depends on no parameter"):
        trainstep(lambda m, x, y: y.sum(), model, batch, state, release=True)
    with pytest.raises(ValueError, match="the loss depends on no parameter"):
        trainstep(lambda m, x, y: (y * x.sum().requires_grad_()).sum(), model, batch, state, release=True)
    with pytest.raises(ValueError, match="all of them are frozen"):
        trainstep(loss, model, batch, freeze(copy.deepcopy(state)), release=True)
    with pytest.raises(ValueError, match="the loss must be one real number"):
        trainstep(lambda m, x, y: m(x), model, batch, state, release=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="before the ranks have averaged"):
        trainstep(loss, model, batch, state, release=True)
    monkeypatch.undo()
    assert_alike(before, image(state, model))
    history = {"w": torch.ones(2, requires_grad=True) * 2}
    with pytest.raises(ValueError, match="'w' carries autograd history"):
        trainstep(lambda m: m["w"].sum(), history, (), setup(Adam(), history), release=True)


class Picky(Rule):
    """Refuses one shape."""

    def apply(self, state, x, dx):
        if x.shape == (8, 4):
            raise ArithmeticError("not this one")
        return state, 0.1 * dx


def test_an_error_in_the_middle_leaves_each_parameter_stepped_or_as_it_was():
    model, twin = network(width=8), network(width=8)
    state, other = setup(Picky(), model), setup(Descent(0.1), twin)
    batch = batches(1)[0]
    before = image(state, model)
    with pytest.raises(ArithmeticError, match="not this one") as caught:
        trainstep(loss, model, batch, state, release=True)
    trainstep(loss, twin, batch, other)
    stepped = 0
    for (path, leaf), x, y in zip(fluxpy.leaves(state), model.parameters(), twin.parameters(), strict=True):
        assert leaf.count in (0, 1)
        torch.testing.assert_close(x, y if leaf.count else before[f"parameter {path}"], rtol=1e-12, atol=1e-12)
        assert x.grad is None and not x._post_accumulate_grad_hooks
        stepped += leaf.count
    assert state[0].weight.count == 0 and stepped == 15
    notes = " ".join(caught.value.__notes__)
    assert "15 of 16 parameters were stepped before this" in notes and "'0.weight'" in notes
    freeze(state[0])
    trainstep(loss, model, batch, state, release=True)  # the next goes well


def test_a_parameter_that_is_also_used_detached_is_to_be_cloned():
    def f(m, x, y, own=lambda t: t):
        return ((x @ m["a"]) * own(m["b"].detach()) * m["b"] - y).square().mean()

    model = {"a": torch.ones(3, 2), "b": torch.ones(2)}
    state, batch = setup(Descent(0.1), model), (torch.ones(4, 3), torch.zeros(4, 2))
    with pytest.raises(RuntimeError, match="inplace") as caught:
        trainstep(f, model, batch, state, release=True)
    assert "the loss also uses a parameter detached" in caught.value.__notes__[-1]
    found = [{"a": torch.ones(3, 2), "b": torch.ones(2)} for _ in range(2)]
    for release, model in zip((False, True), found, strict=True):
        trainstep(partial(f, own=torch.clone), model, batch, setup(Descent(0.1), model), release=release)
    assert torch.equal(found[0]["a"], found[1]["a"])


# --- Memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [AdamW(1e-3), OptimiserChain(ClipNorm(1.0), Momentum()), Averaged(Own()), Whole()])
@pytest.mark.parametrize("depth, width", [(40, 32), (24, 128)])
def test_only_a_few_gradients_exist_at_once(rule, depth, width):
    """Counted when each is there: those of before that are still alive, by weak references to them."""
    model = network(depth=depth, width=width, dtype=torch.float32)
    state = setup(rule, model)
    peaks = []

    def count(x: Tensor) -> None:
        assert x.grad is not None
        peaks.append(sum(size for size, ref in held if ref() is not None) + x.grad.nbytes)
        held.append((x.grad.nbytes, weakref.ref(x.grad)))

    for turn in range(3):
        held: list[tuple[int, weakref.ref[Tensor]]] = []
        hooks = [x.register_post_accumulate_grad_hook(count) for x in model.parameters()] if turn else []
        trainstep(loss, model, batches(1, dtype=torch.float32)[0], state, release=True)
        for hook in hooks:
            hook.remove()
    total = sum(x.nbytes for x in model.parameters())
    assert len(peaks) == 2 * len(list(model.parameters()))
    assert max(peaks) <= total / 10, (max(peaks), total)


def test_the_allocator_says_the_same():
    """The memory of a step, beside that of one without release: less by most of the gradients."""
    peaks = []
    for release in (False, True):
        model = network(depth=30, width=96, dtype=torch.float32)
        state, batch = setup(AdamW(1e-3), model), batches(1, dtype=torch.float32)[0]
        for _ in range(2):
            trainstep(loss, model, batch, state, release=release)
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            trainstep(loss, model, batch, state, release=release)
        now, peak = 0, 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        peaks.append(peak)
    total = sum(x.nbytes for x in model.parameters())
    assert peaks[0] >= total
    assert peaks[1] <= 0.25 * total, (peaks, total)


def test_after_surgery_and_after_a_change_of_dtype():
    """The parameters are the same objects, and what was kept for them is of other shapes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    state = fluxpy.setup(fluxpy.Adam(0.1), model)
    x = torch.randn(5, 3)

    def loss(m, x):
        return m(x).square().mean()

    fluxpy.trainstep(loss, model, (x,), state, release=True)
    fluxpy.surgery.grow(state[1], model[1], 3)
    fluxpy.trainstep(loss, model, (x,), state, release=True)
    fluxpy.follow(state, model.double())
    fluxpy.trainstep(loss, model, (x.double(),), state, release=True)
    assert state[1].weight.count == 3 and state[1].weight.shape == (5, 4)

"""Parameters, gradients and momenta may lie anywhere, and move from step to step."""

import copy
import itertools
import random

import optree
import pytest
import torch
from helpers import (
    CHAINS,
    FEW,
    SHAPES,
    Run,
    assert_close,
    every_layout,
    few_chains,
    grads_of,
    needs_compiler,
    tensors_of,
    transposed,
    values_of,
)
from torch import nn

from fluxpy import (
    AdamW,
    Lion,
    flatten_parameters,
    gradient,
    leaves,
    setup,
    update,
)  # fmt: skip

# --- Parameters that move -----------------------------------------------------------------------------------------


@every_layout
@few_chains
def test_parameters_may_move_from_step_to_step(rule, layout):
    """To other memory, out of one buffer and into another, to other strides, or to another object."""
    run, twin = Run(rule, layout).step(2), Run(rule).step(2)

    def moved(name, make):
        run.model[name].data = make(run.model[name].detach())

    for change in (
        lambda: moved("b", torch.clone),
        lambda: [moved(name, torch.clone) for name in SHAPES],
        lambda: flatten_parameters(run.model),
        lambda: moved("d", torch.clone),
        lambda: moved("a", transposed),
        lambda: flatten_parameters(run.model, grad=True),
        lambda: run.model.update({"e": nn.Parameter(run.model["e"].detach().clone())}),
        lambda: run.model.load_state_dict(run.model.state_dict(), assign=True),
    ):
        change()
        run.step(2)
        run.equals(twin.step(2), room=1e-12)


# --- Momenta as a user may give them ------------------------------------------------------------------------------


def backwards(state):
    """The momenta in one buffer, the last leaf's first."""
    tensors = optree.tree_leaves(state, namespace="fluxpy")
    buffer, end = torch.cat([t.reshape(-1) for t in reversed(tensors)]), sum(t.numel() for t in tensors)
    places = []
    for t in tensors:
        places.append(buffer[end - t.numel() : end].view(t.shape))
        end -= t.numel()
    found = iter(places)
    return optree.tree_map(lambda t: next(found), state, namespace="fluxpy")


MOMENTA = {
    "of other strides": (transposed, 1e-12),
    "with gaps": (lambda t: torch.stack([t, t], -1)[..., 0], 1e-12),
    "in one buffer backwards": (backwards, 1e-12),
    "of another dtype": (lambda t: t.float(), 1e-5),
    "with a history": (lambda t: t * torch.ones((), dtype=t.dtype, requires_grad=True), 1e-12),
    "that require grad": (lambda t: t.clone().requires_grad_(), 1e-12),
}
HELD = {name: CHAINS[name] for name in FEW if name != "master"}


@every_layout
@pytest.mark.parametrize("change, room", MOMENTA.values(), ids=MOMENTA.keys())
def test_momenta_of_any_kind_give_the_same_numbers(change, room, layout):
    for rule, name in itertools.product(HELD.values(), ["", "d"]):
        run, twin = Run(rule, layout).step(2), Run(rule, layout).step(2)
        chosen = set(map(id, tensors_of(run.state[name] if name else run.state)))
        if change is backwards:
            run.state = backwards(run.state)
        else:
            run.state = optree.tree_map(lambda t: change(t) if id(t) in chosen else t, run.state, namespace="fluxpy")  # noqa: B023
        dtypes = [t.dtype for t in tensors_of(run.state)]
        for _ in range(3):
            run.step()
            twin.step()
            assert_close(run.model, twin.model, room)
            for (path, mine), (_, theirs) in zip(leaves(run.state), leaves(twin.state), strict=True):
                assert mine.count == theirs.count
                for a, b in zip(tensors_of(mine.state), tensors_of(theirs.state), strict=True):
                    torch.testing.assert_close(a, b, rtol=room, atol=room, check_dtype=False, msg=path)
        assert [t.dtype for t in tensors_of(run.state)] == dtypes


@every_layout
@pytest.mark.parametrize("rule", HELD.values(), ids=HELD.keys())
def test_autograd_sees_that_momenta_with_a_history_were_written(rule, layout):
    """As it does of parameters: what was computed from the old ones is not differentiated with the new ones."""
    run = Run(rule, layout).step(2)
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    run.state = optree.tree_map(lambda t: t * w, run.state, namespace="fluxpy")
    for _ in range(2):
        losses = [(t * t).sum() for t in tensors_of(run.state) if t.requires_grad]
        run.step(2)
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@every_layout
@pytest.mark.parametrize("rule", HELD.values(), ids=HELD.keys())
def test_momenta_on_another_device_are_refused_by_name(rule, layout):
    for start in (1, 2):
        run = Run(rule, layout).step(start)
        run.state = optree.tree_map(lambda t: t.to("meta") if t.shape == (7,) else t, run.state, namespace="fluxpy")
        before = values_of(run.model)
        for _ in range(2):
            with pytest.raises(ValueError, match="momenta of 'b' are on meta"):
                run.step()
            assert all(torch.equal(before[name], x) for name, x in run.model.items())
            assert {leaf.count for _, leaf in leaves(run.state)} <= {start, start // 2}


@needs_compiler
@pytest.mark.parametrize("way", ["in place", "pure", "compiled"])
@few_chains
def test_a_parameter_may_be_a_negated_view(rule, way):
    """As the imaginary part of a conjugate is. PyTorch's kernels refuse it, or take what is in memory."""
    model, twin = ({k: torch.full((3, 2), 2.0, dtype=torch.float64) for k in "abc"} for _ in range(2))
    model["b"] = torch._neg_view(-model["b"])
    states = [setup(rule, m, compile=way == "compiled") for m in (model, twin)]
    for turn in range(5):
        grads = {k: draw for k, draw in zip("abc", torch.randn(3, 3, 2, dtype=torch.float64) * (turn + 1), strict=True)}
        states[0], model = update(states[0], model, grads, inplace=way != "pure")
        states[1], twin = update(states[1], twin, grads, inplace=way != "pure")
    for k, x in twin.items():
        torch.testing.assert_close(model[k], x, rtol=1e-12, atol=1e-12)


# --- Gradients that lie elsewhere ---------------------------------------------------------------------------------


def laid(grads, order, gap=0):
    """The gradients in one buffer, in some order, with gaps between."""
    buffer = torch.zeros(sum(t.numel() + gap for t in grads.values()), dtype=torch.float64)
    found, start = {}, 0
    for name in order:
        t = grads[name]
        found[name] = buffer[start : start + t.numel()].view(t.shape).copy_(t)
        start += t.numel() + gap
    return {name: found[name] for name in grads}


PLACES = {
    "apart": lambda g: g,
    "side by side": lambda g: laid(g, list(g)),
    "backwards": lambda g: laid(g, list(g)[::-1]),
    "two changed": lambda g: laid(g, ["d", "b", "c", "a", "e"]),
    "with gaps": lambda g: laid(g, list(g), gap=3),
    "transposed": lambda g: {k: transposed(v) for k, v in g.items()},
    "negated": lambda g: {k: torch._neg_view(v) for k, v in g.items()},
    "negated in part": lambda g: {k: v if k in "bd" else torch._neg_view(v) for k, v in laid(g, list(g)).items()},
    "expanded": lambda g: {k: v.reshape(-1)[:1].expand(v.numel()).view(v.shape) for k, v in g.items()},
}


def apart(grads):
    return {name: t.resolve_neg().clone(memory_format=torch.contiguous_format) for name, t in grads.items()}


@every_layout
@few_chains
def test_gradients_may_lie_anywhere_from_step_to_step(rule, layout):
    run, twin = Run(rule, layout), Run(rule, layout)
    chance, turns = random.Random(0), [*PLACES] * 3
    chance.shuffle(turns)
    for name in turns:
        run.step(1, PLACES[name])
        twin.step(1, lambda grads, name=name: apart(PLACES[name](grads)))
        run.equals(twin, room=1e-12)


@needs_compiler
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
@pytest.mark.parametrize("rule", [AdamW(0.1), Lion(0.1)])
def test_a_gradient_that_autograd_leaves_negated(rule, shape):
    """As that of an imaginary part. A compiled kernel would take what is in memory, the fused ones refuse it."""
    w = torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))

    def loss(model):
        return (torch.complex(model["re"], model["im"]).conj() * w).real.sum() + model["other"].sum()

    ends = []
    for compile in (False, True):
        model = {"re": torch.ones(shape), "im": torch.ones(shape), "other": torch.ones(4)}
        state = setup(rule, model, compile=compile)
        for _ in range(2):
            grads = gradient(loss, model)
            assert grads["im"].is_neg()
            update(state, model, grads)
        ends.append(model["im"])
        assert torch.equal((model["im"] - 1).sign(), -w.imag.sign())
    torch.testing.assert_close(*ends)


@every_layout
@few_chains
@pytest.mark.parametrize("by", ["name", "grad"])
def test_the_same_tensors_as_gradients_in_other_memory(rule, layout, by):
    """Kept from step to step, side by side, and then one of them moves, as `.data =` does; or another takes its
    address."""
    run, twin = Run(rule, layout), Run(rule, layout)
    kept = laid(run.grads(), list(SHAPES))
    if by == "grad":
        for name, x in run.model.items():
            x.grad = kept[name]

    def go(times=2):
        for _ in range(times):
            for name, dx in run.grads().items():
                kept[name].copy_(dx)
            run.step(1, lambda _: None if by == "grad" else kept)
            twin.step()
        run.equals(twin, room=1e-12)

    def put(name, t):
        kept[name] = t
        if by == "grad":
            run.model[name].grad = t

    go()
    kept["b"].data = kept["b"].clone()  # out of the buffer
    go()
    kept["b"].data, kept["d"].data = kept["b"].clone(), torch.zeros(3, 4, dtype=torch.float64).t()  # other strides
    go()
    put("a", kept["a"].as_strided((4, 3), (1, 4)))  # the same address, in other strides
    go()
    put("a", kept["a"].as_strided((4, 3), (3, 1)))
    go()
    for name, t in laid(kept, list(SHAPES)).items():
        put(name, t)
    go()
    kept["d"].data = kept["d"].clone()  # one further back, while the first two stay side by side
    go()
    for name, t in laid(kept, list(SHAPES)).items():
        put(name, t)
    go()
    put("b", torch.zeros(7, dtype=torch.float64))  # the first of the buffer stays where it was, its neighbour does not
    go()
    for name, t in laid(kept, ["d", "b", "c", "a", "e"]).items():  # every one at the place of another
        kept[name].data = t
    go()


@every_layout
@few_chains
def test_gradients_by_name_in_any_order(rule, layout):
    run, twin = Run(rule, layout), Run(rule, layout)
    chance = random.Random(0)
    for i in range(8):
        order = list(SHAPES)
        if i % 2:
            chance.shuffle(order)
        run.step(1, lambda grads, order=order: {name: grads[name] for name in order})
        twin.step()
    run.equals(twin)
    nested = nn.ModuleDict({"x": nn.Linear(3, 3), "y": nn.Linear(3, 3)}).double()
    other, state = copy.deepcopy(nested), setup(rule, nested)
    pure = setup(rule, other)
    for i in range(4):
        grads = grads_of(nested, i)
        if i % 2:
            parts = {layer: {x: grads[f"{layer}.{x}"] for x in ("bias", "weight")} for layer in "yx"}
            update(state, nested, parts)
        else:
            update(state, nested, dict(reversed(grads.items())))
        update(pure, other, grads)
    assert_close(nested, other)

"""A state belongs to places in a model: what stands there now is stepped."""

import pytest
import torch
from helpers import (
    CHAINS,
    few_chains,
    grads_of,
    values_of,
)
from torch import nn

import fluxpy
from fluxpy import (
    AdamW,
    Descent,
    Lion,
    flatten_parameters,
    leaves,
    setup,
    update,
)  # fmt: skip

# --- Models whose parts change places -----------------------------------------------------------------------------


def two(kind="module"):
    """Two layers of one shape."""
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    if kind == "dict":
        return {name: {"weight": make(3, 3), "bias": make(3)} for name in ("one", "two")}
    model = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)}).double()
    for x in model.parameters():
        x.data = make(*x.shape)
    return model


def swap_layers(model):
    model["one"], model["two"] = model["two"], model["one"]


def swap_in_other_order(model):
    """As one does to rename: out, and in again."""
    one, two = model.pop("one"), model.pop("two")
    model["two"], model["one"] = one, two


def swap_weights(model):
    if isinstance(model, dict):
        one, two = model["one"], model["two"]
        one["weight"], two["weight"] = two["weight"], one["weight"]
    else:
        model["one"].weight, model["two"].weight = model["two"].weight, model["one"].weight


@few_chains
@pytest.mark.parametrize("kind", ["module", "dict"])
@pytest.mark.parametrize("swap", [swap_layers, swap_in_other_order, swap_weights])
@pytest.mark.parametrize("laid_out", [False, True])
def test_parts_that_change_names_are_stepped_by_their_new_ones(rule, kind, swap, laid_out):
    """A state belongs to places: momenta and gradients of a name go to what stands there now."""
    model, twin = two(kind), two(kind)
    if laid_out:
        flatten_parameters(model)
    state, other = setup(rule, model), setup(rule, twin)
    for i in range(3):
        update(state, model, grads_of(model, i))
        update(other, twin, grads_of(twin, i))
    swap(model)
    swapped = values_of(model)
    with torch.no_grad():
        for path, x in fluxpy.trainables(twin, path=True):
            x.copy_(swapped[path])
    before = {path: x for path, x in fluxpy.trainables(model, path=True)}
    if kind == "module" and swap is swap_in_other_order:  # which is another module to iterate over
        with pytest.raises(ValueError, match="the model children 'two', 'one'"):
            update(state, model, grads_of(twin, 3))
        assert all(torch.equal(swapped[path], x) for path, x in before.items())
        return
    for i in range(3, 6):
        grads = grads_of(twin, i)
        update(state, model, grads)
        update(other, twin, grads)
    now, expected = dict(fluxpy.trainables(model, path=True)), dict(fluxpy.trainables(twin, path=True))
    for path, x in now.items():
        assert x is before[path]
        torch.testing.assert_close(x, expected[path], rtol=1e-12, atol=1e-12, msg=path)


class Box(nn.Module):
    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))


@few_chains
@pytest.mark.parametrize("kind", ["module", "dict"])
def test_a_parameter_that_moves_to_another_dict_is_refused_until_it_is_back(rule, kind):
    """Also where all dicts one after another hold the same names and tensors as before."""
    if kind == "module":
        model = nn.ModuleDict({"one": Box(a=(3, 3), b=(3,)), "two": Box(c=(3, 3)), "zoo": Box(d=(2,))})
        held = {name: box._parameters for name, box in model.items()}
    else:
        make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
        held = model = {"one": {"a": make(3, 3), "b": make(3)}, "two": {"c": make(3, 3)}, "zoo": {"d": make(2)}}
    state = setup(rule, model)
    update(state, model, grads_of(model))
    update(state, model, grads_of(model))
    before = values_of(model)
    for source, name, target in (("two", "c", "one"), ("one", "b", "two"), ("zoo", "d", "two"), ("one", "a", "zoo")):
        order = list(held[source])
        held[target][name] = held[source].pop(name)
        for grads in (grads_of(model), {}):
            with pytest.raises(ValueError, match="does not fit the state|unknown name"):
                update(state, model, grads)
        held[source][name] = held[target].pop(name)
        for key in order:  # as it was
            held[source][key] = held[source].pop(key)
        assert all(torch.equal(before[path], x) for path, x in fluxpy.trainables(model, path=True))
    counts = {path: leaf.count for path, leaf in leaves(state)}
    for _ in range(2):
        update(state, model, grads_of(model))
    step = 1 if rule == CHAINS["gather, Momentum"] else 2  # which moves every other time
    assert all(leaf.count == counts[path] + step for path, leaf in leaves(state))


@pytest.mark.parametrize("rule", [AdamW(0.1), Lion(0.1), CHAINS["whole"]])
def test_layers_of_other_names_are_refused(rule):
    for kind in ("module", "dict"):
        model = two(kind)
        state = setup(rule, model)
        for _ in range(2):
            update(state, model, grads_of(model))
        before = values_of(model)
        model["twin"] = model.pop("two")
        with pytest.raises(ValueError, match="the model children 'one', 'twin'"):
            update(state, model, grads_of(model))
        model["two"] = model.pop("twin")
        assert all(torch.equal(before[path], x) for path, x in fluxpy.trainables(model, path=True))
        grads = {path: torch.ones_like(x) for path, x in fluxpy.trainables(model, path=True)}
        update(state, model, grads)
        assert not any(torch.equal(before[path], x) for path, x in fluxpy.trainables(model, path=True))


class Alike(nn.Linear):
    """Equal to all others."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike)

    __hash__ = nn.Linear.__hash__


def one():
    return nn.Parameter(torch.ones(1, dtype=torch.float64))


def again(x):
    return nn.Parameter(x.detach().clone())


EQUAL = {  # a model, what exchanges its part, and that part
    "a parameter of one element": (
        lambda: nn.ParameterDict({"a": one()}),
        lambda model: setattr(model, "a", again(model.a)),
        lambda model: model.a,
    ),
    "a tensor of one element": (
        lambda: {"a": one(), "b": one()},
        lambda model: model.update(a=again(model["a"])),
        lambda model: model["a"],
    ),
    "a list of such": (
        lambda: {"a": [one()], "b": one()},
        lambda model: model.update(a=[again(model["a"][0])]),
        lambda model: model["a"][0],
    ),
    "a module": (
        lambda: nn.ModuleDict({"a": Alike(1, 1, bias=False)}),
        lambda model: model.update({"a": Alike(1, 1, bias=False)}),
        lambda model: model.a.weight,
    ),
}


@pytest.mark.parametrize("make, exchange, get", EQUAL.values(), ids=EQUAL)
def test_an_equal_thing_in_the_model_is_another(make, exchange, get):
    model = make()
    state = setup(Descent(1.0), model)
    for _ in range(3):
        update(state, model, fluxpy.gradient(lambda m: get(m).sum(), model))
    old, was = get(model), get(model).detach().clone()
    exchange(model)
    new, before = get(model), get(model).detach().clone()
    assert new is not old
    update(state, model, fluxpy.gradient(lambda m: get(m).sum(), model))
    assert torch.equal(new, before - 1)
    assert torch.equal(old, was)

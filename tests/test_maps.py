"""Going over parameters: several patterns, modules by type, gradients by path, model and gradients together."""

import optree
import pytest
import torch
from torch import nn

import fluxpy
from fluxpy import AdamW, Descent, adjust, gradient, leaves, module_paths, select, setup, tree_map, update


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), nn.Dropout(0.0))
        self.plain = nn.LayerNorm(4, elementwise_affine=False)
        self.again = self.blocks[0].norm
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.again(self.plain(self.blocks(x))))


def loss(m):
    return m(torch.arange(8.0).reshape(2, 4)).square().mean()


# --- Choosing -----------------------------------------------------------------------------------------------------


def test_no_decay_on_norms_and_biases_is_one_line():
    model = Net()
    quiet = ["*bias", *module_paths(model, nn.LayerNorm)]
    by_select = setup(AdamW(), model)
    adjust(select(by_select, *quiet), weight_decay=0.0)
    by_pattern = setup({**dict.fromkeys(quiet, AdamW(weight_decay=0.0)), "*": AdamW()}, model)
    for state in (by_select, by_pattern):
        decayed = [path for path, leaf in leaves(state) if leaf.rule.weight_decay]
        assert decayed == ["blocks.0.linear.weight", "blocks.1.linear.weight", "head.weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_module_paths():
    model = Net()
    assert module_paths(model, nn.LayerNorm) == ["blocks.0.norm.*", "blocks.1.norm.*"]  # a tie once, none without
    assert module_paths(model, nn.Linear, nn.Dropout) == ["blocks.0.linear.*", "blocks.1.linear.*", "head.*"]
    assert module_paths(model.head, nn.Linear) == ["*"] and module_paths(model, nn.Conv2d) == []
    assert module_paths(torch.compile(model), Block) == ["blocks.0.*", "blocks.1.*"]
    odd = {"a[0]": [model.head], "b*": {"c": nn.Linear(1, 1)}}
    state = setup(Descent(), odd)
    assert [len(list(leaves(select(state, path)))) for path in module_paths(odd, nn.Linear)] == [2, 2]
    loop = Block()
    loop.linear.parent = [loop]
    assert module_paths({"x": loop, "y": loop}, nn.Linear) == ["x.linear.*"]
    for wrong in ((), ("LayerNorm",), (nn.LayerNorm(2),)):
        with pytest.raises(TypeError, match="classes of modules"):
            module_paths(model, *wrong)


def test_select_by_several_comes_in_the_order_of_the_model():
    state = setup(AdamW(), Net())
    view = select(state, "head.*", lambda path, leaf: leaf.shape == (4, 4), "blocks.0.linear.*")
    paths = [path for path, _ in leaves(view)]
    assert paths == [
        "blocks.0.linear.weight",
        "blocks.0.linear.bias",
        "blocks.1.linear.weight",
        "head.weight",
        "head.bias",
    ]
    assert view["head.bias"] is state.head.bias
    assert [path for path, _ in leaves(select(state, "again.weight", "blocks.0.norm.weight"))] == [
        "blocks.0.norm.weight"
    ]
    tied = torch.ones(2)
    state = setup(AdamW(), {"a": tied, "b": torch.ones(3), "c": tied})
    assert [path for path, _ in leaves(select(state, "*"))] == ["a", "b"]


# --- Gradients ----------------------------------------------------------------------------------------------------


def test_gradients_iterate_as_pairs():
    model = Net()
    grads = gradient(loss, model)
    assert [path for path, _ in grads] == [path for path, _ in model.named_parameters()]
    assert all(g is grads[path] for path, g in grads) and len(grads) == len(list(model.parameters()))
    assert [path for path, _ in grads.blocks[1:]] == [f"1.{path}" for path, _ in model.blocks[1].named_parameters()]
    assert list(reversed(grads.head)) == [("bias", grads.head.bias), ("weight", grads.head.weight)]
    with torch.no_grad():
        expected = [x - 0.1 * g for x, (_, g) in zip(model.parameters(), grads, strict=True)]
    update(setup(Descent(0.1), model), model, dict(grads))
    for x, y in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(x.data, y)


def test_gradients_that_are_not_there_are_left_out():
    model = Net()
    state = fluxpy.freeze(setup(Descent(), model).blocks)
    whole = gradient(lambda m: loss(m), model)
    part = gradient(loss, model, state=fluxpy.setup({"blocks.*": None, "*": Descent()}, model))
    assert {path for path, _ in whole} > {path for path, _ in part} == {"head.weight", "head.bias"}
    assert part["blocks.0.norm.weight"] is None and state is not None


# --- Maps ---------------------------------------------------------------------------------------------------------


def test_a_model_and_its_gradients_together():
    """A step of descent as a map equals the pure update, and changes nothing that was given."""
    model = Net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    grads = gradient(loss, model)
    with torch.no_grad():
        new = tree_map(lambda x, g: x - 0.1 * g, model, grads)
    wanted = update(setup(Descent(0.1), model), model, grads, inplace=False)[1]
    assert type(new) is Net and new.again is new.blocks[0].norm  # still tied
    for (name, x), y in zip(new.named_parameters(), wanted.parameters(), strict=True):
        assert isinstance(x, nn.Parameter) and x.requires_grad, name
        torch.testing.assert_close(x, y)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_other_trees_together():
    a, b = {"w": torch.ones(2), "n": 3}, {"w": torch.full((2,), 3.0), "n": 4}
    assert tree_map(lambda x, y: (x + y) / 2, a, b)["w"].tolist() == [2, 2] and tree_map(torch.neg, a)["n"] == 3
    assert tree_map(lambda x, y: x * y, a, {"w": torch.tensor([1.0, 2.0])})["w"].tolist() == [1, 2]
    grads = gradient(lambda m: m["w"].square().sum(), a)
    assert dict(tree_map(lambda g, x: g - x, grads, a))["w"].tolist() == [1, 1]
    assert tree_map(torch.add, torch.ones(1), torch.ones(1)).tolist() == [2]
    half = tree_map(lambda g: g / 2, gradient(loss, net := Net()).head)
    assert {path for path, _ in half} == {"weight", "bias"} and half.weight.shape == net.head.weight.shape
    kept = tree_map(lambda x, g: x + g, a, {"w": None})
    assert torch.equal(kept["w"], a["w"]) and kept["w"] is not a["w"]
    nothing = tree_map(lambda g: g / 0, fluxpy.Gradients(*_empty(grads)))
    assert nothing["w"] is None


def test_gradients_of_another_part_are_not_lost():
    model = {"a": torch.ones(1), "b": torch.ones(1)}
    first, second = (gradient(lambda m, name=name: m[name].sum(), model) for name in "ab")
    with pytest.raises(ValueError, match="the first gradients have nothing at 'b'"):
        tree_map(torch.add, first, second)
    decayed = tree_map(lambda g, x: g + x, first, model)  # what is frozen stays out
    assert dict(decayed) == {"a": torch.tensor([2.0])}


def _empty(grads):
    spec = fluxpy.tree.spec_of(grads)
    return spec, [None]


def test_one_can_differentiate_through_a_map():
    x, factor = {"w": torch.tensor([2.0])}, torch.tensor(3.0, requires_grad=True)
    y = tree_map(lambda t: t * factor, x)
    assert torch.autograd.grad(y["w"].sum(), factor)[0] == 2


def test_of_a_state_it_maps_the_momenta():
    state = setup(AdamW(), Net())
    other = tree_map(lambda t: t + 1, state)
    assert bool(other.head.weight.state.m.all()) and not state.head.weight.state.m.any()
    total = tree_map(torch.add, other, other)
    assert optree.tree_leaves(total, namespace="fluxpy")[0].flatten()[0] == 2
    with pytest.raises(TypeError, match="or states"):
        tree_map(torch.add, Net(), state)
    with pytest.raises(ValueError, match=r"\(AdamW; 2 tensors\).*\(Descent; 0 tensors\)"):
        tree_map(torch.add, other, setup(Descent(), Net()))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: tree_map(lambda x: None, m), TypeError, "must return a tensor.*'blocks.0.norm.weight'"),
        (lambda m: tree_map(torch.add, m, Block()), ValueError, "do not fit"),
        (lambda m: tree_map(torch.add, m, {"head.wieght": torch.ones(1)}), ValueError, "head.weight"),
    ],
)
def test_maps_that_do_not_fit(call, error, match):
    with pytest.raises(error, match=match):
        call(Net())

"""The state mirrors the model: navigation, ties, odd names, wrappers, copies, pytrees."""

import collections
import copy
import pickle

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import nn

import fluxpy
from fluxpy import Adam, Averaged, Descent, leaves, select, setup, update

Pair = collections.namedtuple("Pair", "left right")


@optree.dataclasses.dataclass(namespace="fluxpy")
class Box:
    inside: object
    label: str = optree.dataclasses.field(pytree_node=False, default="box")


class Net(nn.Module):
    """Layers without parameters between layers with, a tie, a buffer, and names that collide with everything."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.keys, self.items, self.rule, self.state, self.frozen = (nn.Linear(1, 1) for _ in range(5))
        self.table = nn.ModuleDict({"0": nn.Linear(1, 2), "ab": nn.Linear(1, 2)})
        self.many = nn.ParameterList([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))])
        self.decoder = nn.Linear(2, 3)
        self.decoder.weight = self.layers[0].weight
        self.missing = None
        self._spec = nn.Linear(1, 1)


@pytest.fixture
def model():
    return Net()


@pytest.fixture
def state(model):
    return setup(Adam(), model)


def train_once(state, model):
    """A leaf that is frozen before it ever trained holds no momenta."""
    return update(state, model, {path: torch.ones_like(x) for path, x in model.named_parameters()})[0]


def test_paths_are_those_of_named_parameters(model, state):
    """Order, names and shapes are PyTorch's own; a tie is listed once, under its first name."""
    ours = [(path, leaf.shape) for path, leaf in leaves(state)]
    assert ours == [(name, p.shape) for name, p in model.named_parameters()]
    assert all(state[path] is leaf for path, leaf in leaves(state))


@pytest.mark.parametrize("name", ["keys", "items", "rule", "state", "frozen", "decoder", "_spec"])
def test_any_name_is_reached_by_attribute_or_key(state, name):
    assert state[name]["weight"] is state[f"{name}.weight"]
    if name != "_spec":
        assert getattr(state, name).weight is state[name].weight
    assert not [public for public in vars(type(state)) if not public.startswith("_")]


def test_positions_follow_the_model(model, state):
    """An index means the layer it means in the model, layers without parameters included."""
    assert state.layers[2].weight is state["layers.2.weight"] is state.layers[-2].weight
    assert list(leaves(state.layers[1])) == [] and len(state.layers) == len(model.layers)
    assert [path for path, _ in leaves(state.layers[1:3])] == ["2.weight", "2.bias"]
    assert state.layers[1:][1].weight is state.layers[2].weight
    assert [len(list(leaves(layer))) for layer in state.layers] == [2, 0, 2, 2]
    assert state.many[1] is state["many.1"]
    assert state.table["0"].weight is state["table.0.weight"]
    assert state["table.ab.bias"] is state.table["ab"].bias
    assert "layers.2.weight" in state and "layers.9" not in state


def test_a_tie_is_one_leaf_under_all_its_names(state):
    assert state.decoder.weight is state.layers[0].weight
    paths = [path for path, _ in leaves(state)]
    assert "layers.0.weight" in paths and "decoder.weight" not in paths
    assert [path for path, _ in leaves(select(state, "decoder.*"))] == ["decoder.weight", "decoder.bias"]
    assert [path for path, _ in leaves(state.decoder)] == ["weight", "bias"]
    pattern = {"decoder.weight": Descent(0.5), "*": Adam()}
    assert setup(pattern, Net()).layers[0].weight.rule == Descent(0.5)


def test_containers_and_mixtures():
    """Containers and modules in each other; what is no parameter gives an empty place."""
    model = {
        "net": nn.Linear(2, 2),
        "list": [torch.ones(1), 3, None, torch.ones(2)],
        "pair": Pair(torch.ones(3), "text"),
        "box": Box({1: torch.ones(4), 2: len}),
        "int": torch.arange(3),
        "complex": torch.ones(2, dtype=torch.complex64),
        "deep.name": torch.ones(5),
    }
    state = setup(Descent(), model)
    assert state["net"].weight is state["net.weight"] is state.net.weight
    assert state["list"][3] is state["list"][-1] is state["list.3"]
    assert [path for path, _ in leaves(state["list"][1:3])] == []
    assert state["pair"].left is state["pair"][0] is state["pair.left"]
    assert state["box"].inside[1] is state["box.inside.1"]
    assert isinstance(state["complex"], fluxpy.state.Leaf) and state["deep.name"] is not None
    assert "int" in state and not list(leaves(state["int"]))
    assert {path for path, _ in leaves(state)} == {
        "net.weight", "net.bias", "list.0", "list.3", "pair.left", "box.inside.1", "complex", "deep.name",
    }  # fmt: skip
    grads = optree.tree_map(
        lambda x: torch.ones_like(x) if fluxpy.tree.is_parameter(x) else None,
        {k: v for k, v in model.items() if k != "net"},
        none_is_leaf=True,
        namespace="fluxpy",
    )
    update(state, model, grads)
    torch.testing.assert_close(model["box"].inside[1], torch.full((4,), 0.9))


def test_an_exact_key_wins_over_a_dotted_path():
    state = setup(Adam(), {"a.b": torch.ones(1), "a": {"c": torch.ones(2)}})
    assert state["a.b"].shape == (1,) and state["a.c"].shape == (2,)


@pytest.mark.parametrize(
    "model", [{1: torch.ones(1), "1": torch.ones(1)}, {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}]
)
def test_two_parameters_of_one_path_are_refused(model):
    with pytest.raises(ValueError, match="one path"):
        setup(Adam(), model)


@pytest.mark.parametrize(
    ("look", "error", "match"),
    [
        (lambda s: s.layer, AttributeError, "did you mean 'layers'"),
        (lambda s: s["layers.0.wieght"], KeyError, "layers.0.weight"),
        (lambda s: s.layers[4], IndexError, "'0', '1', '2', '3'"),
        (lambda s: s.layers[9:], IndexError, "nothing"),
        (lambda s: s.table[0:1], TypeError, "sequences"),
        (lambda s: select(s, "nothing.*"), ValueError, "matches no leaf"),
        (lambda s: select(s, lambda path, leaf: leaf.frozen), ValueError, "matches no leaf"),
    ],
)
def test_what_is_not_there_is_an_error(state, look, error, match):
    with pytest.raises(error, match=match):
        look(state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrappers_are_looked_through():
    net = nn.Linear(2, 2)
    for wrapped in (torch.compile(net, backend="eager"), nn.DataParallel(net), {"inner": torch.compile(net)}):
        paths = [path.removeprefix("inner.") for path, _ in leaves(setup(Adam(), wrapped))]
        assert paths == ["weight", "bias"]


def test_a_sequence_with_a_parameter_of_its_own_keeps_positions():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    model.scale = nn.Parameter(torch.ones(1))
    state = setup(Adam(), model)
    assert state[2].weight is state["2.weight"] and state.scale is state["scale"]
    assert [path for path, _ in leaves(state[:2])] == ["0.weight", "0.bias"]


def test_a_verb_on_a_slice_takes_each_leaf_once():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Linear(2, 2), shared, nn.Sequential(nn.Linear(2, 2), shared))
    state = setup(Descent(0.1), model)
    fluxpy.adjust(state[1:], fluxpy.scale(0.5))
    assert [leaf.rule.lr for _, leaf in leaves(state)] == [0.1, 0.1, 0.05, 0.05, 0.05, 0.05]
    with pytest.raises(ValueError, match=r"no hyperparameter 'eta'.*at '1.weight', '1.bias', '2.0.weight'"):
        fluxpy.adjust(state[1:], eta=0.1)


def test_a_module_that_holds_its_parent():
    parent = nn.Linear(1, 1)
    parent.child = nn.Module()
    parent.child.parent = parent
    assert [path for path, _ in leaves(setup(Adam(), parent))] == ["weight", "bias"]


def test_edge_models():
    with pytest.warns(UserWarning, match="no parameters"):
        assert list(leaves(setup(Adam(), nn.ReLU()))) == []
    leaf = setup(Adam(), torch.ones(2))
    assert [path for path, _ in leaves(leaf)] == [""]
    with pytest.raises(ValueError, match="lazy"):
        setup(Adam(), nn.LazyLinear(3))


@pytest.mark.parametrize(
    "part", [lambda s: s, lambda s: s.layers[2:], lambda s: select(s, "*weight"), lambda s: s.decoder.bias]
)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_independent_and_hold_no_parameters(model, state, part, clone):
    view = part(state)
    train_once(state, model)
    twin = clone(view)
    assert [p for p, _ in leaves(twin)] == [p for p, _ in leaves(view)]
    before = pickle.dumps(view)
    fluxpy.freeze(fluxpy.adjust(twin, 7.0))
    for _, leaf in leaves(twin):
        leaf.state.m.add_(1)
    assert pickle.dumps(view) == before
    assert len(pickle.dumps(part(setup(Descent(), Net())))) < 4000


def test_the_state_is_a_pytree_of_its_tensors(model, state):
    """Numbers, flags and rules are metadata compared by structure: states that differ in them go together."""
    other = fluxpy.freeze(fluxpy.adjust(train_once(setup(Adam(0.5), model), model), eps=1e-3))
    for tree in (state, state.layers[1:], select(state, "*bias"), state.decoder.bias):
        tensors, spec = optree.tree_flatten(tree, namespace="fluxpy")
        assert len(tensors) == 2 * len(list(leaves(tree)))
        assert {id(t) for t in tensors} == {id(t) for _, leaf in leaves(tree) for t in (leaf.state.m, leaf.state.v)}
        back = optree.tree_unflatten(spec, tensors)
        assert [(p, leaf.rule, leaf.state.t) for p, leaf in leaves(back)] == [
            (p, leaf.rule, leaf.state.t) for p, leaf in leaves(tree)
        ]
        assert len(torch_pytree.tree_leaves(tree)) == len(tensors)
    both = optree.tree_map(torch.add, state, other, namespace="fluxpy")
    assert both.keys.weight.rule == state.keys.weight.rule
    torch_pytree.tree_map(torch.add, state, other)
    with pytest.raises(ValueError):
        optree.tree_map(torch.add, state, setup(Descent(), model), namespace="fluxpy")
    traced = setup(Descent(torch.tensor(0.1)), torch.ones(2))
    assert optree.tree_map(lambda t: t * 2, traced, namespace="fluxpy").rule.lr == torch.tensor(0.2)
    traced = setup(Averaged(Adam(torch.tensor(0.1)), decay=torch.tensor(0.9)), torch.ones(2))  # the rule is first
    rule = optree.tree_map(lambda t: t / 2, traced, namespace="fluxpy").rule
    assert (rule.decay.item(), rule.rule.lr.item()) == pytest.approx((0.45, 0.05))
    grads = fluxpy.gradient(lambda m: m["a"].sum(), {"a": torch.ones(2), "b": torch.ones(1)})
    doubled = optree.tree_map(lambda g: 2 * g, grads, namespace="fluxpy")
    assert doubled["b"] is None and doubled["a"].tolist() == [2, 2]


def test_a_large_tree_prints_folded():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    state = setup(Adam(), nn.Sequential(*[copy.deepcopy(layer) for _ in range(12)], nn.Linear(8, 2)))
    fluxpy.freeze(state[:6])
    text = str(state)
    assert "0 to 5  frozen" in text and "6 to 11\n" in text and len(text.splitlines()) < 50
    table = fluxpy.summary(state).splitlines()
    assert len(table) == 2 + len(list(leaves(state))) and "0.self_attn.in_proj_weight" in table[1]


def test_deep_and_wide_trees():
    """No step recurses where the limit of 900 levels would not let it; beyond, the error says so."""
    deep = torch.ones(2)
    for _ in range(899):
        deep = [deep]
    state = setup(Adam(), deep)
    (path, leaf), *_ = leaves(state)
    for inplace in (True, False):
        _, new = update(state, deep, {path: torch.ones(2)}, inplace=inplace)
    assert leaf.state.t == 1 and fluxpy.trainables(new)[0] is not fluxpy.trainables(deep)[0]
    assert len(pickle.dumps(state)) and len(str(copy.deepcopy(state)))
    with pytest.raises(ValueError, match="900 levels"):
        setup(Adam(), [[deep]])
    wide = {f"layer {i}": {"w": torch.ones(1)} for i in range(2000)}
    state = setup(Descent(1.0), wide)
    update(state, wide, {f"layer {i}.w": torch.ones(1) for i in range(0, 2000, 2)})
    assert wide["layer 1998"]["w"] == 0 and wide["layer 1999"]["w"] == 1

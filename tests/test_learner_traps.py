"""What was wrong without a word, or failed late: each of these was."""

import dataclasses
import math
from collections import OrderedDict, UserDict

import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import nn
from torch.nn import functional as F

import fluxpy
from fluxpy import Adam, DataLoader, Descent, setup, train, update, withgradient
from fluxpy.learner import Learner as _Learner


def Learner(*args, **kwargs):
    return _Learner(*args, default_callbacks=False, **kwargs)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))


def arrays(rows=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=g), torch.randint(0, 4, (rows,), generator=g)


# --- Outputs and batches of other libraries ---------------------------------------------------------------------------


class ModelOutput(OrderedDict):
    """As those of Hugging Face: an OrderedDict by class, which only PyTorch's registry knows."""


torch_pytree.register_pytree_node(
    ModelOutput,
    lambda x: (list(x.values()), list(x)),
    lambda values, names: ModelOutput(zip(names, values, strict=True)),
)


class Encoding(UserDict):
    """As a tokeniser's."""


@dataclasses.dataclass(frozen=True)
class Output:
    logits: torch.Tensor
    name: str = "same"


KINDS = {
    "model_output": lambda y: ModelOutput(logits=y, hidden=(y + 1, y + 2)),
    "user_dict": lambda y: Encoding({"logits": y}),
    "dataclass": Output,
    "nested": lambda y: {"out": [Output(y), None]},
}


class Gives(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.linear, self.make = nn.Linear(3, 4), make

    def forward(self, x):
        return self.make(self.linear(x))


def tensors_of(x):
    if isinstance(x, torch.Tensor):
        return [x]
    if dataclasses.is_dataclass(x):
        x = vars(x)
    inside = x.values() if hasattr(x, "values") else x if isinstance(x, list | tuple) else ()
    return [t for part in inside for t in tensors_of(part)]


@pytest.mark.parametrize("kind", KINDS)
def test_predict_joins_whatever_holds_tensors(kind):
    x, y = arrays()
    model = Gives(KINDS[kind])
    out = Learner(model, F.cross_entropy, Adam()).predict(DataLoader((x, y), batch_size=6))
    whole = model(x)
    assert type(out) is type(whole)
    for a, b in zip(tensors_of(out), tensors_of(whole), strict=True):
        assert torch.allclose(a, b) and not a.requires_grad


def test_predict_gives_a_list_where_outputs_cannot_be_joined():
    x, y = arrays(6)
    counter = iter(range(100))
    for make, expected in [
        (lambda out: f"batch {next(counter)}", ["batch 0", "batch 1", "batch 2"]),
        (lambda out: {"n": next(counter)}, [{"n": 3}, {"n": 4}, {"n": 5}]),
        (lambda out: ["a"] * len(out), [["a", "a"]] * 3),
    ]:
        out = Learner(Gives(make), F.cross_entropy, Adam()).predict(DataLoader((x, y), batch_size=2))
        assert out == expected
    sizes = iter([1, 2, 3])
    ragged = Learner(Gives(lambda out: out[:, : next(sizes)]), F.cross_entropy, Adam())
    assert [tuple(t.shape) for t in ragged.predict(DataLoader((x, y), batch_size=2))] == [(2, 1), (2, 2), (2, 3)]
    named = Learner(Gives(lambda out: Output(out, f"{next(counter)}")), F.cross_entropy, Adam())
    assert [out.name for out in named.predict(DataLoader((x, y), batch_size=2))] == ["6", "7", "8"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_withgradient_gives_has_no_history(kind):
    model = Gives(KINDS[kind])

    def loss(m, x):
        out = m(x)
        return tensors_of(out)[0].square().mean(), out

    (_, out), _ = withgradient(loss, model, torch.ones(2, 3))
    assert type(out) is type(model(torch.ones(2, 3)))
    assert tensors_of(out) and not any(t.requires_grad for t in tensors_of(out))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "nested"])
def test_batches_of_other_libraries_are_moved(kind):
    from fluxpy.train import place

    batch = KINDS[kind](torch.ones(2, 3))
    moved = place((batch, torch.ones(2)), torch.device("meta"))
    assert all(t.device.type == "meta" for t in tensors_of(moved)) and type(moved[0]) is type(batch)
    assert all(t.device.type == "cpu" for t in tensors_of(batch))
    assert place(batch, torch.device("cpu")) is batch


def test_a_dict_batch_with_one_key_is_passed_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, other=None, pixel_values=None):
            assert other is None
            return self.linear(pixel_values)

    x, y = arrays()
    data = DataLoader({"pixel_values": x, "label": y}, batch_size=5)
    assert len(Learner(Named(), F.cross_entropy, Adam()).fit(data)) == 1
    with pytest.raises(TypeError, match="keyword") as caught:
        Learner(nn.Linear(3, 4), F.cross_entropy, Adam()).fit(data)
    assert any("of a batch that is a dict the model gets keywords: pixel_values" in n for n in caught.value.__notes__)


class Rows:
    """A map-style data set that says so by its methods alone."""

    def __getitem__(self, i):
        if i >= 8:
            raise IndexError(i)
        return torch.ones(3), torch.tensor(1)

    def __len__(self):
        return 8


@pytest.mark.parametrize("data", [torch.utils.data.TensorDataset(*arrays()), Rows()])
def test_a_data_set_of_samples_is_refused(data):
    with pytest.raises(TypeError, match="gives single samples.*DataLoader"):
        Learner(net(), F.cross_entropy, Adam()).fit(data)
    with pytest.raises(TypeError, match="gives single samples.*DataLoader"):
        train(lambda m, x, y: F.cross_entropy(m(x), y), net(), data, setup(Adam(), net()))


# --- Autocast ---------------------------------------------------------------------------------------------------------


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def test_autocast_around_a_loop_is_autocast_inside_the_loss():
    x, y = arrays(8)
    loss = lambda m, x, y: F.cross_entropy(m(x), y)  # noqa: E731

    def inside(m, x, y):
        with autocast():
            return loss(m, x, y)

    weights = []
    for how in ("inside", "train", "loop", "fit"):
        model = net()
        state = setup(Descent(0.5), model)
        if how == "inside":
            train(inside, model, [(x, y)] * 6, state)
        with autocast():
            if how == "train":
                train(loss, model, [(x, y)] * 6, state)
            elif how == "fit":
                Learner(model, F.cross_entropy, state).fit([(x, y)] * 6)
            elif how == "loop":
                for _ in range(6):
                    _, grads = withgradient(loss, model, x, y)
                    update(state, model, grads)
        weights.append(model[0].weight.detach())
    first = net()[0].weight
    for other in weights[1:]:
        assert torch.allclose(other - first, weights[0] - first, rtol=0.05, atol=1e-3)

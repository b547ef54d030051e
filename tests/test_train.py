"""train and trainstep."""

import numpy as np
import pytest
import torch
from helpers import like_a_device
from torch import nn

import fluxpy
from fluxpy import Adam, DataLoader, Descent, freeze, leaves, setup, train, trainables, trainstep, update, withgradient


def loss(model, x, y):
    return (model(x) - y).square().mean()


def data(n=6, bad=()):
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(4, 3, generator=g), torch.randn(4, 2, generator=g)) for _ in range(n)]
    for i in bad:
        items[i][0][0, 0] = float("nan")
    return items


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_train_is_the_loop_one_writes():
    """Losses are measured before each update; batches may be tuples, dicts or tensors."""
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    b.load_state_dict(a.state_dict())
    state_a, state_b = setup(Adam(0.1), a), setup(Adam(0.1), b)
    losses = train(loss, a, data(), state_a)
    for (x, y), seen in zip(data(), losses, strict=True):
        value, grads = withgradient(loss, b, x, y)
        update(state_b, b, grads)
        assert value.item() == seen
    assert all(torch.equal(x, y) for x, y in zip(trainables(a), trainables(b), strict=True))
    dicts = [{"x": x, "y": y} for x, y in data()]
    assert len(train(lambda m, batch: loss(m, batch["x"], batch["y"]), a, dicts, state_a)) == 6
    assert len(train(lambda m, x: m(x).square().mean(), a, [x for x, _ in data()], state_a)) == 6


def test_a_loss_that_is_not_finite_updates_nothing():
    model = nn.Linear(3, 2)
    state = setup(Adam(), model)
    with pytest.raises(FloatingPointError, match="nan on item 3"):
        train(loss, model, data(bad=[3]), state)
    other = nn.Linear(3, 2)
    assert all(x.isfinite().all() for x in trainables(model)) and state.weight.count == 3
    before = [x.clone() for x in trainables(other)]
    value = trainstep(lambda m, x, y: (loss(m, x, y), "more"), other, data(1, bad=[0])[0], setup(Adam(), other))
    assert value[0].isnan() and value[1] == "more"
    assert all(torch.equal(x, y) for x, y in zip(before, trainables(other), strict=True))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, s, d: train(loss, m, [], s), ValueError, "no batch"),
        (lambda m, s, d: (train(loss, m, it := iter(d), s), train(loss, m, it, s)), ValueError, "used up"),
        (lambda m, s, d: train(loss, m, d[0], s), TypeError, r"DataLoader\(\(X, Y\)"),
        (lambda m, s, d: train(loss, m, list(d[0]), s), TypeError, "DataLoader"),
        (lambda m, s, d: train(loss, m, (np.ones(3), np.ones(3)), s), TypeError, "DataLoader"),
        (lambda m, s, d: train(loss, m, d, s, callbacks=[]), TypeError, "Learner"),
        (lambda m, s, d: train(loss, m, d, s, epochs=2), TypeError, "no argument 'epochs'; it goes over the data once"),
        (
            lambda m, s, d: train(loss, m, {"x": d[0][0]}, s),
            TypeError,
            r"iterable of batches, not dict: fluxpy\.DataLoader",
        ),
        (lambda m, s, d: train(loss, m, d, Adam()), TypeError, "state tree that setup returns"),
        (lambda m, s, d: train(loss, nn.Linear(3, 2, bias=False), d, s), ValueError, "does not fit the state"),
        (
            lambda m, s, d: train(loss, w := [m, torch.ones(1, device="meta")], d, setup(Adam(), w)),
            ValueError,
            "device",
        ),
    ],
)
def test_mistakes(call, error, match):
    model = nn.Linear(3, 2)
    state = setup(Adam(), model)
    with pytest.raises(error, match=match):
        call(model, state, data())


def test_training_mode_leaves_what_is_frozen_alone():
    """A frozen encoder that the user set to eval() keeps its BatchNorm statistics and its Dropout off."""
    model = nn.ModuleDict({"encoder": net(), "drop": nn.Dropout(), "head": nn.Linear(2, 2)}).eval()
    state = setup(Descent(), model)
    freeze(state.encoder)
    forward = lambda m, x, y: loss(lambda z: m["head"](m["drop"](m["encoder"](z))), x, y)  # noqa: E731
    before = model["encoder"][1].running_mean.clone()
    train(forward, model, data(), state)
    assert model.training and model["head"].training and model["drop"].training
    assert not any(module.training for module in model["encoder"].modules())
    assert torch.equal(before, model["encoder"][1].running_mean)
    fluxpy.thaw(state.encoder[3])
    train(forward, model, data(), state)
    assert model["encoder"].training and model["encoder"][2].training and not model["encoder"][1].training


def test_the_bar_is_for_a_person(capsys):
    model = nn.Linear(3, 2)
    state = setup(Descent(), model)
    train(loss, model, data(), state)
    assert capsys.readouterr().err == ""
    train(loss, model, DataLoader((torch.ones(4, 3), torch.ones(4, 2)), batch_size=2), state, progress=True)
    err = capsys.readouterr().err
    assert "2/2" in err and "loss=" in err
    assert [leaf.count for _, leaf in leaves(state)] == [8, 8]


@pytest.mark.parametrize("bad", ["loss", "norm"])
def test_on_a_device_the_flag_is_read_late(monkeypatch, bad):
    """Where the host does not read numbers in a step, the first bad one holds back its update and all after it."""
    like_a_device(monkeypatch)
    model, good = nn.Linear(3, 2), nn.Linear(3, 2)
    good.load_state_dict(model.state_dict())
    rule = fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(1.0), Adam())
    state, good_state = setup(rule, model), setup(rule, good)
    train(loss, good, data(3), good_state)
    if bad == "loss":
        with pytest.raises(FloatingPointError, match="the loss is nan on item 3"):
            train(loss, model, data(bad=[3, 4]), state)
    else:
        for i, (x, y) in enumerate(data()):
            _, grads = withgradient(loss, model, x, y)
            grads = {"weight": grads.weight, "bias": grads.bias * (float("inf") if i == 3 else 1)}
            update(state, model, grads)
        with pytest.raises(FloatingPointError, match="ClipGlobalNorm.*'bias' is not finite, in update 3"):
            fluxpy.check_finite(state)
    assert torch.equal(model.weight, good.weight) and torch.equal(state.weight.state[1].m, good_state.weight.state[1].m)
    fluxpy.check_finite(state)
    train(loss, model, data(), state)
    assert not torch.equal(model.weight, good.weight)

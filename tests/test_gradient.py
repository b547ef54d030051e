"""gradient, withgradient, trainables, destructure."""

import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import fluxpy
from fluxpy import Adam, Descent, destructure, freeze, gradient, setup, thaw, trainables, update, withgradient


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        return self.head(self.encoder(x))


X = torch.linspace(-1, 1, 15).reshape(5, 3)


def loss(model, x=X):
    return model(x).square().mean()


def test_gradients_are_pytorchs_and_leave_no_trace():
    model = Net()
    loss(model).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.no_grad():
        value, grads = withgradient(loss, model, X)
    assert not value.requires_grad and value == loss(model)
    for name, g in expected.items():
        assert (grads[name] is None) if g is None else torch.equal(grads[name], g)
    assert all(p.grad is None for p in model.parameters())
    assert "encoder.0.weight: (4, 3)" in repr(grads) and "unused.bias: None" in repr(grads)


def test_the_loss_may_come_with_more():
    value, grads = withgradient(lambda m: (loss(m), {"out": m(X), "n": 5}), Net())
    assert not value[1]["out"].requires_grad and value[1]["n"] == 5 and grads.head.weight is not None


def test_the_value_does_not_change_with_the_parameters():
    model = {"w": torch.ones(2)}
    value = withgradient(lambda m: (m["w"].sum(), m["w"], m["w"][:1]), model)[0]
    model["w"].zero_()
    assert value[1].tolist() == [1, 1] and value[2].tolist() == [1]


def test_any_pytree_and_second_derivatives():
    model = {"a": torch.tensor(2.0), "b": [torch.tensor(3.0), 7]}
    grads = gradient(lambda m: m["a"] ** 3 * m["b"][0], model)
    assert (grads["a"], grads["b"][0]) == (36.0, 8.0) and not model["a"].requires_grad
    assert gradient(lambda x: x**2, torch.tensor(3.0)) == 6.0
    outer = gradient(lambda m: gradient(lambda n: n["a"] ** 3, m, create_graph=True)["a"], {"a": torch.tensor(2.0)})
    assert outer["a"] == 12.0


@pytest.mark.parametrize("fails", [False, True])
def test_the_state_decides_who_trains(fails):
    """Whatever requires_grad says, in both directions; the flags are as before afterwards, whatever happens."""
    model = Net()
    model.head.requires_grad_(False)
    state = thaw(setup(Adam(), model))
    freeze(state.encoder)
    flags = [p.requires_grad for p in model.parameters()]

    def f(m):
        assert [p.requires_grad for p in m.head.parameters()] == [True, True]
        assert not any(p.requires_grad for p in m.encoder.parameters())
        assert not fails
        return loss(m)

    if fails:
        with pytest.raises(AssertionError):
            withgradient(f, model, state=state)
    else:
        _, grads = withgradient(f, model, state=state)
        assert grads.encoder[0].weight is None and grads.head.weight is not None
    assert flags == [p.requires_grad for p in model.parameters()]
    assert gradient(loss, model).head.weight is None


def test_frozen_leaves_cost_nothing():
    """Below the last trained layer no activation is kept and no node is made."""
    kept, seen = [], []

    def f(m):
        def watch(t):
            kept.append(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(watch, lambda t: t):
            kept.clear()
            hidden = m.encoder(X)
            seen.append((hidden.requires_grad, len(kept)))
            return m.head(hidden).square().mean()

    model = Net()
    state = setup(Adam(), model)
    withgradient(f, model, state=state)
    withgradient(f, model, state=freeze(state.encoder) and state)
    assert seen == [(True, 5), (False, 0)]


def test_activations_are_freed():
    refs = []

    def f(m):
        hidden = m.encoder(X)
        refs.append(weakref.ref(hidden))
        return m.head(hidden).sum()

    withgradient(f, Net())
    assert refs[0]() is None


@pytest.mark.parametrize(
    ("f", "match"),
    [
        (lambda m: m(X), r"one real number.*float32 with shape \(5, 2\)"),
        (lambda m: loss(m)[None], r"one real number.*shape \(1,\)"),
        (lambda m: 3.0, "one real number .* got 3.0"),
        (lambda m: m(X).sum() + 0j, "complex64"),
        (lambda m: loss(m).detach(), "depends on no parameter"),
        (lambda m: loss(Net()), "depends on no parameter"),
        (lambda m: (loss(m).item(), loss(m)), "one real number"),
    ],
)
def test_losses_that_are_none(f, match):
    with pytest.raises(ValueError, match=match):
        gradient(f, Net())


def test_other_mistakes():
    model = Net()
    with pytest.raises(ValueError, match="all of them are frozen"):
        withgradient(loss, model, state=freeze(setup(Adam(), model)))
    with pytest.raises(ValueError, match="no parameter"):
        gradient(loss, nn.ReLU())
    with pytest.raises(TypeError, match="function comes first"):
        gradient({}, model)
    with pytest.raises(ValueError, match="does not fit the state"):
        withgradient(loss, model, state=setup(Adam(), model.head))
    with pytest.raises(TypeError, match="state tree"):
        withgradient(loss, model, state=Adam())


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_reentrant_checkpointing_is_named():
    model = Net()

    def f(m, reentrant, x):
        return m.head(torch.utils.checkpoint.checkpoint(m.encoder, x, use_reentrant=reentrant)).sum()

    grads = gradient(f, model, False, X)
    assert torch.equal(grads.encoder[0].weight, gradient(lambda m: m(X).sum(), model).encoder[0].weight)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        gradient(f, model, True, X.clone().requires_grad_())
    with pytest.raises(ValueError, match="use_reentrant=False"):
        gradient(lambda m: torch.utils.checkpoint.checkpoint(m, X, use_reentrant=True).sum(), model)


def test_trainables_and_destructure():
    model = {"net": Net(), "w": torch.ones(2, dtype=torch.float64), "n": torch.arange(3)}
    model["net"].head.bias = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    model["again"] = model["net"].head.weight
    pairs = trainables(model, path=True)
    assert [p for p, _ in pairs][:2] == ["again", "net.encoder.0.weight"] and len(pairs) == len(trainables(model))
    assert [name for name, _ in trainables(Net(), path=True)] == [n for n, _ in Net().named_parameters()]
    flat, rebuild = destructure(model)
    assert flat.dtype == torch.float64 and flat.numel() == sum(x.numel() for x in trainables(model))
    twin = rebuild(flat.detach())
    assert type(twin["net"]) is Net and twin["net"].head.weight is twin["again"] and twin["n"] is model["n"]
    for x, y in zip(trainables(model), trainables(twin), strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and x.data_ptr() != y.data_ptr()
    vector = flat.detach().clone().requires_grad_()
    rebuild(vector)["net"].head.weight.sum().backward()
    assert vector.grad.sum() == 8.0
    gradient(lambda m: destructure(m)[0].square().sum(), model)
    for wrong in (flat[:-1], flat[None], [1.0]):
        with pytest.raises(ValueError, match="parameters: rebuild takes"):
            rebuild(wrong)


def test_with_torch_func():
    """What torch.func.grad over functional_call gives can be passed to update."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    params = dict(model.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (X,)).square().mean())(params)
    update(setup(Descent(), model), model, grads)
    update(setup(Descent(), other), other, gradient(loss, other))
    torch.testing.assert_close(model.weight, other.weight)
    assert fluxpy.leaves

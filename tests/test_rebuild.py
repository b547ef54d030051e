"""What is bound to a model follows into its copies, or is refused by name; nothing goes on with the old numbers."""

import functools
import logging
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fluxpy import (
    ClipGlobalNorm,
    Descent,
    Momentum,
    OptimiserChain,
    Rule,
    destructure,
    gradient,
    setup,
    thaw,
    update,
)

INPUT = torch.linspace(-1, 1, 12).reshape(4, 3)


class Net(nn.Module):
    def __init__(self, extra: Callable[["Net"], Any] = lambda net: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner: Any = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.extra = extra(self)

    def body(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.extra is None else self.extra(x)


class Helper:
    def __init__(self, *held: Any) -> None:
        self.held = held

    def __call__(self, x: Tensor) -> Tensor:
        return self.held[-1](x)


class Wrapped:
    """A method of an object that is no module."""

    __slots__ = ("net",)

    def __init__(self, net: Net) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * self.net.body(x)


def with_forward(make: Callable[[Net], Any]) -> Net:
    net = Net()
    net.forward = make(net)
    return net


def like_a_library(net: Net) -> Any:
    """As libraries wrap a model's forward."""
    old = net.forward

    @functools.wraps(old)
    def forward(*args: Any, scale: float = 2.0, **options: Any) -> Tensor:
        return scale * old(*args, **options)

    return forward


def weakly(net: Net) -> Any:
    inner = weakref.ref(net.inner)
    return lambda x: inner()(x)


def with_handle() -> Net:
    net = Net()
    net.handle = net.register_forward_hook(lambda module, args, out: out + net.inner[0].bias)
    return net


def recursive(net: Net) -> Any:
    def f(x: Tensor, times: int = 2) -> Tensor:
        return net.body(x) if times == 0 else f(x, times - 1)

    return f


def hooked() -> Net:
    net = Net()
    net.register_forward_hook(lambda module, args, out: out + net.inner[0].bias)
    net.inner[0].register_forward_pre_hook(
        types.MethodType(lambda self, module, args: args[0] + self.inner[0].bias, net)
    )
    return net


def compiled() -> Net:
    net = Net()
    net.compile(backend="eager")
    return net


class Views(Net):
    """Beside its parameters it holds tensors that lie in their memory, and buffers that lie in each other's."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.trained = self.inner[0].weight.data[1], self.inner[0].weight[0]
        self.register_buffer("turned", self.inner[0].weight.detach().t())
        self.register_buffer("pair", torch.zeros(2))
        self.register_buffer("second", self.pair[1:])

    def body(self, x: Tensor) -> Tensor:
        self.pair.add_(1)
        return super().body(x) * (self.row.sum() + self.trained.sum() + self.second) + x @ self.turned


FOLLOW = {
    "views": Views,
    "a method": lambda: Net(lambda net: net.body),
    "a lambda": lambda: Net(lambda net: lambda x: net.body(x)),
    "a lambda in a list": lambda: Net(lambda net: dict(f=[lambda x: net.body(x)])["f"][0]),
    "a function that calls itself": lambda: Net(recursive),
    "a partial": lambda: Net(lambda net: functools.partial(linear, weight=net.inner[0].weight, bias=net.inner[0].bias)),
    "a weak reference": lambda: Net(weakly),
    "a handle": with_handle,
    "a default": lambda: Net(lambda net: lambda x, weight=net.inner[0].weight: x @ weight),
    "a patched forward": lambda: with_forward(lambda net: types.MethodType(lambda self, x: 2 * self.body(x), net)),
    "a wrapped forward": lambda: with_forward(like_a_library),
    "hooks": hooked,
    "compile": compiled,
    "fx": lambda: torch.fx.symbolic_trace(Net()),
    "export": lambda: torch.export.export(Net(), (INPUT,)).module(),
    "a parametrization": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
    "an LSTM": lambda: nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 3), Helped()),
}


class Helped(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return x[0]


def loss(model: Any) -> Tensor:
    return model(INPUT).square().mean()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of fx and export
@pytest.mark.parametrize("make", FOLLOW.values(), ids=FOLLOW)
def test_what_is_bound_to_a_model_follows_its_copy(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    a = make()
    torch.manual_seed(0)
    b = make()
    grads = gradient(loss, a)
    before = [x.clone() for x in a.parameters()]
    _, copy = update(setup(Descent(0.5), a), a, grads, inplace=False)
    update(setup(Descent(0.5), b), b, gradient(loss, b))
    assert type(copy) is type(a)
    flat, rebuild = destructure(a)
    again = rebuild(flat + 1)
    with torch.no_grad():
        for x in before:
            x += 1
        torch.testing.assert_close(loss(copy), loss(b))
        for x, y in zip(a.parameters(), before, strict=True):
            x.copy_(y)
        torch.testing.assert_close(loss(again), loss(a))
    assert all(
        g.any() for g in torch.autograd.grad(loss(copy), list(copy.parameters()), allow_unused=True) if g is not None
    )


def overlapping() -> Net:
    net, flat = Net(), torch.ones(12)
    net.inner[0].weight.data, net.part = flat[:9].view(3, 3), flat
    return net


REFUSED = {
    "what overlaps": (lambda: overlapping(), r"Net\.part holds float32\[12\] in the memory of a parameter"),
    "an object": (lambda: Net(lambda net: Helper(net.inner[0])), r"Net\.extra holds .* object of .*Helper"),
    "inside": (lambda: nn.Sequential(Net(lambda net: Helper(0, {"a": [net.body]}))), r"Sequential\.0\.extra holds"),
    "with slots": (lambda: Net(lambda net: Wrapped(net)), r"Net\.extra holds .*Wrapped"),
    "in a closure": (lambda: Net(lambda net: functools.partial(Helper(net.inner), torch.ones(1))), r"Net\.extra holds"),
    "a weak method": (lambda: Net(lambda net: weakref.WeakMethod(net.body)), r"Net\.extra holds"),
    "a script": (lambda: torch.jit.trace(Net().eval(), INPUT), "scripted module"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_follow_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    model = make()
    state = setup(Descent(0.5), model)
    grads = {name: torch.ones_like(x) for name, x in model.named_parameters()}
    before = [x.detach().clone() for x in model.parameters()]
    with pytest.raises(TypeError, match=message):
        update(state, model, grads, inplace=False)
    with pytest.raises(TypeError, match=message):
        destructure(model)[1](destructure(model)[0])
    assert all(map(torch.equal, before, model.parameters()))
    update(state, model, grads)  # in place nothing is copied
    assert not torch.equal(before[0], next(iter(model.parameters())))


class Config:
    def __init__(self) -> None:
        self.sizes, self.nested, self.me = [1, 2], {"a": types.SimpleNamespace(b=torch.ones(2))}, self


def test_ordinary_attributes_are_no_alarm_and_stay_shared() -> None:
    net = Net()
    others: dict[str, Any] = {
        "config": Config(),
        "logger": logging.getLogger("net"),
        "lock": threading.Lock(),
        "local": threading.local(),
        "generator": torch.Generator(),
        "act": nn.functional.relu,
        "method": Config().__init__,
        "kind": Config,
        "module": torch,
        "dtype": torch.float32,
        "table": torch.ones(3),
        "counter": (lambda count=0: lambda: count)(),
        "partial": functools.partial(linear, weight=torch.ones(3, 3)),
    }
    for name, value in others.items():
        setattr(net, name, value)
    setattr(net, "handle", net.register_forward_hook(lambda module, args, out: out))  # noqa: B010
    net.register_load_state_dict_pre_hook(lambda module, *args: None)
    _, copy = update(setup(Descent(0.5), net), net, gradient(loss, net), inplace=False)
    assert all(getattr(copy, name) is value for name, value in others.items() if name != "method")
    copy.load_state_dict(net.state_dict())


class Marked(nn.Parameter):
    """A user's own parameters."""


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "thawed"])
@pytest.mark.parametrize(
    "rule", [Descent(0.5), OptimiserChain(ClipGlobalNorm(0.5), Momentum(0.5))], ids=["one", "chain"]
)
def test_parameters_keep_their_class_attributes_and_hooks(rule: Rule, frozen: bool) -> None:
    ends = []
    for inplace in (True, False):
        model, fired = Net(), list[str]()
        weight = model.inner[0].weight = Marked(model.inner[0].weight.detach())
        weight.group = ["a"]
        weight.register_hook(lambda g: g * torch.tensor([1.0, 0.0, 2.0]))  # holds a column
        weight.register_post_accumulate_grad_hook(lambda x, fired=fired: fired.append("there"))
        weight.requires_grad_(not frozen)
        state = thaw(setup(rule, model))
        for _ in range(3):
            state, model = update(state, model, gradient(loss, model, state=state), inplace=inplace)
        new = model.inner[0].weight
        assert type(new) is Marked
        assert new.group is weight.group
        assert torch.equal(new[:, 1], Net().inner[0].weight[:, 1])
        loss(model.requires_grad_()).backward()
        assert fired == ["there"]
        ends.append([x.detach() for x in model.parameters()])
        assert len(weight._backward_hooks) == 1  # which the copy has its own of
        assert (new._backward_hooks is weight._backward_hooks) is (new is weight)
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y)


def test_hooks_and_attributes_of_tensors_that_are_no_parameters() -> None:
    model = {"w": torch.ones(3, requires_grad=True)}
    model["w"].register_hook(lambda g: g * 0)
    model["w"].group = "a"
    with torch.no_grad():
        _, new = update(setup(Descent(0.5), model), model, {"w": torch.ones(3)}, inplace=False)
    assert new["w"].group == "a"
    assert torch.equal(new["w"], torch.full((3,), 0.5))
    assert torch.equal(gradient(lambda m: m["w"].sum(), new)["w"], torch.zeros(3))

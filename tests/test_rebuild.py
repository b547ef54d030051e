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

from fluxpy import Descent, destructure, gradient, setup, update

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


FOLLOW = {
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


REFUSED = {
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

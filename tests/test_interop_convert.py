"""Runs of torch.optim go on here, and ours there, with the same numbers."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fluxpy
from fluxpy import AccumGrad, Adam, AdamW, ClipNorm, Descent, Lion, Momentum, OptimiserChain, WeightDecay
from fluxpy.interop import TorchOptimizer, from_torch, to_torch

opt = torch.optim
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (opt.SGD, {"lr": 0.1}),
    "SGD momentum": (opt.SGD, {"lr": 0.1, "momentum": 0.8}),
    "SGD nesterov": (opt.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
    "Adam": (opt.Adam, {"lr": 0.05, "betas": (0.8, 0.95)}),
    "Adam penalty": (opt.Adam, {"lr": 0.05, "weight_decay": 0.1}),
    "Adam amsgrad": (opt.Adam, {"lr": 0.05, "amsgrad": True, "weight_decay": 0.1}),
    "Adam decoupled": (opt.Adam, {"lr": 0.05, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    "AdamW": (opt.AdamW, {"lr": 0.05, "weight_decay": 0.2, "eps": 1e-4}),
    "RMSprop": (opt.RMSprop, {"lr": 0.02, "alpha": 0.9}),
    "RMSprop centered": (opt.RMSprop, {"lr": 0.02, "centered": True, "weight_decay": 0.05}),
    "Rprop": (opt.Rprop, {"lr": 0.02, "etas": (0.4, 1.3), "step_sizes": (1e-4, 0.1)}),
    "Adagrad": (opt.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.3}),
    "NAdam": (opt.NAdam, {"lr": 0.05, "momentum_decay": 0.01, "weight_decay": 0.1}),
    "RAdam": (opt.RAdam, {"lr": 0.05, "betas": (0.8, 0.9)}),
    "Adamax": (opt.Adamax, {"lr": 0.05}),
    "Adafactor": (opt.Adafactor, {"lr": 0.1, "weight_decay": 0.1}),
    "Adadelta": (opt.Adadelta, {"lr": 0.9, "rho": 0.8}),
}
rows = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


DATA = torch.Generator().manual_seed(7)
X, Y = torch.randn(16, 3, generator=DATA).double(), torch.randn(16, 2, generator=DATA).double()


def loss_of(model: nn.Module) -> torch.Tensor:
    return mse_loss(model(X), Y)


def steps(optimizer: torch.optim.Optimizer, model: nn.Module, n: int = 8) -> None:
    for _ in range(n):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def updates(state: Any, model: nn.Module, n: int = 8) -> None:
    for _ in range(n):
        loss_of(model).backward()
        fluxpy.update(state, model)
        model.zero_grad()


def groups(model: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Two groups that differ, in an order that is not the model's."""
    return [
        {"params": list(model[4].parameters()), "lr": options["lr"] / 2},
        {"params": [*model[0].parameters(), *model[2].parameters()]},
    ]


def assert_same_change(one: nn.Module, other: nn.Module, before: nn.Module) -> None:
    sizes = [(x - x0).abs().max().item() for x, x0 in zip(one.parameters(), before.parameters(), strict=True)]
    assert min(sizes) > 1e-3
    for x, y in zip(one.parameters(), other.parameters(), strict=True):
        assert (x - y).abs().max() < 1e-12 * max(sizes)


@rows
def test_a_run_of_torch_goes_on_here(name: str) -> None:
    kind, options = RUNS[name]
    theirs = net()
    optimizer = kind(groups(theirs, options), **options)
    steps(optimizer, theirs)
    ours, before = copy.deepcopy(theirs), copy.deepcopy(theirs)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = kind(groups(ours, options), **options)
    fresh.load_state_dict(saved)
    state = from_torch(fresh, ours)
    assert fluxpy.value(state[4].weight, "lr") == options["lr"] / 2
    assert state[0].weight.count == (0 if kind is opt.SGD else 8)
    steps(optimizer, theirs)
    updates(state, ours)
    assert_same_change(theirs, ours, before)
    assert str(fresh.state_dict()) == str(saved), "the optimiser is not changed, and shares nothing"


@rows
def test_a_run_of_ours_goes_on_in_torch(name: str) -> None:
    kind, options = RUNS[name]
    ours = net()
    state = from_torch(kind(groups(ours, options), **options), ours)
    updates(state, ours)
    theirs, before = copy.deepcopy(ours), copy.deepcopy(ours)
    empty = {"lr": 1e-5} | ({"momentum": 0.1, "nesterov": True} if name == "SGD nesterov" else {})
    optimizer = kind(groups(theirs, {"lr": 3.0}), **empty)
    assert to_torch(state, theirs, optimizer) is optimizer
    updates(state, ours)
    steps(optimizer, theirs)
    assert_same_change(ours, theirs, before)


@rows
def test_a_run_goes_there_and_back_before_its_first_step(name: str) -> None:
    kind, options = RUNS[name]
    theirs, ours = net(), net()
    state = from_torch(kind(groups(ours, options), **options), ours)
    optimizer = to_torch(state, theirs, kind(groups(theirs, options), lr=1.0))
    steps(optimizer, theirs)
    updates(state, ours)
    if "initial_accumulator_value" not in options:  # that a new optimiser of torch has already
        twin = net()
        steps(kind(groups(twin, options), **options), twin)
        assert_same_change(twin, ours, net())
    assert_same_change(theirs, ours, net())


@pytest.mark.parametrize("name", ["Adam penalty", "RMSprop centered", "Adagrad", "SGD momentum", "Rprop", "NAdam"])
def test_complex_parameters(name: str) -> None:
    kind, options = RUNS[name]
    theirs = {"w": nn.Parameter(torch.randn(3, 2, dtype=torch.complex128)), "b": nn.Parameter(torch.randn(2))}
    ours = {key: nn.Parameter(x.detach().clone()) for key, x in theirs.items()}

    def backward(model: Any) -> None:
        for x in model.values():
            x.grad = None
        ((model["w"] - 1j).abs().pow(2).sum() + model["b"].sin().sum()).backward()

    optimizer = kind(theirs.values(), **options)
    for _ in range(5):
        backward(theirs)
        optimizer.step()
    for key, x in ours.items():
        x.data.copy_(theirs[key])
    fresh = kind(ours.values(), **options)
    fresh.load_state_dict(optimizer.state_dict())
    state = from_torch(fresh, ours)
    back = to_torch(state, ours, kind(ours.values(), **options))
    for x, y in zip(fresh.state.values(), back.state.values(), strict=True):
        for key, value in x.items():
            assert torch.equal(value, y[key]), key
    for _ in range(5):
        backward(theirs)
        optimizer.step()
        backward(ours)
        fluxpy.update(state, ours)
    assert (theirs["w"] - ours["w"]).abs().max() < 1e-12
    assert (theirs["b"] - ours["b"]).abs().max() < 1e-12


def test_parts_that_the_optimiser_does_not_train() -> None:
    """One with `requires_grad=False` is frozen, one that it does not have has no rule, one without a step is new."""
    model = net()
    model[2].weight.requires_grad_(False)
    optimizer = opt.Adam([*model[2].parameters(), *model[4].parameters()], lr=0.1)
    state = from_torch(optimizer, model)
    assert state[0].weight.rule is None and state[0].weight.frozen
    assert state[2].weight.frozen and state[2].weight.rule == Adam(0.1) and state[2].weight.state is None
    assert not state[2].bias.frozen and state[2].bias.state.t == 0
    there = to_torch(state, model, opt.Adam([*model[2].parameters(), *model[4].parameters()]))
    assert there.param_groups[0]["lr"] == 0.1


def test_leaves_of_one_group_share_their_rule() -> None:
    model = net()
    state = from_torch(opt.Adam(model.parameters()), model)
    assert state[0].weight.rule is state[4].bias.rule


def test_momenta_keep_their_dtype_and_layout() -> None:
    model = nn.Conv2d(3, 4, 3).to(torch.bfloat16)
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = opt.Adam(model.parameters(), lr=0.1)
    model(torch.randn(1, 3, 5, 5, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    leaf = from_torch(optimizer, model).weight
    assert leaf.state.m.dtype == torch.bfloat16
    assert leaf.state.m.stride() == model.weight.stride()


def test_a_rate_that_is_a_tensor_stays_one() -> None:
    model = net()
    lr = torch.tensor(0.1)
    state = from_torch(opt.Adam(model.parameters(), lr=lr, foreach=False), model)
    lr.fill_(0.2)
    assert isinstance(state[0].weight.rule.lr, torch.Tensor) and state[0].weight.rule.lr == 0.1
    there = to_torch(state, model, opt.Adam(model.parameters()))
    assert there.param_groups[0]["lr"] == 0.1


class Mine(opt.Adam):
    pass


class Wrapped:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


REFUSED: list[tuple[Any, str]] = [
    (lambda p: opt.SGD(p, momentum=0.9, dampening=0.5), "SGD with dampening=0.5: no rule has this mode"),
    (lambda p: opt.SGD(p, maximize=True), "torch.optim.SGD: maximize=True is not available; negate the loss"),
    (lambda p: opt.Adam(p, capturable=True), "capturable=True is not available; a step is not made for CUDA graphs"),
    (lambda p: opt.Adam(p, differentiable=True), "differentiable=True is not available; write fluxpy.update"),
    (lambda p: opt.AdamW(p, amsgrad=True), "AdamW with amsgrad=True"),
    (lambda p: opt.NAdam(p, decoupled_weight_decay=True), "NAdam with decoupled_weight_decay=True"),
    (lambda p: opt.RAdam(p, decoupled_weight_decay=True), "RAdam with decoupled_weight_decay=True"),
    (lambda p: opt.RMSprop(p, momentum=0.5), "RMSprop with momentum=0.5"),
    (lambda p: opt.Muon([x for x in p if x.ndim == 2], ns_steps=4, eps=1e-6), "Muon with eps=1e-06"),
    (lambda p: opt.Adagrad(p, lr_decay=0.5), "Adagrad with lr_decay=0.5"),
    (opt.ASGD, "torch.optim.ASGD has no rule that does the same; known are Adadelta, .*, SGD"),
    (opt.LBFGS, "torch.optim.LBFGS has no rule"),
    (Mine, "Mine is no class of torch.optim"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused_by_name(make: Any, message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message):
        from_torch(make(model.parameters()), model)


def test_what_is_no_optimiser_of_torch() -> None:
    model = net()
    with pytest.raises(TypeError, match="takes an optimiser of torch.optim, but got State"):
        from_torch(fluxpy.setup(Adam(), model), model)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="its state is optimizer.tree"):
        from_torch(TorchOptimizer(Adam(), model), model)
    with pytest.raises(ValueError, match="Wrapped is no class of torch.optim; of a wrapper, .* optimizer.optimizer"):
        to_torch(fluxpy.setup(Adam(), model), model, Wrapped(opt.Adam(model.parameters())))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="4 parameters of the optimiser are not in the model"):
        from_torch(opt.Adam(model.parameters()), model[0])


THERE: list[tuple[Any, str]] = [
    (OptimiserChain(ClipNorm(1.0), Adam()), "torch.optim.Adam does not do what OptimiserChain.ClipNorm"),
    (OptimiserChain(AccumGrad(2), Adam()), "does not do what OptimiserChain.AccumGrad"),
    (OptimiserChain(Adam(), WeightDecay()), "does not do what"),
    (Lion(), "does not do what Lion"),
    (Descent(), "torch.optim.Adam does not do what Descent"),
    (Adam(fluxpy.schedules.cosine(0.1, 0.0, 10)), "keeps no schedules: .*adjust it to a number first"),
    ({"0.*": Adam(0.1), "*": Adam(0.2)}, "'0.weight' and '2.weight' are in one param group, but have different"),
    ({"4.*": None, "*": Adam()}, "'4.weight', '4.bias' are frozen here; torch needs x.requires_grad_"),
]


@pytest.mark.parametrize(("rule", "message"), THERE, ids=lambda x: x if isinstance(x, str) else "")
def test_what_torch_cannot_do_is_refused_and_changes_nothing(rule: Any, message: str) -> None:
    model = net()
    optimizer = opt.Adam(model.parameters())
    steps(optimizer, model, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        to_torch(fluxpy.setup(rule, model), model, optimizer)
    assert str(optimizer.state_dict()) == str(before)


def test_modes_of_the_optimiser_that_is_filled() -> None:
    model = net()
    with pytest.raises(ValueError, match="Adam with {'maximize': True} does not do what a rule does"):
        to_torch(fluxpy.setup(Adam(), model), model, opt.Adam(model.parameters(), maximize=True))
    with pytest.raises(TypeError, match="to_torch takes the state tree .*, but got the model"):
        to_torch(model, model, opt.Adam(model.parameters()))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="does not have the parameters '0.weight', '0.bias', which train here"):
        to_torch(fluxpy.setup(Adam(), model), model, opt.Adam([*model[2].parameters(), *model[4].parameters()]))
    with pytest.raises(ValueError, match="parameters that are not in the model"):
        to_torch(fluxpy.setup(Adam(), model[0]), model[0], opt.Adam(model.parameters()))
    fused = to_torch(fluxpy.setup(AdamW(), model), model, opt.AdamW(model.parameters(), fused=True))
    steps(fused, model, 2)


def test_nesterov_goes_to_an_optimiser_that_was_made_plain() -> None:
    """The options that select the mode are set too."""
    ours, theirs = net(), net()
    state = fluxpy.setup(fluxpy.Nesterov(0.1, 0.7), ours)
    optimizer = to_torch(state, theirs, opt.SGD(theirs.parameters(), momentum=0.3, dampening=0.2))
    updates(state, ours)
    steps(optimizer, theirs)
    assert_same_change(ours, theirs, net())


def test_plain_descent_goes_to_an_optimiser_with_momentum() -> None:
    ours, theirs = net(), net()
    state = fluxpy.setup(Descent(0.1), ours)
    optimizer = to_torch(state, theirs, opt.SGD(theirs.parameters(), momentum=0.3))
    updates(state, ours)
    steps(optimizer, theirs)
    assert_same_change(ours, theirs, net())


@pytest.mark.parametrize("kind", [opt.Muon, opt.Adafactor])
def test_matrices(kind: Any) -> None:
    """Both ways, the stacks and factors of matrices, with options that are not the defaults."""
    of_muon = {"momentum": 0.8, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}
    options = of_muon if kind is opt.Muon else {"d": 1.5, "beta2_decay": -0.7}

    def model() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))

    theirs, ours = model(), model()
    optimizer = kind(theirs.parameters(), lr=0.05, weight_decay=0.2, **options)
    steps(optimizer, theirs)
    fresh = kind(ours.parameters())
    ours.load_state_dict(theirs.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    state = from_torch(fresh, ours)
    updates(state, ours)
    steps(optimizer, theirs)
    assert_same_change(theirs, ours, model())
    back = to_torch(state, ours, kind(ours.parameters()))
    steps(back, ours)
    steps(optimizer, theirs)
    assert_same_change(theirs, ours, model())


def test_tied_parameters_and_wrapped_models() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    wrapped = nn.DataParallel(model)
    optimizer = opt.Adam(wrapped.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = from_torch(optimizer, wrapped)
    assert [path for path, _ in fluxpy.leaves(state)] == ["0.weight", "0.bias", "1.bias"]
    assert state[1].weight is state[0].weight
    assert to_torch(state, model, opt.Adam(model.parameters())).state[model[0].weight]["step"] == 1


def test_a_frozen_leaf_keeps_what_torch_had_for_it() -> None:
    model = net()
    optimizer = opt.Adam(model.parameters())
    steps(optimizer, model, 3)
    model[0].weight.requires_grad_(False)
    state = from_torch(optimizer, model)
    assert state[0].weight.frozen and state[0].weight.state.t == 3
    assert torch.equal(state[0].weight.state.m, optimizer.state[model[0].weight]["exp_avg"])


def test_momentum_state_and_rule_are_those_of_torch() -> None:
    model = net()
    optimizer = opt.SGD(model.parameters(), lr=0.3, momentum=0.4)
    steps(optimizer, model, 1)
    state = from_torch(optimizer, model)
    assert state[0].weight.rule == Momentum(0.3, 0.4)
    assert torch.equal(state[0].weight.state, optimizer.state[model[0].weight]["momentum_buffer"])

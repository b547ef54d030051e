"""Tensors that share memory: two parameters, or a gradient with a parameter or with momenta. Refused or right, and the
same on all paths."""

import copy

import pytest
import torch
from helpers import CHAINS, FEW, Run, assert_alike, grads_of, image, model_of, tensors_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fluxpy
from fluxpy import AdaGrad, Adam, AdamW, Descent, Momentum, OptimiserChain, RMSProp, Rule, WeightDecay, setup, update

SHAPES = {"a": (4, 3), "b": (4, 3), "c": (5,)}

# --- A gradient that is something else too ------------------------------------------------------------------------

GIVEN = {
    "another parameter": lambda state, model, grads: grads | {"a": model["b"]},
    "another parameter, without its history": lambda state, model, grads: grads | {"a": model["b"].detach()},
    "the parameter itself": lambda state, model, grads: grads | {"b": model["b"].detach()},
    "each other": lambda state, model, grads: grads | {"a": model["b"].detach(), "b": model["a"].detach()},
    "a part of a parameter": lambda state, model, grads: grads | {"c": model["b"].detach().reshape(-1)[2:7]},
    "one for two": lambda state, model, grads: grads | {"a": grads["b"]},
    "momenta": lambda state, model, grads: (
        grads | {"a": next((t for t in tensors_of(state.b.state) if t.shape == (4, 3)), grads["a"])}
    ),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
def test_a_gradient_that_is_written_in_the_same_update(given):
    """What counts is what it was before."""
    outcomes = {}
    for name in FEW:
        for layout in ("apart", "flat"):
            for stepped in (0, 2):
                run, twin = (Run(CHAINS[name], layout, SHAPES).step(stepped) for _ in range(2))
                for _ in range(2):
                    grads = given(run.state, run.model, run.grads())
                    twin.step(1, lambda _, g=grads: {k: dx.detach().clone() for k, dx in g.items()})
                    before = run.image()
                    try:
                        run.step(1, lambda _, g=grads: g)
                    except ValueError as error:
                        assert_alike(run.image(), before)
                        outcomes[name, layout, stepped] = str(error)
                        break
                    run.equals(twin, room=1e-12)
                    outcomes[name, layout, stepped] = None
    assert len({outcome is None for outcome in outcomes.values()}) == 1, outcomes


# --- Parameters that share memory ---------------------------------------------------------------------------------

TWINS = {
    "Descent": (Descent(0.1), torch.optim.SGD, {"lr": 0.1}),
    "Momentum": (Momentum(0.1), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (AdamW(0.1), torch.optim.AdamW, {"lr": 0.1}),
    "Adam": (Adam(0.1), torch.optim.Adam, {"lr": 0.1}),
    "AdaGrad": (AdaGrad(0.1), torch.optim.Adagrad, {"lr": 0.1}),
    "RMSProp": (RMSProp(0.1), torch.optim.RMSprop, {"lr": 0.1}),
    "whole": (CHAINS["whole"], None, {}),
    "own": (CHAINS["own"], None, {}),
    "clip all, Lion": (CHAINS["clip all, Lion"], None, {}),
}


def on_one_memory(how):
    """Two parameters that are not one, on the same elements or on some of them."""
    buffer = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = {"whole": 0, "in part": 5}[how]
    parts = {"a": buffer[:12], "b": buffer[start : start + 12], "c": buffer[18:23]}
    return nn.ParameterDict({name: nn.Parameter(t.view(SHAPES[name])) for name, t in parts.items()})


@pytest.mark.parametrize("how", ["whole", "in part"])
@pytest.mark.parametrize("inplace", [True, False])
def test_two_parameters_on_one_memory(how, inplace):
    """Refused by name, or stepped one after the other as `torch.optim` does; not one way here and another there."""
    outcomes = {}
    for name, (rule, twin, options) in TWINS.items():
        for start in (0, 1):
            model, other, fresh = on_one_memory(how), on_one_memory(how), model_of(SHAPES)
            optimizer = twin(other.parameters(), **options, foreach=False) if twin and not start else None
            values = [x.detach().clone() for x in model.values()]
            try:
                state = setup(rule, fresh if start else model)
                if start:  # made for a model without such a thing, and used with it
                    update(state, fresh, grads_of(fresh))
                for i in range(3):
                    state, model = update(state, model, grads_of(model, i), inplace=inplace)
                    for key, dx in grads_of(model, i).items():
                        other[key].grad = dx
                    if optimizer is not None:
                        optimizer.step()
            except ValueError as error:
                assert "'a'" in str(error) and "'b'" in str(error)
                assert all(map(torch.equal, model.values(), values))
                outcomes[name, start] = "refused"
                continue
            outcomes[name, start] = "stepped"
            if optimizer is not None and inplace:
                for key, x in other.items():
                    torch.testing.assert_close(model[key], x, rtol=1e-10, atol=1e-12, msg=f"{name} {key}")
    assert len(set(outcomes.values())) == 1, outcomes


@pytest.mark.parametrize("name", TWINS)
def test_parameters_that_come_to_lie_in_one_memory(name):
    """Whatever was made for them before: refused, or the gradients that lie there are read before they are written."""
    rule, model = TWINS[name][0], model_of(SHAPES)
    state = setup(rule, model)
    for i in range(2):
        update(state, model, grads_of(model, i))
    for x in model.values():
        x.data = x.data.clone()
    expected, twin = copy.deepcopy((model, state))
    crossed = [grads_of(m) | {"a": m["b"].detach(), "b": m["a"].detach()} for m in (model, expected)]
    update(state, model, crossed[0])
    update(twin, expected, {key: dx.clone() for key, dx in crossed[1].items()})
    for key, x in expected.items():
        torch.testing.assert_close(model[key], x, rtol=1e-12, atol=1e-12)
    model["b"].data = model["a"].data
    before = image(state, model)
    for _ in range(2):
        with pytest.raises(ValueError, match="are in the same memory"):
            update(state, model, grads_of(model))
        assert_alike(image(state, model), before)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("rule", [AdamW(0.1), OptimiserChain(WeightDecay(0.1), RMSProp(0.1))])
def test_tensors_that_have_no_memory_share_none(rule, inplace):
    """As those of PyTorch's FakeTensorMode, by which people find out what a step takes."""
    with FakeTensorMode():
        model = nn.Linear(3, 2)
        state = setup(rule, model)
        for _ in range(3):
            state, model = update(state, model, {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, inplace=inplace)
    assert state.weight.count == 3


def test_parameters_beside_each_other_on_one_memory_are_no_such_case():
    model = fluxpy.flatten_parameters(model_of(SHAPES))
    state = setup(AdamW(0.1), model)
    update(state, model, grads_of(model))
    assert all(leaf.count == 1 for _, leaf in fluxpy.leaves(state))
    halves = torch.randn(2, 4, dtype=torch.float64)
    model = {"even": halves[:, ::2], "odd": halves[:, 1::2]}  # one memory, no element in common
    expected = {name: x.clone() for name, x in model.items()}
    for each in (model, expected):
        state = setup(Momentum(0.1), each)
        for i in range(3):
            update(state, each, grads_of(model, i))
    for name, x in expected.items():
        torch.testing.assert_close(model[name], x, rtol=1e-12, atol=1e-12)


# --- A rule whose change is something else too --------------------------------------------------------------------


class Turned(Rule):
    """Of whole arrays: the change is the state as it was, and the state becomes the gradient."""

    def init(self, x):
        return torch.ones_like(x)

    def apply(self, state, x, dx):
        return 0.5 * dx, state


class Mirrored(Rule):
    """Of whole arrays: the change is a view of the parameter."""

    def apply(self, state, x, dx):
        return state, x.flip(0) if x.ndim < 2 else x.mT


class Passing(Rule):
    """Of whole arrays: the change is the gradient."""

    def apply(self, state, x, dx):
        return state, dx


@pytest.mark.parametrize("rule", [Turned(), Mirrored(), Passing()], ids=lambda rule: type(rule).__name__)
def test_a_change_that_is_a_tensor_of_the_step(rule):
    shapes = {"a": (4, 4), "b": (4, 4), "c": (5,)}
    model, expected = model_of(shapes), {name: x.detach().clone() for name, x in model_of(shapes).items()}
    state, own = setup(rule, model), {name: rule.init(x) for name, x in expected.items()}
    for i in range(4):
        grads = grads_of(model, i) | {"b": model["a"].detach()}
        given = {name: dx.clone() for name, dx in grads.items()}
        update(state, model, grads)
        for name, x in expected.items():
            own[name], change = rule.apply(own[name], x, given[name])
            expected[name] = x - change
            torch.testing.assert_close(model[name].detach(), expected[name], rtol=0, atol=0)


class Starting(Rule):
    """The state is at first the parameter itself, which an elementwise rule sees as a real one."""

    elementwise = True

    def init(self, x):
        return x

    def apply(self, state, x, dx):
        return state + dx, dx


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3,)])
def test_a_state_that_begins_as_the_parameter_is_no_view_of_it(shape, device):
    """Also where there is no memory by which to tell; or momenta would require grad."""
    x = torch.ones(shape, dtype=torch.complex64, device=device, requires_grad=True)
    state = setup(Starting(), {"x": x})["x"].state
    assert state.shape == (*shape, 2) and not state._is_view() and not state.requires_grad

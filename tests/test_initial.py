"""The states that many leaves begin with, against those of each alone; and what `setup` knows of a model."""

import gc
import math
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import storages, tensors_of
from rule_table import ROWS, Row
from torch import Tensor, nn

import fluxpy
from fluxpy import (
    AccumGrad,
    Adam,
    Averaged,
    Lookahead,
    MixedPrecision,
    Muon,
    OptimiserChain,
    Prodigy,
    Rule,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
    leaves,
    reset,
    setup,
    update,
)
from fluxpy.state import tree_bindings

MANY = 5


def alike(shape: tuple[int, ...] = (3, 2), dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"w{i}": torch.randn(shape, generator=generator, dtype=dtype) for i in range(MANY)}


def assert_as_alone(rule: Rule, model: dict[str, Tensor], state: Any) -> None:
    """Each leaf has the state that it would have as the only one."""
    for path, leaf in leaves(state):
        alone: Any = setup(rule, model[path])
        assert repr(leaf.state) == repr(alone.state)
        for ours, its in zip(tensors_of(leaf), tensors_of(alone), strict=True):
            assert torch.equal(ours, its) and ours.dtype == its.dtype and ours.stride() == its.stride()
    mine = [t for t in tensors_of(state) if t.numel()]
    assert len(storages(mine)) == len(mine), "two states share memory"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_many_begin_as_each_alone(row: Row, dtype: torch.dtype) -> None:
    model = alike(row.fit((3, 2)), dtype)
    try:
        state = setup(row.rule, model)
    except (TypeError, ValueError, NotImplementedError):  # not for this dtype: nor alone
        with pytest.raises((TypeError, ValueError, NotImplementedError)):
            setup(row.rule, model["w0"])
        return
    assert_as_alone(row.rule, model, state)
    grads = {path: torch.ones_like(x) for path, x in model.items()}
    update(state, model, grads)
    reset(state)
    update(state, model, grads)  # which makes the states again


def of_init(how: Callable[[Tensor], Any], asked: list[Tensor]) -> Rule:
    """A rule whose `init` does that, and notes what it was asked of."""

    class Noted(Rule):
        def init(self, x: Tensor) -> Any:
            asked.append(x)
            return how(x)

        def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
            return state, 0.1 * dx

    return Noted()


LOOKS = {
    "clone": lambda x: x.clone(),
    "itself": lambda x: (x, torch.zeros_like(x)),
    "item": lambda x: x.flatten()[0].item(),
    "tolist": lambda x: tuple(x.flatten().tolist()),
    "numpy": lambda x: float(x.detach().numpy().sum()),
    "where": lambda x: torch.where(x > 0, 1.0, 0.0),
    "like": lambda x: torch.full_like(x, float(x.max())),
    "data_ptr": lambda x: x.data_ptr(),
    "twice": lambda x: [torch.zeros_like(x)] * 2,
    "strange": lambda x: (torch.zeros_like(x), frozenset([x.ndim])),
}
FORMS = {
    "zeros": lambda x: (torch.zeros_like(x), torch.ones_like(x), 0),
    "number": lambda x: {"n": x.new_zeros(()), "t": 0.5, "name": "a", "none": None},
    "wider": lambda x: torch.zeros(x.shape, dtype=torch.float64, device=x.device),
    "nothing": lambda x: (),
    "form": lambda x: x.new_ones(2 * x.ndim + x.numel() + len(x.shape)),
}


@pytest.mark.parametrize("how", LOOKS.values(), ids=LOOKS.keys())
def test_an_init_that_looks_is_asked_of_each(how: Any) -> None:
    model, asked = alike(), list[Tensor]()
    state = setup(of_init(how, asked), model)
    assert [id(x) for x in asked] == [id(x) for x in model.values()]
    for path, leaf in leaves(state):
        alone: Any = setup(of_init(how, []), model[path])
        assert repr(leaf.state) == repr(alone.state)
    mine = tensors_of(state)
    assert not storages(mine) & storages(model.values()) and len(storages(mine)) == len(mine)


@pytest.mark.parametrize("how", FORMS.values(), ids=FORMS.keys())
def test_an_init_that_does_not_look_is_asked_twice(how: Any) -> None:
    model, asked = alike(), list[Tensor]()
    state = setup(of_init(how, asked), model)
    assert len(asked) == 2
    assert_as_alone(of_init(how, []), model, state)
    update(state, model, {path: torch.ones_like(x) for path, x in model.items()})
    reset(state)
    update(state, model, {path: torch.ones_like(x) for path, x in model.items()})
    assert_as_alone(of_init(how, []), model, state)


def test_states_that_are_made_again() -> None:
    """At the next update, after `reset`: of many in the same way."""

    class Own(Rule):
        elementwise = True

        def init(self, x: Tensor) -> Any:
            asked.append(x)
            return torch.ones_like(x)

        def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
            return 2 * state, dx

    model, asked = alike(), list[Tensor]()
    grads = {path: torch.ones_like(x) for path, x in model.items()}
    state = setup(Own(), model)
    update(update(state, model, grads)[0], model, grads)
    asked.clear()
    update(reset(state), model, grads)
    assert len(asked) == 2 and all(leaf.state.eq(2).all() for _, leaf in leaves(state))


@pytest.mark.parametrize("change", ["shape", "strides", "rule", "large"])
def test_others_are_asked_too(change: str) -> None:
    model, asked = alike((64, 65) if change == "large" else (3, 2)), list[Tensor]()
    rule: Any = of_init(FORMS["zeros"], asked)
    if change == "shape":
        model |= {f"v{i}": torch.zeros(2, 3) for i in range(2)}
    elif change == "strides":
        model["w3"] = torch.randn(2, 3, dtype=torch.float64).t()
    elif change == "rule":
        rule = {"w[12]": rule, "*": of_init(FORMS["zeros"], asked)}
    state = setup(rule, model)
    assert len(asked) == {"shape": 4, "strides": 5, "rule": 4, "large": 5}[change]
    assert_as_alone(of_init(FORMS["zeros"], []), model, state)


def test_numbers_that_differ_from_leaf_to_leaf() -> None:
    """A counter, or a draw of Python's own, is no number of the parameter's: then each is asked."""
    counter = iter(range(99))
    assert [leaf.state for _, leaf in leaves(setup(of_init(lambda x: next(counter), []), alike()))] == [*range(MANY)]
    drawn = [leaf.state for _, leaf in leaves(setup(of_init(lambda x: random.random(), []), alike()))]
    assert len({*drawn}) == MANY
    nan = setup(of_init(lambda x: math.nan, []), alike())
    assert all(math.isnan(leaf.state) for _, leaf in leaves(nan))


def test_a_fault_names_a_leaf_and_makes_no_state() -> None:
    def fail(x: Tensor) -> Any:
        raise ArithmeticError("no state")

    with pytest.raises(ArithmeticError, match="no state") as caught:
        setup(of_init(fail, []), alike())
    assert "'w0'" in "".join(caught.value.__notes__)


def test_frozen_leaves_hold_nothing() -> None:
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(MANY))
    for layer in model[1:3]:
        layer.requires_grad_(False)
    state = setup(Adam(), model)
    held = [leaf.state is not None for _, leaf in leaves(state)]
    assert held == [not leaf.frozen for _, leaf in leaves(state)] and sum(held) == 2 * (MANY - 2)


# --- The model that setup walked ----------------------------------------------------------------------------------


def test_a_model_that_changes_before_the_first_update() -> None:
    """Its parameters are those that it has then."""
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    state, old = setup(Adam(0.1), model), model[0].weight
    model[0].weight = nn.Parameter(old.detach().clone())
    before = old.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    update(state, model)
    assert torch.equal(old, before) and not torch.equal(model[0].weight, before)
    model.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not fit"):
        update(state, model)


def test_a_state_that_never_stepped_keeps_no_model_alive() -> None:
    model = nn.Linear(2, 2)
    state = setup(Adam(), model)
    known: list[Any] = [weakref.ref(model), weakref.ref(model.weight)]
    assert len(tree_bindings(state)) == 1
    gc.disable()
    try:
        del model
        assert [ref() for ref in known] == [None, None]
    finally:
        gc.enable()
    assert fluxpy.state_dict(state)


class FromValues(Rule):
    """A user's rule that begins with the parameter."""

    lr: float = 0.1

    def init(self, x: Tensor) -> Any:
        return {"start": x.clone()}

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        return state, self.lr * dx + 0.1 * (x - state["start"])


BEGIN_WITH_VALUES = {
    "ScheduleFreeSGD": ScheduleFreeSGD(0.1),
    "ScheduleFreeAdamW": ScheduleFreeAdamW(0.1),
    "Lookahead": Lookahead(Adam(0.1), k=2),
    "Prodigy": Prodigy(d0=1e-2),
    "Averaged": Averaged(Adam(0.1)),
    "master": MixedPrecision(ScheduleFreeSGD(0.1), dtype=torch.float64),
    "window": OptimiserChain(AccumGrad(2), Prodigy(d0=1e-2)),
    "whole": Lookahead(Muon(0.1), k=2),
    "own": FromValues(),
}


def replaced(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            path = next(path for path, x in model.named_parameters() if x is module.weight)
            module.weight = nn.Parameter(weights[path].clone())


WRITTEN: dict[str, Callable[[nn.Module, Any], Any]] = {
    "loaded": lambda model, weights: model.load_state_dict(weights),
    "assigned": lambda model, weights: model.load_state_dict({k: t.clone() for k, t in weights.items()}, assign=True),
    "data": lambda model, weights: [x.data.copy_(weights[path]) for path, x in model.named_parameters()],
    "replaced": replaced,
}


WAYS = [("loaded", way) for way in ("pure", "compiled")] + [(name, "in place") for name in WRITTEN]


@pytest.mark.parametrize(("write", "way"), WAYS)
@pytest.mark.parametrize("rule", BEGIN_WITH_VALUES.values(), ids=BEGIN_WITH_VALUES)
def test_what_is_written_before_the_first_update_is_what_a_run_begins_with(rule: Rule, write: str, way: str) -> None:
    """As weights that are loaded after `setup`."""

    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(*[nn.Linear(2, 2, bias=False, dtype=torch.float64) for _ in range(4)])

    model, twin = net(1), net(2)
    state = setup(rule, model, compile=way == "compiled")
    WRITTEN[write](model, twin.state_dict())
    states = [state, setup(rule, twin, compile=way == "compiled")]
    models = [model, twin]
    for turn in range(5):
        grads = {path: torch.sin(x.detach() + turn) for path, x in twin.named_parameters()}
        for i in range(2):
            states[i], models[i] = update(states[i], models[i], grads, inplace=way != "pure")
    for x, y in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(tensors_of(states[0]), tensors_of(states[1]), strict=True):
        assert torch.equal(x, y)


def test_a_state_that_was_used_or_loaded_is_kept() -> None:
    rule, model = ScheduleFreeSGD(0.1), {"w": torch.ones(3)}
    states = [setup(rule, model) for _ in range(2)]
    update(states[0], {"w": torch.ones(3)}, {"w": torch.ones(3)})
    fluxpy.load_state_dict(states[1], fluxpy.state_dict(setup(rule, {"w": torch.zeros(3)})))
    for state in states:
        z = state["w"].state.z.clone()
        before = {"w": torch.full((3,), 7.0)}
        update(state, before, {"w": torch.zeros(3)})
        assert torch.equal(state["w"].state.z, z)

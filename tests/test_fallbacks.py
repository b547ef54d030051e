"""Where a version of PyTorch lacks the private interfaces that make things fast, all goes on with the same numbers."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from helpers import CHAINS, Run, every_layout, few_chains
from pytest import MonkeyPatch, mark
from test_sequences import play
from torch import Tensor, nn

import fluxpy
from fluxpy.engine import kernels, signature
from fluxpy.engine.signature import looks_of

gradient = sys.modules["fluxpy.gradient"]  # the module; `fluxpy.gradient` is the function


def without_guards(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(signature, "_tensor_guards", lambda: None)


def without_engine(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "_ENGINE", None)


def without_both(monkeypatch: MonkeyPatch) -> None:
    without_guards(monkeypatch)
    without_engine(monkeypatch)


def without_inductor(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._inductor", None)  # importing it raises
    monkeypatch.setattr(kernels, "_KERNELS", {})


def loss(model: nn.ParameterDict, grads: dict[str, Tensor]) -> Tensor:
    return sum(((x * grads[name]).sum() for name, x in model.items() if name in grads), torch.zeros(()))


def story(rule: Any, layout: str, **options: Any) -> Run:
    """Updates with all that makes an engine look again at what it is given."""
    run = Run(rule, layout, **options)

    def step(lacking: str = "", change: Callable[[Tensor], Any] = lambda dx: dx) -> None:
        wanted = {name: dx for name, dx in run.grads().items() if name not in lacking}
        found = fluxpy.gradient(loss, run.model, wanted, state=run.state)
        grads = {name: None if found[name] is None else change(found[name]) for name in run.model}
        run.step(change=lambda _: grads)

    for _ in range(3):
        step()
    step(lacking="bd")
    fluxpy.freeze(run.state["a"])
    step()
    fluxpy.thaw(run.state)
    fluxpy.adjust(run.state["c"], lr=0.003)
    step()
    step(change=lambda dx: torch.stack([dx, dx], -1)[..., 0])  # in other strides
    with torch.no_grad():
        run.model["e"].data = run.model["e"].clone()  # in other memory
    step()
    with pytest.raises(ValueError):
        step(change=lambda dx: dx.new_ones(9))  # of another shape
    step()
    return run


@mark.parametrize("without", [without_guards, without_engine, without_both])
@every_layout
@few_chains
def test_updates(without: Any, rule: Any, layout: str, monkeypatch: MonkeyPatch) -> None:
    wanted = story(rule, layout)
    without(monkeypatch)
    story(rule, layout).equals(wanted)


@mark.parametrize("without", [without_guards, without_engine])
@mark.parametrize("seed", range(8))
def test_sequences(without: Any, seed: int, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    without(monkeypatch)
    play(seed, tmp_path)


# --- What tensors look like ---------------------------------------------------------------------------------------

SAME: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda x: x,
    "other numbers": lambda x: x + 1,
}
OTHER: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x.new_ones(3, 5),
    "strides": lambda x: x.t().contiguous().t(),
    "dtype": lambda x: x.double(),
    "device": lambda x: x.to("meta"),
    "layout": lambda x: x.to_sparse(),
    "sign": torch._neg_view,
    "class": lambda x: nn.Parameter(x, requires_grad=False),
    "nothing": lambda _: None,
    "a number": lambda _: 1.0,
}


@mark.parametrize("guards", [True, False])
@mark.parametrize("what", [*SAME, *OTHER])
def test_signatures(what: str, guards: bool, monkeypatch: MonkeyPatch) -> None:
    if not guards:
        without_guards(monkeypatch)
    x, y = torch.ones(3, 4), torch.ones(2)
    one = looks_of([x, y])
    assert isinstance(one, FunctionType) != guards  # without them, a function of this package
    assert one({**SAME, **OTHER}[what](x), y) == (what in SAME)


@mark.parametrize("guards", [True, False])
def test_signatures_know_the_order(guards: bool, monkeypatch: MonkeyPatch) -> None:
    if not guards:
        without_guards(monkeypatch)
    x, y = torch.ones(3, 4), torch.ones(2)
    assert looks_of([x, y])(x, y) and not looks_of([x, y])(y, x)


# --- Gradients ----------------------------------------------------------------------------------------------------


def test_gradients_without_the_engine_below_autograd(monkeypatch: MonkeyPatch) -> None:
    model = {"w": torch.tensor([1.0, 2.0]), "v": torch.ones(3)}

    def cube(m: Any) -> Tensor:
        return (m["w"] ** 3).sum()

    wanted = fluxpy.gradient(cube, model)
    calls, real = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **how: calls.append(how) or real(*args, **how))
    fluxpy.gradient(cube, model)
    assert not calls, "it is not there that gradients come from, where the engine can be had"
    without_engine(monkeypatch)
    with torch.no_grad():
        found = fluxpy.gradient(cube, model)
    assert len(calls) == 1
    assert torch.equal(found["w"], wanted["w"]) and found["v"] is wanted["v"] is None
    twice = fluxpy.gradient(lambda m: fluxpy.gradient(cube, m, create_graph=True)["w"].sum(), model)
    torch.testing.assert_close(twice["w"], 6 * model["w"])


# --- Compiled updates ---------------------------------------------------------------------------------------------


@every_layout
@mark.parametrize("name", ["AdamW", "clip all, decay, Adam", "own", "master"])
def test_compiled_updates_without_the_compiler(name: str, layout: str, monkeypatch: MonkeyPatch) -> None:
    wanted = story(CHAINS[name], layout)
    without_inductor(monkeypatch)
    with pytest.warns(UserWarning, match=r"without being compiled: .*torch\._inductor"):
        run = story(CHAINS[name], layout, compile=True)
    run.equals(wanted, room=1e-12)  # the first update, which finds that out, goes leaf by leaf

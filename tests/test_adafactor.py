"""Adafactor beside torch.optim.Adafactor: all shapes, low precision, stacks, and the size of its state."""

import inspect
from typing import Any

import pytest
import torch
from helpers import Run, grads_of, model_of, values_of
from test_engine import paths_of

import fluxpy
from fluxpy import Adafactor, ClipGlobalNorm, MixedPrecision, OptimiserChain
from fluxpy.rule import title_key
from fluxpy.state import tree_context

SHAPES = {"matrix": (5, 3), "batch": (2, 4, 3), "filters": (4, 2, 3, 3), "vector": (7,), "scalar": (), "none": (0, 3)}


def test_the_defaults_are_torchs() -> None:
    theirs = {key: p.default for key, p in inspect.signature(torch.optim.Adafactor).parameters.items()}
    assert all(theirs[key] == value for key, value in vars(Adafactor()).items())


@pytest.mark.parametrize("values", [{}, {"lr": 0.5, "d": 1.3, "weight_decay": 0.1, "eps": (1e-8, 0.1)}], ids=str)
def test_all_shapes_take_torchs_steps(values: Any) -> None:
    model = model_of(SHAPES)
    start, twin = values_of(model), model_of({key: shape for key, shape in SHAPES.items() if key != "none"})
    optimizer = torch.optim.Adafactor(twin.parameters(), foreach=False, **values)
    state = fluxpy.setup(Adafactor(**values), model)
    for i in range(30):
        grads = grads_of(model, i)
        fluxpy.update(state, model, grads)
        for key, p in twin.items():
            p.grad = grads[key]
        optimizer.step()
    for key, p in twin.items():
        torch.testing.assert_close(model[key] - start[key], p - start[key], rtol=1e-11, atol=1e-14, msg=key)


@pytest.mark.parametrize("dtype, room", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_in_low_precision_only_the_parameter_is_rounded(dtype: torch.dtype, room: float) -> None:
    """One step, and gradients whose squares float16 cannot hold. (eps is that of the parameter's dtype, as torch's.)"""
    model, exact = model_of(SHAPES, dtype), model_of(SHAPES, dtype).float()
    rule = Adafactor(eps=(1e-4, 1e-3))
    state, wide = fluxpy.setup(rule, model), fluxpy.setup(rule, exact)
    grads = {key: 300 * dx for key, dx in grads_of(model).items()}
    fluxpy.update(state, model, grads)
    fluxpy.update(wide, exact, {key: dx.float() for key, dx in grads.items()})
    for key, x in model.items():
        torch.testing.assert_close(x.float(), exact[key], rtol=2 * room, atol=1e-3 * room, msg=key)
        for a, b in zip(state[key].state[:-1], wide[key].state[:-1], strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b)


def test_its_state_is_a_row_and_a_column() -> None:
    model = {"w": torch.zeros(300, 200), "b": torch.zeros(300)}
    state = fluxpy.setup(Adafactor(), model)
    assert sum(t.numel() for t in state["w"].state[:-1]) == 500
    with pytest.raises(ValueError, match="Adafactor takes real parameters, but this one is complex"):
        fluxpy.setup(Adafactor(), {"w": torch.zeros(2, 2, dtype=torch.complex64)})


@pytest.mark.parametrize(
    "rule",
    [
        Adafactor(0.1),
        OptimiserChain(ClipGlobalNorm(0.5), Adafactor(fluxpy.schedules.linear(0.1, 0.0, 9))),
        MixedPrecision(Adafactor(0.1), dtype=torch.float64),
    ],
    ids=["alone", "chain", "master"],
)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (6,)], ids=str)
def test_stacks_have_the_numbers_of_each_alone(rule: Any, shape: tuple[int, ...]) -> None:
    run, twin = (Run(rule, shapes={f"w{i}": shape for i in range(10)}) for _ in range(2))
    for _, leaf in fluxpy.leaves(twin.state):
        tree_context(twin.state).reference_only.add(title_key(leaf.rule))
    for verb in (fluxpy.freeze, fluxpy.thaw, fluxpy.reset):
        run.step(3), twin.step(3)
        assert paths_of(run.state) == {"Stack"} and paths_of(twin.state) == {"Reference"}
        verb(run.state["w2"]), verb(twin.state["w2"])
    run.step(2).equals(twin.step(2), 1e-12)
    run.state, run.model = fluxpy.update(run.state, run.model, run.grads(), inplace=False)
    twin.state, twin.model = fluxpy.update(twin.state, twin.model, twin.grads(), inplace=False)
    run.equals(twin, 1e-12)

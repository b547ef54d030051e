"""Rules that keep a number of each array, a 0-dim tensor, beside what they keep of its elements: packed, compiled, and
refused by both where that would be wrong."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from helpers import SHAPES, Run, assert_close, grads_of, needs_compiler
from test_engine import FLAT, Pair, Whole, paths_of, small_pieces
from torch import Tensor

import fluxpy
from fluxpy import AccumGrad, Adam, Averaged, MixedPrecision, OptimiserChain, WeightDecay, freeze, thaw, update
from fluxpy.rules import Reduce, ReducingRule, Rule

SOME = {name: shape for name, shape in SHAPES.items() if shape}
ALIKE = {f"{i:02}": (4, 3) for i in range(12)}


class Gain(NamedTuple):
    m: Tensor
    gain: Tensor


class Fading(Rule):
    """A gain that fades by itself."""

    lr: float = 0.01
    elementwise = True

    def init(self, x: Tensor) -> Gain:
        return Gain(torch.zeros_like(x), x.new_ones(()))

    def apply(self, state: Gain, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        gain = 0.9 * state.gain + 0.05
        m = 0.8 * state.m + gain * dx
        return Gain(m, gain), self.lr * m


class Size(ReducingRule):
    """The sum of the squares of an array."""

    over = "array"
    splittable = True

    def part(self, value: Tensor) -> Tensor:
        return value.abs().square().sum()


class Sized(ReducingRule):
    """A gain that follows the size of the array's gradients."""

    lr: float = 0.01
    elementwise = True

    def init(self, x: Tensor) -> Gain:
        return Gain(torch.zeros_like(x), x.new_ones(()))

    def steps(self, state: Gain, x: Tensor, dx: Tensor) -> Any:
        size = yield Reduce(Size(), lambda: 2 * dx)
        gain = 0.9 * state.gain + 0.1 / (1 + size)
        m = 0.8 * state.m + gain * dx
        return Gain(m, gain), self.lr * m


class Largest(ReducingRule):
    def part(self, value: Tensor) -> Tensor:
        return value.amax()

    def combine(self, parts: Tensor) -> Tensor:
        return parts.amax()


class Shared(Sized):
    """A gain that all leaves share: the largest of all."""

    def steps(self, state: Gain, x: Tensor, dx: Tensor) -> Any:
        size = yield Reduce(Size(), dx)
        own = yield Reduce(Largest(), state.gain)
        gain = yield Reduce(Largest(), 0.9 * own + 0.1 / (1 + size))
        m = 0.8 * state.m + gain * dx
        return Gain(m, gain), self.lr * m


class Norm(Sized):
    """Says that it is elementwise, and keeps a norm all the same."""

    def steps(self, state: Gain, x: Tensor, dx: Tensor) -> Any:
        gain = 0.9 * state.gain + 0.1 * dx.norm()
        return Gain(state.m + gain * dx, gain), self.lr * dx
        yield


class Summed(Sized):
    """Adds up numbers as if they were arrays: spread over elements they would count more than once."""

    def steps(self, state: Gain, x: Tensor, dx: Tensor) -> Any:
        total = yield Reduce(self, state.gain)
        gain = 0.9 * state.gain + 0.01 * total
        return Gain(state.m + gain * dx, gain), self.lr * gain * dx


class Reduced(Sized):
    """Asks for a total of what it added up itself."""

    def steps(self, state: Gain, x: Tensor, dx: Tensor) -> Any:
        total = yield Reduce(self, dx.sum())
        return Gain(state.m + total * dx, 0.9 * state.gain), self.lr * total * dx


class Bare(Reduced):
    """The same, without a number in its state."""

    def init(self, x: Tensor) -> Any:
        return ()

    def steps(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        total = yield Reduce(self, dx.sum())
        return state, self.lr * total * dx


class Swapped(Rule):
    """Two numbers that change places."""

    elementwise = True

    def init(self, x: Tensor) -> Any:
        return x.new_ones(()), x.new_zeros(())

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        one, other = state
        return (other, one), 0.1 * (one + 0.5 * other) * dx


PACKED = {
    "fading": Fading(),
    "sized": Sized(),
    "shared": Shared(),
    "swapped": Swapped(),
    "in front": OptimiserChain(Sized(1.0), Adam(0.01)),
    "in front of others": OptimiserChain(WeightDecay(0.1), Shared(1.0), FLAT["own"]),
    "gathering": OptimiserChain(AccumGrad(2), Sized()),
    "averaged": Averaged(Shared()),
    "master": MixedPrecision(Sized(), dtype=torch.float64),
}
ALONE = {
    "norm": Norm(),
    "norm behind a window": OptimiserChain(AccumGrad(2), Norm()),
    "summed": Summed(),
    "reduced": Reduced(),
    "reduced before a number": OptimiserChain(Bare(1.0), Fading()),
    "bare": Bare(),
}


@pytest.fixture(params=["whole", "cut"])
def size(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "cut":
        small_pieces(monkeypatch)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("column", ["apart", "flat grads"])
@pytest.mark.parametrize("shapes", [list(SOME.values()), list(ALIKE.values())], ids=["several", "alike"])
@pytest.mark.parametrize("name", PACKED)
def test_numbers_are_packed(name: str, shapes: list[Any], column: str) -> None:
    pair = Pair(PACKED[name], column, shapes).step(12).check()
    assert paths_of(pair.state) - {"Reference"} == {"Fused" if name == "in front" else "Eager"}


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("shapes", [list(SOME.values()), list(ALIKE.values())], ids=["several", "alike"])
@pytest.mark.parametrize("name", ALONE)
def test_what_is_not_elementwise_goes_leaf_by_leaf(name: str, shapes: list[Any]) -> None:
    pair = Pair(ALONE[name], "apart", shapes).step(6).check()
    assert paths_of(pair.state) == {"Reference"}


def test_numbers_before_a_rule_that_needs_whole_arrays() -> None:
    """As many leaves as columns, so that a number of each leaf would fit a column of each."""
    shapes = [(4, 8)] * 8
    Pair(OptimiserChain(Shared(1.0), Whole()), "apart", shapes).step(5).check()
    Pair(OptimiserChain(Fading(1.0), Whole()), "apart", shapes).step(5).check()
    assert paths_of(Pair(OptimiserChain(FLAT["own"], Whole()), "apart", shapes).step(2).state) == {"Stack"}


@needs_compiler
@pytest.mark.parametrize("shapes", [list(SOME.values()), list(ALIKE.values())], ids=["several", "alike"])
@pytest.mark.parametrize("name", ["shared", "master", "gathering"])
def test_numbers_are_compiled(name: str, shapes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [shape for shape in shapes if len(shape) and shape not in ((0,), (1,))]
    pair = Pair(PACKED[name], "compiled", shapes).step(6).check()
    assert paths_of(pair.state) == {"Compiled"}
    small_pieces(monkeypatch)
    assert paths_of(Pair(PACKED[name], "compiled", shapes).step(6).check().state) == {"Compiled"}


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_one_large_leaf_is_compiled(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """0-dim in the kernel: Inductor loses some stores to such."""
    small_pieces(monkeypatch)
    pair = (
        Pair(PACKED["sized"], "compiled", [(40, 3), (17,)], dtype).step(5).check(1e-12 if dtype.itemsize == 8 else 2e-5)
    )
    assert paths_of(pair.state) == {"Compiled"}


class Reciprocal(Rule):
    elementwise = True

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        return state, 0.1 / (1 + dx.abs())


@needs_compiler
def test_a_number_over_a_tensor_is_compiled() -> None:
    pair = Pair(Reciprocal(), "compiled", [(4, 3), (5,)]).step(3).check()
    assert paths_of(pair.state) == {"Compiled"}


@needs_compiler
@pytest.mark.parametrize("rule", [fluxpy.ClipNorm(0.5), OptimiserChain(AccumGrad(2), fluxpy.ClipGlobalNorm(0.5))])
def test_totals_over_leaves_alike_and_behind_a_window_are_compiled(rule: Rule) -> None:
    pair = Pair(OptimiserChain(rule, FLAT["own"]), "compiled", list(ALIKE.values())).step(5).check()
    assert paths_of(pair.state) == {"Compiled"}


def test_cautious_takes_many_numbers() -> None:
    Pair(fluxpy.Cautious(Adam(0.1)), "apart", [()] * 12).step(3).check()


# --- What a user does next ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Shared(), fluxpy.Prodigy(d0=1e-3)], ids=["own", "Prodigy"])
@pytest.mark.parametrize("shapes", [SOME, ALIKE], ids=["several", "alike"])
def test_saved_copied_frozen_and_reset(rule: Rule, shapes: Any, tmp_path: Any) -> None:
    """A run that is saved and resumed is the same bit for bit."""
    run = Run(rule, shapes=shapes).step(3)
    first = next(iter(shapes))
    freeze(run.state[first])
    held = run.state[first].state
    run.step(2)
    assert all(torch.equal(a, b) for a, b in zip(held, run.state[first].state, strict=True))
    thaw(run.state)
    run.step()
    fluxpy.save(tmp_path / "run.flux", model=run.model, state=run.state)
    twin, state = copy.deepcopy(run.model), copy.deepcopy(run.state)
    resumed = Run(rule, shapes=shapes)
    fluxpy.load(tmp_path / "run.flux", model=resumed.model, state=resumed.state)
    for i in range(3):
        grads = grads_of(run.model, 50 + i)
        update(run.state, run.model, grads)
        update(resumed.state, resumed.model, grads)
        state, twin = update(state, twin, grads, inplace=False)
    run.equals(resumed)
    assert_close(dict(run.model), dict(twin), 1e-12)
    fluxpy.reset(run.state[first])
    run.step()
    assert run.state[first].count == 1 and run.state[first].state[-1].ndim == 0


def test_rows_are_taken_and_numbers_stay() -> None:
    run = Run(Shared(), shapes=ALIKE).step(2)
    gain = run.state["03"].state.gain.clone()
    fluxpy.surgery.take(run.state["03"], run.model["03"], [0, 2])
    assert run.state["03"].state.gain == gain and run.state["03"].shape == (2, 3)
    update(run.state, run.model, grads_of(run.model, 9))


def test_pickles_hold_no_more_than_their_own() -> None:
    import pickle

    run = Run(Shared(), shapes={f"{i:03}": (2,) for i in range(100)}).step(2)
    size = len(pickle.dumps(run.state["000"]))
    assert size < 6_000

"""What tests of behaviour share: chains of every kind, a run that may have a twin, and a CPU that is like a device."""

import dataclasses
import shutil
import sys
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn

import fluxpy
from fluxpy import (
    AccumGrad,
    AdaGrad,
    Adam,
    AdamW,
    ClipGlobalNorm,
    ClipNorm,
    Descent,
    Lion,
    MixedPrecision,
    Momentum,
    NAdam,
    Nesterov,
    OptimiserChain,
    RMSProp,
    Rule,
    WeightDecay,
)  # fmt: skip

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
since_2_13 = pytest.mark.skipif(torch.__version__ < "2.13", reason="older versions of PyTorch refuse it, or we do")


class Scaled(Rule):
    """A user's wrapper that is not elementwise: the mean size of each array's change is one."""

    rule: Rule

    def init(self, x):
        return self.rule.init(x)

    def apply(self, state, x, dx):
        state, change = self.rule.apply(state, x, dx)
        return state, change * (0.1 / (change.abs().mean() + 1e-6))


class Own(Rule):
    """A user's elementwise rule, whose state has a tensor and a number."""

    lr: float = 0.01
    decay: float = 0.8
    elementwise = True

    def init(self, x: Tensor) -> Any:
        return {"m": torch.zeros_like(x), "t": 0}

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        m = self.decay * state["m"] + (1 - self.decay) * dx
        return {"m": m, "t": state["t"] + 1}, self.lr * m.tanh() / (1 - self.decay ** (state["t"] + 1))


class Whole(Rule):
    """A user's rule that needs the whole array."""

    lr: float = 0.01

    def init(self, x: Tensor) -> Any:
        return torch.zeros_like(x)

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        state = 0.9 * state + dx
        return state, self.lr * state / (state.norm() + 1e-3)


CHAINS: dict[str, Any] = {
    "Descent": Descent(0.1),
    "Momentum": Momentum(0.1),
    "AdamW": AdamW(0.02),
    "AdaGrad": AdaGrad(0.1),
    "Lion": Lion(0.01),
    "RMSProp": RMSProp(0.02),
    "NAdam": NAdam(0.02),
    "clip all, decay, Adam": OptimiserChain(ClipGlobalNorm(0.5), WeightDecay(0.1), Adam(0.02)),
    "clip all, Lion": OptimiserChain(ClipGlobalNorm(0.5), Lion(0.01)),
    "clip each, Nesterov": OptimiserChain(ClipNorm(0.5), Nesterov(0.1)),
    "own": Own(),
    "clip all, own": OptimiserChain(ClipGlobalNorm(0.5), Own()),
    "whole": Whole(),
    "gather, Momentum": OptimiserChain(AccumGrad(2), Momentum(0.1)),
    "master": MixedPrecision(Adam(0.02), dtype=torch.float64),
}
every_chain = pytest.mark.parametrize("rule", CHAINS.values(), ids=CHAINS.keys())
# One of each kind.
FEW = ["AdamW", "clip all, decay, Adam", "clip each, Nesterov", "RMSProp", "clip all, Lion", "own", "whole"]
FEW += ["gather, Momentum", "master"]
few_chains = pytest.mark.parametrize("rule", [CHAINS[name] for name in FEW], ids=FEW)
every_layout = pytest.mark.parametrize("layout", ["apart", "flat"])

SHAPES = {"a": (4, 3), "b": (7,), "c": (), "d": (4, 3), "e": (2, 1, 3)}


def model_of(shapes: dict[str, Any] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.ParameterDict:
    g = torch.Generator().manual_seed(seed)
    return nn.ParameterDict(
        {name: nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for name, s in shapes.items()}
    )


def grads_of(model: Any, turn: int = 0) -> dict[str, Tensor]:
    """The same gradients for all models of a shape."""
    g = torch.Generator().manual_seed(1000 + turn)
    named = fluxpy.trainables(model, path=True)
    return {name: torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for name, x in named}


class Run:
    """A model and its state on their way. Two runs that were treated alike are equal bit for bit."""

    def __init__(
        self,
        rule: Any,
        layout: str = "apart",
        shapes: dict[str, Any] = SHAPES,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        self.model = model_of(shapes, dtype)
        if layout == "flat":
            fluxpy.flatten_parameters(self.model)
        self.state: Any = fluxpy.setup(rule, self.model, **options)
        self.turn = 0

    def grads(self) -> dict[str, Tensor]:
        return grads_of(self.model, self.turn)

    def step(self, times: int = 1, change: Callable[[dict[str, Tensor]], Any] = lambda grads: grads) -> "Run":
        for _ in range(times):
            fluxpy.update(self.state, self.model, change(self.grads()))
            self.turn += 1
        return self

    def image(self) -> Any:
        return image(self.state, self.model)

    def equals(self, other: "Run", room: float = 0.0) -> "Run":
        assert_alike(self.image(), other.image(), room)
        return self


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    """In `Run.step`: these leaves have no gradient."""
    return lambda grads: {name: dx for name, dx in grads.items() if name not in names}


def tensors_of(tree: Any) -> list[Tensor]:
    return [t for t in optree.tree_leaves(tree, namespace="fluxpy") if isinstance(t, Tensor)]


def image(state: Any, model: Any) -> dict[str, Any]:
    """All that a user can see of a state and its model, copied."""
    found: dict[str, Any] = {f"parameter {path}": x.detach().clone() for path, x in fluxpy.trainables(model, path=True)}
    for path, leaf in fluxpy.leaves(state):
        found[f"leaf {path}"] = leaf.rule, leaf.frozen, leaf.count, leaf.state is None
        parts = optree.tree_leaves(leaf.state, none_is_leaf=True, namespace="fluxpy")
        found |= {
            f"momenta {path} {i}": part.detach().clone() if isinstance(part, Tensor) else part
            for i, part in enumerate(parts)
        }
    return found


def assert_alike(one: dict[str, Any], other: dict[str, Any], room: float = 0.0) -> None:
    """Two images are equal; with `room`, numbers of tensors but for that."""
    assert one.keys() == other.keys()
    for key, a in one.items():
        b = other[key]
        if not isinstance(a, Tensor):
            assert a == b, (key, a, b)
        elif room:
            message = lambda text, key=key: f"{key}: {text}"  # noqa: E731
            torch.testing.assert_close(a, b, rtol=room, atol=room, equal_nan=True, msg=message)
        else:
            assert a.dtype == b.dtype and torch.equal(a, b), (key, a, b)


def patch_everywhere(monkeypatch: pytest.MonkeyPatch, name: str, new: Any) -> None:
    """Replace what fluxpy's modules know under a name, wherever that stands."""
    for module in [m for path, m in sys.modules.items() if path.startswith("fluxpy")]:
        if hasattr(module, name):
            monkeypatch.setattr(module, name, new)


def like_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no number is read at once on the CPU either: a flag goes up instead of an error."""
    patch_everywhere(monkeypatch, "reads_at_once", lambda x: False)


def storages(tensors: Any) -> set[int]:
    """The memory under tensors, those that have any."""
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def by_hand(
    rule: Rule | Callable[[int], Rule], x: Tensor, grads: list[Tensor | None], state: Any = None, count: int = 0
) -> tuple[Tensor, Any, int]:
    """One parameter, its state and its count after these gradients, by `apply` alone. Where a schedule is to be taken
    into account, `rule` gives the rule at a count."""
    at = (lambda count: rule) if isinstance(rule, Rule) else rule
    x = x.detach().clone()
    state = at(0).init(x) if state is None else state
    for dx in grads:
        if dx is not None:
            state, change = at(count).apply(state, x, dx)
            if change is not None:
                x = change.value if hasattr(change, "value") else x - change
                count += 1
    return x, state, count


def values_of(model: Any) -> dict[str, Tensor]:
    """The parameters by path, copied."""
    return {path: x.detach().clone() for path, x in fluxpy.trainables(model, path=True)}


def transposed(t: Tensor) -> Tensor:
    """A matrix with the same numbers in other strides."""
    return t.t().contiguous().t() if t.ndim == 2 else t


def assert_close(model: Any, other: Any, room: float = 1e-12) -> None:
    """Two models have the same parameters."""
    for (path, x), y in zip(fluxpy.trainables(model, path=True), fluxpy.trainables(other), strict=True):
        torch.testing.assert_close(x, y, rtol=room, atol=room, msg=path)


def inside(rule: Any) -> list[Rule]:
    """The innermost rules in a rule."""
    held = [getattr(rule, f.name) for f in dataclasses.fields(rule)]
    rules = [r for v in held for r in (v if isinstance(v, tuple) else (v,)) if isinstance(r, Rule)]
    return [r for inner in rules for r in inside(inner)] if rules else [rule]

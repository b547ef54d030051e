"""What a rule is tried with: parameters and gradients of all kinds, single calls of `apply`, other hyperparameters."""

import itertools
import reprlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..leaf import init_state
from ..rule import Assign, Rule, run_alone
from ..text import dtype_name
from .compare import contents, write_counts

UPDATES = 8
SHAPES = {"matrix": (3, 4), "scalar": (), "nothing": (0, 3)}


class Trial:
    """A rule under trial. `adjusted` has values to try for hyperparameters, as the user of `check_rule` gave them.

    A rule may refuse to step a scalar, by a ValueError in `init`: then it gets a matrix of one element.
    """

    def __init__(self, rule: Rule, adjusted: Mapping[str, Any]) -> None:
        self.rule, self.adjusted = rule, adjusted

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        try:
            init_state(self.rule, torch.zeros(()), 0, "scalar")
        except ValueError:
            return SHAPES | {"scalar": (1, 1)}
        return SHAPES

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
        """One tensor of each shape: a model, or its gradients."""
        rng = torch.Generator().manual_seed(seed)
        drawn = {name: 20 * torch.randn(shape, dtype=dtype, generator=rng) for name, shape in self.shapes.items()}
        drawn["matrix"][0] = 0  # as of a unit that never fires
        return drawn

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        real = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        return (*real, torch.complex64) if self.rule.elementwise else real

    @cached_property
    def calls(self) -> list["ApplyCall"]:
        """Calls of `apply` on a parameter of each dtype and shape."""
        return [call for dtype, name in itertools.product(self.dtypes, SHAPES) for call in self._run(dtype, name)]

    def _run(self, dtype: torch.dtype, name: str) -> Iterator["ApplyCall"]:
        x = self.tensors(dtype)[name]
        state = init_state(self.rule, x, 0, name)
        for i in range(UPDATES):
            inputs = Inputs(state, x, self.tensors(dtype, i + 1)[name])
            where = f"in update {i} of a {dtype_name(dtype)} parameter of shape {self.shapes[name]}"
            before = inputs.image()
            try:
                state, change = apply_once(self.rule, *inputs)
            except Exception as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
            yield ApplyCall(where, inputs, before, inputs.image(), state, change)
            x = x if change is None else (x - change).to(dtype)


class Inputs(NamedTuple):
    """What `apply` is called with."""

    state: Any
    parameter: Tensor
    gradient: Tensor

    def image(self) -> dict[str, Any]:
        """All that a write to one of them would change, by its name."""
        return {name: (contents(value), write_counts(value)) for name, value in self._asdict().items()}


class ApplyCall(NamedTuple):
    """One call of `apply`: its inputs, their images before and after it, and what it returned."""

    where: str
    inputs: Inputs
    before: dict[str, Any]
    after: dict[str, Any]
    state: Any
    change: Any  # also of a rule that assigns


def apply_once(rule: Rule, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
    """`apply` as the engine runs it, on one tensor that is its own whole tree; finite or not."""
    result = run_alone(rule, state, x, dx)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"it must return (state, change), but gave {reprlib.repr(result)}")
    new, change = result
    return new, x - change.value if isinstance(change, Assign) else change


def other_values(old: Any, allowed: Any) -> list[Any]:
    """Other values to try for a hyperparameter."""
    if isinstance(allowed, tuple):
        return [value for value in allowed if value != old]
    if isinstance(old, bool):
        return [not old]
    if isinstance(old, tuple):
        return [(*old[:i], new, *old[i + 1 :]) for i, v in enumerate(old) for new in other_values(v, None)]
    if isinstance(old, int):
        return [value for value in (1, 2, 3, 5, 2 * old) if value != old]
    if isinstance(old, float):
        return [value for value in (old / 2, 2 * old, 1e-3, 0.05, 0.3, 0.9, 3.0) if value != old]
    return []

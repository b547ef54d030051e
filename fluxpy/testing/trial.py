"""What a rule is tried with: parameters and gradients of all kinds, and single calls of `apply`."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pytree import Frame
from ..rule import Assign, Rule
from ..state import start
from .snapshot import bits, diff, dtype_name

UPDATES = 8
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SHAPES = {"matrix": (3, 4), "scalar": (), "nothing": (0, 3)}


class Step(NamedTuple):
    """One call of `apply`: what it was given, what that was before, and is now, and what it gave."""

    where: str
    given: tuple[Any, Tensor, Tensor]  # state, x, dx
    before: list[Any]
    after: list[Any]
    state: Any
    change: Any  # also where the rule assigns


def dtypes(rule: Rule) -> tuple[torch.dtype, ...]:
    return (*_DTYPES, torch.complex64) if rule.elementwise else _DTYPES


def steps(rule: Rule) -> Iterator[Step]:
    """Calls of `apply` on a parameter of each dtype and shape."""
    for dtype, name in itertools.product(dtypes(rule), _SHAPES):
        x = draw(dtype)[name]
        state = start(rule, x, 0, name)
        for i in range(UPDATES):
            given = state, x, draw(dtype, i + 1)[name]
            before = [seen(part, versions=True) for part in given]
            where = f"in update {i} of a {dtype_name(dtype)} parameter of shape {_SHAPES[name]}"
            try:
                state, change = drive(rule, *given)
            except Exception as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
            after = [seen(part, versions=True) for part in given]
            yield Step(where, given, before, after, state, change)
            x = x if change is None else (x - change).to(dtype)


def demand(good: bool, why: str) -> None:
    if not good:
        raise AssertionError(why)


def equal(a: Any, b: Any, where: str) -> None:
    demand(not (found := diff(a, b)), f"{where}: {found}")


def draw(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    drawn = {name: 20 * torch.randn(shape, dtype=dtype, generator=rng) for name, shape in _SHAPES.items()}
    drawn["matrix"][0] = 0  # as of a unit that never fires
    return drawn


def drive(rule: Rule, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
    """`apply` as the engine runs it, on one tensor that is its own whole tree; finite or not."""
    steps, answer = rule.steps(state, x, dx), None
    while True:
        try:
            ask = steps.send(answer)  # pyright: ignore[reportArgumentType]
        except StopIteration as done:
            new, change = done.value
            return new, x - change.value if isinstance(change, Assign) else change
        answer = ask.rule.combine([ask.part]) if ask.across else ask.part


def close(a: Any, b: Any, where: str) -> None:
    """Two pytrees are the same but for a few roundings: fused kernels round less often than a formula line by line."""
    (ours, frame), (theirs, other) = Frame.split(a), Frame.split(b)
    demand(frame == other and list(map(repr, frame.parts)) == list(map(repr, other.parts)), f"{where}: other numbers")
    for x, y in zip(ours, theirs, strict=True):
        x, y = x.detach(), y.detach()
        room = 32 * torch.finfo(x.dtype).eps * float(x.abs().nan_to_num(0, 0, 0).max()) if x.numel() else 0.0
        demand(torch.allclose(x, y, rtol=0, atol=room, equal_nan=True), f"{where}: {x} and {y}")


def seen(tree: Any, versions: bool = False) -> list[Any]:
    """All that a pytree holds, as something that can be compared."""
    parts = Frame(tree).parts
    found = [(part.dtype, part.shape, bits(part)) if isinstance(part, Tensor) else repr(part) for part in parts]
    return [*found, *(part._version for part in parts if versions and isinstance(part, Tensor))]


def others(old: Any, allowed: Any) -> list[Any]:
    """Other values to try for a hyperparameter."""
    if isinstance(allowed, tuple) or isinstance(old, bool):
        return [v for v in allowed or (True, False) if v != old]
    if isinstance(old, tuple):
        return [(*old[:i], new, *old[i + 1 :]) for i, v in enumerate(old) for new in others(v, None)]
    if isinstance(old, int):
        return [v for v in (1, 2, 3, 5, 2 * old) if v != old]
    return [v for v in (old / 2, 2 * old, 1e-3, 0.05, 0.3, 0.9, 3.0) if v != old] if isinstance(old, float) else []

"""Momenta in less memory than the arithmetic needs."""

from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import torch
from torch import Tensor

from ..fields import hyper
from ..pytree import Skeleton, skeleton_of
from ..rule import Assign, Rule, Run, Steps
from .wrap import Wrapper, inner_accumulates, inner_elementwise


class Lowered(Wrapper):
    """`rule` with its momenta kept in `dtype`, half the memory of float32; the arithmetic is in float32, or in the
    parameter's dtype where that is wider.

    Each step raises the momenta, runs `rule`, and rounds what it made of them to nearest. Numbers, tensors of integers,
    complex and 0-dim tensors stay as the rule made them. With `MixedPrecision` around it the master copy stays wide.

    An average whose step is below half the resolution of `dtype` stalls. Bfloat16 resolves 1 in 128 to 1 in 256:
    with `betas=(0.9, 0.999)` the second moment still rises under large gradients, but it does not fall under small
    ones, and steps become too small. A `beta2` of 0.99 or less averages as it should. Float16 resolves more, but there
    squares of small gradients are zero, and what is divided by their root explodes: it is for momenta alone.

    >>> leaf = setup(Lowered(Adam(betas=(0.9, 0.99))), torch.zeros(2))
    >>> leaf.state.v.dtype
    torch.bfloat16
    """

    rule: Rule
    _: KW_ONLY
    dtype: torch.dtype = hyper(default=torch.bfloat16, fixed=True)
    delegates = True
    accumulates, elementwise = inner_accumulates, inner_elementwise

    def __post_init__(self) -> None:
        if isinstance(self.rule, Rule) and self.rule.evaluates:
            raise ValueError(
                f"Lowered: {self.rule!r} keeps weights beside its momenta, which must not be rounded; "
                "put Lowered around the rule inside that has the momenta, as in Averaged(Lowered(...))"
            )
        super().__post_init__()

    def init(self, x: Tensor) -> Any:
        def lower(part: Tensor) -> Tensor:
            return part.to(self.dtype) if part.ndim and part.dtype.itemsize > self.dtype.itemsize else part

        return _map_floats(lower, self.rule.init_any(_to(x, _wide(x))))

    def steps(self, state: Any, x: Tensor, dx: Any) -> Steps:
        wide = _wide(x)
        real = wide.to_real()
        raised = _map_floats(lambda part: _to(part, real) if part.dtype == self.dtype else part, state)
        run = Run(self.rule.steps(raised, _to(x, wide), None if dx is None else _to(dx, wide)))
        while run.asks is not None:
            run.tell((yield run.asks))
        new, change = run.result
        before, after = skeleton_of(state), skeleton_of(new)
        if before.spec != after.spec:
            raise ValueError(f"Lowered takes rules whose states keep their structure, unlike {self.rule!r}")
        parts = [
            _to(part, old.dtype) if _is_float(part) and _is_float(old) else part
            for old, part in zip(before.parts, after.parts, strict=True)
        ]
        if isinstance(change, Assign):
            change = Assign(_to(change.value, x.dtype))
        elif change is not None:
            change = _to(change, x.dtype)
        return Skeleton(after.spec, parts).bare(), change

    def map_inner_states(self, f: Callable[..., Any], *states: Any) -> Any:
        return f(self.rule, *states)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # a cast that does nothing is one more line to compile


def _is_float(part: Any) -> bool:
    """Whether a part of a state is a real tensor, or stands for one."""
    return hasattr(part, "is_floating_point") and part.is_floating_point()


def _map_floats(f: Callable[[Any], Any], state: Any) -> Any:
    """The state with `f` of each of its real tensors."""
    skeleton = skeleton_of(state)
    return Skeleton(skeleton.spec, [f(part) if _is_float(part) else part for part in skeleton.parts]).bare()

"""Rules that bound the gradient: each element, each array, or the whole update."""

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Any

import torch
from torch import Tensor

from ..fields import Hyper, hyper
from ..rule import Reduce, ReducingRule, Rule, Steps

_foreach_norm: Any = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]


class ClipGrad(Rule):
    """Each element of the gradient, clamped to `[-clip_value, clip_value]` (`torch.nn.utils.clip_grad_value_`).

    >>> ClipGrad(1.0).apply((), torch.zeros(2), torch.tensor([0.5, -3.0]))[1]
    tensor([ 0.5000, -1.0000])
    """

    clip_value: Hyper = hyper(default=10.0, allowed="(0, inf]")
    elementwise = True

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        return state, dx.clamp(-self.clip_value, self.clip_value)


class ClipNorm(ReducingRule):
    """Each array's gradient, scaled down to a norm of at most `max_norm`, for each array by itself, as Flux does it.

    PyTorch's `clip_grad_norm_` clips the norm over *all* arrays: that is `ClipGlobalNorm`.

    `norm_type` is the p of the p-norm, `math.inf` included. `nonfinite` says what a gradient with a norm that is not
    finite does: "raise" a `FloatingPointError` that names the array, "skip" the whole update (nothing moves, no count
    either), or "ignore" it.

    >>> ClipNorm(1.0).apply((), torch.zeros(2), torch.tensor([3.0, 4.0]))[1]
    tensor([0.6000, 0.8000])
    """

    max_norm: Hyper = hyper(default=10.0, allowed="(0, inf]")
    _: KW_ONLY
    norm_type: Hyper = hyper(default=2.0, allowed="(0, inf]")
    nonfinite: Hyper = hyper(default="raise", allowed=("raise", "skip", "ignore"))
    elementwise = True
    takes_numbers = splittable = True
    over = "array"

    def part(self, value: Tensor) -> Tensor:
        return norm_of(value, self.norm_type)

    def parts(self, values: Sequence[Tensor] | Tensor) -> Tensor:
        return norms_of(values, self.norm_type)

    def combine(self, parts: Tensor) -> Tensor:
        return parts[0] if len(parts) == 1 else norm_of(parts, self.norm_type)

    def steps(self, state: Any, x: Tensor, dx: Any) -> Steps:
        norm = yield Reduce(self, dx, self.nonfinite)
        return state, shrink(dx, norm, self.max_norm)


class ClipGlobalNorm(ClipNorm):
    """The gradients of the whole update, scaled down together to a norm of at most `max_norm`.

    One norm over all leaves stepped in this `update` whose chain has an equal `ClipGlobalNorm` at the same place among
    its global clips; frozen leaves are out. Computed in float32 or better. That of `torch.nn.utils.clip_grad_norm_`,
    without the 1e-6 it adds to the norm. `norm_type` and `nonfinite` are those of `ClipNorm`.
    """

    max_norm: Hyper = hyper(default=1.0, allowed="(0, inf]")
    over = "tree"


def norm_of(x: Tensor, p: Hyper) -> Tensor:
    """The p-norm of all elements (their moduli), in float32 or better; 0 of none."""
    x = x.abs() if x.is_complex() else x
    dtype = _wide(x)
    return torch.linalg.vector_norm(x, p, dtype=dtype) if x.numel() else x.new_zeros((), dtype=dtype)


def norms_of(values: Sequence[Tensor] | Tensor, p: Hyper) -> Tensor:
    """`norm_of` each, stacked: by one call of PyTorch's where it takes them, which gives the same numbers."""
    if isinstance(values, Tensor):
        real = values.abs() if values.is_complex() else values
        dims = list(range(1, real.ndim))
        return torch.linalg.vector_norm(real, p, dim=dims, dtype=_wide(real)) if dims else norms_of(list(values), p)
    if len(values) > 1 and not values[0].is_complex() and not isinstance(p, Tensor):
        try:
            return torch.stack(_foreach_norm(values, p, _wide(values[0])))
        except RuntimeError:  # empty arrays, or several dtypes or devices
            pass
    return torch.stack([norm_of(x, p) for x in values])


def _wide(x: Tensor) -> torch.dtype | None:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None


def shrink(dx: Any, norm: Tensor | float, max_norm: Hyper) -> Any:
    """`dx`, divided by how many times `norm` is above `max_norm`. The norm is a number, or a tensor that broadcasts."""
    # Not times clamp(max_norm / norm): at a norm of zero that divides by zero, and its derivative is NaN.
    excess = norm / max_norm
    if isinstance(excess, float):
        return dx if excess <= 1 else dx * (1 / excess)
    excess = excess.clamp(min=1)
    excess = excess if excess.device == dx.device else excess.to(dx.device)
    if excess.dtype == dx.dtype or dx.is_complex():
        return dx / excess
    return (dx / excess.expand_as(dx)).to(dx.dtype)  # in the norm's precision: float16 would round the excess

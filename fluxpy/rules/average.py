"""What rules are made of: averages, the root of one, arithmetic of numbers that may be tensors, and other dtypes."""

import torch
from torch import Tensor

from ..fields import Hyper


def average(beta: Hyper, old: Tensor, new: Tensor) -> Tensor:
    return beta * old + (1 - beta) * new


def average_square(beta: Hyper, old: Tensor, new: Tensor) -> Tensor:
    # The weight first: the square of a float16 of 256 is not finite, a thousandth of it is.
    return beta * old + (1 - beta) * new * new


def root(v: Tensor) -> Tensor:
    """`√v`. Its slope at zero counts as zero: the true one, infinite, times that of `dx²`, zero, would be NaN."""
    if not torch.is_grad_enabled():
        return v.sqrt()
    zero = v == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, v).sqrt())


def larger(a: Hyper, b: Hyper) -> Hyper:
    """`max(a, b)`, also of tensors."""
    if not isinstance(a, Tensor):
        return larger(b, a) if isinstance(b, Tensor) else max(a, b)
    return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)


def quotient(a: Hyper, b: Hyper) -> Hyper:
    """`a / b`, also of tensors; zero where `b` is."""
    if not isinstance(b, Tensor):
        return a / b if b else 0.0
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def smaller(a: Hyper, b: Hyper) -> Hyper:
    """`min(a, b)`, also of tensors."""
    return -larger(-a, -b)


def decayed(step: Tensor, factor: Hyper, x: Tensor) -> Tensor:
    """`step + factor · x`, at no cost where the factor is zero."""
    return step if isinstance(factor, int | float) and factor == 0 else step + factor * x


def wide(x: Tensor) -> Tensor:
    """In float32, what is in bfloat16 or float16."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def real(x: Tensor) -> Tensor:
    """A complex tensor as a real one."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def like(value: Tensor, x: Tensor) -> Tensor:
    """What `real` made real, as complex as `x`."""
    return torch.view_as_complex(value) if x.is_complex() else value

"""What most rules are made of: exponential averages, the root of one, and arithmetic of numbers that may be tensors."""

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

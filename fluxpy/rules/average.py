"""What most rules are made of: exponential averages, and the root of one."""

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

"""Exponential averages, as most rules keep them."""

from torch import Tensor

from ..rule import Hyper


def average(beta: Hyper, old: Tensor, new: Tensor) -> Tensor:
    return beta * old + (1 - beta) * new


def average_square(beta: Hyper, old: Tensor, new: Tensor) -> Tensor:
    # The weight first: the square of a float16 of 256 is not finite, a thousandth of it is.
    return beta * old + (1 - beta) * new * new

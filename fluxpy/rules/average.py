"""What rules are made of: averages, the root of one, arithmetic of numbers that may be tensors, and other dtypes."""

import torch
from torch import Tensor

from ..fields import Hyper
from ..pytree import is_forward_mode, is_transforming


def plus(a: Tensor, factor: Hyper, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a + factor · b`, in one pass over memory where the factor is a number, and then in `out`, if that is given."""
    return torch.add(a, b, alpha=factor, out=out) if _is_number(factor, a) else a + factor * b


def plus_square(a: Tensor, factor: Hyper, b: Tensor) -> Tensor:
    """`a + factor · b²`. The factor first: the square of a float16 of 256 is not finite, a thousandth of it is."""
    return torch.addcmul(a, b, b, value=factor) if _is_number(factor, a) else a + factor * b * b


def average(beta: Hyper, old: Tensor, new: Tensor) -> Tensor:
    """`beta · old + (1 - beta) · new`, in one pass over memory where `beta` is a number and both are of one dtype."""
    if _is_number(beta, old) and old.dtype == new.dtype:
        return old.lerp(new, 1 - beta)
    return plus(beta * old, 1 - beta, new)


def average_square(beta: Hyper, old: Tensor, new: Tensor) -> Tensor:
    return plus_square(beta * old, 1 - beta, new)


def _is_number(factor: Hyper, a: Tensor) -> bool:
    # Where something else stands for the tensors, it is written down with the operators that have numbers as inputs.
    return isinstance(factor, float | int) and isinstance(a, Tensor)


def is_differentiable() -> bool:
    """Whether somebody may take derivatives of what is computed now, backwards or forwards."""
    return torch.is_grad_enabled() or is_forward_mode()


def root(v: Tensor) -> Tensor:
    """`√v`. Its slope at zero counts as zero: the true one, infinite, times that of `dx²`, zero, would be NaN."""
    if not is_differentiable():
        return v.sqrt()
    zero = v == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, v).sqrt())


def spare(made: Tensor, x: Tensor) -> Tensor | None:
    """For `out=`: the memory of a tensor like `x` that a rule made itself and does not need any more; None where
    somebody may differentiate through the step or transforms it. For rules of whole arrays: where these are large, to
    map new memory for each operation costs more than the operation. (A chunk of many leaves stays in the cache: there
    it is no faster.)"""
    like = type(made) is Tensor and made.dtype == x.dtype and made.shape == x.shape
    return made if like and not is_differentiable() and not is_transforming() else None


def eps_for(x: Tensor, eps: Hyper) -> Hyper:
    """`eps`, at least 1e-7 in float16, where the usual 1e-8 is zero."""
    if x.dtype != torch.float16:
        return eps
    return eps.clamp(min=1e-7) if isinstance(eps, Tensor) else max(eps, 1e-7)


def larger(a: Hyper, b: Hyper) -> Hyper:
    """`max(a, b)`, also of tensors; NaN where one of them is."""
    if isinstance(a, float | int):
        return (a if a >= b or a != a else b) if isinstance(b, float | int) else larger(b, a)
    return a.clamp(min=b) if isinstance(b, float | int) else torch.maximum(a, b)


def quotient(a: Hyper, b: Hyper) -> Hyper:
    """`a / b`, also of tensors; zero where `b` is."""
    if isinstance(b, float | int):
        return a / b if b else 0.0
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def known(a: Hyper) -> Hyper:
    """`a`, also a tensor; zero where it is NaN."""
    return (a if a == a else 0.0) if isinstance(a, float | int) else torch.where(a == a, a, 0.0)


def smaller(a: Hyper, b: Hyper) -> Hyper:
    """`min(a, b)`, also of tensors."""
    return -larger(-a, -b)


def decayed(step: Tensor, factor: Hyper, x: Tensor, out: Tensor | None = None) -> Tensor:
    """`step + factor · x`, at no cost where the factor is zero. For `out` see `plus`."""
    return step if isinstance(factor, int | float) and factor == 0 else plus(step, factor, x, out)


def wide(x: Tensor) -> Tensor:
    """In float32, what is in bfloat16 or float16."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def real(x: Tensor) -> Tensor:
    """A complex tensor as a real one."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def like(value: Tensor, x: Tensor) -> Tensor:
    """What `real` made real, as complex as `x`."""
    return torch.view_as_complex(value) if x.is_complex() else value

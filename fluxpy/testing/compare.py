"""Comparisons of values, tensors and pytrees, bit for bit or up to rounding."""

from typing import Any

import torch
from torch import Tensor

from ..pytree import entries_of, partition, tensors_in
from ..saving.values import tensor_bytes
from ..text import dtype_name


def require(condition: bool, message: str) -> None:
    """An `assert` that stays under `python -O`."""
    if not condition:
        raise AssertionError(message)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two values are equal; of tensors dtype, shape and every bit."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and tensor_bytes(a) == tensor_bytes(b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return a is b or a == b


def describe_change(old: Any, new: Any) -> str:
    """`by at most 0.1` for tensors of one form, else `old -> new`."""
    if isinstance(old, Tensor) and isinstance(new, Tensor) and old.dtype == new.dtype and old.shape == new.shape:
        wide = torch.complex128 if old.is_complex() else torch.float64
        return f"by at most {(new.detach().cpu().to(wide) - old.detach().cpu().to(wide)).abs().max().item():.3g}"
    before, after = _short(old), _short(new)
    return f"{before} -> {after}" if before != after else f"{old!r} -> {new!r}"


def _short(x: Any) -> str:
    if isinstance(x, Tensor) and x.ndim:
        return f"{dtype_name(x.dtype)}{list(x.shape)}"
    return f"{x:.6g}" if isinstance(x, float) else str(x)


def contents(tree: Any) -> list[Any]:
    """All parts of a pytree in a form that `==` compares, tensors by their bits."""
    return [
        (part.dtype, part.shape, tensor_bytes(part)) if isinstance(part, Tensor) else repr(part)
        for _, part in entries_of(tree)
    ]


def write_counts(tree: Any) -> list[int]:
    """How often each tensor of a pytree was written to, also where no bit changed by it. Autograd keeps these."""
    return [t._version for t in tensors_in(tree)]


def require_close(a: Any, b: Any, before: Any, where: str) -> None:
    """What two ways made of one pytree is the same up to rounding: fused kernels round less often than a formula line
    by line. What was larger `before`, and has cancelled, was rounded as that."""
    (ours, skeleton), (theirs, other) = partition(a), partition(b)
    same_numbers = list(map(repr, skeleton.parts)) == list(map(repr, other.parts))
    require(skeleton == other and same_numbers, f"{where}: other numbers")
    for x, y, old in zip(ours, theirs, partition(before)[0], strict=True):
        x, y = x.detach(), y.detach()
        tolerance = 32 * torch.finfo(x.dtype).eps * max(map(_largest, (x, old)))
        if not torch.allclose(x, y, rtol=0, atol=tolerance, equal_nan=True):  # written only where they differ
            raise AssertionError(f"{where}: {x} and {y}")


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().nan_to_num(0, 0, 0).max()) if x.numel() else 0.0

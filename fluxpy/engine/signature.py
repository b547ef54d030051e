"""A cheap check that tensors still have the same type, dtype, shape, strides and device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _tensor_guards() -> Any:
    """What torch.compile itself notices a change with; None in versions of PyTorch without it."""
    try:
        from torch._C._dynamo.guards import TensorGuards
    except ImportError:
        return None
    return TensorGuards


def looks_of(tensors: list[Tensor]) -> Callable[..., bool]:
    """A check whether other objects, as many, are tensors that look as these do now."""
    make = _tensor_guards()
    if make is not None:
        return make(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    known = [_describe(t) for t in tensors]
    return lambda *others: known == [_describe(t) for t in others]


def _describe(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return None
    strides = t.stride() if t.layout == torch.strided else None
    return type(t), t.dtype, t.shape, t.device, t.layout, strides, t.is_neg()

"""A cheap check that tensors still have the same type, dtype, shape, strides and device."""

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


class Signature:
    """Remembers what tensors look like."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.guards = self.known = None
        make = _tensor_guards()
        if make is None:
            self.known = [_describe(t) for t in tensors]
            return
        self.guards = make(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def matches(self, *tensors: Any) -> bool:
        """Whether each of these, which are as many, is a tensor that looks as before."""
        if self.guards is not None:
            return self.guards.check(*tensors)
        return self.known == [_describe(t) for t in tensors]


def _describe(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return None
    strides = t.stride() if t.layout == torch.strided else None
    return type(t), t.dtype, t.shape, t.device, t.layout, strides, t.is_neg()

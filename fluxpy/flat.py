"""The parameters of a model as a list, and as one long vector."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .match import rebuild
from .tree import walk


def trainables(model: Any, path: bool = False) -> list[Any]:
    """The model's parameters in order, a tied one once; with `path`, as `(path, tensor)` pairs.

    >>> [name for name, x in trainables(torch.nn.Linear(2, 3), path=True)]
    ['weight', 'bias']
    """
    spec, values = walk(model)
    return [(spec.unique[i], x) for i, x in enumerate(values)] if path else values


def destructure(model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """`(flat, rebuild)`: all parameters as one vector, and the way back to a model of the same kind.

    Tied parameters stand in the vector once. Where dtypes differ, the vector has the one they promote to, and `rebuild`
    restores each parameter's own. Differentiable both ways. `rebuild` copies the structure as `update(...,
    inplace=False)` does; it raises ValueError for a vector of another length.

    >>> flat, rebuild = destructure({"w": torch.ones(2), "b": torch.zeros(1)})
    >>> rebuild(2 * flat + 1)
    {'w': tensor([3., 3.]), 'b': tensor([1.])}
    """
    _, values = walk(model)
    sizes = [x.numel() for x in values]
    dtype = torch.get_default_dtype() if not values else values[0].dtype
    for x in values:
        dtype = torch.promote_types(dtype, x.dtype)
    flat = torch.cat([x.reshape(-1).to(dtype) for x in values]) if values else torch.zeros(0, dtype=dtype)

    def back(flat: Tensor) -> Any:
        if not isinstance(flat, Tensor) or flat.shape != (sum(sizes),):
            came = tuple(flat.shape) if isinstance(flat, Tensor) else type(flat).__name__
            raise ValueError(f"this model has {sum(sizes)} parameters: rebuild takes shape ({sum(sizes)},), got {came}")
        parts = [
            (part.real if part.is_complex() and not x.is_complex() else part).reshape(x.shape).to(x.dtype)
            for part, x in zip(flat.split(sizes), values, strict=True)
        ]
        # Parts of a vector without a history would share its memory with the new model.
        return rebuild(model, {i: p if p.requires_grad else p.clone() for i, p in enumerate(parts)})

    return flat, back

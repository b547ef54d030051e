"""What outputs and targets say: which classes are predicted, how many targets count."""

from typing import Any

import torch
from torch import Tensor

from .core import reads_at_once


def number(x: Tensor) -> Any:
    """A plain number where that costs nothing, else the tensor: adding numbers is faster and more exact."""
    x = x.detach()
    if reads_at_once(x):
        return x.item()
    return x.double() if x.is_floating_point() and x.device.type != "mps" else x


def class_dim(output: Tensor, target: Tensor, dim: int | None = None) -> int | None:
    """The dimension of the output that has the classes; None where the output has the target's shape."""
    _require_tensor(output)
    if output.ndim != target.ndim + 1:
        return None
    if dim is None:
        first = output.ndim > 1 and output.shape[:1] + output.shape[2:] == target.shape
        last = output.shape[:-1] == target.shape
        if first and last and output.ndim > 2:
            raise ValueError(
                f"an output of shape {tuple(output.shape)} may have its classes in dimension 1 or in the last, for a "
                f"target of shape {tuple(target.shape)}; say which: fluxpy.learner.Accuracy(dim=-1)"
            )
        dim = 1 if first else -1 if last else None
    dim = None if dim is None else dim % output.ndim
    if dim is None or output.shape[:dim] + output.shape[dim + 1 :] != target.shape:
        raise ValueError(_unlike(output, target))
    return dim


def predictions(output: Tensor, target: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor, int | None]:
    """Predicted classes, targets of the same shape, and the number of classes (None where it cannot be told)."""
    _require_tensor(output)
    if output.ndim == target.ndim + 1 and output.shape[-1] == 1:
        output = output.squeeze(-1)  # one score for yes, as a last layer with one output gives it
    found = class_dim(output, target, dim)
    if found is not None:
        return output.argmax(found), target, output.shape[found]
    if output.shape != target.shape:
        raise ValueError(_unlike(output, target))
    return (output > 0, target, 2) if output.is_floating_point() else (output, target, None)


def _require_tensor(output: Any) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the output is of type {type(output).__name__}, and this metric takes a tensor of scores: let "
            "training_step return (loss, output.logits), or give a metric as a function (output, target) -> number"
        )


def _unlike(output: Tensor, target: Tensor) -> str:
    return (
        f"an output of shape {tuple(output.shape)} does not fit a target of shape {tuple(target.shape)}: it must have "
        "scores for each class in one dimension more, or the target's own shape; or give a metric as a function"
    )


def counted(target: Tensor, ignore_index: int) -> Tensor:
    """Which targets count: those that are not `ignore_index`. All, if their dtype cannot hold it; it would wrap."""
    if target.dtype == torch.bool:
        return torch.ones_like(target)
    if not target.is_floating_point():
        info = torch.iinfo(target.dtype)
        if not info.min <= ignore_index <= info.max:
            return torch.ones_like(target, dtype=torch.bool)
    return target != ignore_index


def require_classes(target: Tensor) -> None:
    """ValueError for targets that are no classes, as those of a regression. Reads them."""
    if target.is_floating_point() and not bool(((target == 0) | (target == 1)).all()):
        raise ValueError(
            f"the targets are {target.dtype} and not all 0 or 1, so they are no classes; give classes as whole numbers "
            "(target.long()), or a metric as a function (output, target) -> number"
        )

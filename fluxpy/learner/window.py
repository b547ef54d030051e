"""Window: gradients of several batches, gathered for one update."""

from typing import Any

import torch
from torch import Tensor

from .scores import counted, number

_LOW = (torch.float16, torch.bfloat16)


class Window:
    """The weighted mean of gradients, by place, in float32 or better. A place without a gradient adds zero."""

    def __init__(self) -> None:
        self.batches = 0
        self._sums: list[Tensor | None] = []
        self._weight: Any = 0  # a number, or a tensor where that would have to be read from a device

    def add(self, grads: list[Tensor | None], weight: Any) -> None:
        """Gather the gradients of a batch, none of which is kept or changed."""
        if not self.batches:
            self._sums, self._weight = [None] * len(grads), 0
        for i, g in enumerate(grads):
            if g is not None:
                g = (g.float() if g.dtype in _LOW else g) * weight
                before = self._sums[i]
                self._sums[i] = g if before is None else before.add_(g)
        self._weight = self._weight + weight
        self.batches += 1

    def take(self, like: list[Tensor]) -> list[Tensor | None]:
        """The mean, in the dtypes of these parameters. Nothing is gathered afterwards."""
        sums, self._sums, self.batches = self._sums, [], 0
        return [None if g is None else (g / self._weight).to(x.dtype) for g, x in zip(sums, like, strict=True)]

    def clear(self) -> None:
        self._sums, self._weight, self.batches = [], 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "sums": self._sums, "weight": self._weight}

    def load_state_dict(self, d: dict[str, Any], like: list[Tensor]) -> None:
        sums = [None if g is None else g.to(x.device, copy=True) for g, x in zip(d["sums"], like, strict=False)]
        self.batches, self._sums, self._weight = d["batches"], sums, d["weight"]


def weight_of(step: Any, loss: Any) -> Any:
    """How much a batch counts in a mean over several. Of targets that are classes that is how many of them
    `cross_entropy` takes the mean of, which are those that are not `ignore_index`; of others, the samples."""
    if step.weight is not None:
        return step.weight
    target = step.target
    if (
        not isinstance(target, Tensor)
        or target.is_floating_point()
        or target.is_complex()
        or target.dtype == torch.bool
    ):
        return step.samples
    ignored = getattr(loss, "ignore_index", -100)
    return number(counted(target, ignored).count_nonzero())

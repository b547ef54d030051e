"""Window: gradients of several batches, gathered for one update."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .metrics import counted, number

_LOW = (torch.float16, torch.bfloat16)


@dataclass
class Window:
    """The weighted mean of gradients, by place, in float32 or better. A place without a gradient adds zero.

    Its fields are what is saved of it.
    """

    batches: int = 0
    sums: list[Tensor | None] = field(default_factory=list)
    weight: Any = 0  # a number, or a tensor where that would have to be read from a device

    def add(self, grads: list[Tensor | None], weight: Any) -> None:
        """Gather the gradients of a batch, none of which is kept or changed."""
        self.sums = self.sums or [None] * len(grads)
        for i, g in enumerate(grads):
            if g is not None:
                g = (g.float() if g.dtype in _LOW else g) * weight
                before = self.sums[i]
                self.sums[i] = g if before is None else before.add_(g)
        self.weight = self.weight + weight
        self.batches += 1

    def mean(self, like: list[Tensor]) -> list[Tensor | None]:
        """In the dtypes of these parameters; of batches in which nothing counts it is zero."""
        weight = self.weight + (self.weight == 0)
        return [None if g is None else (g / weight).to(x.dtype) for g, x in zip(self.sums, like, strict=True)]


def weight_of(step: Any, loss: Any) -> Any:
    """How much a batch counts in a mean over several. Of targets that are classes that is how many of them
    `cross_entropy` takes the mean of: those that are not `ignore_index`, each by the `weight` of its class where the
    loss has such; of others, the samples."""
    if step.weight is not None:
        return step.weight
    target = step.target
    kind = target.dtype if isinstance(target, Tensor) else torch.bool
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        return step.samples
    counts = counted(target, option(loss, "ignore_index", -100))
    inner = loss.func if isinstance(loss, partial) else loss
    weighs = isinstance(inner, nn.CrossEntropyLoss | nn.NLLLoss) or inner in (F.cross_entropy, F.nll_loss)
    if weighs and (weights := option(loss, "weight", None)) is not None:
        return number((weights[target.where(counts, 0)] * counts).sum())
    return number(counts.count_nonzero())


def option(loss: Any, name: str, default: Any) -> Any:
    """What a loss was made with: a module, or a function in a `functools.partial`."""
    given, inner = (loss.keywords, loss.func) if isinstance(loss, partial) else ({}, loss)
    found = given.get(name, getattr(inner, name, None))
    return default if found is None else found

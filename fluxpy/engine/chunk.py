"""Chunk: what a rule is run on at once: neighbours in a cohort as one tensor, or a part of one large leaf."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..pytree import memory
from ..rule import Steps
from .cohort import Cohort
from .layout import LEAST_RUN, NumberRow, Row, Scratch, adjacent, copy_all, flat_view, owned, runs, stacks, views_like


class Chunk:
    """Neighbours in a cohort as one tensor; or, of one large leaf, a part."""

    def __init__(
        self, cohort: Cohort, scratch: Scratch, numeric: Sequence[bool], place: tuple[int, int, int, int], stack: bool
    ) -> None:
        low, high, start, size = place
        self.low, self.high, self.start = low, high, start
        reals = cohort.reals[low:high]
        where = runs(reals)
        self.size = size if size >= 0 else sum(cohort.sizes[low:high])
        self.stacked, self.shape = stack, (high - low, *reals[0].shape) if stack else (self.size,)
        self.of_several = high - low > 1
        # The shape in which a number of each leaf broadcasts over the leaves, where these have one shape.
        self.number_shape = (high - low, *[1 for _ in reals[0].shape if stack]) if self.of_several else ()
        self.x = Row(reals, scratch, "x", start, size)
        self.x.show_as(self.shape)
        self.momenta = [self._row(cohort, scratch, i, is_number, size) for i, is_number in enumerate(numeric)]
        if self.of_several:
            first = reals[0]
            self.dx = scratch.take("dx", first.dtype, first.device, self.size)
            self.dx_views = views_like(self.dx, reals, where)
            self.owner = owned(self.dx_views)
        self.written = {memory(row.buffer) for row in (self.x, *self.momenta)}
        self.scratch = scratch
        self.pointers: list[int] = []  # where gradients were last that lay side by side
        self.asked: tuple[Tensor, list[Tensor]] | None = None  # a value that a total is asked for, and its leaves
        self.sizes: Tensor | None = None
        # The runs of neighbours of one shape and strides, where they are long.
        self.runs = where if LEAST_RUN * len(where) <= len(reals) and not cohort.params[low].is_complex() else None
        self.answers: list[Any] = []
        self.running: Steps | None = None
        self.result: Any = None

    def _row(self, cohort: Cohort, scratch: Scratch, i: int, is_number: bool, size: int) -> Row:
        """The row of the i-th tensor of the states."""
        tensors, sizes = cohort.momenta[i][self.low : self.high], cohort.sizes[self.low : self.high]
        if is_number:
            last, repeat = size < 0 or self.start + size == sizes[0], self.of_several and not self.stacked
            return NumberRow(tensors, scratch, i, self.number_shape, sizes=sizes if repeat else None, last=last)
        row = Row(tensors, scratch, i, self.start, size)
        if self.stacked:  # those of a rule that needs whole arrays may have their own shapes
            row.show_as((self.high - self.low, *tensors[0].shape))
        return row

    def gradient(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradients of this chunk as one tensor, from those of the cohort, which have the strides of the reals."""
        if not self.of_several:
            flat = flat_view(grads[self.low])
            return flat if self.size == flat.numel() else flat[self.start : self.start + self.size]
        mine = grads[self.low : self.high]
        flat = adjacent(mine, self.pointers)
        if flat is not None:
            return flat
        copy_all(self.dx_views, mine)
        return self.dx

    def leaves(self, value: Tensor, cohort: Cohort) -> list[Any]:
        """A flat value in the shapes of its leaves: those of one shape, where they are few, as a stack."""
        if self.runs is not None:
            return [stack for stack, _ in stacks(value, cohort.reals[self.low : self.high], self.runs)]
        if self.asked is None or self.asked[0].dtype != value.dtype:
            buffer = self.scratch.take("asked", value.dtype, value.device, self.size)
            pairs = zip(buffer.split(cohort.sizes[self.low : self.high]), cohort.params[self.low :], strict=False)
            self.asked = buffer, [shaped_like(part, x) for part, x in pairs]
        self.asked[0].copy_(value)  # cheaper than new views
        return [self.asked[1]]

    def clear(self) -> None:
        """Forget one step's work."""
        self.answers, self.running, self.result = [], None, None


def shaped_like(flat: Tensor, x: Tensor) -> Tensor:
    """A flat value in the shape of its parameter."""
    real = x if not x.is_complex() else torch.view_as_real(x.detach())
    value = flat.view(real.shape) if real.is_contiguous() else flat.as_strided(real.shape, real.stride())
    return torch.view_as_complex(value) if x.is_complex() else value

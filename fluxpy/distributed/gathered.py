"""The step of a leaf that is spread over processes, by a rule that needs the whole array.

Each process puts parameter, gradient and momenta together, takes the same step as all others, and keeps its part.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..engine.reference import ReferenceUnit
from ..engine.step import Prepare
from ..leaf import Record


class GatheredUnit(ReferenceUnit):
    """One leaf, put together for its step. It is put together once an update, however often a step is attempted: the
    other processes would not do it again."""

    whole: tuple[Record, Tensor, Tensor | None] | None = None

    def prepare(self, grads: Sequence[Any]) -> Prepare:
        layout = self.record.layout
        assert layout is not None
        if self.whole is None:
            dx = grads[self.place]
            self.whole = self.record.put_together(), layout.whole(self.x), None if dx is None else layout.whole(dx)
        record, x, dx = self.whole
        inner = ReferenceUnit(record, x, self.place, self.path, self.context)
        yield from inner.prepare([None] * self.place + [dx])
        self.moved, self.skeleton = inner.moved, inner.skeleton
        self.value = layout.part(inner.value)
        self.spread = [layout.is_whole(t) for t in inner.news]
        self.news = [layout.part(t) if cut else t for t, cut in zip(inner.news, self.spread, strict=True)]
        self.olds = self.record.tensors or [] if inner.olds else []

    def settle(self, record: Record) -> None:
        super().settle(record)
        record.spread = self.spread

    def drop(self) -> None:
        super().drop()
        self.whole = None

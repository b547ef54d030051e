"""The step of a leaf that is spread over processes, by a rule that needs the whole array.

Each process puts parameter, gradient and momenta together, takes the same step as all others, and keeps its part.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..context import Context, require_all_finite
from ..engine.reference import ReferenceUnit
from ..engine.step import Prepare, Request
from ..leaf import Record
from .sharding import Sharding


class GatheredUnit(ReferenceUnit):
    """One leaf, whole only while its step is worked out, so that no two are at a time: where its rule asks for a total
    over the tree it lets go, and is put together anew for what follows.

    What it asked for and came to is kept until the update ends. Where a process makes another attempt at it, the others
    would not put the leaf together again.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked: list[Request] = []
        self.done = False

    def prepare(self, grads: Sequence[Any]) -> Prepare:
        answers: list[Any] = []
        while True:
            if len(answers) == len(self.asked):
                request = None if self.done else self._go_on(grads[self.place], answers)
                if request is None:
                    return
                self.asked.append(request)
            answers.append((yield self.asked[len(answers)]))

    def _go_on(self, dx: Tensor | None, answers: list[Any]) -> Request | None:
        """The next total over the tree that the rule asks for after these answers; None where it came to its result."""
        sharding = self.record.sharding
        assert sharding is not None
        record, x = self.record.put_together(), sharding.whole(self.x)
        inner = ReferenceUnit(record, x, self.place, self.path, self.context)
        steps = inner.prepare([None] * self.place + [None if dx is None else sharding.whole(dx)])
        known, answer = iter(answers), None
        while True:
            try:
                request = steps.send(answer)
            except StopIteration:
                self._keep(inner, sharding)
                return None
            if request.reduce.rule.over == "array":  # all of it is here
                require_all_finite(request.parts, request.reduce, self.context, request.paths)
                answer = request.parts
            elif (answer := next(known, None)) is None:
                return request._replace(reduce=request.reduce._replace(value=request.parts))  # without the whole array

    def _keep(self, inner: ReferenceUnit, sharding: Sharding) -> None:
        """Keep this process's part of the result."""
        self.moved, self.skeleton = inner.moved, inner.skeleton
        self.value = sharding.part(inner.value if inner.change is None else inner.x - inner.change)
        self.spread_flags = [sharding.is_whole(t) for t in inner.news]
        self.news = [sharding.part(t) if cut else t for t, cut in zip(inner.news, self.spread_flags, strict=True)]
        self.olds = self.record.tensors or [] if inner.olds else []
        self.done = True

    def store(self, record: Record) -> None:
        super().store(record)
        record.spread_flags = self.spread_flags

    def drop(self) -> None:
        super().drop()
        self.asked, self.done = [], False


def unit_alone(record: Record, x: Tensor, place: int, path: str, context: Context, **options: Any) -> ReferenceUnit:
    """The unit of a leaf that steps by itself."""
    return (GatheredUnit if record.needs_whole else ReferenceUnit)(record, x, place, path, context, **options)

"""Shadow units: a rule that one of PyTorch's kernels steps, inside a rule that keeps a shadow of the parameter.

The stepping rule runs as if there were no shadow: on records of its own, which share the momenta of the leaves.
"""

from collections.abc import Sequence
from typing import Any

from ..leaf import Numbers, Record
from ..pytree import HOLE, Skeleton, partition
from ..rule import Rule, hyperparameters, title_key, value_key
from . import fused, fused_kernels
from .cohort import Cohort
from .layout import Row, Scratch, chunks_of, pack
from .packed import rule_now
from .step import CohortUnit, FallBack, Prepare


def takes(record: Record, x: Any) -> bool:
    """Whether the rule of a leaf keeps a shadow, and one of PyTorch's kernels computes the rule inside."""
    if record.rule is None or record.rule.shadow_rule is None:
        return False
    rule, state = record.rule.without_shadow(record.state)
    return fused_kernels.takes(rule, x, partition(state)[0])


def stepper(rule: Rule) -> Rule:
    """The rule that steps, inside one that keeps a shadow."""
    return rule.without_shadow(None)[0]


def bucket_key(rule: Rule) -> Any:
    """What rules must have in common to go together."""
    assert rule.shadow_rule is not None
    own = tuple([value_key(value) for value in hyperparameters(rule.shadow_rule).values()])
    return fused_kernels.bucket_key(stepper(rule)), own


class ShadowUnit(CohortUnit):
    """A cohort of rules that keep a shadow: what steps, by a unit of its own, and then the shadows."""

    def __init__(self, cohort: Cohort) -> None:
        super().__init__(cohort)
        self.bare: dict[int, tuple[Rule, Rule]] = {}  # by the id of a rule: that rule, and the one that steps in it
        self.stepping = [self._bare_record(record) for record in cohort.records]
        first, its = cohort.records[0].tensors or [], self.stepping[0].tensors or []
        row = next((i for i, (t, own) in enumerate(zip(first, its, strict=False)) if t is not own), len(its))
        holes = [i for i, part in enumerate(cohort.skeleton.parts) if part is HOLE]
        self.place = holes[row]  # of the shadow among the parts of the state; its step count comes next
        shadows = cohort.momenta[row]
        for low, high, _, _ in chunks_of(cohort.sizes, split=False):
            shadows[low:high] = pack(shadows[low:high])
        members = [m._replace(record=own) for m, own in zip(cohort.members, self.stepping, strict=True)]
        inner = Cohort(members, cohort.context, cohort.static_key)
        self.inner = fused.fused_unit(inner)
        cohort.hold([*inner.momenta[:row], shadows, *inner.momenta[row:]])
        scratch = Scratch()
        pairs = ("shadow", shadows), ("x", cohort.reals)
        self.rows = [
            [Row(tensors[low:high], scratch, role, start, size) for role, tensors in pairs]
            for low, high, start, size in chunks_of(cohort.sizes, split=True)
        ]
        self.shadow_rule: Any = None

    def _bare_rule(self, rule: Rule | None) -> Rule:
        assert rule is not None
        if id(rule) not in self.bare:
            self.bare[id(rule)] = rule, stepper(rule)
        return self.bare[id(rule)][1]

    def _bare_record(self, record: Record) -> Record:
        """What the stepping rule sees of a leaf."""
        assert record.rule is not None
        own = Record(self._bare_rule(record.rule), False, record.shape, record.dtype)
        own.tensors, skeleton = partition(record.rule.without_shadow(record.state)[1])
        own.numbers = Numbers(record.numbers.count, skeleton)
        return own

    def adopt_rules(self, rules: list[Rule]) -> bool:
        self.bare = {}
        for record, own in zip(self.cohort.records, self.stepping, strict=True):
            own.rule = self._bare_rule(record.rule)
        return self.inner.adopt_rules(self.inner.cohort.rules())

    def prepare(self, grads: Sequence[Any]) -> Prepare:
        self.shadow_rule = rule_now(self.cohort.rule, self.cohort.numbers.count).shadow_rule
        self.inner.cohort.odd = self.cohort.odd
        try:
            yield from self.inner.prepare(grads)
        except FallBack as fallback:
            raise FallBack(fallback.reason and title_key(self.cohort.rule)) from fallback

    def drop(self) -> None:
        """Let go of a step's gradients, results and count: an interrupt may have come after the inner step."""
        self.inner.drop()
        own, parts = self.inner.cohort.numbers, self.cohort.skeleton.parts
        own.skeleton = Skeleton(self.inner.cohort.skeleton.spec, parts[: self.place] + parts[self.place + 2 :])
        own.count = self.cohort.numbers.count

    def commit(self) -> None:
        own, mask = self.inner.cohort, self.context.flag.mask
        count, t = own.numbers.count, self.cohort.skeleton.parts[self.place + 1]
        self.inner.commit()
        moved = own.numbers.count > count
        t, then = self.shadow_rule.shadow_step(t) if moved else (t, None)
        if then is not None:
            for tensor, x in self.rows:
                old, value = tensor.read(), x.read()
                new, becomes = then(old, value)
                tensor.write(mask(old, new))
                if becomes is not value:
                    x.write(mask(value, becomes))
        parts = [*own.skeleton.parts[: self.place], HOLE, t, *own.skeleton.parts[self.place :]]
        self.cohort.advance(Skeleton(self.cohort.skeleton.spec, parts), moved)

"""Group: leaves that go through an update together."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..guard import reads_at_once
from ..pytree import Frame, is_wrapped
from ..rule import Rule, at


class Misfit(Exception):
    """What came is for the plain path to judge: it knows the leaf, and takes all that can be taken. `rules` are those
    that should always go that way."""

    def __init__(self, rules: Iterable[type] = ()) -> None:
        self.rules = set(rules)


class Member(NamedTuple):
    """A leaf in a plan, its parameter, and where that stands among the model's parameters."""

    path: str
    leaf: Any
    x: Tensor
    place: int


class Group:
    """Leaves with one rule, one count and equal numbers in their states. An update takes it through

        begin      its gradients, and the rule's values at this count
        advance    to the next total over the tree that it asks for; None at the end
        finish     to where nothing can fail any more
        commit     written

    The leaves hold the tensors and the group the numbers, which a leaf takes over when it is looked at (`of`).
    """

    idle = False  # whether it leaves its leaves alone
    quick: bool  # whether it asks for nothing and can fail at nothing
    rewrites_views = False  # whether parameters are written through a view that autograd does not know

    plan: Any  # what it belongs to
    odd: Sequence[int] = ()  # gradients with other strides than their parameters

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.params = [member.x for member in members]
        first = members[0].leaf
        self.rule: Rule = first.rule
        self.count, self.steps = first._count, 0
        split = [Frame.split(member.leaf._state) for member in members]
        self.frame = split[0][1]
        self.momenta = [list(row) for row in zip(*(tensors for tensors, _ in split), strict=True)]
        self.join()

    def join(self) -> None:
        for member in self.members:
            if member.leaf._group is not None:
                member.leaf._group.disband()
            member.leaf._group, member.leaf._seen = self, 0

    def of(self, held: Any) -> Any:
        """The state of a leaf with the group's numbers."""
        return self.frame.join(Frame.split(held)[0])

    def disband(self) -> None:
        """Somebody changed a leaf: whoever steps these leaves next must plan anew."""
        self.plan.dead = True

    def retune(self) -> bool:
        """Take over what `adjust` did to the rules of the leaves; False where they do not go together any more."""
        rules = {id(m.leaf._rule): m.leaf._rule for m in self.members}.values()
        self.rule = self.members[0].leaf._rule
        return not self.rule.traced and (len(rules) == 1 or len(set(map(same, rules))) == 1)

    def begin(self, grads: list[Tensor]) -> None:
        self.grads, self.now = grads, self.rule
        if self.rule.scheduled:
            self.now = at(self.rule, self.count)

    def stepped(self, numbers: list[Any] | None = None, moved: bool = True) -> None:
        """Count a step, after which the states have these numbers."""
        if numbers is not None:
            self.frame.parts = numbers
        self.steps += 1
        self.count += moved
        if self.rewrites_views:
            torch.autograd.graph.increment_version(self.params)


class Rest(Group):
    """Leaves of a plan that no group steps: it hears when they are changed."""

    idle = True

    def __init__(self, members: Sequence[Member]) -> None:
        self.members, self.steps = list(members), 0
        for member in members:
            member.leaf._catch_up()
        self.join()


def value_key(v: Any, loose: bool = False) -> Any:
    """A value to compare by. Tensors count by value where the host may read it, functions by identity. With `loose`,
    real numbers are alike."""
    if isinstance(v, Rule):
        return same(v, loose)
    if isinstance(v, tuple | list):
        return tuple(value_key(x, loose) for x in v)
    if isinstance(v, Tensor):
        return v.item() if v.numel() == 1 and not is_wrapped(v) and reads_at_once(v) else id(v)
    return id(v) if callable(v) else float if loose and type(v) is float else v


def same(rule: Rule, loose: bool = False) -> Any:
    """What equal rules have in common: they share a total, and go together."""
    return type(rule), tuple((name, value_key(getattr(rule, name), loose)) for name in rule.__dataclass_fields__)

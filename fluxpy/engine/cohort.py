"""Cohort: leaves that step together, and how they are laid out in memory."""

import copy
from collections.abc import Collection, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..context import Context, remembered
from ..leaf import Numbers, Record, rules_of
from ..pytree import Skeleton
from ..rule import Rule, reducing
from .layout import LEAST_RUN, adjacent, chunks_of, clone_all, is_dense, owned, pack, runs, views_like


class Member(NamedTuple):
    """A leaf in a plan: its record, its parameter, where that is among the model's parameters, and its path."""

    record: Record
    x: Tensor
    place: int
    path: str


def real_view(x: Tensor) -> Tensor:
    """A parameter without its history, a complex one as a real one."""
    x = x.detach()
    return torch.view_as_real(x) if x.is_complex() else x


class Cohort:
    """Leaves of rules of one kind, with one count and equal numbers in their states.

    They share one `Numbers`, which no other leaf holds: a step changes that object, and the tensors where they are.
    `momenta` has a row for each tensor of the state, and a column for each leaf.
    """

    def __init__(self, members: Sequence[Member], context: Context, static_key: Any) -> None:
        self.context = context
        self.static_key = static_key  # what its leaves have in common but the numbers in their states
        self.records = [member.record for member in members]
        self.params = [member.x for member in members]
        self.places = [member.place for member in members]
        self.paths = [member.path for member in members]
        parts = 2 if self.params[0].is_complex() else 1
        self.sizes = [x.numel() * parts for x in self.params]
        self.numbers: Numbers = self.records[0].numbers.copy()
        self.numbers.fresh = all(record.numbers.fresh for record in self.records)
        columns = [record.tensors or [] for record in self.records]
        self.momenta = [list(row) for row in zip(*columns, strict=True)]
        # Which rows are of numbers.
        self.numeric = [is_number(row[0], self.params[0]) for row in self.momenta]
        order = sorted(range(len(self.places)), key=self.places.__getitem__)
        # The indices that put a value for each leaf into the order of the model; None where they are in that order.
        self.model_order: Tensor | None = None
        self.model_places, self.model_paths = self.places, self.paths
        if order != list(range(len(order))):
            self.model_order = torch.tensor(order, device=self.params[0].device)
            self.model_places, self.model_paths = sorted(self.places), [self.paths[i] for i in order]
        self.odd: list[int] = []  # the gradients whose strides are not those of their parameters
        self.steps, self.owner = 0, None
        for record in self.records:
            record.numbers = self.numbers
        self.tensors = [record.tensors for record in self.records]

    @cached_property
    def reals(self) -> list[Tensor]:
        """The parameters without history, complex ones as real."""
        detached = [x.detach() for x in self.params]
        return [*map(torch.view_as_real, detached)] if detached[0].is_complex() else detached

    def forget_reals(self) -> None:
        """Let go of the memory that the parameters were in: they are elsewhere."""
        self.__dict__.pop("reals", None)
        self.owner = owned([t for row in self.momenta for t in row])

    @property
    def members(self) -> list[Member]:
        return [*map(Member, self.records, self.params, self.places, self.paths)]

    @property
    def rule(self) -> Rule:
        """The rule of the first leaf; those of the others are of the same kind."""
        rule = self.records[0].rule
        assert rule is not None
        return rule

    def rules(self) -> list[Rule]:
        """The rules of the leaves, each object once."""
        return [rule for rule in rules_of(self.records) if rule is not None]

    @property
    def skeleton(self) -> Skeleton:
        skeleton = self.numbers.skeleton
        assert skeleton is not None
        return skeleton

    def pack_momenta(self, breaks: Collection[int] = ()) -> None:
        """Lay the momenta of small neighbours side by side."""
        if not self.momenta:
            return
        for low, high, _, _ in chunks_of(self.sizes, False, breaks):
            where = runs(self.reals[low:high])  # of momenta too: each is like its parameter, or all are numbers
            for row in self.momenta:
                row[low:high] = pack(row[low:high], where)
        self.hold(self.momenta)

    def hold(self, momenta: list[list[Tensor]]) -> None:
        """Give the leaves these momenta."""
        self.momenta = momenta
        for record, *tensors in zip(self.records, *momenta, strict=True):
            record.tensors = tensors
        self.tensors = [record.tensors for record in self.records]

    def holds(self) -> bool:
        """Whether the leaves are still as this cohort left them."""
        for record, tensors in zip(self.records, self.tensors, strict=True):
            if record.numbers is not self.numbers or record.tensors is not tensors:
                return False
        return True

    def fork(self, params: Sequence[Tensor], context: Context) -> "Cohort":
        """The same leaves of a copy of the model: with copies of the states, laid out alike."""
        other = copy.copy(self)
        other.context, other.numbers, other.steps, other.owner = context, self.numbers.copy(), 0, None
        other.params = [params[place] for place in self.places]
        other.__dict__.pop("reals", None)
        other.records = [record.copy(other.numbers, None) for record in self.records]
        other.hold([self._copied(row) for row in self.momenta])
        return other

    def _copied(self, row: list[Tensor]) -> list[Tensor]:
        copied: list[Tensor] = []
        for low, high, _, _ in chunks_of(self.sizes, split=False):
            flat = adjacent(row[low:high])
            copied += clone_all(row[low:high]) if flat is None else views_like(flat.clone(), row[low:high])
        return copied

    def advance(self, skeleton: Skeleton, moved: bool) -> None:
        """Count a step, after which the states have the numbers of this skeleton."""
        if self.context.late is not None:
            self.context.late.undo += remembered(self.numbers, "skeleton", "fresh", "count")
        if self.steps == 1:  # of what steps once, as the copy that a pure update makes, it would not pay
            self.owner = owned([*self.reals, *(t for row in self.momenta for t in row)])
        self.steps += 1
        self.numbers.skeleton, self.numbers.fresh = skeleton, False
        self.numbers.count += moved


def arranged(members: Sequence[Member]) -> list[Member]:
    """Members in the order of the model. If their rules ask for totals, and parameters are not adjacent in memory, many
    of one shape come together: their totals are one operation."""
    ordered = sorted(members, key=attrgetter("place"))
    rule, first = ordered[0].record.rule, [real_view(member.x) for member in ordered[:2]]
    if rule is not None and reducing(rule) and len(first) > 1 and adjacent(first) is None:
        forms: dict[Any, list[Member]] = {}
        for member in ordered:
            forms.setdefault((member.x.shape, member.x.stride()), []).append(member)
        if LEAST_RUN * len(forms) <= len(ordered):
            return [member for form in sorted(forms, key=lambda f: (f[0].numel(), f)) for member in forms[form]]
    return ordered


def is_number(t: Tensor, x: Tensor) -> bool:
    """Whether a tensor of the state of `x` is a number: 0-dim, where the parameter, a complex one as a real one, is
    not."""
    return not t.ndim and (x.ndim > 0 or x.is_complex())


def packed_form(x: Tensor, tensors: Sequence[Tensor]) -> tuple[bool, ...] | None:
    """Which tensors of the state of a dense parameter are numbers (0-dim), where the others are like the parameter;
    None where such a state cannot be packed."""
    real = real_view(x) if x.is_complex() else x
    contiguous = real.is_contiguous()  # which is cheaper to compare than strides
    if not (contiguous or is_dense(real)):
        return None
    shape, device, form = real.shape, real.device, []
    for t in tensors:
        alike = t.shape == shape and (t.is_contiguous() if contiguous else t.stride() == real.stride())
        if t.device != device or t.requires_grad or t.is_inference() or not (alike or not t.ndim):
            return None
        form.append(not alike)
    return tuple(form)


def fits_stacked(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether the parameter and its state, of any shapes, can each be one of a stack."""
    return x.is_contiguous() and all(
        t.is_contiguous() and t.device == x.device and not t.requires_grad and not t.is_inference() for t in tensors
    )

"""Param groups: the leaves of a state tree, those with equal hyperparameters together."""

import warnings
from collections.abc import Iterator, Sequence
from inspect import signature
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adjust import adjust
from ..leaf import Leaf
from ..rule import Rule, at, hyperparameters, rule_key, rules_in, title, value_key
from ..state import State, leaf_list, select, shape_of, tree_context
from ..text import unknown
from .live import LiveDict

# All that a group of an optimiser of torch has.
OPTIONS = {"params", "param_names"}.union(
    *(signature(kind).parameters for kind in vars(torch.optim).values() if isinstance(kind, type))
)
# Options of torch's classes that say how to compute, which is the engine's business here.
_HOW = ("foreach", "fused")
# Modes that are off here; what to write for each.
_OFF = {
    "maximize": "negate the loss",
    "capturable": "a step is not made for CUDA graphs",
    "differentiable": "write fluxpy.update(state, model, grads, inplace=False) to differentiate through a step",
}


class Member(NamedTuple):
    """A leaf, its number in its tree, its path and its parameter."""

    leaf: Leaf
    number: int
    path: str
    x: Tensor


def refuse_mode(name: str, value: Any, owner: str) -> None:
    """ValueError for a mode of torch's optimisers that there is not here."""
    if name in _OFF and value:
        raise ValueError(f"{owner}: {name}={value!r} is not available; {_OFF[name]}")


def check_options(options: dict[str, Any]) -> None:
    """TypeError for an unknown option of the constructor; ValueError for a mode that there is not."""
    for name, value in options.items():
        if name not in (*_HOW, *_OFF):
            raise TypeError(
                f"TorchOptimizer got an unexpected argument {name!r}: hyperparameters belong to the rule, "
                "as in TorchOptimizer(fluxpy.AdamW(lr=1e-3), model)"
            )
        refuse_mode(name, value, "TorchOptimizer")


def same(a: Any, b: Any) -> bool:
    """Whether two values of a hyperparameter are one. A tensor is so with itself alone: it may be written to."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return value_key(a) == value_key(b)


class ParamGroup(LiveDict):
    """Leaves with equal hyperparameters. `params` and `names` are theirs in the order of the model; a hyperparameter is
    read from the tree and written to it; any other key is kept for those who put it there (`initial_lr`)."""

    def __init__(self, state: State | Leaf, members: Sequence[Member], kept: dict[str, Any] | None = None) -> None:
        self._state = state
        self.kept = {} if kept is None else kept
        self.take(members)

    def take(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._fixed = {"params": [m.x for m in members], "names": [m.path for m in members]}
        self._view: State | None = None
        self._known: tuple[Rule, tuple[dict[str, Any], list[str]]] | None = None  # a rule, and what it shows

    @property
    def rule(self) -> Rule:
        """The rule of its leaves, which all have an equal one."""
        return self.members[0].leaf.rule

    def shown(self) -> tuple[dict[str, Any], list[str]]:
        """The hyperparameters by name as the next step will use them, and the names of those that members of a chain
        have with different values. Under a schedule, by the count of the first leaf that is not frozen."""
        rule = self.rule
        if rule.scheduled:
            leaf = next((m.leaf for m in self.members if not m.leaf.frozen), self.members[0].leaf)
            return _by_name(at(rule, leaf.count))
        if self._known is None or self._known[0] is not rule:
            self._known = rule, _by_name(rule)
        return self._known[1]

    def __getitem__(self, name: str) -> Any:
        for known in (self._fixed, self.kept):
            if name in known:
                return known[name]
        shown, mixed = self.shown()
        if name in mixed:
            raise KeyError(self._mixed(name))
        return shown[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._fixed:
            raise TypeError(f"param_groups: {name!r} follows the tree; {NEW_OPTIMIZER}")
        shown, mixed = self.shown()
        if name in mixed:
            raise ValueError(f"param_groups: {self._mixed(name)}")
        if name not in shown:
            refuse_mode(name, value, "param_groups")
            if value and name in OPTIONS.difference(_HOW, _OFF):
                raise ValueError(f"param_groups: {unknown(title(self.rule), shown, name)}")
            self.kept[name] = value
        elif not same(shown[name], value):
            schedules = [v for member in rules_in(self.rule) if callable(v := hyperparameters(member).get(name))]
            adjust(self.view, **{name: value})
            if schedules:
                warnings.warn(
                    f"param_groups: {name}={value!r} replaces {schedules[0]!r} of {self._first()}; a scheduler of "
                    "torch and a schedule in the rule cannot both set it (ConstantLR(optimizer, factor=1.0) sets none)",
                    stacklevel=2,
                )

    def __delitem__(self, name: str) -> None:
        if name not in self.kept:
            raise TypeError(f"param_groups: {name!r} cannot be deleted")
        del self.kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._fixed, *self.shown()[0], *self.kept])

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def view(self) -> State:
        """Its leaves as a view of the tree, for the verbs."""
        if self._view is None:
            own = {m.path for m in self.members}
            self._view = select(self._state, lambda path, _: path in own)
        return self._view

    def _first(self) -> str:
        more = len(self.members) - 1
        return repr(self.members[0].path) + (f" and {more} more" if more else "")

    def _mixed(self, name: str) -> str:
        return (
            f"members of {title(self.rule)} have {name!r} with different values, so a group has no one {name!r}; "
            "put a schedule into the rule itself"
        )


NEW_OPTIMIZER = (
    "for another model: state = fluxpy.setup(rule, model, keep=optimizer.tree), then TorchOptimizer(state, model)"
)


def _by_name(rule: Rule) -> tuple[dict[str, Any], list[str]]:
    """The hyperparameters of a rule and those inside it by name; and the names that have several values."""
    values: dict[str, Any] = {}
    mixed: list[str] = []
    for member in rules_in(rule):
        for name, value in hyperparameters(member).items():
            if name not in values:
                values[name] = value
            elif not same(values[name], value):
                mixed.append(name)
    return {name: value for name, value in values.items() if name not in mixed}, mixed


class ParamGroups:
    """All groups of a tree, in the order of the model. What `adjust` makes different is split off into a group at the
    end; groups are never put together again, for schedulers count on their number."""

    def __init__(self, state: State | Leaf, params: Sequence[Tensor]) -> None:
        leaves, self._state = leaf_list(state), state
        places = zip(shape_of(state).leaves.items(), params, strict=True)
        # What setup was given None for is frozen for good and has no hyperparameters.
        self.members = [Member(leaves[i], i, path, x) for (i, path), x in places if leaves[i].rule is not None]
        if not self.members:
            raise ValueError("TorchOptimizer: the model has no parameter that a rule trains")
        self._context = tree_context(state)
        self._all = [ParamGroup(state, members) for members in _equal(self.members)]
        self._seen = self._versions()

    def _versions(self) -> tuple[int, int]:
        return self._context.structure, self._context.hyper

    def current(self) -> list[ParamGroup]:
        """The groups, after what changed in the tree since the last look. Always the same list."""
        if self._seen != self._versions():
            for group in list(self._all):
                first, *others = _equal(group.members)
                if others:
                    self._split(group, first, others)
            self._seen = self._versions()
        return self._all

    def _split(self, group: ParamGroup, first: list[Member], others: list[list[Member]]) -> None:
        # A scheduler that is made later starts from the rates as they are then.
        kept = {name: value for name, value in group.kept.items() if name != "initial_lr"}
        new = [ParamGroup(self._state, members, dict(kept)) for members in others]
        group.take(first)
        self._all += new
        if "initial_lr" in group.kept:
            names = ", ".join(repr(m.path) for m in others[0][:3])
            warnings.warn(
                f"param_groups: {names} got other hyperparameters than their group and are now a group of their own; a "
                "scheduler of torch that keeps a rate for each group was made for fewer, and must be made anew",
                stacklevel=4,
            )

    def regroup(self, groups: Sequence[tuple[Sequence[str], dict[str, Any]]]) -> None:
        """Make these the groups: the names of each, and what it holds; what is not the tree's is kept. What differs
        within a group is split off as ever."""
        where = {member.path: member for member in self.members}
        self._all[:] = [ParamGroup(self._state, [where[name] for name in names]) for names, _ in groups]
        for group, (_, held) in zip(self._all, groups, strict=True):
            known = {"params", "names", *chain(*group.shown())}
            group.kept |= {name: value for name, value in held.items() if name not in known}
        self._seen = -1, -1


def _equal(members: Sequence[Member]) -> list[list[Member]]:
    """The members with equal rules together, in the order of the first of each."""
    rules = {id(m.leaf.rule): m.leaf.rule for m in members}
    keys = {number: rule_key(rule) for number, rule in rules.items()}
    found: dict[Any, list[Member]] = {}
    for member in members:
        found.setdefault(keys[id(member.leaf.rule)], []).append(member)
    return list(found.values())

"""Leaf: what a state tree holds for one parameter."""

import copy
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .guard import Guard
from .pytree import Frame, apart, register
from .rule import Rule, at, replace
from .rule import walk as walk_rules


def _read_only(name: str, doc: str, advice: str) -> Any:
    def refuse(leaf: "Leaf", value: Any) -> NoReturn:
        raise AttributeError(f"leaf.{name} is read-only; write {advice}")

    return property(lambda leaf: getattr(leaf, "_" + name), refuse, doc=doc)


class Leaf:
    """What the state holds for one parameter: its `rule`, the rule's `state`, and whether it is `frozen`. Read-only.

    `rule` is None where `setup` was told so: that leaf is frozen for good. `state` is None until the first update
    after a thaw or a reset.
    """

    __slots__ = (
        "_dtype",
        "_frozen",
        "_group",
        "_guard",
        "_held",
        "_missed",
        "_open",
        "_rule",
        "_seen",
        "_shape",
        "_steps",
    )

    rule: Any = _read_only("rule", "The hyperparameters.", "fluxpy.adjust(leaf, lr=...)")
    state: Any = _read_only("state", "The rule's momenta.", "fluxpy.reset(leaf), or load a saved state")
    frozen: bool = _read_only("frozen", "Whether updates pass it by.", "fluxpy.freeze(leaf) or fluxpy.thaw(leaf)")

    def __init__(self, rule: Rule | None, frozen: bool, x: Tensor, guard: Guard) -> None:
        self._rule, self._held, self._frozen = rule, None, frozen
        self._shape, self._dtype, self._guard = x.shape, x.dtype, guard  # one guard for all leaves of a tree
        self._steps = 0  # how often the rule stepped the parameter: what schedules see
        self._missed = 0  # updates sat out frozen, that a rule which gathers must hear of
        self._open: Any = None  # as a pytree with something else in place of its tensors: those, and the rest
        # The engine steps many leaves as one group, which counts for all; a leaf catches up when it is looked at.
        self._group: Any = None
        self._seen = 0

    @property
    def _state(self) -> Any:
        self._catch_up()
        return self._held

    @property
    def _count(self) -> int:
        self._catch_up()
        return self._steps

    def _catch_up(self) -> None:
        if self._group is not None and self._seen != self._group.steps:
            self._held, self._steps, self._seen = self._group.of(self._held), self._group.count, self._group.steps

    def _set(self, **values: Any) -> None:
        """Change anything but the momenta's numbers: `rule`, `state`, `frozen`, `count`, `missed`."""
        self._catch_up()
        if self._group is not None:
            self._group = self._group.disband()
        names = {"state": "_held", "count": "_steps"}
        for name, value in values.items():
            setattr(self, names.get(name, "_" + name), value)

    def _retune(self, rule: Any) -> None:
        """The same rule with other hyperparameters, which the engine takes over as it goes."""
        self._rule = rule
        if self._group is not None:
            self._group.plan.retuned = True

    def _put(self, state: Any, count: int) -> None:
        """What a step on the plain path makes of it."""
        if self._group is not None and not self._group.idle:
            self._set()
        self._held, self._steps, self._missed = state, count, 0

    def __getstate__(self) -> Any:
        self._catch_up()
        return None, {name: getattr(self, name) for name in self.__slots__} | {"_group": None}

    def __repr__(self) -> str:
        return f"Leaf({self._rule!r}, {'x'.join(map(str, self._shape)) or '0-dim'}{', frozen' * self._frozen})"

    def _with(self, rule: Rule | None, state: Any) -> "Leaf":
        """A copy with another rule and state."""
        leaf = copy.copy(self)
        leaf._rule, leaf._held = rule, state
        return leaf


def start(rule: Rule, x: Tensor, count: int, path: str) -> Any:
    """A new optimiser state for the parameter `x`. It holds no gradient history, and never the parameter itself."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            tensors, frame = Frame.split(at(rule, count).start(x))
    except Exception as error:
        error.add_note(f"in the rule {rule!r} of the parameter {path!r}")
        raise
    return frame.join(apart(tensors, [x]))


class _LeafShape:
    """A leaf without its tensors, as pytree metadata: equal where the tensors lie alike, whatever the numbers are."""

    def __init__(self, leaf: Leaf, frame: Frame) -> None:
        self.leaf, self.frame = leaf, frame
        self.rules = [] if leaf.rule is None else [type(rule) for rule in walk_rules(leaf.rule)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LeafShape) and (self.rules, self.frame) == (other.rules, other.frame)

    def __hash__(self) -> int:
        return hash(len(self.rules))


def _flatten(leaf: Leaf) -> tuple[tuple[Any, ...], _LeafShape]:
    if leaf._open is not None:
        return leaf._open
    held: list[Tensor] = []
    if leaf.rule is not None and leaf.rule.traced:
        _map_tensors(leaf.rule, lambda t: held.append(t) or t)
    tensors, frame = Frame.split((leaf.state, held))
    return tuple(tensors), _LeafShape(leaf._with(leaf.rule, None), frame)


def _unflatten(shape: _LeafShape, tensors: Any) -> Leaf:
    state, held = shape.frame.join(tensors)
    source, rule = iter(held), shape.leaf.rule
    leaf = shape.leaf._with(_map_tensors(rule, lambda _: next(source)) if rule and held else rule, state)
    if not all(isinstance(t, Tensor) for t in tensors):  # as torch.vmap does on its way, with dimensions
        leaf._open = tuple(tensors), shape
    return leaf


def _map_tensors(rule: Rule, f: Callable[[Tensor], Any]) -> Rule:
    """The rule with `f` of each tensor that stands for a hyperparameter."""

    def change(v: Any) -> Any:
        return tuple(map(change, v)) if isinstance(v, tuple) else f(v) if isinstance(v, Tensor) else v

    return replace(rule, lambda _rule, _name, v: change(v), validate=False)


register(Leaf, _flatten, _unflatten)

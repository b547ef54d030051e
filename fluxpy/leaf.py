"""Leaf: what a state tree holds for one parameter.

A leaf is a read-only handle. What it shows is in its `Record`, which the verbs and the engine change, and how often it
was stepped is in `Numbers`, one object that all leaves which step together share: a step changes that object alone.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, NoReturn

import torch
from torch import Tensor

from .binding import Bindings
from .context import Context
from .distributed.sharding import Sharding
from .distributed.spread import SpreadRecord
from .pytree import Skeleton, apart, partition, register
from .rule import Rule, all_hyperparameters, at, replace, rules_in, tensors_of
from .text import OF_STATES, meant, note


class Numbers:
    """How often leaves were stepped (`count`), and their states without the tensors (`skeleton`).

    Shared by exactly those leaves that the engine steps together. The skeleton is None before a state was made.
    `fresh` is True while the states are as a rule made them: an update may change their tensors and nothing else here.
    """

    __slots__ = ("count", "fresh", "skeleton")

    def __init__(self, count: int = 0, skeleton: Skeleton | None = None, fresh: bool = False) -> None:
        self.count, self.skeleton, self.fresh = count, skeleton, fresh

    def copy(self) -> "Numbers":
        return Numbers(self.count, self.skeleton, self.fresh)

    def having(self, skeleton: Skeleton) -> "Numbers":
        """A copy with another skeleton."""
        return Numbers(self.count, skeleton, self.fresh)


class Record(SpreadRecord):
    """The contents of a leaf. `tensors` are those of the rule's state, None where there is no state yet.

    `pending` are the numbers that a frozen or missing state will continue with: meanwhile an accumulating rule counts
    the updates that it misses. `setup_rule` is the rule that `setup` was given, `required_grad` the parameter's flag at
    that time, None where that is not known.

    Where the parameter is spread over processes, `sharding` says how, and `tensors` are local ones; `spread_flags` say
    which of them are spread like the parameter. The others are the same on all processes.
    """

    __slots__ = (
        *("required_grad", "dtype", "frozen", "numbers", "pending", "rule", "setup_rule", "shape", "tensors"),
        *("sharding", "spread_flags"),
    )

    def __init__(
        self, rule: Rule | None, frozen: bool, shape: torch.Size, dtype: torch.dtype, numbers: Numbers | None = None
    ) -> None:
        self.rule, self.frozen, self.shape, self.dtype = rule, frozen, shape, dtype
        self.setup_rule = rule
        self.required_grad: bool | None = None
        self.tensors: list[Tensor] | None = None
        self.numbers = Numbers() if numbers is None else numbers
        self.pending: Skeleton | None = None
        self.sharding: Sharding | None = None
        self.spread_flags: list[bool] | None = None

    @property
    def untrained(self) -> bool:
        """Whether its state is as its rule made it."""
        return self.tensors is not None and self.numbers.fresh

    @property
    def state(self) -> Any:
        """The rule's state as it made it; None before there is one."""
        if self.tensors is None or self.numbers.skeleton is None:
            return None
        return self.numbers.skeleton.combine(self.tensors)

    def make_state(self, x: Tensor, path: str) -> None:
        """Make a state for the parameter `x`."""
        sharding = self.sharding if self.needs_whole else None
        self.tensors, skeleton = self._new_parts(x if sharding is None else sharding.whole(x), path)
        self.spread_flags = None
        if sharding is not None:
            self.take_shown(self.tensors)
        self.numbers, self.pending = Numbers(self.numbers.count, skeleton, fresh=True), None

    def fresh_state(self, x: Tensor, path: str) -> Any:
        """A new state for the parameter `x`, in step with the pending numbers."""
        tensors, skeleton = self._new_parts(x, path)
        return skeleton.combine(tensors)

    def _new_parts(self, x: Tensor, path: str) -> tuple[list[Tensor], Skeleton]:
        assert self.rule is not None
        tensors, skeleton = _new_state(self.rule, x, self.numbers.count, path)
        if self.pending is None:
            return tensors, skeleton
        return partition(self.rule.restart(self.pending.bare(), skeleton.combine(tensors)))

    @property
    def sits_out(self) -> bool:
        """Whether it is frozen and counts the updates that it misses."""
        return self.frozen and self.rule is not None and self.rule.accumulates

    def takes_part(self, dx: Tensor | None) -> bool:
        """Whether an update with this gradient steps the leaf."""
        return not self.frozen and self.rule is not None and (dx is not None or self.rule.accumulates)

    def move(self, dtype: torch.dtype, tensors: list[Tensor] | None) -> None:
        """Hold other tensors, for a parameter that has got another dtype. None: the next update makes a new state."""
        numbers = self.numbers.copy()  # no longer shared with those it stepped with
        if tensors is None and self.tensors is not None:
            if self.rule is not None and self.rule.accumulates and self.pending is None:
                self.pending = numbers.skeleton
            numbers.skeleton = None
        self.dtype, self.tensors, self.numbers = dtype, tensors, numbers

    def clone(self, numbers: Numbers) -> "Record":
        """A copy with tensors of its own."""
        return self.copy(numbers, None if self.tensors is None else [t.clone() for t in self.tensors])

    def copy(self, numbers: Numbers, tensors: list[Tensor] | None) -> "Record":
        """A copy with these numbers and tensors."""
        other = object.__new__(Record)  # a pure update makes one for each leaf
        other.rule, other.frozen, other.shape, other.dtype = self.rule, self.frozen, self.shape, self.dtype
        other.setup_rule, other.required_grad = self.setup_rule, self.required_grad
        other.tensors, other.numbers, other.pending = tensors, numbers, self.pending
        other.sharding, other.spread_flags = self.sharding, self.spread_flags
        return other


class Leaf:
    """What the state holds for one parameter. Read-only: the verbs change it.

    `rule` is None where `setup` was told so: that leaf is frozen for good. `state` is None until the first update
    after a thaw or a reset.
    """

    __slots__ = ("_bindings", "_context", "_placeholders", "_record")

    def __init__(self, record: Record, context: Context, bindings: Bindings | None = None) -> None:
        self._record, self._context = record, context
        # The models that views of the tree were used with. Not in the context, which their plans hold.
        self._bindings = Bindings() if bindings is None else bindings
        self._placeholders: Any = None  # for tensors, from a transform such as vmap: (children, metadata)

    @property
    def rule(self) -> Any:  # a Rule or None; Any, since which hyperparameters it has only the user knows
        """The hyperparameters."""
        return self._record.rule

    @property
    def state(self) -> Any:
        """The rule's momenta."""
        return record_of(self).shown_state

    @property
    def frozen(self) -> bool:
        """Whether updates pass it by."""
        return self._record.frozen

    @property
    def count(self) -> int:
        """How often its rule stepped it."""
        return record_of(self).numbers.count

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape."""
        return self._record.shape

    @property
    def dtype(self) -> torch.dtype:
        """The parameter's dtype."""
        return self._record.dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> "Leaf":
        record, context = record_of(self), self._context
        numbers = memo.get(id(record.numbers))
        if numbers is None:
            numbers = memo[id(record.numbers)] = record.numbers.copy()
            memo.setdefault(id(memo), []).append(record.numbers)  # keeps it alive, so that its id stays its own
        tensors = None if record.tensors is None else [_own(t) for t in record.tensors]
        if id(context) not in memo:
            memo[id(context)] = context.fork(1), Bindings()
        copied = record.copy(numbers, tensors)
        copied.rule, copied.setup_rule = copy.deepcopy((record.rule, record.setup_rule), memo)
        other = memo[id(self)] = Leaf(copied, *memo[id(context)])
        return other

    def __getstate__(self) -> Any:
        record = record_of(self)
        if record.sharding is not None:
            raise TypeError(
                "a state whose tensors are spread over processes cannot be pickled: save fluxpy.state_dict(state) by "
                "torch.distributed.checkpoint"
            )
        tensors = None if record.tensors is None else [_compact(t) for t in record.tensors]
        return record.copy(record.numbers, tensors), self._context

    def __setstate__(self, held: tuple[Record, Context]) -> None:
        self._record, self._context = held
        self._bindings, self._placeholders = Bindings(), None

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "0-dim"
        return f"Leaf({self.rule!r}, {shape}{', frozen' if self.frozen else ''})"


def _read_only(name: str, advice: str) -> None:
    """Let an assignment to a property of leaves say what to write instead. Added outside of the class, where a type
    checker sees no setter, and so finds the mistake."""

    def refuse(leaf: Leaf, value: Any) -> NoReturn:
        raise AttributeError(f"leaf.{name} is read-only; write {advice}")

    setattr(Leaf, name, vars(Leaf)[name].setter(refuse))


_read_only("rule", "fluxpy.adjust(leaf, lr=...)")
_read_only("state", "fluxpy.reset(leaf), or load a saved state")
_read_only("frozen", "fluxpy.freeze(leaf) or fluxpy.thaw(leaf)")
_read_only("count", "fluxpy.thaw(leaf, count=...)")
_read_only("shape", "fluxpy.setup(rule, model) for another model")
_read_only("dtype", "fluxpy.setup(rule, model) for another model")


def _no_such_name(leaf: Leaf, name: str) -> NoReturn:
    hint = ""
    if not name.startswith("_"):
        word = None if leaf.rule is None else meant(name, all_hyperparameters(leaf.rule))
        if word is not None:
            hint = f". Write leaf.rule.{word}, or fluxpy.value(leaf, {word!r}) for what the next update uses"
        elif name in OF_STATES:
            hint = f". {OF_STATES[name]}"
        else:
            hint = "; a leaf has rule, state, frozen, count, shape and dtype"
    raise AttributeError(f"a leaf has no {name!r}{hint}" if hint else name, name=name, obj=leaf)


Leaf.__getattr__ = _no_such_name  # pyright: ignore[reportAttributeAccessIssue]  # in the class it would hide misspellings


def record_of(leaf: Leaf) -> Record:
    """The contents of a leaf, for the verbs and the engine."""
    if leaf._context.late is not None:
        leaf._context.settle()
    return leaf._record


def records_of(leaves: Sequence[Leaf]) -> list[Record]:
    """The contents of leaves whose context is settled, at a third of the cost of a call for each."""
    return [leaf._record for leaf in leaves]


def rules_of(records: Sequence[Record]) -> list[Rule | None]:
    """The rules of leaves, each object once."""
    rules: list[Rule | None] = list(map(attrgetter("rule"), records))
    if rules and all(map(is_, rules, repeat(rules[0]))):  # as mostly: this is the fast way to see it
        return rules[:1]
    return list(dict(zip(map(id, rules), rules, strict=True)).values())


def context_of(leaf: Leaf) -> Context:
    """What all leaves of its tree share."""
    return leaf._context


def bindings_of(leaf: Leaf) -> Bindings:
    """The bindings of the leaf's tree."""
    return leaf._bindings


def adopt(leaf: Leaf, context: Context, bindings: Bindings) -> None:
    """Make a leaf one of another tree."""
    record_of(leaf)  # takes back what the device skipped, while the old context knows of it
    leaf._context, leaf._bindings = context, bindings


KEEP: Any = object()  # stands for an argument that was not given


def replace_leaf(
    leaf: Leaf, *, rule: Any = KEEP, state: Any = KEEP, frozen: Any = KEEP, count: Any = KEEP, pending: Any = KEEP
) -> None:
    """Change what is given of a leaf. With `state=None` its next update makes new momenta, which continue with the
    `pending` numbers; where these are not given, at the leaf's present place in the accumulation window."""
    record, context = record_of(leaf), leaf._context
    context.structure += 1
    if rule is not KEEP:
        context.hyper, record.rule = context.hyper + 1, rule
    if frozen is not KEEP:
        record.frozen = frozen
    if pending is not KEEP:
        record.pending = pending
    if frozen is False and record.pending is not None and record.tensors is not None:
        record.numbers, record.pending = record.numbers.having(record.pending), None
    if state is KEEP and count is KEEP:
        return
    numbers = record.numbers.copy()
    if count is not KEEP:
        numbers.count = count
    if state is None:
        if pending is KEEP and record.pending is None and record.rule is not None and record.rule.accumulates:
            record.pending = numbers.skeleton  # its place in the window
        record.tensors = numbers.skeleton = None
    elif state is not KEEP:
        tensors, numbers.skeleton = partition(state)
        record.take_shown(tensors)
        numbers.fresh = False
    record.numbers = numbers


def init_state(rule: Rule, x: Tensor, count: int, path: str) -> Any:
    """A new state for the parameter `x`, without gradient history and without memory shared with the parameter."""
    tensors, skeleton = _new_state(rule, x, count, path)
    return skeleton.combine(tensors)


def _new_state(rule: Rule, x: Tensor, count: int, path: str) -> tuple[list[Tensor], Skeleton]:
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return _new_state(rule, x, count, path)
    try:
        tensors, skeleton = partition(at(rule, count).init_any(x))
    except Exception as error:
        note(error, f"in the rule {rule!r} of the parameter {path!r}")
        raise
    return apart(tensors, [x]), skeleton


def miss_update(record: Record, x: Tensor, path: str) -> None:
    """Tell an accumulating rule of an update in which its leaf was frozen."""
    assert record.rule is not None
    skeleton = record.pending or record.numbers.skeleton or first_numbers(record.rule, x, path)
    record.pending = skeleton.map(at(record.rule, record.numbers.count).skip_frozen)


def first_numbers(rule: Rule, x: Tensor, path: str) -> Skeleton:
    """The numbers that a state for the parameter `x` begins with."""
    try:
        template = init_state(rule, torch.empty_like(x, device="meta"), 0, path)
    except (RuntimeError, NotImplementedError):  # an init that reads its parameter
        template = init_state(rule, x, 0, path)
    return partition(template)[1]


def _compact(t: Tensor) -> Tensor:
    """A tensor that holds no more memory than its own elements."""
    whole = t.is_meta or t.layout != torch.strided or t.untyped_storage().nbytes() <= t.nbytes
    return t if whole else t.clone()


def _own(t: Tensor) -> Tensor:
    copy = t.detach().clone()
    return copy.requires_grad_() if t.requires_grad else copy


class _LeafShape:
    """A leaf without its tensors, as pytree metadata. Equal where tensors are in the same places; numbers do not
    count."""

    def __init__(self, leaf: Leaf) -> None:
        record = record_of(leaf)
        self.record, self.context = record.copy(record.numbers.copy(), None), leaf._context
        self.size = None if record.tensors is None else len(record.tensors)
        self.rules = [] if record.rule is None else [type(rule) for rule in rules_in(record.rule)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _LeafShape) or (self.rules, self.size) != (other.rules, other.size):
            return False
        return self.size is None or self.record.numbers.skeleton == other.record.numbers.skeleton

    def __hash__(self) -> int:
        return hash(len(self.rules))

    def __repr__(self) -> str:  # in optree's error for trees that do not fit
        rules = " of ".join(kind.__name__ for kind in self.rules) or "no rule"
        return f"({rules}; {'no' if self.size is None else self.size} tensors)"


def _flatten(leaf: Leaf) -> tuple[tuple[Any, ...], _LeafShape]:
    if leaf._placeholders is not None:
        return leaf._placeholders
    record = record_of(leaf)
    hyper = [] if record.rule is None else tensors_of(record.rule)
    return (*record.shown_tensors(), *hyper), _LeafShape(leaf)


def _unflatten(shape: _LeafShape, tensors: Any) -> Leaf:
    record = shape.record.copy(shape.record.numbers.copy(), None)
    record.numbers.fresh = False  # tensors of the user's own
    size = shape.size or 0
    if shape.size is not None and all(isinstance(t, Tensor) for t in tensors[:size]):
        record.take_shown(list(tensors[:size]))
    elif shape.size is not None:
        record.tensors = list(tensors[:size])
    if len(tensors) > size and record.rule is not None:
        source = iter(tensors[size:])
        record.rule = _map_tensors(record.rule, lambda _: next(source))
    leaf = Leaf(record, shape.context.fork(1))
    if not all(isinstance(t, Tensor) for t in tensors):
        leaf._placeholders = tuple(tensors), shape
    return leaf


def _map_tensors(rule: Rule, f: Callable[[Tensor], Any]) -> Rule:
    """The rule with `f` of each tensor that stands for a hyperparameter."""

    def change(v: Any) -> Any:
        if isinstance(v, tuple):
            return tuple(map(change, v))
        return f(v) if isinstance(v, Tensor) else v

    return replace(rule, lambda _rule, _name, v: change(v), validate=False)


register(Leaf, _flatten, _unflatten)

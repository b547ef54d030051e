"""The verbs that change a state: adjust, freeze, thaw, reset. Each acts on the leaves under the view it is given."""

from typing import Any, Never

from torch import Tensor

from . import schedules
from .fields import plain
from .leaf import KEEP, Leaf, context_of, record_of, records_of, replace_leaf, rules_of
from .members import holders_of
from .rule import Rule, field_of, replace
from .state import AnyState, State, each_leaf, leaves_of
from .text import names_of, no_value


class scale:
    """In `adjust`: times the present value, leaf by leaf, so that ratios between subtrees survive.

    >>> state = setup({"weight": Adam(0.1), "bias": Adam(0.3)}, torch.nn.Linear(2, 3))
    >>> _ = adjust(state, scale(0.5))
    >>> state.weight.rule.lr, state.bias.rule.lr
    (0.05, 0.15)
    """

    def __init__(self, factor: float) -> None:
        self.factor = plain(factor)
        if isinstance(self.factor, bool) or not isinstance(self.factor, int | float | Tensor):
            raise TypeError(f"scale takes a number, but got {factor!r}")

    def __repr__(self) -> str:
        return f"scale({self.factor!r})"

    def of(self, value: Any) -> Any:
        if callable(value):
            return schedules.scaled(value, self.factor)
        if isinstance(value, tuple):
            return tuple(self.of(v) for v in value)
        if isinstance(value, str | bool) or not isinstance(value, int | float | Tensor):
            raise ValueError(f"{value!r} is no number and cannot be scaled")
        scaled = value * self.factor
        return int(scaled) if isinstance(value, int) and scaled == int(scaled) else scaled


def adjust(state: AnyState, lr: Any = None, /, *refused: Never, member: Any = None, **changes: Any) -> AnyState:
    """Change hyperparameters under this view; momenta and counts are kept. A first positional number is `lr`.

    A value is a number or tuple, `scale(factor)`, or a schedule. In a chain, each member that has the name takes it.
    Where their values differ (`OptimiserChain(RMSProp(1.0), Momentum(0.01))`, whose step has the product of the two),
    `member` says which is meant: a rule class, or an index in the chain.

    Frozen leaves are adjusted too. ValueError where a leaf's rule has no such hyperparameter or member, where members
    differ and `member` is not given, where the hyperparameter shapes the state, or where the value is out of range;
    then nothing is changed anywhere.

    >>> state = setup(Adam(), torch.nn.Linear(2, 3))
    >>> _ = adjust(state, 0.01, betas=(0.8, 0.99))
    >>> state.weight.rule
    Adam(lr=0.01, betas=(0.8, 0.99), eps=1e-08)
    >>> adjust(state, eta=0.1)
    Traceback (most recent call last):
        ...
    ValueError: Adam has no hyperparameter 'eta'; here it is called 'lr' (at 'weight', 'bias')
    """
    _refuse_positions("adjust", state, (lr, *refused) if refused or isinstance(lr, str) else ())
    if lr is not None:
        if "lr" in changes:
            raise TypeError("adjust got lr twice, by position and by name")
        changes["lr"] = lr
    for name, new in changes.items():
        if isinstance(new, type | Rule):
            raise TypeError(no_value(name, new))
    if not changes:
        raise TypeError("adjust needs a hyperparameter to change, as adjust(state, 0.01) or adjust(state, eps=1e-6)")
    found = leaves_of(state, "adjust")
    records = records_of(found)
    new, problems = {}, {}
    for rule in rules_of(records):
        try:
            new[id(rule)] = None if rule is None else _adjusted(rule, changes, member)
        except ValueError as error:
            wrong = [path for path, leaf in each_leaf(state, "adjust") if leaf.rule is rule]
            problems.setdefault(str(error), []).extend(wrong)
    if problems:
        raise ValueError("; ".join(f"{message} (at {names_of(paths)})" for message, paths in problems.items()))
    if found:
        context_of(found[0]).hyper += 1  # first: plans are to look again also after an interrupt below
    for record in records:
        record.rule = new[id(record.rule)]
    return state


def _adjusted(rule: Rule, changes: dict[str, Any], member: Any) -> Rule:
    # One rule object may stand at two places of a chain: in a copy each place has its own, so a member can be chosen.
    rule = rule if member is None else replace(rule, lambda _rule, _name, old: old, validate=False)
    chosen = set()
    for name in changes:
        for holder in holders_of(rule, name, member):
            chosen.add((id(holder), name))
            if field_of(holder, name).metadata.get("fixed"):
                why = f"{type(holder).__name__} uses {name!r} only to make its state, so it cannot be adjusted"
                raise ValueError(f"{why}; call setup again with the new value")

    def change(inner: Rule, name: str, old: Any) -> Any:
        if (id(inner), name) not in chosen:
            return old
        return changes[name].of(old) if isinstance(changes[name], scale) else changes[name]

    return replace(rule, change)


def _refuse_positions(verb: str, state: Any, rest: tuple[Any, ...]) -> None:
    """TypeError for what follows the state: patterns, as one may expect, or numbers without names."""
    if not rest:
        return
    name = "state" if isinstance(state, State | Leaf) else "..."
    if isinstance(rest[0], str):
        more = ", ..." if verb == "adjust" else ""
        raise TypeError(
            f"{verb} takes no pattern; write {verb}({name}.encoder{more}), or {verb}(select({name}, {rest[0]!r}){more})"
        )
    takes = "one number by position, lr; give the others by name" if verb == "adjust" else "one state, or a view of it"
    raise TypeError(f"{verb} takes {takes}; got {', '.join(map(repr, rest))} besides")


def freeze(state: AnyState, *refused: Never) -> AnyState:
    """Freeze the leaves under this view: until they thaw, neither parameter nor momenta nor counts move, bit for bit.
    A leaf that no update has stepped yet gives its momenta back until it thaws.

    With `withgradient(..., state=state)`, as in `train`, frozen leaves cost no gradient and keep no activations.
    Buffers and modes are the module's own. `train` and the Learner put a wholly frozen module into evaluation mode,
    which keeps its BatchNorm statistics and turns its Dropout off; in a loop of your own, call its `eval()`.
    """
    _refuse_positions("freeze", state, refused)
    for _, leaf in each_leaf(state, "freeze"):
        replace_leaf(leaf, frozen=True, state=None if record_of(leaf).untrained else KEEP)
    return state


def thaw(state: AnyState, *refused: Never, count: int | None = None) -> AnyState:
    """Undo `freeze` under this view. Momenta go on from where they were; missing ones start at the next update.

    `count` sets the count that schedules see from here on: a part that thaws late can end with the others
    (`count=state.head.weight.count`). Raises ValueError where a leaf has no rule to train by (`setup` was given None
    for it), or where `count` is no whole number, 0 or more.
    """
    _refuse_positions("thaw", state, refused)
    found = each_leaf(state, "thaw")
    if bare := [path for path, leaf in found if leaf.rule is None]:
        raise ValueError(
            f"thaw: set up with no rule (None), so frozen for good (at {names_of(bare)}); call setup again"
        )
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise ValueError(f"thaw: count={count!r} is not allowed; it must be a whole number, 0 or more")
    for _, leaf in found:
        replace_leaf(leaf, frozen=False, count=KEEP if count is None else count)
    return state


def reset(state: AnyState, *refused: Never) -> AnyState:
    """Empty momenta and counts under this view; rules and frozenness stay. Schedules start over.

    An accumulation window goes on, in step with the leaves that are not reset; where all are, a new one begins.
    """
    _refuse_positions("reset", state, refused)
    found = each_leaf(state, "reset")
    whole = bool(found) and len(found) == context_of(found[0][1]).size
    for _, leaf in found:
        replace_leaf(leaf, state=None, count=0)
        if whole:
            replace_leaf(leaf, pending=None)
    return state

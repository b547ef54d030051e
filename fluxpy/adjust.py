"""The verbs that change a state: adjust, freeze, thaw, reset. Each acts on the leaves under the view it is given."""

from typing import Any, TypeVar

from torch import Tensor

from . import schedules
from .rule import Rule, at, field_of, hyperparameters, no_hyperparameter, replace, walk
from .state import Leaf, State, once, slots

T = TypeVar("T", State, Leaf)


class scale:
    """In `adjust`: times the present value, leaf by leaf, so that ratios between subtrees survive.

    >>> state = setup({"weight": Adam(0.1), "bias": Adam(0.3)}, torch.nn.Linear(2, 3))
    >>> _ = adjust(state, scale(0.5))
    >>> state.weight.rule.lr, state.bias.rule.lr
    (0.05, 0.15)
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

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


def adjust(state: T, lr: Any = None, /, **changes: Any) -> T:
    """Change hyperparameters under this view; momenta and counts are kept. A first positional number is `lr`.

    A value is a number or tuple, `scale(factor)`, or a schedule. In a chain, each member that has the name takes it.
    Frozen leaves are adjusted too. ValueError where a leaf's rule has no such hyperparameter, where it shapes the
    state, or where the value is out of range; then nothing is changed anywhere.

    >>> state = setup(Adam(), torch.nn.Linear(2, 3))
    >>> _ = adjust(state, 0.01, betas=(0.8, 0.99))
    >>> state.weight.rule
    Adam(lr=0.01, betas=(0.8, 0.99), eps=1e-08)
    >>> adjust(state, eta=0.1)
    Traceback (most recent call last):
        ...
    ValueError: Adam has no hyperparameter 'eta'; here it is called 'lr' (at 'weight', 'bias')
    """
    if lr is not None:
        if "lr" in changes:
            raise TypeError("adjust got lr twice, by position and by name")
        changes["lr"] = lr
    found = once(state, "adjust")
    for name, new in changes.items():
        if isinstance(new, type):
            raise TypeError(f"adjust got the class {new.__name__} for {name!r}; write {new.__name__}(...)")
    if not changes:
        raise TypeError("adjust needs a hyperparameter to change, as adjust(state, 0.01) or adjust(state, eps=1e-6)")
    rules = {id(leaf.rule): leaf.rule for _, leaf in found if leaf.rule is not None}
    new, problems = {}, {}
    for key, rule in rules.items():
        try:
            new[key] = _adjusted(rule, changes)
        except ValueError as error:
            problems.setdefault(str(error), []).extend(path for path, leaf in found if leaf.rule is rule)
    if problems:
        raise ValueError("; ".join(f"{message} ({_at(paths)})" for message, paths in problems.items()))
    for _, leaf in found:
        if leaf._missed and leaf._state is not None:  # while the rule is still the one that counted them
            leaf._set(state=at(leaf.rule, leaf._count).miss(leaf._state, leaf._missed), missed=0)
        leaf._retune(new.get(id(leaf.rule)))
    return state


def _adjusted(rule: Rule, changes: dict[str, Any]) -> Rule:
    for name in changes:
        holders = [inner for inner in walk(rule) if name in hyperparameters(inner)]
        if not holders:
            raise ValueError(no_hyperparameter(rule, name))
        for holder in holders:
            if field_of(holder, name).metadata.get("fixed"):
                why = f"{type(holder).__name__} uses {name!r} only to make its state, so it cannot be adjusted"
                raise ValueError(f"{why}; call setup again with the new value")

    def change(inner: Rule, name: str, old: Any) -> Any:
        if name not in changes:
            return old
        return changes[name].of(old) if isinstance(changes[name], scale) else changes[name]

    return replace(rule, change)


def _at(paths: list[str]) -> str:
    return f"at {', '.join(map(repr, paths[:5]))}" + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def freeze(state: T) -> T:
    """Freeze the leaves under this view: until they thaw, neither parameter nor momenta nor counts move, bit for bit.

    With `withgradient(..., state=state)`, as in `train`, frozen leaves cost no gradient and keep no activations.
    Buffers are the module's own: `train` puts into training mode only what is not wholly frozen, so a frozen encoder
    that you set to `eval()` keeps its BatchNorm statistics and its Dropout off.
    """
    for _, leaf in list(slots(state, "freeze")):
        leaf._set(frozen=True)
    return state


def thaw(state: T) -> T:
    """Undo `freeze` under this view. Momenta go on from where they were; missing ones start at the next update.

    Raises ValueError where a leaf has no rule to train by (`setup` was given None for it).
    """
    found = list(slots(state, "thaw"))
    if bare := [path for path, leaf in found if leaf.rule is None]:
        raise ValueError(f"thaw: set up with no rule (None), so frozen for good ({_at(bare)}); call setup again")
    for _, leaf in found:
        leaf._set(frozen=False)
    return state


def reset(state: T) -> T:
    """Empty momenta and counts under this view; rules and frozenness stay. Schedules start over."""
    for _, leaf in list(slots(state, "reset")):
        leaf._set(state=None, count=0, missed=0)
    return state

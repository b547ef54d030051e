"""The state tree and the verbs on it: setup, adjust, freeze, thaw, reset, leaves, select, value.

Every verb takes the whole state or any view of it (a branch, a slice, a selection, one leaf), and returns what it was
given. None of them needs the model.
"""

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from .guard import Guard
from .leaf import Leaf, start
from .match import Fit
from .pytree import Frame
from .rule import Rule, at, hyperparameters, no_hyperparameter
from .rule import walk as walk_rules
from .text import near
from .tree import Mirror, Spec, walk

T = TypeVar("T", "State", "Leaf")


class State(Mirror):
    """The state of training in the shape of the model, as `setup` makes it. See `fluxpy.setup`."""

    __slots__ = ()
    _what = "state"

    def __repr__(self) -> str:
        from .show import show

        return show(self)


def spec_of(state: "State | Leaf") -> Spec:
    """The shape of a state; that of a single leaf is a leaf."""
    return state._spec if isinstance(state, State) else _ALONE


_ALONE = Spec("leaf", index=0)


def guard_of(state: "State | Leaf") -> Guard:
    """The guard that all leaves of a tree share."""
    if isinstance(state, Leaf):
        return state._guard
    return state._values[0]._guard if state._values else Guard()


def fit_of(state: "State | Leaf", model: Any) -> Fit:
    """The model's parameters as they fit the state; of the same model as last time, at next to no cost."""
    spec, fits = spec_of(state), guard_of(state).fits
    fit = fits.get(id(spec))
    if fit is None or fit.spec is not spec or not fit.holds(model):
        if len(fits) > 16:  # of views that were made for one use
            fits.clear()
        fit = fits[id(spec)] = Fit(spec, model)
    return fit


def setup(
    rule: Rule | Mapping[str, Rule | None], model: Any, *, compile: bool = False, keep: "State | Leaf | None" = None
) -> Any:
    """The state for training `model` by `rule`: a tree with the model's shape and a `Leaf` for each parameter.

    `rule` is one rule for all, or a mapping from glob patterns over dotted paths to rules, the first match wins. Each
    parameter must be matched and each pattern must match, else ValueError. None as a rule freezes for good. A
    parameter with `requires_grad=False` gets a frozen leaf, which holds no momenta until it first trains.

    `keep` is an older state: rule, momenta, counts and frozenness of each leaf whose path, shape and dtype are still
    there are taken over (copied), as for a new head on a trained encoder; `rule` is for the others, and None freezes
    for good all the same. A new head of the old one's shape takes its momenta too, unless you `reset` it.
    With `compile`, elementwise rules, your own included, are compiled by `torch.compile` into one kernel for the whole
    chain: seconds at the first update, once for a chain, dtype and device, whatever hyperparameters, schedules, counts
    and sizes follow. Numbers are the same to a few roundings. Where there is no compiler, or a rule cannot be compiled,
    a warning says so once, and updates run as without it.

    The model is an `nn.Module` or a pytree of tensors (a single tensor gives a single `Leaf`). Neither it nor the rule
    is changed. Warns if the model has no parameter.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> state = setup({"0.*": Descent(0.1), "*": Adam()}, model)
    >>> state[0].weight.rule, state["2.bias"].rule.lr
    (Descent(lr=0.1), 0.001)
    """
    if isinstance(model, Rule) or isinstance(rule, nn.Module | State | Leaf):
        raise TypeError("the rule comes first: setup(rule, model)")
    if isinstance(model, State | Leaf):
        raise TypeError("setup takes the model, not a state; to take a state over: setup(rule, model, keep=state)")
    spec, values = walk(model)
    if not values:
        warnings.warn("setup found no parameters in this model", stacklevel=2)
    names: dict[int, list[str]] = {}
    for path, index in spec.slots:
        names.setdefault(index, []).append(path)
    chosen = _assign(rule, names) if values else {}
    old = {} if keep is None else {path: leaf for path, leaf in slots(keep, "setup(..., keep=)")}

    def leaf(index: int, x: Tensor) -> Leaf:
        own = chosen[index]
        frozen = own is None or (isinstance(x, nn.Parameter) and not x.requires_grad)
        for name in names[index]:
            before = old.get(name)
            if own is not None and before is not None and (before._shape, before._dtype) == (x.shape, x.dtype):
                tensors, frame = Frame.split(before.state)  # which may lie in one buffer with those of other leaves
                kept = before._with(before.rule, frame.join(t.clone() for t in tensors))
                kept._set(frozen=before._frozen or frozen, guard=guard)
                return kept
        new = Leaf(own, frozen, x, guard)
        if own is not None and not frozen:
            new._held = start(own, x, 0, names[index][0])
        return new

    guard = Guard()
    guard.compile = compile
    leaves = [leaf(index, x) for index, x in enumerate(values)]
    return leaves[0] if spec.kind == "leaf" else State(spec, leaves)


def _assign(rule: Any, names: dict[int, list[str]]) -> dict[int, Rule | None]:
    if not isinstance(rule, Mapping):
        return dict.fromkeys(names, _rule(rule, "setup takes a rule or a mapping of patterns to rules"))
    chosen: dict[int, Rule | None] = {}
    idle = []
    for pattern, own in rule.items():
        own = None if own is None else _rule(own, f"the pattern {pattern!r} needs a rule or None")
        hits = [i for i, paths in names.items() if any(fnmatch.fnmatchcase(path, pattern) for path in paths)]
        chosen.update((i, own) for i in hits if i not in chosen)
        idle += [] if hits else [pattern]
    bare = [paths[0] for i, paths in names.items() if i not in chosen]
    if bare or idle:
        every = [path for paths in names.values() for path in paths]
        parts = [f"no pattern matches the parameters {', '.join(map(repr, bare))}"] * bool(bare)
        parts += [f"the pattern {pattern!r} matches no parameter ({near(pattern, every)})" for pattern in idle]
        raise ValueError("setup: " + "; ".join(parts) + "; a last '*': Rule() catches what is left")
    return chosen


def _rule(rule: Any, need: str) -> Rule:
    if isinstance(rule, Rule):
        return rule
    hint = f"; write {rule.__name__}()" if isinstance(rule, type) and issubclass(rule, Rule) else ""
    hint = "; write fluxpy.OptimiserChain(...)" if isinstance(rule, list | tuple) else hint
    raise TypeError(f"{need}, but got {rule!r}{hint}")


# --- Reading ------------------------------------------------------------------------------------------------------


def slots(state: Any, verb: str) -> Iterator[tuple[str, Leaf]]:
    """(path, leaf) of every place, ties at each of theirs."""
    if isinstance(state, Leaf):
        return iter([("", state)])
    if not isinstance(state, State):
        mistaken = "a rule" if isinstance(state, Rule) else "the model" if walk(state)[1] else type(state).__name__
        raise TypeError(f"{verb} takes the state tree that setup returns (or a branch of it), but got {mistaken}")
    return ((path, state._values[index]) for path, index in state._spec.slots)


def leaves(state: "State | Leaf") -> Iterator[tuple[str, Leaf]]:
    """`(path, leaf)` for each parameter, a tied one once, in the order of the model; paths start at the given view."""
    return iter(once(state, "leaves"))


def once(state: Any, verb: str) -> list[tuple[str, Leaf]]:
    """What `leaves` gives, for a verb to name in its errors."""
    first: dict[int, tuple[str, Leaf]] = {}
    for path, leaf in slots(state, verb):
        first.setdefault(id(leaf), (path, leaf))
    return list(first.values())


def select(state: State, what: str | Callable[[str, Leaf], bool]) -> State:
    """A view of all leaves whose path matches a glob pattern, or for which `what(path, leaf)` is true.

    A tied leaf is found by any of its names. Raises ValueError where nothing matches.

    >>> state = setup(Adam(), torch.nn.Linear(2, 3))
    >>> _ = adjust(select(state, "*bias"), 0.1)
    >>> state.bias.rule.lr, state.weight.rule.lr
    (0.1, 0.001)
    """
    places = list(slots(state, "select"))
    match = (lambda path, leaf: fnmatch.fnmatchcase(path, what)) if isinstance(what, str) else what
    hits = [path for path, leaf in places if match(path, leaf)]
    if not hits:
        raise ValueError(f"select: {what!r} matches no leaf; {near(what, (path for path, _ in places))}")
    if isinstance(state, Leaf):
        return State(Spec("selection", ("",), (Spec("leaf", index=0),)), [state])
    numbers = dict(state._spec.slots)
    first = {numbers[path]: path for path in reversed(hits)}
    chosen = [(path, Spec("leaf", index=i)) for i, path in reversed(first.items())]
    paths, specs = zip(*chosen, strict=True)
    return State(Spec("selection", paths, specs), state._values)


def value(leaf: Leaf, name: str) -> Any:
    """The hyperparameter that the next update of this leaf will use: a schedule's value at the leaf's count.

    >>> leaf = setup(Descent(lambda count: 0.5 / (1 + count)), torch.zeros(2))
    >>> _ = update(leaf, torch.zeros(2), torch.ones(2))
    >>> value(leaf, "lr")
    0.25
    """
    if not isinstance(leaf, Leaf):
        raise TypeError("value takes one leaf, as state.encoder.weight or state['encoder.weight']")
    if leaf.rule is None:
        raise ValueError("this leaf was set up with no rule (None), so it has no hyperparameters")
    first, *rest = values(leaf, name) or [None]
    if first is None:
        raise ValueError(no_hyperparameter(leaf.rule, name))
    if any(other is not first and other != first for other in rest):
        raise ValueError(f"{name!r} stands more than once in {leaf.rule!r}; ask one member, as leaf.rule[0].{name}")
    return first


def values(leaf: Leaf, name: str) -> list[Any]:
    """The hyperparameter of each rule of the leaf that has it, at the leaf's count."""
    members = [] if leaf.rule is None else walk_rules(at(leaf.rule, leaf._count))
    return [own[name] for own in map(hyperparameters, members) if name in own]

"""The state tree and the verbs on it: setup, adjust, freeze, thaw, reset, leaves, select, value.

Every verb takes the whole state or any view of it (a branch, a slice, a selection, one leaf), and returns what it was
given. None of them needs the model.
"""

import copy
import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from .guard import Guard
from .pytree import Frame, apart, register
from .rule import Rule, at, hyperparameters, no_hyperparameter, replace
from .rule import walk as walk_rules
from .text import near
from .tree import Mirror, Spec, walk

T = TypeVar("T", "State", "Leaf")


def _read_only(name: str, doc: str, advice: str) -> Any:
    def refuse(leaf: "Leaf", value: Any) -> NoReturn:
        raise AttributeError(f"leaf.{name} is read-only; write {advice}")

    return property(lambda leaf: getattr(leaf, "_" + name), refuse, doc=doc)


class Leaf:
    """What the state holds for one parameter: its `rule`, the rule's `state`, and whether it is `frozen`. Read-only.

    `rule` is None where `setup` was told so: that leaf is frozen for good. `state` is None until the first update
    after a thaw or a reset.
    """

    __slots__ = ("_dtype", "_frozen", "_group", "_guard", "_held", "_missed", "_open", "_rule", "_seen", "_shape", "_steps")

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


class State(Mirror):
    """The state of training in the shape of the model, as `setup` makes it. See `fluxpy.setup`."""

    __slots__ = ()
    _what = "state"

    def __repr__(self) -> str:
        from .show import show

        return show(self)


def spec_of(state: "State | Leaf") -> Spec:
    """The shape of a state; that of a single leaf is a leaf."""
    return state._spec if isinstance(state, State) else Spec("leaf", index=0)


def start(rule: Rule, x: Tensor, count: int, path: str) -> Any:
    """A new optimiser state for the parameter `x`. It holds no gradient history, and never the parameter itself."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            tensors, frame = Frame.split(at(rule, count).start(x))
    except Exception as error:
        error.add_note(f"in the rule {rule!r} of the parameter {path!r}")
        raise
    return frame.join(apart(tensors, [x]))


def setup(
    rule: Rule | Mapping[str, Rule | None], model: Any, *, compile: bool = False, keep: "State | Leaf | None" = None
) -> Any:
    """The state for training `model` by `rule`: a tree with the model's shape and a `Leaf` for each parameter.

    `rule` is one rule for all, or a mapping from glob patterns over dotted paths to rules, the first match wins. Each
    parameter must be matched and each pattern must match, else ValueError. None as a rule freezes for good. A
    parameter with `requires_grad=False` gets a frozen leaf, which holds no momenta until it first trains.

    `keep` is an older state: rule, momenta, counts and frozenness of each leaf whose path, shape and dtype are still
    there are taken over (copied), as for a new head on a trained encoder; `rule` is for the others, and None freezes
    for good all the same. A new head of the old one's shape takes its momenta too, unless you `reset` it. `compile`
    asks for compiled updates where the engine has them; today every update runs on the plain path, with the same
    numbers.

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
                kept = copy.deepcopy(before)
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


# --- Pytrees ------------------------------------------------------------------------------------------------------


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

"""The state tree: setup, and what reads it: leaves, select, value, summary.

Every verb takes the whole state or any view of it (a branch, a slice, a selection, one leaf), and returns what it was
given. None of them needs the model.
"""

import copy
import fnmatch
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .binding import Binding, Bindings
from .context import Context
from .distributed.sharding import any_dtensor, local_tensors, sharding_of
from .initial import make_states
from .leaf import Leaf, Numbers, Record, adopt, bindings_of, context_of, first_numbers, record_of, records_of
from .members import holders_of
from .patterns import assign_rules
from .pytree import Skeleton, plain_arithmetic
from .rule import Rule, all_hyperparameters, at, hyperparameters, rule_key, title_key
from .show import describe_tree, table, tree_as_html
from .text import NEW_TENSORS, OF_STATES, form, meant, near_pattern, not_dense, starts_anew
from .tree import Mirror, TreeSpec, check_model, explore, relaid, respec, rooted, spec_of, values_of, walk

AnyState = TypeVar("AnyState", bound="State | Leaf")
Rules: TypeAlias = Rule | Mapping[str, Rule | None]  # one rule, or rules by glob patterns over paths


class State(Mirror):
    """The state of training in the shape of the model, as `setup` makes it. See `fluxpy.setup`."""

    __slots__ = ()
    _what = "state"
    _of_several = "write fluxpy.select(state, *patterns)"

    @classmethod
    def _rebuilt(cls, spec: TreeSpec, values: list[Any]) -> "State":
        leaves = [value for value in values if isinstance(value, Leaf)]
        contexts = {id(context_of(leaf)): context_of(leaf) for leaf in leaves}
        if len(contexts) == 1:  # leaves of one tree stay in it: another view may hold them
            for context in contexts.values():
                context.size = max(context.size, len(values))
        elif leaves:
            context, bindings = context_of(leaves[0]).fork(len(values)), Bindings()
            for leaf in leaves:
                adopt(leaf, context, bindings)
        return cls(spec, values)

    def __deepcopy__(self, memo: dict[int, Any]) -> "State":
        spec, leaves = rooted(self)
        return State._rebuilt(spec, [copy.deepcopy(leaf, memo) for leaf in leaves])

    def __repr__(self) -> str:
        return describe_tree(self)

    def _repr_html_(self) -> str:
        return tree_as_html(self)

    @classmethod
    def _hint(cls, name: str, here: "State") -> str:
        """What to write instead of looking for a hyperparameter or a leaf's attribute on a branch."""
        leaf_names = ("rule", "state", "frozen", "count", "shape", "dtype")
        rules = {id(leaf.rule): leaf.rule for _, leaf in each_leaf(here, "leaves") if leaf.rule is not None}
        word = meant(name, {own for rule in rules.values() for own in all_hyperparameters(rule)})
        if word is not None:
            return (
                f"Hyperparameters are the leaves': fluxpy.adjust(branch, {word}=...) sets them, "
                f"fluxpy.value(leaf, {word!r}) tells one, fluxpy.summary(branch) all"
            )
        if name in leaf_names:
            return f"Leaves have it: state['a.path'].{name}, or fluxpy.leaves(branch) for all of them"
        return OF_STATES.get(name, "")


_ALONE = TreeSpec("leaf", index=0)


def shape_of(state: State | Leaf) -> TreeSpec:
    """The spec of a state; that of a single leaf is a leaf."""
    return spec_of(state) if isinstance(state, State) else _ALONE


def leaf_list(state: State | Leaf) -> list[Leaf]:
    """The leaves of the whole tree that a view is of, by the numbers in its spec."""
    return values_of(state) if isinstance(state, State) else [state]


def tree_context(state: State | Leaf) -> Context:
    """What all leaves of the tree share."""
    leaves = leaf_list(state)
    return context_of(leaves[0]) if leaves else Context()


def require_training_weights(state: State | Leaf, what: str) -> None:
    """RuntimeError where parameters of these leaves hold their weights to evaluate with."""
    tree_context(state).require_training_weights(records_of(leaves_of(state, what)), what)


def tree_bindings(state: State | Leaf) -> Bindings:
    """The models that views of the tree were used with, by the identity of the view's spec."""
    leaves = leaf_list(state)
    return bindings_of(leaves[0]) if leaves else Bindings()


def bind(state: State | Leaf, model: Any) -> Binding:
    """The model bound to the state's shape; the same model as last time at next to no cost."""
    spec, bindings = shape_of(state), tree_bindings(state)
    if is_compiling():
        return Binding(spec, model, records_of(leaf_list(state)))
    alone = record_of(state) if isinstance(state, Leaf) else None
    key = id(alone or spec)
    binding = bindings.get(key)
    known = binding is not None and binding.spec is spec and binding.matches(model)
    if binding is not None and known and (alone is None or binding.records[0] is alone):
        return binding
    binding, context = _new_binding(state, spec, model, key), tree_context(state)
    if binding.spread or context.spread:
        context.settle()
        bindings.redistribute(binding, context, records_of(leaf_list(state)))
    return binding


def _new_binding(state: State | Leaf, spec: TreeSpec, model: Any, key: int) -> Binding:
    bindings, records = tree_bindings(state), records_of(leaf_list(state))
    try:
        return bindings.add(key, spec, model, records)
    except ValueError:
        if isinstance(state, Leaf) or (other := relaid(spec, walk(model)[0])) is None:
            raise
        respec(state, other)  # the same parameters, in the order of the model
    return bindings.add(id(other), other, model, records)


@overload
def setup(  # pyright: ignore[reportOverlappingOverload]  # anything but a tensor gives a State
    rule: Rules, model: Tensor, *, compile: bool = False, keep: State | Leaf | None = None
) -> Leaf: ...
@overload
def setup(rule: Rules, model: Any, *, compile: bool = False, keep: State | Leaf | None = None) -> State: ...
def setup(rule: Rules, model: Any, *, compile: bool = False, keep: State | Leaf | None = None) -> State | Leaf:
    """The state for training `model` by `rule`: a tree with the model's shape and a `Leaf` for each parameter.

    `rule` is one rule for all, or a mapping from glob patterns over dotted paths to rules, the first match wins. Each
    parameter must be matched and each pattern must match, else ValueError; a pattern of which earlier ones take all
    that it matches is warned of. None as a rule freezes for good. A parameter with `requires_grad=False` gets a frozen
    leaf, which holds no momenta until it first trains.

    `keep` is an older state: rule, momenta, counts and frozenness of each leaf whose path, shape and dtype are still
    there are taken over (copied), as for a new head on a trained encoder; `rule` is for the others, and None freezes
    for good all the same. One warning lists the leaves whose shape or dtype changed, which start anew;
    `fluxpy.surgery` takes momenta along. A new head of the old one's shape goes on with the old momenta, unless you
    `reset` it; in the same module, where that can be told, a warning says so.

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
    walked = spec, params, _ = explore(model)
    if not params:
        check_model(model, "setup(rule, model)")
        warnings.warn("setup found no parameters in this model", stacklevel=2)
    names, rules = spec.names, assign_rules(rule, spec.names) if params else {}
    kept: dict[str, Leaf] = {}
    if keep is not None:
        kept = dict(paths_and_leaves(keep, "setup(..., keep=)"))
        require_training_weights(keep, "setup(..., keep=)")
    context, bindings = Context(compile, len(params)), Bindings()
    context.spread = any_dtensor(params)
    records, taken = _records(rules, params, names, kept)
    for record, x in zip(records, params, strict=True) if context.spread or taken else ():
        record.redistribute(sharding_of(x))
    leaves = [Leaf(record, context, bindings) for record in records]
    new = [index for index in range(len(params)) if rules[index] is not None and index not in taken]
    with plain_arithmetic():
        _make_states(records, new, taken, local_tensors(params), names)
    if kept and (changed := _changed(kept, new, params, names)):
        warnings.warn(starts_anew(changed), stacklevel=2)
    if taken and keep is not None:
        _warn_of_new_tensors(keep, kept, taken, params)
    if isinstance(model, nn.Module) and not (context.spread or is_compiling()):
        bindings.add(id(spec), spec, model, records, walked)  # so that the first update need not walk again
    return leaves[0] if spec.kind == "leaf" else State(spec, leaves)


def _records(
    rules: dict[int, Rule | None], params: list[Tensor], names: dict[int, list[str]], kept: dict[str, Leaf]
) -> tuple[list[Record], dict[int, Record]]:
    """The records of the leaves, new or copied; and the record that each copy is of, by the number of the parameter."""
    numbers, start, taken = dict[int, Numbers](), Numbers(), dict[int, Record]()
    records: list[Record] = []
    for index, x in enumerate(params):
        rule = rules[index]
        if x.layout != torch.strided or x.is_nested:
            raise ValueError(not_dense(names[index][0], "nested" if x.is_nested else x.layout))
        before = _kept(kept, names[index], x) if kept and rule is not None else None
        if before is None:
            record = Record(rule, rule is None, x.shape, x.dtype, start)
        else:
            taken[index] = before
            record = before.clone(numbers.setdefault(id(before.numbers), before.numbers.copy()))
        if isinstance(x, nn.Parameter) and record.required_grad is not False:  # what was thawed since stays so
            record.required_grad = x.requires_grad
            record.frozen = record.frozen or not x.requires_grad  # one that does not require grad is frozen
        records.append(record)
    return records, taken


def _kept(kept: dict[str, Leaf], names: list[str], x: Tensor) -> Record | None:
    """The record that is taken over for a parameter with these names, if there is one."""
    for name in names:
        leaf = kept.get(name)
        if leaf is not None and leaf.rule is not None and (leaf.shape, leaf.dtype) == (x.shape, x.dtype):
            return record_of(leaf)
    return None


def _changed(kept: dict[str, Leaf], new: list[int], params: list[Tensor], names: dict[int, list[str]]) -> list[str]:
    """A line for each leaf that starts anew because its shape or dtype changed."""
    pairs = [(next((name for name in names[index] if name in kept), None), params[index]) for index in new]
    return [
        f"{name!r} was {form(kept[name].shape, kept[name].dtype)} and is {form(x.shape, x.dtype)}"
        for name, x in pairs
        if name is not None and kept[name].rule is not None
    ]


def _warn_of_new_tensors(
    keep: State | Leaf, kept: dict[str, Leaf], taken: dict[int, Record], params: list[Tensor]
) -> None:
    """Say where, in a model that is otherwise the old one, a new tensor goes on with the momenta of another."""
    known = {id(r): x for b in tree_bindings(keep).values() for r, x in zip(b.records, b.params, strict=True)}
    same = {index: known.get(id(record)) is params[index] for index, record in taken.items()}
    if not all(id(record) in known for record in taken.values()) or not any(same.values()):
        return
    paths = {id(record_of(leaf)): path for path, leaf in reversed(kept.items())}
    new = [paths[id(taken[index])] for index, is_same in same.items() if not is_same and taken[index].numbers.count]
    if new:
        warnings.warn(NEW_TENSORS.format(", ".join(map(repr, new))), stacklevel=3)


def _make_states(records: list[Record], new: list[int], old: Iterable[int], params: list[Tensor], names: Any) -> None:
    """Make the states of new leaves that train, at the place in an accumulation window where kept ones are."""
    todo: list[tuple[Record, Tensor, str]] = []
    windows: dict[Any, Skeleton] = {}  # the numbers of kept leaves, by the classes of their rule
    inner: dict[Any, Any] = {}  # the part of each accumulating rule in them, by a key that equal rules share
    for r in map(records.__getitem__, old):
        numbers = r.pending or r.numbers.skeleton
        if r.rule is not None and r.rule.accumulates and numbers is not None:
            if title_key(r.rule) not in windows:
                _map_windows(r.rule, numbers.bare(), inner.setdefault)
            windows[title_key(r.rule)] = numbers
    for index in new:
        record, path = records[index], names[index][0]
        if record.rule is not None and record.rule.accumulates:
            record.pending = windows.get(title_key(record.rule))
            if record.pending is None and inner:  # each accumulating rule in step with its equal in other chains
                in_step = partial(_map_windows, record.rule, f=lambda key, own: inner.get(key, own))
                record.pending = first_numbers(record.rule, params[index], path).map(in_step)
        if not record.frozen:
            todo.append((record, params[index], path))
    make_states(todo)


def _map_windows(rule: Rule, state: Any, f: Callable[[Any, Any], Any]) -> Any:
    """The state with `f(key, part)` in place of the part of each accumulating rule inside. Two rules have one key where
    they are equal, and at the same place among their equals."""
    seen: Counter[Any] = Counter()

    def visit(rule: Rule, state: Any) -> Any:
        if rule.inner or not rule.accumulates:
            return rule.map_inner_states(visit, state)
        key = rule_key(rule)
        seen[key] += 1
        return f((key, seen[key]), state)

    return visit(rule, state)


# --- Reading ------------------------------------------------------------------------------------------------------


def require_state(state: Any, verb: str) -> None:
    """TypeError where this is no state; it names the verb."""
    if isinstance(state, State | Leaf):
        return
    got = type(state).__name__
    if isinstance(state, Rule):
        got = "a rule; call state = setup(rule, model) first"
    elif isinstance(state, nn.Module):
        got = "the model"
    raise TypeError(f"{verb} takes the state tree that setup returns (or a branch of it), but got {got}")


def paths_and_leaves(state: Any, verb: str) -> Iterator[tuple[str, Leaf]]:
    """`(path, leaf)` of every place, a tied leaf at each of its places. TypeError names the verb."""
    require_state(state, verb)
    values = leaf_list(state)
    return ((path, values[index]) for path, index in shape_of(state).paths)


def leaves(state: State | Leaf) -> Iterator[tuple[str, Leaf]]:
    """`(path, leaf)` for each parameter, a tied one once, in the order of the model; paths start at the given view."""
    return iter(each_leaf(state, "leaves"))


def leaves_of(state: Any, verb: str) -> list[Leaf]:
    """The leaves under a view, a tied one once. TypeError names the verb."""
    require_state(state, verb)
    values, spec = leaf_list(state), shape_of(state)
    if spec.kind == "slice":  # made anew by each state[:6], while its children are kept, with their paths
        return [values[index] for index in dict.fromkeys(chain.from_iterable(child.leaves for child in spec.children))]
    return [values[index] for index in spec.leaves]


def each_leaf(state: Any, verb: str) -> list[tuple[str, Leaf]]:
    """What `leaves` gives, for a verb to name in its errors."""
    require_state(state, verb)
    values = leaf_list(state)
    return [(path, values[index]) for index, path in shape_of(state).leaves.items()]


def select(state: State | Leaf, *what: str | Callable[[str, Leaf], bool]) -> State:
    """A view of all leaves that one of `what` finds: a glob pattern over their paths, or a predicate `(path, leaf) ->
    bool`. They come in the order of the model.

    A tied leaf is found by any of its names. Raises ValueError where one of `what` finds nothing.

    >>> state = setup(Adam(), torch.nn.Linear(2, 3))
    >>> _ = adjust(select(state, "*bias"), 0.1)
    >>> state.bias.rule.lr, state.weight.rule.lr
    (0.1, 0.001)
    >>> [path for path, leaf in leaves(select(state, "*bias", lambda path, leaf: leaf.shape == (3, 2)))]
    ['weight', 'bias']
    """
    places = list(paths_and_leaves(state, "select"))
    found: set[str] = set()
    for one in what:
        if not isinstance(one, str) and (isinstance(one, type) or not callable(one)):
            way = "select(state, *patterns), or select(state, *module_paths(model, ...))"
            raise TypeError(f"select takes glob patterns and predicates (path, leaf) -> bool, not {one!r}; write {way}")
        some = {
            path
            for path, leaf in places
            if (fnmatch.fnmatchcase(path, one) if isinstance(one, str) else one(path, leaf))
        }
        if not some:
            raise ValueError(f"select: {one!r} matches no leaf; {near_pattern(one, (path for path, _ in places))}")
        found |= some
    if not what:
        raise TypeError("select needs a pattern or a predicate: select(state, 'encoder.*')")
    first: dict[int, str] = {}  # by its number, the first name of each leaf that was found
    for path, index in shape_of(state).paths:
        if path in found:
            first.setdefault(index, path)
    specs = tuple(TreeSpec("leaf", index=index) for index in first)
    return State(TreeSpec("selection", tuple(first.values()), specs), leaf_list(state))


def value(leaf: Leaf, name: str, *, member: Any = None) -> Any:
    """The hyperparameter that the next update of this leaf will use: a schedule's value at the leaf's count.

    Where it stands more than once in a chain, with different values, `member` says which is meant: a rule class, or an
    index in the chain.

    >>> leaf = setup(Descent(lambda count: 0.5 / (1 + count)), torch.zeros(2))
    >>> _ = update(leaf, torch.zeros(2), torch.ones(2))
    >>> value(leaf, "lr")
    0.25
    """
    if not isinstance(leaf, Leaf):
        raise TypeError("value takes one leaf, as state.encoder.weight or state['encoder.weight']")
    if leaf.rule is None:
        raise ValueError("this leaf was set up with no rule (None), so it has no hyperparameters")
    return hyperparameters(holders_of(at(leaf.rule, leaf.count), name, member)[0])[name]


def summary(state: State | Leaf, depth: int | None = None) -> str:
    """A table with a line for each leaf under this view: path, shape, dtype, rule, the rate that the next update will
    use, every other hyperparameter that is not its default or not the same for all, whether it is frozen, and the bytes
    of its momenta. It is a string; a notebook shows it as a table.

    With `depth`, a branch that many names below the view is one line, which says what is true of all its leaves.

    >>> print(summary(setup(Adam(), torch.nn.Linear(2, 3))))
    path    shape   dtype    rule  lr     frozen  state bytes
    weight  [3, 2]  float32  Adam  0.001                   48
    bias    [3]     float32  Adam  0.001                   24
    2 parameters, 9 numbers, 0 frozen                      72
    """
    return table(each_leaf(state, "summary"), depth)

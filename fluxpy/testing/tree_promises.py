"""What a rule promises within a tree: of `update`, of the other verbs, of copying and saving. Each public function
tries one promise of `check_rule`."""

import copy
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..adjust import adjust, freeze
from ..rule import Rule, field_of, hyperparameters, reducing, rules_in, title_key
from ..saving import load_state_dict, state_dict
from ..state import leaves, setup, tree_context, value
from ..text import dtype_name
from ..update import update
from .compare import contents, require, require_close
from .snapshots import require_equal, snapshot
from .trial import UPDATES, Trial, other_values


def is_elementwise(trial: Trial) -> None:
    if not trial.rule.elementwise or reducing(trial.rule, "array"):  # two arrays as one have another total
        return
    apart: Any = {name: trial.tensors(seed=seed)["matrix"] for name, seed in (("a", 0), ("b", 100))}
    joined = _side_by_side(apart)
    first = joined.clone()
    state_apart = leaf_by_leaf(setup(trial.rule, apart), trial.rule)
    state_joined = leaf_by_leaf(setup(trial.rule, joined), trial.rule)
    for i in range(1, UPDATES + 1):
        grads = {"a": trial.tensors(seed=i)["matrix"], "b": trial.tensors(seed=100 + i)["matrix"]}
        state_apart, apart = update(state_apart, apart, grads, inplace=False)
        state_joined, joined = update(state_joined, joined, _side_by_side(grads), inplace=False)
        moved = _side_by_side(apart) - first
        error = (joined - first - moved).abs()
        require(bool((error <= 1e-9 * moved.abs() + 1e-12).all()), f"update {i - 1} differs")


def leaf_by_leaf(state: Any, rule: Rule) -> Any:
    """The state, whose updates run `apply` on each leaf: packed, leaves that are apart would be one tensor too."""
    tree_context(state).reference_only.add(title_key(rule))
    return state


def _side_by_side(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.flatten() for x in tensors.values()])


def gives_the_same_in_place(trial: Trial) -> None:
    for dtype in trial.dtypes:
        state, model = _begin(trial, dtype, updates=0)
        for i in range(UPDATES):
            grads, before = trial.tensors(dtype, i + 1), snapshot(model, state)
            pure = update(state, model, grads, inplace=False)
            old, twin = copy.deepcopy((state, model))
            single = update(leaf_by_leaf(old, trial.rule), twin, grads, inplace=False)
            require_equal(before, snapshot(model, state), f"on {dtype_name(dtype)}, what was given changed")
            update(state, model, grads)
            for other in (pure, single):
                require_close((state, model), other, (old, twin), f"on {dtype_name(dtype)}, after update {i}")


# --- Leaves that are not stepped, or once -------------------------------------------------------------------------


def skips_frozen(trial: Trial) -> None:
    _skips_one_leaf(trial, frozen=True)


def skips_without_gradient(trial: Trial) -> None:
    if not trial.rule.accumulates:  # to such a rule an update without a gradient counts
        _skips_one_leaf(trial, frozen=False)


def _skips_one_leaf(trial: Trial, frozen: bool) -> None:
    """`matrix` is frozen (and gets NaN), or has no gradient; the other leaves are also trained without it."""
    state, model = _begin(trial)
    model_without = {name: x.clone() for name, x in model.items() if name != "matrix"}
    state_without = setup(trial.rule, model_without, keep=state)
    gradient = None
    if frozen:
        freeze(state["matrix"])
        gradient = torch.full((3, 4), torch.nan, dtype=torch.float64)
    before = snapshot(model["matrix"], state["matrix"])
    for i in range(UPDATES):
        grads = trial.tensors(seed=i + 3)
        update(state, model, grads | {"matrix": gradient})
        update(state_without, model_without, {name: grads[name] for name in model_without})
    require_equal(before, snapshot(model["matrix"], state["matrix"]), "of the leaf itself")
    alone = snapshot(model_without["scalar"], state_without["scalar"])
    beside = snapshot(model["scalar"], state["scalar"])
    require_equal(alone, beside, "of another leaf, without it and beside it")


def steps_tied_once(trial: Trial) -> None:
    x = trial.tensors()["matrix"]
    tied = x.clone()
    one, two = {"a": x.clone()}, {"a": tied, "b": tied}
    state_one, state_two = setup(trial.rule, one), setup(trial.rule, two)
    for i in range(UPDATES):
        gradient = trial.tensors(seed=i + 1)["matrix"]
        update(state_one, one, {"a": gradient})
        update(state_two, two, {"a": gradient, "b": gradient})
    require_equal(snapshot(one["a"], state_one["a"]), snapshot(two["a"], state_two["a"]), "tied and not")


# --- Adjusting ----------------------------------------------------------------------------------------------------


def takes_adjust(trial: Trial) -> None:
    state, model = _begin(trial)
    usual = _outcome(trial, *copy.deepcopy((state, model)))
    for rule in rules_in(trial.rule):
        for name, old in hyperparameters(rule).items():
            metadata = field_of(rule, name).metadata
            if metadata.get("fixed"):
                continue
            given = name in trial.adjusted
            values = [trial.adjusted[name]] if given else other_values(old, metadata.get("allowed"))
            ignored = _ignored_values(trial, state, model, name, values, usual)
            without_effect = f"{name}={old!r} became {', '.join(map(repr, ignored))} and nothing else changed"
            require(not ignored, f"{without_effect} in {2 * UPDATES} updates")


def _ignored_values(trial: Trial, state: Any, model: Any, name: str, values: list[Any], usual: list[Any]) -> list[Any]:
    """The values of a hyperparameter that changed nothing; none as soon as one changed something."""
    ignored: list[Any] = []
    for new in values:
        other, twin = copy.deepcopy((state, model))
        try:
            adjust(other, **{name: new})
        except ValueError:  # refused, which is right as well
            continue
        got = value(other["matrix"], name)
        require(got == new, f"after adjust(state, {name}={new!r}) it is {got!r}")
        if _outcome(trial, other, twin) != usual:
            return []
        ignored.append(new)
    return ignored


def _outcome(trial: Trial, state: Any, model: Any) -> list[Any]:
    """The effect of 16 updates, and then of one with gradients that are not finite."""
    for i in range(2 * UPDATES):
        update(state, model, trial.tensors(seed=i + 3))
    finite = contents((model, [leaf.state for _, leaf in leaves(state)]))
    try:
        update(state, model, {name: g / 0 for name, g in trial.tensors().items()})
    except FloatingPointError:
        return [*finite, "raised"]
    return finite + contents((model, [leaf.state for _, leaf in leaves(state)]))


# --- Copies and files ---------------------------------------------------------------------------------------------


def can_be_copied(trial: Trial) -> None:
    _goes_on_from(trial, copy.deepcopy)


def can_be_pickled(trial: Trial) -> None:
    classes = [type(rule) for rule in rules_in(trial.rule)]
    # Of a class inside a function pickle finds no name.
    if all(getattr(sys.modules.get(c.__module__), c.__qualname__, None) is c for c in classes):
        _goes_on_from(trial, lambda state: pickle.loads(pickle.dumps(state)))


def can_be_saved(trial: Trial) -> None:
    def reload(state: Any) -> Any:
        file = io.BytesIO()
        torch.save(state_dict(state), file)
        file.seek(0)
        fresh = setup(trial.rule, trial.tensors())
        load_state_dict(fresh, torch.load(file, weights_only=True))
        return fresh

    _goes_on_from(trial, reload)


def _goes_on_from(trial: Trial, copy_state: Callable[[Any], Any]) -> None:
    state, model = _begin(trial)
    other, twin = copy_state(state), copy.deepcopy(model)
    for tree, parameters in ((state, model), (other, twin)):
        for i in range(UPDATES):
            update(tree, parameters, trial.tensors(seed=i + 3))
    require_equal(snapshot(model, state), snapshot(twin, other), f"after {UPDATES} more updates")


def _begin(trial: Trial, dtype: torch.dtype = torch.float64, updates: int = 2) -> tuple[Any, Any]:
    """A state and a model after some updates."""
    model = trial.tensors(dtype)
    state = setup(trial.rule, model)
    for i in range(updates):
        update(state, model, trial.tensors(dtype, i + 1))
    return state, model

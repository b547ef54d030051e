"""check_rule: whether a rule keeps what every rule promises, by trying it."""

import copy
import io
import pickle
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..adjust import adjust, freeze
from ..pytree import Frame
from ..rule import Rule, at, field_of, hyperparameters, title, walk
from ..state import leaves, setup, start, value
from ..statedict import load_state_dict, state_dict
from ..update import update
from .snapshot import dtype_name, snapshot
from .trial import UPDATES, Step, close, demand, draw, drive, dtypes, equal, others, seen, steps


def check_rule(rule: Rule | type[Rule], *, adjusted: Mapping[str, Any] | None = None) -> None:
    """Try a rule (an instance, or a class that has defaults for all its fields) on everything that rules promise.

    AssertionError says which promise is broken, with an example: it runs on all floating dtypes (on complex64 if it is
    `elementwise`) and shapes, writes to nothing it is given, keeps dtypes and the form of its state, holds on to no
    gradient, gives the same for the same, reads no tensor on the host, is elementwise where it says so; its leaves can
    be frozen, tied, copied, pickled and saved; and `adjust` of a hyperparameter takes effect or is refused.

    For that last promise other values are tried for each hyperparameter; where none of them can show in 16
    updates, give one that does: `adjusted={"name": value}`. A class defined inside of a function is not pickled.

    >>> class Worn(Rule):
    ...     lr: float = 0.1
    ...
    ...     def apply(self, state, x, dx):
    ...         return state, dx.mul_(self.lr)
    >>> check_rule(Worn)  # doctest: +NORMALIZE_WHITESPACE
    Traceback (most recent call last):
        ...
    AssertionError: Worn breaks a promise: apply writes to nothing it is given.
        Here: in update 0 of a float64 parameter of shape (3, 4): the gradient was written to
    """
    if isinstance(rule, type):
        try:
            rule = rule()
        except TypeError as error:
            raise TypeError(
                f"check_rule: {rule.__name__}() does not work ({error}); give check_rule an instance"
            ) from None
    trial = _Trial(at(rule, 0), adjusted or {})
    for name, check in vars(_Trial).items():
        if not name.startswith("_"):
            try:
                check(trial)
            except Exception as error:
                came = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
                raise AssertionError(f"{title(rule)} breaks a promise: {check.__doc__}. Here: {came}") from error


class _Trial:
    """Each public method tries the promise in its docstring; they stand in the order in which one needs the other."""

    def __init__(self, rule: Rule, adjusted: Mapping[str, Any]) -> None:
        self._rule, self._adjusted = rule, adjusted

    @cached_property
    def _steps(self) -> list[Step]:
        return list(steps(self._rule))

    def runs_on_all(self) -> None:
        """apply takes parameters of all floating dtypes and shapes, and gives a finite change of that shape"""
        for step in self._steps:
            if (change := step.change) is not None:
                came = tuple(change.shape) if isinstance(change, Tensor) else repr(change)
                demand(came == tuple(step.given[1].shape), f"{step.where}: the change is {came}")
                demand(bool(change.isfinite().all()), f"{step.where}: finite gradients give a change with NaN or Inf")

    def writes_to_nothing(self) -> None:
        """apply writes to nothing it is given"""
        for step in self._steps:
            for what, old, now in zip(("state", "parameter", "gradient"), step.before, step.after, strict=True):
                demand(old == now, f"{step.where}: the {what} was written to")

    def keeps_the_dtype(self) -> None:
        """the change has the dtype of the parameter"""
        for step in self._steps:
            if step.change is not None:
                was, now = dtype_name(step.given[1].dtype), dtype_name(step.change.dtype)
                demand(was == now, f"{step.where}: {was} became {now}")

    def keeps_the_form_of_its_state(self) -> None:
        """the state is a pytree of tensors and plain numbers, and keeps its structure, shapes and dtypes"""
        for step in self._steps:
            odd = [part for part in Frame(step.state).parts if not isinstance(part, Tensor | int | float | str | None)]
            demand(not odd, f"{step.where}: it holds {', '.join(map(repr, odd))}")
            (olds, before), (news, after) = Frame.split(step.given[0]), Frame.split(step.state)
            was, now = ([(dtype_name(t.dtype), list(t.shape)) for t in tensors] for tensors in (olds, news))
            demand(was == now, f"{step.where}: tensors {was} became {now}")
            demand(before == after, f"{step.where}: {step.given[0]!r} became {step.state!r}")

    def keeps_no_reference(self) -> None:
        """the state holds no memory of the parameter or the gradient, which others write to; clone it"""
        for step in self._steps:
            for what, other in zip(("parameter", "gradient"), step.given[1:], strict=True):
                memory = other.untyped_storage().data_ptr()
                views = (t for t in Frame.split(step.state)[0] if t is not other and t.numel())
                shared = any(t.untyped_storage().data_ptr() == memory for t in views)
                demand(not shared, f"{step.where}: the state keeps a view of the {what}")

    def is_a_function(self) -> None:
        """from the same inputs, apply gives the same"""
        for step in self._steps:
            state, change = drive(self._rule, *step.given)
            demand(seen((state, change)) == seen((step.state, step.change)), f"{step.where}: two calls differ")

    def reads_nothing(self) -> None:
        """apply reads no tensor on the host, which would wait for the device; as .item(), float(t), or `if t > 0`"""
        x = torch.zeros(3, device="meta")
        state = start(self._rule, x, 0, "")
        for _ in range(UPDATES):
            state, _ = drive(self._rule, state, x, torch.zeros_like(x))

    def can_be_copied(self) -> None:
        """training goes on from a deepcopy of the state as from the state, bit for bit"""
        self._goes_on(copy.deepcopy)

    def is_elementwise(self) -> None:
        """elementwise = True: on two tensors laid side by side it gives what it gives on each"""
        if self._rule.elementwise:
            apart: Any = {name: draw(seed=seed)["matrix"] for name, seed in (("a", 0), ("b", 100))}
            side = torch.cat([x.flatten() for x in apart.values()])
            first, (one, other) = side.clone(), (setup(self._rule, apart), setup(self._rule, side))
            for i in range(1, UPDATES + 1):
                grads = {"a": draw(seed=i)["matrix"], "b": draw(seed=100 + i)["matrix"]}
                one, apart = update(one, apart, grads, inplace=False)
                other, side = update(other, side, torch.cat([g.flatten() for g in grads.values()]), inplace=False)
                moved = torch.cat([x.flatten() for x in apart.values()]) - first
                off = (side - first - moved).abs()
                demand(bool((off <= 1e-9 * moved.abs() + 1e-12).all()), f"update {i - 1} differs")

    def gives_the_same_in_place(self) -> None:
        """update(..., inplace=False) gives the same as in place, to a few roundings, and changes nothing given"""
        for dtype in dtypes(self._rule):
            state, model = self._begun(dtype, 0)
            for i in range(UPDATES):
                grads, before = draw(dtype, i + 1), snapshot(model, state)
                other = update(state, model, grads, inplace=False)
                equal(before, snapshot(model, state), f"on {dtype_name(dtype)}, what was given changed")
                update(state, model, grads)
                close((state, model), other, f"on {dtype_name(dtype)}, after update {i}")

    def leaves_the_frozen(self) -> None:
        """a frozen leaf keeps every bit, and has no part in what others get"""
        self._sits_out(frozen=True)

    def leaves_those_without_a_gradient(self) -> None:
        """a leaf without a gradient keeps every bit, and has no part in what others get"""
        if not self._rule.gathers:  # to such a rule an update without a gradient counts
            self._sits_out(frozen=False)

    def steps_the_tied_once(self) -> None:
        """a tied leaf is stepped once"""
        x = draw()["matrix"]
        one, two = {"a": x.clone()}, {"a": (tied := x.clone()), "b": tied}
        states = setup(self._rule, one), setup(self._rule, two)
        for i in range(UPDATES):
            g = draw(seed=i + 1)["matrix"]
            update(states[0], one, {"a": g})
            update(states[1], two, {"a": g, "b": g})
        equal(snapshot(one["a"], states[0]["a"]), snapshot(two["a"], states[1]["a"]), "tied and not")

    def heeds_adjust(self) -> None:
        """adjust of a hyperparameter takes effect, or is refused (declare what only init reads as hyper(fixed=True))"""
        state, model = self._begun()
        usual = _outcome(*copy.deepcopy((state, model)))
        for rule in walk(self._rule):
            for name, old in hyperparameters(rule).items():
                metadata = field_of(rule, name).metadata
                tries = [self._adjusted[name]] if name in self._adjusted else others(old, metadata.get("allowed"))
                idle: list[Any] = []
                for new in () if metadata.get("fixed") else tries:
                    other, twin = copy.deepcopy((state, model))
                    try:
                        adjust(other, **{name: new})
                    except ValueError:
                        continue
                    has = value(other["matrix"], name)
                    demand(has == new, f"after adjust(state, {name}={new!r}) it is {has!r}")
                    if _outcome(other, twin) != usual:
                        break
                    idle.append(new)
                else:
                    tried = ", ".join(map(repr, idle))
                    demand(not idle, f"{name}={old!r} became {tried} and nothing else changed in {2 * UPDATES} updates")

    def can_be_pickled(self) -> None:
        """training goes on from a pickle of the state as from the state, bit for bit"""
        classes = [type(rule) for rule in walk(self._rule)]
        if all(getattr(sys.modules.get(c.__module__), c.__qualname__, None) is c for c in classes):
            self._goes_on(lambda state: pickle.loads(pickle.dumps(state)))

    def can_be_saved(self) -> None:
        """training goes on from a saved state_dict as from the state, bit for bit"""

        def reloaded(state: Any) -> Any:
            file = io.BytesIO()
            torch.save(state_dict(state), file)
            file.seek(0)
            fresh = setup(self._rule, draw())
            load_state_dict(fresh, torch.load(file, weights_only=True))
            return fresh

        self._goes_on(reloaded)

    def _begun(self, dtype: torch.dtype = torch.float64, updates: int = 2) -> tuple[Any, Any]:
        model = draw(dtype)
        state = setup(self._rule, model)
        for i in range(updates):
            update(state, model, draw(dtype, i + 1))
        return state, model

    def _sits_out(self, frozen: bool) -> None:
        state, model = self._begun()
        alone = {name: x.clone() for name, x in model.items() if name != "matrix"}
        other = setup(self._rule, alone, keep=state)
        gradient = torch.full((3, 4), torch.nan, dtype=torch.float64) if frozen else None
        if frozen:
            freeze(state["matrix"])
        before = snapshot(model["matrix"], state["matrix"])
        for i in range(UPDATES):
            grads = draw(seed=i + 3)
            update(state, model, grads | {"matrix": gradient})
            update(other, alone, {name: grads[name] for name in alone})
        equal(before, snapshot(model["matrix"], state["matrix"]), "of the leaf itself")
        lonely, beside = (snapshot(m["scalar"], s["scalar"]) for m, s in ((alone, other), (model, state)))
        equal(lonely, beside, "of another leaf, without it and beside it")

    def _goes_on(self, again: Callable[[Any], Any]) -> None:
        state, model = self._begun()
        other, twin = again(state), copy.deepcopy(model)
        for a, b in ((state, model), (other, twin)):
            for i in range(UPDATES):
                update(a, b, draw(seed=i + 3))
        equal(snapshot(model, state), snapshot(twin, other), f"after {UPDATES} more updates")


def _outcome(state: Any, model: Any) -> list[Any]:
    """What 16 updates do, and then one with gradients that are not finite."""
    for i in range(2 * UPDATES):
        update(state, model, draw(seed=i + 3))
    usual = seen((model, [leaf.state for _, leaf in leaves(state)]))
    try:
        update(state, model, {name: g / 0 for name, g in draw().items()})
    except FloatingPointError:
        return [*usual, "raised"]
    return usual + seen((model, [leaf.state for _, leaf in leaves(state)]))

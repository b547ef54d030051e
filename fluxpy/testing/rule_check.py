"""check_rule: whether a rule keeps what every rule promises, by trying it."""

from collections.abc import Mapping
from typing import Any

import torch

from ..rule import Rule, at, title
from ..text import named
from . import apply_promises, tree_promises
from .trial import Trial

# In the order in which one relies on another. Each raises an AssertionError with an example, or any other error.
PROMISES = (
    (
        "apply takes parameters of all floating dtypes and shapes, and gives a finite change of that shape",
        apply_promises.runs_on_all,
    ),
    ("apply writes to nothing it is given", apply_promises.writes_to_nothing),
    ("the change has the dtype of the parameter", apply_promises.keeps_dtype),
    (
        "the state is a pytree of tensors and plain numbers, and keeps its structure, shapes and dtypes",
        apply_promises.keeps_state_form,
    ),
    (
        "the state holds no memory of the parameter or the gradient, which others write to; clone it",
        apply_promises.keeps_no_reference,
    ),
    ("evaluation gives a tensor of the parameter's shape, and writes to nothing", apply_promises.evaluates_in_form),
    ("from the same inputs, apply gives the same", apply_promises.is_deterministic),
    (
        "apply reads no tensor on the host, which would wait for the device; as .item(), float(t), or `if t > 0`",
        apply_promises.reads_nothing,
    ),
    ("training goes on from a deepcopy of the state as from the state, bit for bit", tree_promises.can_be_copied),
    (
        "elementwise = True: on two tensors laid side by side it gives what it gives on each",
        tree_promises.is_elementwise,
    ),
    (
        "update(..., inplace=False) gives the same as in place, to a few roundings, and changes nothing given",
        tree_promises.gives_the_same_in_place,
    ),
    ("a frozen leaf keeps every bit, and has no part in what others get", tree_promises.skips_frozen),
    (
        "a leaf without a gradient keeps every bit, and has no part in what others get",
        tree_promises.skips_without_gradient,
    ),
    ("a tied leaf is stepped once", tree_promises.steps_tied_once),
    (
        "adjust of a hyperparameter takes effect, or is refused (declare what only init reads as hyper(fixed=True))",
        tree_promises.takes_adjust,
    ),
    ("training goes on from a pickle of the state as from the state, bit for bit", tree_promises.can_be_pickled),
    ("training goes on from a saved state_dict as from the state, bit for bit", tree_promises.can_be_saved),
)


def check_rule(rule: Rule | type[Rule], *, adjusted: Mapping[str, Any] | None = None) -> None:
    """Try a rule (an instance, or a class that has defaults for all its fields) on everything that rules promise.

    AssertionError says which promise is broken, with an example: it runs on all floating dtypes (on complex64 if it is
    `elementwise`) and shapes, writes to nothing it is given, keeps dtypes and the form of its state, holds on to no
    gradient, gives the same for the same, reads no tensor on the host, is elementwise where it says so; its leaves can
    be frozen, tied, copied, pickled and saved; and `adjust` of a hyperparameter takes effect or is refused. A rule for
    matrices may refuse a scalar, by a ValueError in `init`: it is tried on matrices alone.

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
    if not isinstance(rule, Rule):
        raise TypeError(f"check_rule takes a rule, but got {named(rule)}")
    trial = Trial(at(rule, 0), adjusted or {})
    for promise, check in PROMISES:
        try:
            with torch.device("cpu"):  # whatever the default device is
                check(trial)
        except Exception as error:
            example = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            raise AssertionError(f"{title(rule)} breaks a promise: {promise}. Here: {example}") from error

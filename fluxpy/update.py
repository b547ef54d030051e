"""update: one step of every leaf, all or nothing.

In place, a plan of the engine does it, made at the first update and kept. A pure update runs the plain path, each
rule's `apply` leaf by leaf, and can be differentiated.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .engine.group import Misfit
from .engine.plain import Plain
from .engine.plan import Plan, rounds
from .guard import Guard, Skip
from .leaf import Leaf
from .match import Fit, rebuild, scatter
from .pytree import Frame, is_transforming, is_wrapped, unwritable
from .rule import Rule, hyperparameters, walk
from .state import State, fit_of, guard_of
from .text import form
from .tree import Mirror


def update(state: Any, model: Any, grads: Any = None, *, inplace: bool = True) -> tuple[Any, Any]:
    """One step: apply each leaf's rule to its parameter and gradient. Returns `(state, model)`.

    `grads` is what `gradient` returns; or a pytree like the model; or a dict by dotted name, as `torch.func.grad` over
    `functional_call` gives; or None: each parameter's `.grad`. Gradients are read, never written. A leaf without one
    is not stepped, nor is a frozen one: parameter, momenta and count stay as they are, bit for bit.

    In place, parameters and momenta are written where they are, and the same objects are returned. With
    `inplace=False` nothing given is changed and new ones are returned (of a module a structural copy: new parameters,
    cloned buffers, the rest shared). Where gradients, hyperparameters, momenta or parameters carry autograd history,
    so do the results: one can differentiate through the step.

    All or nothing: where anything raises, parameters and state are what they were. ValueError names the place where
    structure, shape, dtype or device do not fit. FloatingPointError comes from clipping rules (see `ClipNorm`).

    >>> model = {"w": torch.ones(2)}
    >>> state = setup(Descent(0.1), model)
    >>> state, model = update(state, model, {"w": torch.tensor([1.0, 2.0])})
    >>> model["w"]
    tensor([0.9000, 0.8000])
    """
    if not isinstance(state, State | Leaf):
        what = "a rule; call state = setup(rule, model) first" if isinstance(state, Rule) else f"{type(state).__name__}"
        raise TypeError(f"update takes (state, model, grads), but the first is {what}")
    return stepped(state, fit_of(state, model), model, grads, inplace)


def stepped(state: Any, fit: Fit, model: Any, grads: Any, inplace: bool = True) -> tuple[Any, Any]:
    """`update` of a model whose parameters are known."""
    leaves = [state] if isinstance(state, Leaf) else state._values
    guard, values = guard_of(state), in_order(fit, grads)
    if not inplace:
        _check(fit, leaves, values, inplace)
        with torch.set_grad_enabled(_has_history(leaves, fit, values)):
            return _pure(fit, leaves, values, guard, model)
    tracked = torch.is_grad_enabled()
    torch.set_grad_enabled(False)  # as a context it would cost a tenth of a small model's update
    try:
        _step(fit, leaves, values, guard)
    except Skip:
        pass
    finally:
        torch.set_grad_enabled(tracked)
    guard.updates += 1
    return state, model


def in_order(fit: Fit, grads: Any) -> list[Any]:
    """The gradients in the order of the parameters."""
    if grads is None:
        values: list[Any] = [x.grad for x in fit.params]
        if values and all(v is None for v in values):
            raise ValueError(
                "update was given no gradients, and no parameter has a .grad: call loss.backward() first, "
                "or pass what fluxpy.gradient returns"
            )
        return values
    if isinstance(grads, Mirror) and grads._spec is fit.walked:
        return grads._values
    if type(grads) is dict and tuple(grads) == fit.names:
        return list(grads.values())
    found = scatter(fit.spec, grads)
    return [found.get(index) for index in fit.spec.unique]


def _step(fit: Fit, leaves: list[Leaf], values: list[Any], guard: Guard) -> None:
    """Update in place."""
    if is_transforming():  # nothing may be kept from one step to the next
        _check(fit, leaves, values, inplace=True)
        _commit(fit, leaves, values, guard)
        return
    plan = fit.plan
    if plan is None or not plan.holds(leaves, values):
        _check(fit, leaves, values, inplace=True)
        with torch.inference_mode(False), torch.no_grad():
            plan = fit.plan = Plan(fit, leaves, values, guard)
    try:
        plan.step(values)
        return
    except Misfit as misfit:
        guard.slow.update(misfit.rules)
    _commit(fit, leaves, values, guard)


def _commit(fit: Fit, leaves: list[Leaf], values: list[Any], guard: Guard) -> None:
    """Update in place on the plain path."""
    turns = _plain(fit, leaves, values, guard, inplace=True)
    _sit_out(fit, leaves)
    for turn in turns.values():
        turn.commit(guard)


def _pure(fit: Fit, leaves: list[Leaf], values: list[Any], guard: Guard, model: Any) -> tuple[Any, Any]:
    """The outcome as a new state and a new model, which share no tensor with the old."""
    spec = fit.spec
    try:
        turns, skipped = _plain(fit, leaves, values, guard, inplace=False), False
    except Skip:
        turns, skipped = {}, True
    fresh, new = list(leaves), []
    for index, x in zip(spec.unique, fit.params, strict=True):
        leaf, turn = leaves[index], turns.get(index)
        tensors, frame = Frame.split(None if turn else leaf.state)
        fresh[index] = leaf._with(leaf.rule, frame.join(t.clone() for t in tensors))
        if turn:
            turn.settle(fresh[index], inplace=False)
        new.append(turn.value if turn else x.clone())
    if not skipped:
        _sit_out(fit, fresh)
    state = fresh[0] if spec.kind == "leaf" else State(spec, fresh)
    return state, rebuild(model, dict(enumerate(new)))


def _sit_out(fit: Fit, leaves: list[Leaf]) -> None:
    """A rule that gathers hears, when its leaf thaws, how many updates went by."""
    for leaf in (leaves[index] for index in fit.spec.unique):
        leaf._missed += leaf.frozen and leaf.rule is not None and leaf.rule.gathers


def _check_one(path: str, leaf: Leaf, x: Tensor, dx: Any) -> None:
    if (x.shape, x.dtype) != (leaf._shape, leaf._dtype):
        raise ValueError(
            f"the model does not fit the state: {path!r} was {form(leaf._shape, leaf._dtype)} at setup and is now "
            f"{form(x.shape, x.dtype)}; call setup again after changing a model"
        )
    if dx is None:
        return
    if not isinstance(dx, Tensor):
        raise ValueError(f"the gradient of {path!r} must be a tensor or None, but got {type(dx).__name__}")
    if dx.layout != torch.strided:
        raise ValueError(f"the gradient of {path!r} is sparse ({dx.layout}); pass grad.to_dense()")
    if (dx.shape, dx.dtype, dx.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"the gradient of {path!r} does not fit: the parameter is {form(x.shape, x.dtype)} on {x.device}, "
            f"the gradient {form(dx.shape, dx.dtype)} on {dx.device}"
        )
    for held in Frame.split(leaf.state)[0]:
        if held.device != x.device and held.ndim:
            raise ValueError(
                f"the momenta of {path!r} are on {held.device}, the parameter on {x.device}: after model.to(...), "
                "move the state too: optree.tree_map(lambda t: t.to(device), state, namespace='fluxpy')"
            )


def _check(fit: Fit, leaves: Sequence[Leaf], values: Sequence[Any], inplace: bool) -> None:
    for (index, path), x, dx in zip(fit.spec.unique.items(), fit.params, values, strict=True):
        _check_one(path, leaves[index], x, dx)
        if inplace and unwritable(x):
            raise ValueError(
                f"{path!r} cannot be written in place (expanded, or made in inference mode); clone it first"
            )


def _has_history(leaves: Sequence[Leaf], fit: Fit, values: Sequence[Any]) -> bool:
    """Whether there is anything to differentiate through. An `nn.Parameter` that merely requires grad is not: the graph
    of an ordinary loop would grow with every step."""
    if not torch.is_grad_enabled():
        return False
    inside = [leaves[index] for index in fit.spec.unique]
    rules = {id(leaf.rule): leaf.rule for leaf in inside if leaf.rule is not None}.values()
    held = [t for leaf in inside for t in Frame.split(leaf.state)[0]]
    held += [t for rule in rules for inner in walk(rule) for t in Frame.split(hyperparameters(inner))[0]]
    return any(t.requires_grad for t in (*values, *held) if t is not None) or any(
        is_wrapped(x) or (x.requires_grad and not (x.is_leaf and isinstance(x, torch.nn.Parameter))) for x in fit.params
    )


def _plain(fit: Fit, leaves: Sequence[Leaf], values: Sequence[Any], guard: Guard, inplace: bool) -> dict[int, Plain]:
    """All leaves through their rules on the plain path, up to writing."""
    rules: dict[Any, Rule] = {}
    turns = {
        index: Plain(path, leaf, x, dx, rules)
        for (index, path), x, dx in zip(fit.spec.unique.items(), fit.params, values, strict=True)
        if not (leaf := leaves[index]).frozen and leaf.rule and (dx is not None or leaf.rule.gathers)
    }
    rounds(list(turns.values()), guard)
    for turn in turns.values():
        turn.finish(guard, inplace)
    return turns


def check(state: Any) -> None:
    """Raise FloatingPointError if a number that must be finite (a norm, or the loss of `trainstep`) was not.

    On the CPU that error came already, when it happened. On other devices nothing is read during a step: the first bad
    number holds back its update and all after it, and this reads it, with its path and the number of the update, and
    lets updates go on. `train` calls it at its end.
    """
    guard_of(state).check()

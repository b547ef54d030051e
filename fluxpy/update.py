"""update: one step of every leaf, all or nothing, on the plain path: each rule's `apply`, leaf by leaf.

Everything that can fail is worked out first, into new tensors; then it is written, in place or into copies.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .guard import Guard, Skip, reads_at_once, require_finite
from .match import fit, rebuild, scatter
from .pytree import Frame, apart, is_wrapped, memory, unwritable
from .rule import Ask, Assign, Rule, StagedRule, at, hyperparameters, walk
from .state import Leaf, State, spec_of, start
from .state import leaves as leaves_of
from .text import form
from .tree import Spec


class _Step:
    """One leaf on its way through its rule."""

    def __init__(self, path: str, leaf: Leaf, x: Tensor, dx: Tensor | None, rules: dict[Any, Rule]) -> None:
        assert leaf.rule is not None
        self.path, self.x, self.dx = path, x, dx
        key = (id(leaf.rule), leaf._count)
        try:
            if key not in rules:
                rules[key] = at(leaf.rule, leaf._count)
        except Exception as error:
            error.add_note(f"in a schedule of the parameter {path!r}, at its count {leaf._count}")
            raise
        self.rule = rules[key]
        self.state = start(leaf.rule, x, leaf._count, path) if leaf.state is None else leaf.state
        if leaf._missed:
            self.state = self.rule.miss(self.state, leaf._missed)
        self.run = self.rule.steps(self.state, x, dx)
        self.asked = 0  # how many totals over the tree it has asked for

    def advance(self, answer: Any, guard: Guard) -> Ask | None:
        """Run to the next question that concerns other leaves too; None at the end."""
        while True:
            try:
                ask = self.run.send(answer)
            except StopIteration as done:
                self.result = done.value
                return None
            except Exception as error:
                error.add_note(f"in the rule {self.rule!r} of the parameter {self.path!r}")
                raise
            if ask.across:
                self.asked += 1
                return ask
            require_finite(ask.part, ask, [(self.path, ask.part)], guard)
            answer = ask.part

    def finish(self, guard: Guard, inplace: bool) -> None:
        """Work out what is to be written, so that writing it cannot fail."""
        if not (isinstance(self.result, tuple) and len(self.result) == 2):
            raise TypeError(f"{self._who()} must return (state, change), but gave {self.result!r}")
        state, self.change = self.result
        self.value = guard.held(self.x, self._value(self.change))
        (olds, before), (news, self.frame) = Frame.split(self.state), Frame.split(state)
        self.olds = olds if before == self.frame and all(map(_alike, olds, news)) else []
        if any(t.device != self.x.device and t.ndim for t in news):
            raise ValueError(f"{self._who()} gave a state on another device than the parameter's {self.x.device}")
        # Never keep memory that others write to: the parameter, the gradient, or the old state's.
        dx = [] if self.dx is None else [self.dx]
        news = apart(news, [self.x, *dx, *([] if self.olds and inplace else olds)])
        if self.olds:
            mine = set(map(memory, olds)) if inplace else set()  # a rule may let its buffers change places
            news = [t.clone() if memory(t) in mine and t is not old else t for old, t in zip(olds, news, strict=True)]
            news = [guard.held(old, t).to(old.dtype) for old, t in zip(olds, news, strict=True)]
        self.news = news

    def _value(self, change: Any) -> Tensor:
        """What the parameter becomes."""
        value = change.value if isinstance(change, Assign) else self.x if change is None else change
        if not isinstance(value, Tensor) or (value.shape, value.device) != (self.x.shape, self.x.device):
            form = f"shape {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else repr(value)
            want = f"it must have the parameter's shape {tuple(self.x.shape)}, on {self.x.device}"
            raise ValueError(f"{self._who()} gave a change of {form}; {want}")
        return value.clone() if value is self.x or isinstance(change, Assign) else (self.x - value).to(self.x.dtype)

    def _who(self) -> str:
        return f"the rule {self.rule!r} of the parameter {self.path!r}"

    def settle(self, leaf: Leaf, inplace: bool) -> None:
        """Give a leaf its new state. In place, each tensor keeps its memory where its shape allows."""
        if inplace and self.olds:
            self.news = [old if old is t else old.copy_(t) for old, t in zip(self.olds, self.news, strict=True)]
        leaf._state, leaf._missed = self.frame.join(self.news), 0
        leaf._count += self.change is not None


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.can_cast(b.dtype, a.dtype)


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
    spec = spec_of(state)
    leaves = state._values if isinstance(state, State) else [state]
    params = fit(spec, model)
    given = _gradients(spec, params, grads)
    for index, path in spec.unique.items():
        _check(path, leaves[index], params[index], given.get(index))
        if inplace and unwritable(params[index]):
            raise ValueError(
                f"{path!r} cannot be written in place (expanded, or made in inference mode); clone it first"
            )
    guard = guard_of(state)
    with torch.set_grad_enabled(not inplace and _has_history(leaves, params, given)):
        try:
            steps = _run(spec, leaves, params, given, guard)
            for step in steps.values():
                step.finish(guard, inplace)
        except Skip:
            steps = {}
        else:
            leaves = leaves if inplace else [leaf._with(leaf.rule, leaf.state) for leaf in leaves]
            for leaf in (leaves[index] for index in spec.unique):
                leaf._missed += leaf.frozen and leaf.rule is not None and leaf.rule.gathers
        if inplace:
            guard.updates += 1
            for index, step in steps.items():
                step.settle(leaves[index], inplace=True)
                if step.change is not None:
                    step.x.copy_(step.value)
            return state, model
        return _copies(spec, leaves, params, steps, model)


def _gradients(spec: Spec, params: Mapping[int, Tensor], grads: Any) -> dict[int, Tensor]:
    if grads is not None:
        return scatter(spec, grads)
    given = {index: x.grad for index, x in params.items() if x.grad is not None}
    if params and not given:
        raise ValueError(
            "update was given no gradients, and no parameter has a .grad: call loss.backward() first, "
            "or pass what fluxpy.gradient returns"
        )
    return given


def _check(path: str, leaf: Leaf, x: Tensor, dx: Tensor | None) -> None:
    if (x.shape, x.dtype) != (leaf._shape, leaf._dtype):
        raise ValueError(
            f"the model does not fit the state: {path!r} was {form(leaf._shape, leaf._dtype)} at setup and is now "
            f"{form(x.shape, x.dtype)}; call setup again after changing a model"
        )
    if dx is None:
        return
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


def _has_history(leaves: list[Leaf], params: Mapping[int, Tensor], given: Mapping[int, Tensor]) -> bool:
    """Whether there is anything to differentiate through. An `nn.Parameter` that merely requires grad is not: the graph
    of an ordinary loop would grow with every step."""
    if not torch.is_grad_enabled():
        return False
    rules = {id(leaf.rule): leaf.rule for leaf in leaves if leaf.rule is not None}.values()
    held = [t for leaf in leaves for t in Frame.split(leaf.state)[0]]
    held += [t for rule in rules for inner in walk(rule) for t in Frame.split(hyperparameters(inner))[0]]
    return any(t.requires_grad for t in (*given.values(), *held)) or any(
        is_wrapped(x) or (x.requires_grad and not (x.is_leaf and isinstance(x, torch.nn.Parameter)))
        for x in params.values()
    )


def _run(
    spec: Spec, leaves: list[Leaf], params: Mapping[int, Tensor], given: Mapping[int, Tensor], guard: Guard
) -> dict[int, _Step]:
    """All leaves through their rules. Where rules ask for totals, all leaves get there before any goes on."""
    rules: dict[Any, Rule] = {}
    steps = {
        index: _Step(path, leaf, params[index], given.get(index), rules)
        for index, path in spec.unique.items()
        if not (leaf := leaves[index]).frozen and leaf.rule and (index in given or leaf.rule.gathers)
    }
    waiting: list[tuple[_Step, Any]] = [(step, None) for step in steps.values()]
    while waiting:
        groups: dict[Any, list[tuple[_Step, Ask]]] = {}
        for step, answer in waiting:
            ask = step.advance(answer, guard)
            if ask is not None:
                groups.setdefault((step.asked, _identity(ask.rule)), []).append((step, ask))
        waiting = []
        for group in groups.values():
            total = group[0][1].rule.combine([ask.part for _, ask in group])
            require_finite(total, group[0][1], [(step.path, ask.part) for step, ask in group], guard)
            waiting += [(step, total) for step, _ in group]
    return steps


def _identity(rule: StagedRule) -> Any:
    """Equal rules share a total. Tensors among their hyperparameters count by value where the host may read it."""

    def key(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        return v.item() if v.numel() == 1 and not is_wrapped(v) and reads_at_once(v) else id(v)

    return type(rule), tuple((name, key(v)) for name, v in hyperparameters(rule).items())


def _copies(
    spec: Spec, leaves: list[Leaf], params: Mapping[int, Tensor], steps: Mapping[int, _Step], model: Any
) -> tuple[Any, Any]:
    """The outcome as a new state and a new model, which share no tensor with the old."""
    fresh, values = list(leaves), {}
    for i, index in enumerate(spec.unique):
        leaf, x = leaves[index], params[index]
        if index in steps:
            fresh[index] = leaf._with(leaf.rule, None)
            steps[index].settle(fresh[index], inplace=False)
            values[i] = steps[index].value
        else:
            tensors, frame = Frame.split(leaf.state)
            fresh[index], values[i] = leaf._with(leaf.rule, frame.join(t.clone() for t in tensors)), x.clone()
    new = fresh[0] if spec.kind == "leaf" else State(spec, fresh)
    return new, rebuild(model, values)


def guard_of(state: State | Leaf) -> Guard:
    """The guard that all leaves of a tree share."""
    return next((leaf._guard for _, leaf in leaves_of(state)), Guard())


def check(state: Any) -> None:
    """Raise FloatingPointError if a number that must be finite (a norm, or the loss of `trainstep`) was not.

    On the CPU that error came already, when it happened. On other devices nothing is read during a step: the first bad
    number holds back its update and all after it, and this reads it, with its path and the number of the update, and
    lets updates go on. `train` calls it at its end.
    """
    guard_of(state).check()

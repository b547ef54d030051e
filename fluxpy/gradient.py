"""gradient and withgradient: the gradient of a function of a model, as a tree in the model's shape."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .match import fit
from .pytree import Frame
from .state import Leaf, State, spec_of
from .tree import Mirror, walk


class Gradients(Mirror):
    """A gradient for each parameter in the shape of the model; None where the loss does not depend on one."""

    __slots__ = ()
    _what = "tree of gradients"

    def __repr__(self) -> str:
        lines = (f"  {path}: {g if g is None else tuple(g.shape)}" for path, g in self._found())
        return "Gradients(\n" + "\n".join(lines) + "\n)"

    def _found(self) -> Iterator[tuple[str, Tensor | None]]:
        return ((path, self._values[index]) for index, path in self._spec.unique.items())


def gradient(f: Callable[..., Any], model: Any, *args: Any, create_graph: bool = False) -> Any:
    """The gradient of `f(model, *args)` with respect to the model's parameters. See `withgradient`.

    >>> gradient(lambda m: (m["w"] ** 2).sum(), {"w": torch.tensor([1.0, 2.0])})["w"]
    tensor([2., 4.])
    """
    return withgradient(f, model, *args, create_graph=create_graph)[1]


def withgradient(
    f: Callable[..., Any], model: Any, *args: Any, state: State | Leaf | None = None, create_graph: bool = False
) -> tuple[Any, Any]:
    """`(value, grads)` of `f(model, *args)`: the loss, detached, and its gradient in the shape of the model.

    `f` returns the scalar loss, or a tuple whose first element is the loss; then `value` is the whole tuple, detached.
    `grads` has None where the loss does not depend on a parameter. Works inside `torch.no_grad()`. `.grad` is neither
    read nor written. `create_graph=True` lets one differentiate the gradients again.

    With `state`, the state decides who trains, whatever the parameters' `requires_grad` says: frozen leaves cost no
    gradient and keep no activations, thawed ones train. The flags are as before afterwards, whatever happens. Without,
    a module's parameters train where they require grad, and the tensors of other models always.

    Raises ValueError where the loss is no real scalar tensor, or depends on no parameter; TypeError where `f` is not
    callable; RuntimeError under reentrant activation checkpointing, which hides parameters (`use_reentrant=False`).

    >>> model = torch.nn.Linear(2, 1)
    >>> loss, grads = withgradient(lambda m, x: m(x).square().mean(), model, torch.ones(4, 2))
    >>> loss.shape, grads.weight.shape
    (torch.Size([]), torch.Size([1, 2]))
    """
    if not callable(f):
        raise TypeError(f"the function comes first: withgradient(f, model), but got {type(f).__name__}")
    spec, values = walk(model)
    if not values:
        raise ValueError("the model has no parameter, so no loss can depend on it")
    trains = _trains(values, model, state)
    with torch.enable_grad(), _requiring(values, trains, exact=state is not None):
        value = f(model, *args)
        loss = _loss(value)
        wanted = [i for i, trained in enumerate(trains) if trained]
        found = _differentiate(loss, [values[i] for i in wanted], create_graph) if wanted else []
    if all(g is None for g in found):
        why = "all of them are frozen; thaw some" if not any(trains) else _WHY
        raise ValueError(f"the loss depends on no parameter of the model: {why}")
    grads: list[Tensor | None] = [None] * len(values)
    for i, g in zip(wanted, found, strict=True):
        grads[i] = g
    tensors, frame = Frame.split(value)
    # What is, or views, a parameter would change with the next update.
    outputs = [t.detach().clone() if t.is_leaf or t._is_view() else t.detach() for t in tensors]
    return frame.join(outputs), grads[0] if spec.kind == "leaf" else Gradients(spec, grads)


_WHY = (
    "was it detached, computed under no_grad or inference_mode, or from another model? Reentrant activation "
    "checkpointing hides parameters too: pass use_reentrant=False to torch.utils.checkpoint"
)


def _trains(values: list[Tensor], model: Any, state: State | Leaf | None) -> list[bool]:
    if state is None:
        return [x.requires_grad or not isinstance(x, torch.nn.Parameter) for x in values]
    if not isinstance(state, State | Leaf):
        raise TypeError(f"withgradient(..., state=) takes the state tree, but got {type(state).__name__}")
    held, spec = [state] if isinstance(state, Leaf) else state._values, spec_of(state)
    fit(spec, model)
    return [not held[index].frozen for index in spec.unique]


@contextmanager
def _requiring(values: list[Tensor], trains: list[bool], exact: bool) -> Iterator[None]:
    """Parameters that train require grad for a while, and with `exact` no others do. A tensor with a history of its
    own stays as it is: its flag cannot be cleared, and differentiating through it is wanted."""
    changed = [(x, x.requires_grad) for x, t in zip(values, trains, strict=True) if x.is_leaf and x.requires_grad != t]
    changed = [(x, old) for x, old in changed if exact or not old]
    try:
        for x, old in changed:
            x.requires_grad_(not old)
        yield
    finally:
        for x, old in changed:
            x.requires_grad_(old)


def _loss(value: Any) -> Tensor:
    loss = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(loss, Tensor) or loss.ndim or loss.is_complex():
        came = f"a tensor of {loss.dtype} with shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"the loss must be one real number in a tensor (as .mean() or .sum() gives), but got {came}")
    return loss


def _differentiate(loss: Tensor, params: list[Tensor], create_graph: bool) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        return (None,) * len(params)
    found: tuple[Tensor | None, ...] = (None,)
    hidden = None
    try:
        found = torch.autograd.grad(loss, params, allow_unused=True, create_graph=create_graph)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        hidden = error
    if hidden or (any(g is None for g in found) and _has_checkpoint(loss)):
        raise RuntimeError(
            "reentrant activation checkpointing hides parameters from the gradient; "
            "pass use_reentrant=False to torch.utils.checkpoint"
        ) from hidden
    return found


def _has_checkpoint(loss: Tensor) -> bool:
    """Whether the graph below has a node of reentrant checkpointing, which may hide parameters."""
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node.name() == "CheckpointFunctionBackward":
                return True
            todo.extend(below for below, _ in node.next_functions)
    return False

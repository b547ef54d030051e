"""gradient and withgradient: the gradient of a function of a model, as a tree in the model's shape."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Concatenate, NamedTuple, TypeAlias, TypeVar, overload

import torch
from torch import Tensor

from .binding import Binding
from .containers import open_data
from .distributed.parallel import Parallel, parallel_of
from .leaf import Leaf
from .pytree import is_transforming
from .state import State, bind, require_state
from .text import ASSIGN_GRADIENTS, HIDDEN_PARAMETERS, OF_GRADIENTS, OF_NO_PARAMETER
from .tree import Mirror, TreeSpec, check_model, spec_of, values_of, walk

Model = TypeVar("Model")
TensorModel = TypeVar("TensorModel", bound=Tensor)
# What a loss returns: the loss, or a tuple that begins with it.
Value = TypeVar("Value", bound=Tensor | tuple[Any, ...])
LossFunction: TypeAlias = Callable[Concatenate[Model, ...], Value]


class Gradients(Mirror):
    """A gradient for each parameter in the shape of the model; None where the loss does not depend on one.

    It is navigated as the model is, and iterates over the gradients that there are, as `(path, tensor)`.

    >>> grads = gradient(lambda m: m(torch.ones(1, 2)).sum(), torch.nn.Linear(2, 1))
    >>> grads.bias.tolist(), {path: g.norm().item() for path, g in grads}
    ([1.0], {'weight': 1.4142135381698608, 'bias': 1.0})
    """

    __slots__ = ()
    _what = "tree of gradients"

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((path, g) for path, g in _by_path(self) if g is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __reversed__(self) -> Iterator[tuple[str, Tensor]]:
        return reversed(list(self))

    @classmethod
    def _hint(cls, name: str, here: Any) -> str:
        return OF_GRADIENTS.get(name, ASSIGN_GRADIENTS if name in here else "")

    def __repr__(self) -> str:
        lines = (f"  {path}: {None if g is None else tuple(g.shape)}" for path, g in _by_path(self))
        return "Gradients(\n" + "\n".join(lines) + "\n)"


def _by_path(grads: Gradients) -> Iterator[tuple[str, Tensor | None]]:
    values = values_of(grads)
    return ((path, values[index]) for index, path in spec_of(grads).leaves.items())


@overload
def gradient(
    f: LossFunction[TensorModel, Value],
    model: TensorModel,
    *args: Any,
    state: State | Leaf | None = None,
    create_graph: bool = False,
) -> Tensor: ...
@overload
def gradient(
    f: LossFunction[Model, Value],
    model: Model,
    *args: Any,
    state: State | Leaf | None = None,
    create_graph: bool = False,
) -> Gradients: ...
def gradient(
    f: LossFunction[Any, Any], model: Any, *args: Any, state: State | Leaf | None = None, create_graph: bool = False
) -> Gradients | Tensor:
    """The gradient of `f(model, *args)` with respect to the model's parameters. See `withgradient`.

    >>> gradient(lambda m: (m["w"] ** 2).sum(), {"w": torch.tensor([1.0, 2.0])})["w"]
    tensor([2., 4.])
    """
    return withgradient(f, model, *args, state=state, create_graph=create_graph)[1]


@overload
def withgradient(
    f: LossFunction[TensorModel, Value],
    model: TensorModel,
    *args: Any,
    state: State | Leaf | None = None,
    create_graph: bool = False,
) -> tuple[Value, Tensor]: ...
@overload
def withgradient(
    f: LossFunction[Model, Value],
    model: Model,
    *args: Any,
    state: State | Leaf | None = None,
    create_graph: bool = False,
) -> tuple[Value, Gradients]: ...
def withgradient(
    f: LossFunction[Any, Any], model: Any, *args: Any, state: State | Leaf | None = None, create_graph: bool = False
) -> tuple[Any, Gradients | Tensor]:
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
    if state is not None:
        require_state(state, "withgradient(..., state=)")
        return differentiate(f, model, args, bind(state, model), create_graph)
    spec, params = walk(model)
    trains = [x.requires_grad or not isinstance(x, torch.nn.Parameter) for x in params]
    parallel = parallel_of(model, params, tuple(spec.leaves.values()))
    return _differentiate(f, model, args, _Wanted(spec, params, trains, _flips(params, trains), parallel), create_graph)


def differentiate(
    f: LossFunction[Model, Value], model: Model, args: Iterable[Any], binding: Binding, create_graph: bool = False
) -> tuple[Value, Gradients | Tensor]:
    """`withgradient` of a model bound to a state, which decides who trains."""
    return _differentiate(f, model, args, _wanted(binding), create_graph)


@contextmanager
def recorded(f: Callable[..., Any], model: Any, args: Iterable[Any], binding: Binding) -> Iterator[tuple[Tensor, Any]]:
    """`(loss, value)`: the loss with its graph, whose backward pass may be run in the block, where the state decides
    who trains; and what `f` returned, detached."""
    wanted = _wanted(binding)
    with torch.enable_grad(), _flipped(wanted.flips):
        value = f(model, *args)
        loss = _loss(value)
        if not loss.requires_grad:
            raise independent_loss(wanted.trains)
        yield loss, _detached(value)


def _wanted(binding: Binding) -> "_Wanted":
    trains = [not record.frozen for record in binding.records]
    flips = _flips(binding.params, trains)
    if len(flips) != binding.flips:
        binding.flips = len(flips)
        binding.warn_of_flags()
    return _Wanted(binding.walked, binding.params, trains, flips, binding.parallel)


class _Wanted(NamedTuple):
    """The parameters of a model, which of them train, and whose `requires_grad` must be flipped for that."""

    spec: TreeSpec
    params: list[Tensor]
    trains: list[bool]
    flips: list[Tensor]
    parallel: Parallel | None


def _differentiate(
    f: Callable[..., Any], model: Any, args: Iterable[Any], wanted: _Wanted, create_graph: bool
) -> tuple[Any, Any]:
    spec, params, trains, flips, parallel = wanted
    if not params:
        if callable(model) and not isinstance(model, torch.nn.Module):
            raise TypeError("the function comes first, then the model: withgradient(f, model)")
        check_model(model, "withgradient(f, model)")
        raise ValueError("the model has no parameter, so no loss can depend on it")
    tracking = nullcontext() if torch.is_grad_enabled() else torch.enable_grad()
    with tracking, _flipped(flips) if flips else nullcontext():
        places = [i for i, wants in enumerate(trains) if wants]
        if parallel is None:
            value = f(model, *args)
            loss = _loss(value)
            found = _backward(loss, [params[i] for i in places], create_graph) if places else []
        else:
            value, found = parallel.differentiate(lambda: f(model, *args), _loss, args, trains, create_graph)
    if all(g is None for g in found):
        raise independent_loss(trains)
    source = iter(found)
    grads = [next(source) if wants else None for wants in trains]
    return _detached(value), grads[0] if spec.kind == "leaf" else Gradients(spec, grads)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        # What is, or views, a parameter would change with the next update.
        own = torch.compiler.is_compiling() or value.is_leaf or value._is_view()
        return value.detach().clone() if own else value.detach()
    if type(value) is tuple:
        return tuple(map(_detached, value))
    tensors, opened = open_data(value)
    return opened.combine(map(_detached, tensors)) if tensors else value


def independent_loss(trains: list[bool]) -> ValueError:
    """The error for a loss that depends on no parameter that trains."""
    why = OF_NO_PARAMETER if any(trains) else "all of them are frozen; thaw some, or let some require grad"
    return ValueError(f"the loss depends on no parameter of the model: {why}")


def _flips(params: list[Tensor], trains: list[bool]) -> list[Tensor]:
    """Those whose `requires_grad` must change; a tensor with a history keeps it, to be differentiated through."""
    flips = [x for x, wants in zip(params, trains, strict=True) if x.requires_grad != wants and x.is_leaf]
    if flips and is_transforming():
        raise TypeError("inside torch.func and torch.compile, set requires_grad before, or use torch.func.grad")
    return flips


@contextmanager
def _flipped(tensors: list[Tensor]) -> Iterator[None]:
    """Within, these tensors have the opposite `requires_grad`."""
    old = [x.requires_grad for x in tensors]
    try:
        for x in tensors:
            x.requires_grad_(not x.requires_grad)
        yield
    finally:
        for x, flag in zip(tensors, old, strict=True):
            x.requires_grad_(flag)


def _loss(value: Any) -> Tensor:
    loss = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(loss, Tensor) or loss.ndim or loss.is_complex():
        came = f"a tensor of {loss.dtype} with shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"the loss must be one real number in a tensor (as .mean() or .sum() gives), but got {came}")
    return loss


def _backward(loss: Tensor, params: list[Tensor], create_graph: bool) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        return (None,) * len(params)
    try:
        found = _grad(loss, params, create_graph)
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            require_no_checkpoint(loss, error)
        raise
    if any(g is None for g in found):
        require_no_checkpoint(loss)
    return found


def require_no_checkpoint(loss: Tensor, hidden: Exception | None = None) -> None:
    """RuntimeError where reentrant checkpointing may hide parameters. `hidden` is the error that shows that it does."""
    if hidden or _has_checkpoint(loss):
        raise RuntimeError(HIDDEN_PARAMETERS) from hidden


def _grad(loss: Tensor, params: list[Tensor], create_graph: bool) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, None where the loss does not depend on a parameter.

    Calls autograd's engine directly: what `grad` checks is known here, and costs a sixth of a small model's step.
    """
    if _ENGINE is None or is_transforming():
        return torch.autograd.grad(loss, params, allow_unused=True, create_graph=create_graph)
    start = (torch.ones_like(loss, memory_format=torch.preserve_format),)
    inputs = tuple(params)
    return _ENGINE.run_backward((loss,), start, create_graph, create_graph, inputs, True, accumulate_grad=False)


_ENGINE: Any = getattr(torch.autograd.Variable, "_execution_engine", None)


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

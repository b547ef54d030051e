"""The parameters of a model: as a list, mapped, by the modules they are in, as one long vector, as views of one."""

import glob
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from .distributed.sharding import any_dtensor
from .engine.layout import views_like
from .gradient import Gradients
from .grads import scatter
from .leaf import Leaf
from .pytree import map_tensors, places, unwritable
from .rebuild import like_parameter, rebuild
from .state import State
from .tree import check_model, rooted, walk

Model = TypeVar("Model")
Tree = TypeVar("Tree")


@overload
def trainables(model: Any, path: Literal[False] = False) -> list[Tensor]: ...
@overload
def trainables(model: Any, path: Literal[True]) -> list[tuple[str, Tensor]]: ...
def trainables(model: Any, path: bool = False) -> list[Tensor] | list[tuple[str, Tensor]]:
    """The model's parameters in order, a tied one once; with `path`, as `(path, tensor)` pairs.

    >>> [name for name, x in trainables(torch.nn.Linear(2, 3), path=True)]
    ['weight', 'bias']
    """
    spec, values = walk(model)
    if not values:
        check_model(model, "trainables(model)")
    return [(spec.leaves[i], x) for i, x in enumerate(values)] if path else values


def tree_map(f: Callable[..., Tensor], tree: Tree, *others: Any) -> Tree:
    """`f` of each parameter of a model, or of each of some gradients, and of what is at its place in the others. Gives
    a tree like the first: a new model (a structural copy, as `update(..., inplace=False)` makes), or gradients.

    The others are models or gradients of the same shape, or dicts by dotted name. Where one of them has nothing, as
    gradients of a frozen layer, what the first has stays; where the first have nothing and other gradients something,
    that is refused. A tied parameter is visited once. Of a model whose parameters require grad the result has a
    history; under `torch.no_grad()` it has new parameters.

    Of a state it is `f` of each tensor of the momenta, as for moving them: `tree_map(lambda t: t.to(device), state)`.

    ValueError where the trees do not fit each other.

    >>> model = {"w": torch.tensor([1.0, 2.0])}
    >>> grads = gradient(lambda m: (m["w"] ** 2).sum(), model)
    >>> tree_map(lambda x, g: x - 0.1 * g, model, grads)
    {'w': tensor([0.8000, 1.6000])}
    """
    if isinstance(tree, State | Leaf):
        return map_tensors(f, tree, *others)
    if any(isinstance(other, State | Leaf) for other in others):
        raise TypeError("tree_map takes models and gradients together, or states; fluxpy.leaves goes over the leaves")
    spec, values = rooted(tree) if isinstance(tree, Gradients) else walk(tree)
    columns = [scatter(spec, other, "values") for other in others]
    gradients = [column for other, column in zip(others, columns, strict=True) if isinstance(other, Gradients)]
    new: list[Any] = list(values)
    for index, path in spec.leaves.items():
        x = values[index]
        args = [x, *(column.get(index) for column in columns)]
        if all(arg is not None for arg in args):
            new[index] = f(*args)
            if not isinstance(new[index], Tensor):
                raise TypeError(f"tree_map: f must return a tensor, but gave {new[index]!r} at {path!r}")
        elif x is not None:
            new[index] = x.detach().clone() if x.is_leaf else x.clone()
        elif any(column.get(index) is not None for column in gradients):
            raise ValueError(
                f"tree_map: the first gradients have nothing at {path!r}, where others have something that would be "
                "lost; gradients of different parts are added by name, in a dict, which update takes too"
            )
    if isinstance(tree, Gradients):
        return cast(Tree, Gradients(spec, new))
    return rebuild(tree, spec, values, [like_parameter(t, x) for t, x in zip(new, values, strict=True)])


def module_paths(model: Any, *types: type[nn.Module]) -> list[str]:
    """Glob patterns for all parameters in modules of these types, for `select` and for the mapping of `setup`. A module
    without parameters has none; one that stands at several places is named by its first.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    >>> module_paths(model, torch.nn.LayerNorm)
    ['1.*']
    >>> state = setup(AdamW(), model)
    >>> _ = adjust(select(state, "*bias", *module_paths(model, torch.nn.LayerNorm)), weight_decay=0.0)
    """
    if not types or not all(isinstance(kind, type) for kind in types):
        raise TypeError(f"module_paths takes the model and classes of modules, as torch.nn.LayerNorm, but got {types}")
    check_model(model, "module_paths(model, *types)")
    found = [(path, x) for path, x in places(model) if isinstance(x, types) and next(x.parameters(), None) is not None]
    return [glob.escape(path) + ".*" if path else "*" for path, _ in found]


def destructure(model: Model) -> tuple[Tensor, Callable[[Tensor], Model]]:
    """`(flat, rebuild)`: all parameters as one vector, and the way back to a model of the same kind.

    Tied parameters stand in the vector once. Where dtypes differ, the vector has the one they promote to, and `rebuild`
    restores each parameter's own. Differentiable both ways. `rebuild` copies the structure as `update(...,
    inplace=False)` does; it raises ValueError for a vector of another length.

    >>> flat, rebuild = destructure({"w": torch.ones(2), "b": torch.zeros(1)})
    >>> rebuild(2 * flat + 1)
    {'w': tensor([3., 3.]), 'b': tensor([1.])}
    """
    spec, values = walk(model)
    if not values:
        check_model(model, "destructure(model)")
    _require_one_process("destructure", values)
    sizes = [x.numel() for x in values]
    dtype = torch.get_default_dtype() if not values else values[0].dtype
    for x in values:
        dtype = torch.promote_types(dtype, x.dtype)
    flat = torch.cat([x.reshape(-1).to(dtype) for x in values]) if values else torch.zeros(0, dtype=dtype)

    def back(flat: Tensor) -> Model:
        if not isinstance(flat, Tensor) or flat.shape != (sum(sizes),):
            came = tuple(flat.shape) if isinstance(flat, Tensor) else type(flat).__name__
            raise ValueError(f"this model has {sum(sizes)} parameters: rebuild takes shape ({sum(sizes)},), got {came}")
        parts = [
            (part.real if part.is_complex() and not x.is_complex() else part).reshape(x.shape).to(x.dtype)
            for part, x in zip(flat.split(sizes), values, strict=True)
        ]
        # Parts of a vector without a history would share its memory with the new model.
        parts = [p if p.requires_grad else p.clone() for p in parts]
        return rebuild(model, spec, values, [like_parameter(p, x) for p, x in zip(parts, values, strict=True)])

    return flat, back


def _require_one_process(verb: str, values: list[Tensor]) -> None:
    if any_dtensor(values):
        raise ValueError(f"{verb} is for one process: these parameters are spread over several")


def flatten_parameters(model: Model, *, grad: bool = False) -> Model:
    """Lay the parameters of a model side by side in memory, one buffer for each dtype and device; returns the model.

    A model of many small tensors is then updated as one long tensor. Nothing else changes: the parameters are the same
    objects with the same numbers, and names, ties, hooks, `state_dict` and saving are as before. With `grad`, each
    gets a `.grad` that lies in one buffer too; zero it by `model.zero_grad(set_to_none=False)`, which keeps it there.

    What moves parameters elsewhere, as `model.to(...)`, undoes it: updates stay right, and this may be called again.
    Parameters in another memory format become contiguous. Raises ValueError where one cannot be moved: a tensor with
    a history, or one that shares memory with another.

    >>> model = flatten_parameters(torch.nn.Linear(2, 3))
    >>> model.weight.untyped_storage().data_ptr() == model.bias.untyped_storage().data_ptr()
    True
    """
    check_model(model, "flatten_parameters(model)")
    spec, values = walk(model)
    _require_one_process("flatten_parameters", values)
    groups: dict[Any, list[Tensor]] = {}
    ends: dict[Any, tuple[int, str]] = {}
    for path, x in sorted(zip(spec.leaves.values(), values, strict=True), key=lambda pair: pair[1].data_ptr()):
        end, other = ends.get(x.device, (0, ""))
        if not x.is_leaf or unwritable(x) or (x.numel() and x.data_ptr() < end):
            why = f"it shares memory with {other!r}" if other else "it is expanded"
            if not x.is_leaf:
                why = "it has a history"
            raise ValueError(f"flatten_parameters cannot move {path!r}: {why}")
        ends[x.device] = x.data_ptr() + x.nbytes, path
    for x in values:
        groups.setdefault((x.dtype, x.device), []).append(x)
    with torch.inference_mode(False), torch.no_grad():
        for xs in groups.values():
            flat = torch.cat([x.detach().reshape(-1) for x in xs])
            shapes = [x.detach().contiguous() for x in xs]
            for x, part in zip(xs, views_like(flat, shapes), strict=True):
                x.data = part
            if grad:
                room = torch.zeros_like(flat)
                for x, part in zip(xs, views_like(room, shapes), strict=True):
                    x.grad = part if x.grad is None else part.copy_(x.grad)
    return model

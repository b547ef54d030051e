"""What a model is made of: parameters, modules and the containers of optree. Only this file imports optree."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

NAMESPACE = "fluxpy"


def is_parameter(x: Any) -> bool:
    """Whether a tensor is trained: floating-point and complex ones are, integers and flags are not."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def unwrap(module: Any) -> Any:
    """The module inside `torch.compile`, DataParallel, DistributedDataParallel and a wrapper that checkpoints
    activations: they are no part of a path."""
    while isinstance(module, nn.Module):
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif "_orig_mod" in module._modules:  # torch.compile; its class lives in a module that is slow to import
            module = module._orig_mod
        elif "_checkpoint_wrapped_module" in module._modules:
            module = module._modules["_checkpoint_wrapped_module"]
        else:
            break
    return module


def fsdp_module() -> Any:
    """The class of what `fully_shard` and `replicate` make of a module; in a program that never imported them, none."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def put_back(module: Any) -> None:
    """Let FSDP2 put parameters where they belong: after a forward pass without a backward one, whole tensors stand in
    their places."""
    if isinstance(module, fsdp_module()):
        module.reshard()


class Level(NamedTuple):
    """One level of a model: what it holds, under which keys, and how to make another one like it."""

    kind: str
    keys: tuple[Any, ...]
    children: list[Any]
    make: Any = None


def level(x: Any) -> Level | None:
    """The children of a container; None of anything else."""
    if isinstance(x, nn.Module):
        put_back(x)
        sequence = isinstance(x, nn.Sequential | nn.ModuleList | nn.ParameterList)
        # A sequence with parameters of its own keeps the positions of its layers.
        inside = {**x._modules, **x._parameters} if sequence else {**x._parameters, **x._modules}
        return Level("sequence" if sequence else "record", tuple(inside), list(inside.values()))
    if optree.tree_is_leaf(x, none_is_leaf=True, namespace=NAMESPACE):
        return None
    children, metadata, entries, make = optree.tree_flatten_one_level(x, none_is_leaf=True, namespace=NAMESPACE)
    keys = getattr(x, "_fields", None) or tuple(entries)
    positions = isinstance(x, list | tuple) or (not isinstance(x, Mapping) and keys == tuple(range(len(keys))))
    kind = "sequence" if positions else "mapping"
    return Level(kind, keys, list(children), lambda new: make(metadata, new))


class Skeleton:
    """A pytree without its tensors. Two are equal where the same tensors fit both; other data do not count.

    `parts` are the leaves of the pytree in order, with `HOLE` in place of each tensor.
    """

    __slots__ = ("parts", "spec")

    def __init__(self, spec: Any, parts: list[Any]) -> None:
        self.spec, self.parts = spec, parts

    def __repr__(self) -> str:
        return f"Skeleton({self.parts!r})"

    def combine(self, tensors: Iterable[Any]) -> Any:
        """The pytree again, with other tensors."""
        source = iter(tensors)
        return optree.tree_unflatten(self.spec, [next(source) if part is HOLE else part for part in self.parts])

    def bare(self) -> Any:
        """The pytree with `HOLE` in place of its tensors."""
        return optree.tree_unflatten(self.spec, self.parts)

    def places(self) -> list[str]:
        """Where each part is, written as in Python: `[1].m`."""
        return [accessor.codify("") for accessor in self.spec.accessors()]

    def map(self, f: Callable[[Any], Any]) -> "Skeleton":
        """The skeleton of `f` of the pytree, for an `f` that changes numbers and passes tensors on."""
        parts, spec = optree.tree_flatten(f(self.bare()), none_is_leaf=True, namespace=NAMESPACE)
        return Skeleton(spec, parts)

    def fits(self, other: "Skeleton") -> bool:
        """Whether tensors and numbers lie at the same places in both."""
        if self.spec != other.spec:
            return False
        return [part is HOLE for part in self.parts] == [part is HOLE for part in other.parts]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and self.fits(other)

    def __hash__(self) -> int:
        return hash(len(self.parts))


class HOLE:
    """Marks the place of a tensor."""


def partition(tree: Any) -> tuple[list[Tensor], Skeleton]:
    """The tensors of a pytree, and the skeleton to put them back into."""
    parts, spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
    tensors = []
    for i, part in enumerate(parts):
        if isinstance(part, Tensor):
            tensors.append(part)
            parts[i] = HOLE
    return tensors, Skeleton(spec, parts)


def skeleton_of(tree: Any) -> Skeleton:
    """A pytree as a skeleton with everything still in it, tensors too."""
    parts, spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
    return Skeleton(spec, parts)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a pytree, in order."""
    parts = optree.tree_leaves(tree, none_is_leaf=True, namespace=NAMESPACE)
    return [part for part in parts if isinstance(part, Tensor)]


def map_tensors(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """A pytree with `f` of each tensor, and of those at its place in the others."""
    return optree.tree_map(f, tree, *others, namespace=NAMESPACE)


def entries_of(tree: Any) -> list[tuple[str, Any]]:
    """`(place, value)` of everything in a pytree, a place written as in Python: `[1].m`."""
    skeleton = skeleton_of(tree)
    return list(zip(skeleton.places(), skeleton.parts, strict=True))


def register(cls: type, flatten: Any, unflatten: Any) -> None:
    """Make a class a pytree, of optree (namespace "fluxpy") and of torch (for `torch.func`).

    `flatten(x)` gives (children, metadata), `unflatten(metadata, children)` the object again.
    """
    optree.register_pytree_node(cls, flatten, unflatten, namespace=NAMESPACE)
    torch_pytree.register_pytree_node(
        cls,
        lambda x: (list((out := flatten(x))[0]), out[1]),
        lambda children, metadata: unflatten(metadata, tuple(children)),
        serialized_type_name=f"{NAMESPACE}.{cls.__name__}",
    )


# Whether a `torch.func` transform is running over a tensor, whose numbers and memory cannot be seen then.
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]


def is_transforming() -> bool:
    """Whether a `torch.func` transform or `torch.compile` is looking on, so that nothing may be kept between steps."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def overlaps_itself(x: Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor: it cannot be written in place."""
    if is_wrapped(x) or x.is_contiguous():
        return False
    return torch._debug_has_internal_overlap(x) == 1  # pyright: ignore[reportPrivateImportUsage]


def unwritable(x: Tensor) -> bool:
    """Whether a tensor cannot be written in place: expanded, or made in inference mode."""
    return overlaps_itself(x) or (x.is_inference() and not torch.is_inference_mode_enabled())


def memory(x: Tensor) -> int:
    """What tensors that share memory have in common; of an empty tensor, itself."""
    return id(x) if is_wrapped(x) or not x.numel() or x.is_meta else x.untyped_storage().data_ptr()


def apart(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, cloned where they share memory with `others`, with each other, or within themselves."""
    taken, found = set(map(memory, others)), []
    for t in tensors:
        place = memory(t)
        if place in taken or overlaps_itself(t):
            t = t.clone(memory_format=torch.contiguous_format)
            place = memory(t)
        found.append(t)
        taken.add(place)
    return found

"""What a model is made of: parameters, modules and the containers of optree. Only this file imports optree."""

from collections.abc import Iterable, Mapping
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
    """The module inside `torch.compile`, DataParallel and DistributedDataParallel: they are no part of a path."""
    while isinstance(module, nn.Module):
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif "_orig_mod" in module._modules:  # torch.compile; its class lives in a module that is slow to import
            module = module._orig_mod
        else:
            break
    return module


class Level(NamedTuple):
    """One level of a model: what it holds, under which keys, and how to make another one like it."""

    kind: str
    keys: tuple[Any, ...]
    children: list[Any]
    make: Any = None


def level(x: Any) -> Level | None:
    """The children of a container; None of anything else."""
    if isinstance(x, nn.Module):
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


class Frame:
    """What a pytree is without its tensors. Equal to another where the tensors lie alike; other data do not count."""

    def __init__(self, tree: Any) -> None:
        self.parts, self.spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)

    @classmethod
    def split(cls, tree: Any) -> tuple[list[Tensor], "Frame"]:
        """The tensors of a pytree, and the frame to put them back into."""
        frame = cls(tree)
        tensors = [part for part in frame.parts if isinstance(part, Tensor)]
        frame.parts = [_HOLE if isinstance(part, Tensor) else part for part in frame.parts]
        return tensors, frame

    def join(self, tensors: Iterable[Any]) -> Any:
        """The pytree again, with other tensors."""
        source = iter(tensors)
        return optree.tree_unflatten(self.spec, [next(source) if part is _HOLE else part for part in self.parts])

    def __eq__(self, other: object) -> bool:
        holes = [part is _HOLE for part in self.parts]
        return isinstance(other, Frame) and self.spec == other.spec and holes == [p is _HOLE for p in other.parts]

    def __hash__(self) -> int:
        return hash(len(self.parts))


class _HOLE:
    """Where a tensor stood."""


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


def is_wrapped(x: Tensor) -> bool:
    """Whether a `torch.func` transform is running over this tensor, whose numbers and memory cannot be seen."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]


def is_transforming() -> bool:
    """Whether a `torch.func` transform or `torch.compile` is looking on, so that nothing may be kept between steps."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


def overlaps_itself(x: Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor: it cannot be written in place."""
    return not is_wrapped(x) and torch._debug_has_internal_overlap(x) == 1  # pyright: ignore[reportPrivateImportUsage]


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
        fresh = memory(t) not in taken and not overlaps_itself(t)
        found.append(t if fresh else t.clone(memory_format=torch.contiguous_format))
        taken.add(memory(found[-1]))
    return found

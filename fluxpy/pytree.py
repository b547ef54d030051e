"""What a model is made of: parameters, modules and the containers of optree. Only this file imports optree."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, UntypedStorage, nn
from torch.autograd import forward_ad

from .text import join

NAMESPACE = "fluxpy"
PLAIN = Tensor, nn.Parameter  # the classes of tensors that are no more than their numbers


def is_parameter(x: Any) -> bool:
    """Whether a tensor is trained: floating-point and complex ones are, integers and flags are not."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def unwrap(module: Any) -> Any:
    """The module inside `torch.compile`, DataParallel, DistributedDataParallel and a wrapper that checkpoints
    activations: they are no part of a path."""
    while isinstance(module, nn.Module):
        if isinstance(module, _WRAPPERS):
            module = module.module
        elif "_orig_mod" in module._modules:  # torch.compile; its class lives in a module that is slow to import
            module = module._orig_mod
        elif "_checkpoint_wrapped_module" in module._modules:
            module = module._modules["_checkpoint_wrapped_module"]
        else:
            break
    return module


_WRAPPERS = nn.DataParallel, nn.parallel.DistributedDataParallel
_SEQUENCES = nn.Sequential, nn.ModuleList, nn.ParameterList


def fsdp_module() -> Any:
    """The class that `fully_shard` and `replicate` give a module; `()` in a program that never imported them."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def put_back(module: Any) -> None:
    """Let FSDP2 put the sharded parameters back into a module, which holds whole tensors after a forward pass without a
    backward pass."""
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
        sequence = isinstance(x, _SEQUENCES)
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


def places(model: Any, wrappers: bool = False) -> Iterator[tuple[str, Any]]:
    """(path, what is there) of each place in a model, from the outside in, in an order that is the same on all
    processes; a container at the first of its places alone. With `wrappers`, what `unwrap` looks through has a place
    of its own."""
    todo, seen = [("", model)], dict[int, Any]()  # kept alive, so that no other object gets its identity
    while todo:
        path, x = todo.pop()
        x = x if wrappers else unwrap(x)
        if id(x) in seen:
            continue
        yield path, x
        if (inside := level(x)) is not None:
            seen[id(x)] = x
            children = zip(reversed(inside.keys), reversed(inside.children), strict=True)
            todo += [(join(path, key), child) for key, child in children]


def modules_in(model: Any, wrappers: bool = True) -> list[nn.Module]:
    """All modules of a model, each once, in the order of `places`."""
    return [x for _, x in places(model, wrappers) if isinstance(x, nn.Module)]


class Structure:
    """The structure of a pytree, without its leaves. Equal ones are one object, except inside `torch.compile`.

    `plan` is nested tuples `(class, keys, children)` with a number for each leaf, which `torch.compile` can follow; or
    the spec of optree, if there are other containers than tuples, lists and dicts.
    """

    __slots__ = ("_names", "flat", "plan")
    known: ClassVar[dict[Any, "Structure"]] = {}  # by the spec of optree
    flats: ClassVar[dict[type, "Structure"]] = {}  # by that class
    specs: ClassVar[dict[Any, Any]] = {}  # of optree, by plan
    MOST: ClassVar[int] = 10_000  # kept at a time: users may pass a new structure at each call

    def __init__(self, plan: Any) -> None:
        self.plan = plan
        self._names: list[str] = []
        self.flat: Any = None  # for a named tuple of leaves alone, its constructor: faster than optree

    @staticmethod
    def of(spec: Any) -> "Structure":
        """The structure with a spec of optree."""
        found = Structure.known.get(spec)
        if found is None:
            try:
                plan = take_apart(optree.tree_unflatten(spec, range(spec.num_leaves)), [])
            except Exception:  # no plan; or a named tuple that takes no numbers in place of its parts
                plan = spec
            if len(Structure.known) >= Structure.MOST:
                Structure.known.clear()
                Structure.specs.clear()
            found = Structure.known[spec] = Structure(plan)
            Structure.specs[plan] = spec
            if spec.kind is optree.PyTreeKind.NAMEDTUPLE and spec.num_nodes == spec.num_leaves + 1:
                found.flat = spec.type._make
                Structure.flats[spec.type] = found
        return found

    @property
    def spec(self) -> Any:
        """The spec of optree."""
        if not isinstance(self.plan, int | tuple):
            return self.plan
        if self.plan not in Structure.specs:
            example = put_together(self.plan, range(1_000_000))
            Structure.specs[self.plan] = optree.tree_structure(example, none_is_leaf=True, namespace=NAMESPACE)
        return Structure.specs[self.plan]

    @property
    def names(self) -> list[str]:
        """The name of each leaf, written as in Python: `["[0].m", "[0].t"]`."""
        if not self._names:
            self._names = [accessor.codify("").removeprefix(".") for accessor in self.spec.accessors()]
        return self._names

    def build(self, parts: list[Any]) -> Any:
        """The pytree of these leaves."""
        if torch.compiler.is_compiling():
            return put_together(self.plan, parts)
        return optree.tree_unflatten(self.spec, parts) if self.flat is None else self.flat(parts)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.plan == other.plan)

    def __hash__(self) -> int:
        return hash(self.plan)


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves of a pytree, and its structure."""
    if torch.compiler.is_compiling():
        parts: list[Any] = []
        return parts, Structure(take_apart(tree, parts))
    if type(tree) is Tensor:
        return [tree], _LONE
    flat = Structure.flats.get(type(tree))
    if flat is not None and _LEAVES.issuperset(map(type, tree)):
        return list(tree), flat
    parts, spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
    return parts, Structure.of(spec)


def take_apart(tree: Any, parts: list[Any]) -> Any:
    """The plan of a pytree. Appends its leaves to `parts`."""
    kind: Any = type(tree)
    if kind in (tuple, list) or (issubclass(kind, tuple) and hasattr(tree, "_fields")):
        return kind, (), tuple([take_apart(child, parts) for child in tree])
    if kind is dict:
        return kind, tuple(sorted(tree)), tuple([take_apart(tree[key], parts) for key in sorted(tree)])
    if not optree.tree_is_leaf(tree, none_is_leaf=True, namespace=NAMESPACE):
        raise TypeError(f"torch.compile can follow rules whose state is made of tuples, lists and dicts, not {kind}")
    parts.append(tree)
    return len(parts) - 1


def put_together(plan: Any, parts: Sequence[Any]) -> Any:
    """The pytree of a plan and its leaves."""
    if isinstance(plan, int):
        return parts[plan]
    if not isinstance(plan, tuple):
        raise TypeError(f"torch.compile can follow rules whose state is made of tuples, lists and dicts, not {plan}")
    kind, keys, plans = plan
    inside = [put_together(child, parts) for child in plans]
    if kind is dict:
        return dict(zip(keys, inside, strict=True))
    return kind(inside) if kind in (tuple, list) else kind(*inside)


_LONE = Structure.of(optree.treespec_leaf(none_is_leaf=True, namespace=NAMESPACE))  # a leaf alone
_LONE.flat = itemgetter(0)
_LEAVES = {Tensor, int, float}  # types that are never containers


class Skeleton:
    """A pytree without its tensors. `parts` are its leaves in order, with `HOLE` in place of each tensor.

    Two are equal if they have the same structure, with tensors in the same places; their numbers do not count.
    """

    __slots__ = ("parts", "spec")

    def __init__(self, spec: Structure, parts: list[Any]) -> None:
        self.spec, self.parts = spec, parts

    def __repr__(self) -> str:
        return f"Skeleton({self.parts!r})"

    def combine(self, tensors: Iterable[Any]) -> Any:
        """The pytree again, with other tensors."""
        source = iter(tensors)
        return self.spec.build([next(source) if part is HOLE else part for part in self.parts])

    def bare(self) -> Any:
        """The pytree with `HOLE` in place of its tensors."""
        return self.spec.build(self.parts)

    def map(self, f: Callable[[Any], Any]) -> "Skeleton":
        """The skeleton of `f` of the pytree, for an `f` that changes numbers and passes tensors on."""
        parts, spec = flatten(f(self.bare()))
        return Skeleton(spec, parts)

    def fits(self, other: "Skeleton") -> bool:
        """Whether tensors and numbers lie at the same places in both."""
        if self.spec is not other.spec and self.spec != other.spec:
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
    parts, spec = flatten(tree)
    tensors = []
    for i, part in enumerate(parts):
        if isinstance(part, Tensor):
            tensors.append(part)
            parts[i] = HOLE
    return tensors, Skeleton(spec, parts)


def skeleton_of(tree: Any) -> Skeleton:
    """The structure and the leaves of a pytree as a skeleton that still has the tensors in it."""
    parts, spec = flatten(tree)
    return Skeleton(spec, parts)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a pytree, in order."""
    parts = optree.tree_leaves(tree, none_is_leaf=True, namespace=NAMESPACE)
    return [part for part in parts if isinstance(part, Tensor)]


def map_tensors(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """A pytree with `f` of each tensor, and of those at its place in the others."""
    return optree.tree_map(f, tree, *others, namespace=NAMESPACE)


def entries_of(tree: Any) -> list[tuple[str, Any]]:
    """`(name, value)` of everything in a pytree, a name written as in Python: `[1].m`."""
    parts, spec = flatten(tree)
    return list(zip(spec.names, parts, strict=True))


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


# Whether a tensor is wrapped by a `torch.func` transform: its numbers and its memory cannot be seen.
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]


def is_transforming() -> bool:
    """Whether a `torch.func` transform or `torch.compile` is at work, so that nothing may be kept between steps."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def is_forward_mode() -> bool:
    """Whether tensors may carry tangents, of `torch.autograd.forward_ad`."""
    return forward_ad._current_level >= 0


@contextmanager
def uncast() -> Iterator[None]:
    """Within, no autocast narrows arithmetic: it is for losses, not for rules and weights."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Within, what is computed is not narrowed and not recorded, and may be kept and written to later."""
    with torch.inference_mode(False), torch.no_grad(), uncast():
        yield


def is_unseen(x: Tensor) -> bool:
    """Whether a transform or `torch.compile` hides the numbers and the memory of a tensor."""
    return torch.compiler.is_compiling() or is_wrapped(x)


def overlaps_itself(x: Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor: it cannot be written in place."""
    hidden = is_unseen(x) or x.is_contiguous()
    return not hidden and torch._debug_has_internal_overlap(x) == 1  # pyright: ignore[reportPrivateImportUsage]


def unwritable(x: Tensor) -> bool:
    """Whether a tensor cannot be written in place: expanded, or made in inference mode."""
    if torch.compiler.is_compiling():
        return False
    return overlaps_itself(x) or (x.is_inference() and not torch.is_inference_mode_enabled())


def memory(x: Tensor) -> int:
    """What tensors that share memory have in common; of one that has none, as on the meta device, its identity."""
    try:
        return (not is_wrapped(x) and x.untyped_storage().data_ptr()) or id(x)
    except RuntimeError:  # a DTensor, which stands for others
        return id(x)


def memories(tensors: Iterable[Tensor]) -> list[int]:
    """`memory` of each of many tensors, mostly without a Python frame for each."""
    tensors = list(tensors)
    with suppress(RuntimeError):  # as above
        if not any(map(is_wrapped, tensors)):
            found = map(UntypedStorage.data_ptr, map(Tensor.untyped_storage, tensors))
            return [place or id(x) for place, x in zip(found, tensors, strict=True)]
    return [memory(x) for x in tensors]


def shares(x: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether a tensor shares memory with others. `torch.compile` sees no memory: there, whether it is one of them."""
    if torch.compiler.is_compiling():
        return any(x is other for other in others)
    return memory(x) in set(map(memory, others))


def are_apart(tensors: list[Tensor]) -> bool:
    """Whether each of these tensors plainly has memory of its own, at a fraction of what `apart` costs."""
    if torch.compiler.is_compiling() or any(map(is_wrapped, tensors)):
        return False
    places = set(memories(tensors))
    dense = all(map(Tensor.is_contiguous, tensors)) or not any(map(overlaps_itself, tensors))
    return len(places) == len(tensors) and dense and places.isdisjoint(map(id, tensors))


def apart(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, cloned where they share memory with `others`, with each other, or within themselves."""
    if torch.compiler.is_compiling():
        return [t.clone() if shares(t, others) else t for t in tensors]
    taken, found = set(map(memory, others)), []
    for t in tensors:
        place = memory(t)
        if place in taken or overlaps_itself(t) or (place == id(t) and t._is_view()):  # of what, no memory tells
            t = t.clone(memory_format=torch.contiguous_format)
            place = memory(t)
        found.append(t)
        taken.add(place)
    return found

"""Binding: a model bound to the shape of a state, so that from step to step nobody walks the model again."""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .cached import cached
from .distributed.parallel import Parallel, parallel_of, reshard
from .distributed.sharding import any_dtensor, local_tensors, sharding_of
from .pytree import level, unwrap
from .text import CHANGED_FORM, FLAGS_CHANGED, NO_BRANCH, OF_DTENSORS, form, join, names_of
from .tree import TreeSpec, explore


class Binding:
    """A model that fits `spec`: its parameters and their paths, in the order of the model.

    ValueError names the place where the model has another shape. `matches` tells, at almost no cost, whether a model is
    the same as before: each container must hold the same objects. A module is not kept alive; when it dies, `forget` is
    called. The argument `records` is in the order of the tree's numbers, the attribute in that of the parameters.
    """

    def __init__(self, spec: TreeSpec, model: Any, records: Sequence[Any] = (), walked: Any = None) -> None:
        if spec.kind in ("slice", "selection"):
            raise ValueError(NO_BRANCH)
        self.spec = self.walked = spec
        if is_compiling():  # which would check by the identity of each object whether a graph can be used again
            self.params = parameters_at(spec, model)
        else:
            self.walked, values, self.containers = walked or explore(model)
            if self.walked != spec:
                raise ValueError(difference(spec, self.walked, ""))
            self.params: list[Tensor] = [values[j] for j in self.walked.leaves]
        # Whether any is spread over processes. The engine steps `local`, what this process holds of them.
        self.spread = any_dtensor(self.params)
        self.local = local_tensors(self.params) if self.spread else self.params
        self.indices = list(spec.leaves)  # of each parameter's leaf among the values of the state
        self.paths = tuple(spec.leaves.values())
        self.records = [records[index] for index in self.indices] if records else []
        self.off_at_setup = self._off_at_setup()
        self.warned = False
        self.plan: Any = None  # how the engine steps these parameters
        self.buckets: Any = None  # how `release` steps them within a backward pass
        self.grads_form: Any = None  # the structure of the last gradients, and where each parameter's is in it
        self.flips = 0  # how many flags contradicted the state at the last look

    def watch(self, model: Any, forget: Callable[[], None]) -> "Binding":
        """Remember what `matches` compares a model with."""
        self.model: Callable[[], Any] = _reference(model, forget)
        # A model with a container that cannot be compared never matches.
        self.transparent = all(isinstance(x, dict) or type(x) in (list, tuple) for x in self.containers)
        self.containers = self.containers if self.transparent else []
        self.known = _copies(self.containers)
        # Equality is not enough for these objects: `matches` also asks for their identity.
        pairs = [(x, key) for x in self.containers for key, value in _items(x) if _may_equal(value)]
        self.holders, self.keys = [x for x, _ in pairs], [key for _, key in pairs]
        self.values = [*map(getitem, self.holders, self.keys)]
        return self

    @cached
    def parallel(self) -> Parallel | None:
        """How the model runs on several processes, as it was found when first asked."""
        return None if is_compiling() else parallel_of(self.model(), self.params, self.paths)

    def _off_at_setup(self) -> list[Tensor]:
        """The parameters that did not require grad at `setup`: whoever sets such a flag later means them to train."""
        return [x for x, record in zip(self.params, self.records, strict=False) if record.required_grad is False]

    def look_at_flags(self) -> None:
        """`warn_of_flags` where one of `off_at_setup` requires grad by now."""
        if any(x.requires_grad for x in self.off_at_setup):
            self.warn_of_flags(stacklevel=5)
            # A flag that was set without a warning agrees with the state. There is only one warning.
            self.off_at_setup = [] if self.warned else [x for x in self.off_at_setup if not x.requires_grad]

    def warn_of_flags(self, stacklevel: int = 4) -> None:
        """Warn, once, of each `requires_grad` that was changed after the state was made and contradicts it."""
        if self.warned:
            return
        changed = [
            path
            for path, x, record in zip(self.paths, self.params, self.records, strict=True)
            if record.required_grad is not None
            and x.requires_grad is not record.required_grad
            and x.requires_grad is record.frozen
        ]
        if changed:
            self.warned = True
            warnings.warn(FLAGS_CHANGED.format(names_of(changed)), stacklevel=stacklevel)

    def fork(
        self, spec: TreeSpec, model: Any, containers: dict[int, Any], plan: Any, forget: Callable[[], None]
    ) -> "Binding":
        """The binding of a copy of the model."""
        if any(id(x) not in containers for x in self.containers):
            other = Binding(spec, model).watch(model, forget)  # a wrapper was left out of the copy
        else:
            other = copy.copy(self)
            other.spec, other.model = spec, _reference(model, forget)
            other.indices, other.paths = list(spec.leaves), tuple(spec.leaves.values())
            other.containers = [containers[id(x)] for x in self.containers]
            other.known = _copies(other.containers)
            other.holders = [containers[id(x)] for x in self.holders]
            other.values = [*map(getitem, other.holders, self.keys)]
        other.params, other.records, other.plan, other.buckets = plan.params, plan.records, plan, None
        other.local, other.__dict__["parallel"] = other.params, None  # a copy is without its wrappers
        other.off_at_setup = other._off_at_setup()
        return other

    @property
    def leaves(self) -> Iterable[tuple[Any, Tensor, str]]:
        """Each record with its parameter and path."""
        return zip(self.records, self.local, self.paths, strict=True)

    def note_writes(self) -> None:
        """Let autograd see what is written to the local tensors of parameters that are spread over processes."""
        if self.spread:
            torch.autograd.graph.increment_version(self.params)

    def part(self, places: Sequence[int]) -> "Binding":
        """Some of the parameters, with a plan of their own."""
        other = copy.copy(self)
        other.params, other.records = [self.params[i] for i in places], [self.records[i] for i in places]
        other.paths, other.indices = tuple(self.paths[i] for i in places), [self.indices[i] for i in places]
        other.local = [self.local[i] for i in places]
        other.plan = other.buckets = other.grads_form = None
        return other

    def matches(self, model: Any) -> bool:
        """Whether a model is still this one."""
        if model is not self.model() or not self.transparent:
            return False
        if self._holds():
            return True
        if self.spread:
            reshard(model)
        return self.spread and self._holds()

    def _holds(self) -> bool:
        try:  # `==` asks for identity first, and of two tensors of several elements it raises
            if self.containers != self.known:
                return False
        except Exception:
            return False
        if not all(map(is_, map(getitem, self.holders, self.keys), self.values)):
            return False
        return not self.spread or all(map(is_, local_tensors(self.params), self.local))


def _copies(containers: Sequence[Any]) -> list[Any]:
    return [dict(x) if isinstance(x, dict) else x[:] for x in containers]


def _items(container: Any) -> Iterable[tuple[Any, Any]]:
    return container.items() if isinstance(container, dict) else enumerate(container)


def _may_equal(value: Any) -> bool:
    """Whether another object may be equal to this one: to all but None, tensors of several elements and modules."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return value is not None and not (isinstance(value, nn.Module) and type(value).__eq__ is object.__eq__)


class Bindings(dict[int, Binding]):
    """The models that views of one tree were last used with, by the identity of the view's spec."""

    MOST = 16

    def add(self, key: int, spec: TreeSpec, model: Any, records: Sequence[Any], walked: Any = None) -> Binding:
        """Bind a model. When a module dies all bindings are forgotten: others may hold parts of it."""
        if len(self) >= self.MOST:
            self.clear()
        binding = self[key] = Binding(spec, model, records, walked).watch(model, self._forgetting())
        return binding

    def renew(self, binding: Binding, spec: TreeSpec, model: Any, containers: dict[int, Any], plan: Any) -> None:
        """Bind a copy of another binding's model, with a copy of its plan. `containers` are new ones for the old."""
        key = id(plan.records[0]) if spec.kind == "leaf" else id(spec)
        self[key] = binding.fork(spec, model, containers, plan, self._forgetting())

    def redistribute(self, binding: Binding, context: Any, tree: Sequence[Any]) -> None:
        """Move a state to where its parameters are: they may have been spread over processes since, or put together.
        `tree` has the records of the tree, as far as they are known."""
        try:
            moved = _redistribute(binding)
        except BaseException:
            self.clear()  # a model that does not fit is not to be known
            raise
        if any(moved):  # the others have plans for where it was
            context.structure += 1
            for key in [key for key, other in self.items() if other is not binding]:
                del self[key]
        context.spread = len(tree) < context.size or any(record.sharding is not None for record in tree)

    def _forgetting(self) -> Callable[[], None]:
        kept = weakref.ref(self)  # a binding that held its holder would die by the garbage collector alone

        def forget() -> None:
            bindings = kept()
            if bindings is not None:
                bindings.clear()

        return forget


def _redistribute(binding: Binding) -> list[bool]:
    """For each record, whether it was elsewhere."""
    shardings = [sharding_of(x) for x in binding.params]
    for record, x, path in zip(binding.records, binding.params, binding.paths, strict=True):
        if x.shape != record.shape:  # before anything is put together for it
            was, now = form(record.shape, record.dtype), form(x.shape, x.dtype)
            raise ValueError(CHANGED_FORM.format(path, was, now, OF_DTENSORS))
    return [record.redistribute(sharding) for record, sharding in zip(binding.records, shardings, strict=True)]


def _reference(model: Any, forget: Callable[[], None]) -> Callable[[], Any]:
    return weakref.ref(model, lambda _: forget()) if isinstance(model, nn.Module) else lambda: model


def parameters_at(spec: TreeSpec, model: Any) -> list[Tensor]:
    """The parameters of a model at the places of `spec`, in order."""
    found: dict[int, Tensor] = {}
    todo = [(spec, model)]
    while todo:
        place, x = todo.pop()
        x = unwrap(x)
        if place.kind == "leaf":
            found[place.index] = x
        elif place.kind != "empty":
            here = level(x)
            if here is None or here.keys != place.keys:
                raise ValueError(f"the model does not fit the state: the state has {describe(place)} where it has not")
            todo += zip(place.children, here.children, strict=True)
    return [found[index] for index in spec.leaves]


def difference(ours: TreeSpec, other: TreeSpec, path: str) -> str:
    at = f"at {path!r}" if path else "at the top"
    if (ours.kind == "leaf") != (other.kind == "leaf") or ours.keys != other.keys:
        return (
            f"the model does not fit the state: {at} the state has {describe(ours)}, the model {describe(other)}; "
            "pass the model (or branch) that setup was given, or call setup(rule, model, keep=state) again"
        )
    for key, a, b in zip(ours.keys, ours.children, other.children, strict=True):
        if a != b:
            return difference(a, b, join(path, key))
    return f"the model does not fit the state: {at} other parameters are tied than at setup; call setup again"


def describe(spec: TreeSpec) -> str:
    return {"leaf": "a parameter", "empty": "no parameter"}.get(spec.kind, f"children {names_of(spec.keys)}")

"""Edit: a change of a model and its state, worked out in full, then written, or undone where writing fails."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ..binding import Binding
from ..context import Context
from ..leaf import Numbers, Record
from ..parameters import trainables
from ..pytree import apart, is_transforming, modules_in, partition, plain_arithmetic
from ..rule import Rule, at, field_of, hyperparameters, rules_in
from ..state import bind, leaves_of, tree_bindings, tree_context
from ..text import form
from .modules import Cut, Resize, concerned, follows, is_known, own_tensors, set_size

Undo: TypeAlias = Callable[[], None]


class Draft:
    """What one tensor of the model, its `.grad` and its state become. Of a buffer there is no record."""

    def __init__(self, x: Tensor, path: str, record: Record | None) -> None:
        self.x, self.path, self.record = x, path, record
        self.value, self.grad = x.detach(), x.grad
        self.state: Any = None if record is None else record.state

    def rule(self) -> Rule | None:
        """The rule, with its schedules' values, where there is a state to change."""
        if self.record is None or self.record.rule is None or self.state is None:
            return None
        return at(self.record.rule, self.record.numbers.count)


class Change(Protocol):
    """What is done to each tensor along a dimension: see `Taking` and `Growing`."""

    verb: str

    def apply(self, draft: Draft, dim: int) -> None: ...

    def size(self, old: int) -> int:
        """What a dimension of size `old` becomes."""
        ...

    def position(self, row: int, size: int) -> int:
        """Where a row that must stay is afterwards. ValueError where it is gone."""
        return row


class Edit:
    """A change of some parameters of a model, with their states: see `editing`.

    `cut` may be called several times: each goes on from what the one before made of a tensor. Nothing is written
    before `write`.
    """

    def __init__(self, verb: str, state: Any, model: Any) -> None:
        if is_transforming():
            raise RuntimeError(f"{verb} changes a model in place, which torch.func and torch.compile do not allow")
        leaves_of(state, f"surgery.{verb}")  # TypeError for what is no state
        self.verb = verb
        self.binding: Binding = bind(state, model)
        self.context: Context = tree_context(state)
        self.context.settle()
        require_one_process(verb, self.context, self.binding)
        self.context.require_training_weights(self.binding.records, f"surgery.{verb}")
        self.drafts: dict[int, Draft] = {}
        self.attributes: list[tuple[nn.Module, str, Any]] = []
        triples = zip(self.binding.params, self.binding.records, self.binding.paths, strict=True)
        self.known = {id(x): (x, record, path) for x, record, path in triples}
        # Of a branch, others may hold the same parameters: all models that the state was used with.
        models = [binding.model() for binding in tree_bindings(state).values()]
        self.modules = [module for module in modules_in(models, wrappers=False) if is_known(module)]

    def places(self, branch: Any, dim: int | str) -> tuple[list[Cut], list[Resize]]:
        """What of a branch of the model changes along a dimension, ties once."""
        found: dict[tuple[int, int], Cut] = {}
        resizes: list[Resize] = []
        covered: set[int] = set()
        for module in modules_in(branch, wrappers=False):
            if is_known(module):
                cuts, own = concerned(module, dim, self.verb)
                found.update({(id(cut.x), cut.dim): cut for cut in cuts})
                resizes += own
                covered.update(map(id, own_tensors(module).values()))
        for x in trainables(branch):
            if id(x) not in covered:
                path = self.known[id(x)][2]
                if isinstance(dim, str) or not -x.ndim <= dim < x.ndim:
                    raise ValueError(
                        f"{self.verb}: {path!r} of shape {list(x.shape)} has no dim {dim!r}; "
                        "change those that have, one by one"
                    )
                found[id(x), dim % x.ndim] = Cut(x, dim % x.ndim)
        return list(found.values()), resizes

    def cut(self, cuts: Sequence[Cut], resizes: Sequence[Resize], change: Change) -> None:
        """Work out what tensors and attributes become."""
        for x, dim in cuts:
            draft = self.draft(x)
            try:
                _require_no_rows(draft, dim)
                change.apply(draft, dim)
            except Exception as error:
                error.add_note(f"in {self.verb} of {draft.path!r}, along dim {dim}")
                raise
        done = {id(module) for module, _, _ in resizes}
        others = [other for other in self.modules if id(other) not in done]
        tied = [resize for cut in cuts for other in others for resize in follows(other, cut)]
        for module, name, size in [*resizes, *tied]:
            for key, value in set_size(module, name, change.size(size)).items():
                self.attributes.append((module, key, value))
            padding = getattr(module, "padding_idx", None)
            if name == "num_embeddings" and padding is not None:
                self.attributes.append((module, "padding_idx", change.position(padding, size)))

    def draft(self, x: Tensor) -> Draft:
        """What is made of a tensor so far."""
        if id(x) not in self.drafts:
            _, record, path = self.known.get(id(x), (x, None, "a buffer"))
            _require_changeable(x, path, record, self.verb)
            self.drafts[id(x)] = Draft(x, path, record)
        return self.drafts[id(x)]

    def write(self) -> None:
        """Write all that was worked out, or nothing."""
        writes = [write for draft in self.drafts.values() for write in _writes(draft)]
        perform([*writes, *(partial(_set, *attribute) for attribute in self.attributes)], self.context)
        # A graph from before holds the old numbers: let its backward pass raise instead of using the new ones.
        torch.autograd.graph.increment_version([draft.x for draft in self.drafts.values()])


@contextmanager
def editing(verb: str, state: Any, model: Any) -> Iterator[Edit]:
    """An edit to work out within, which is written at the end."""
    with plain_arithmetic():
        edit = Edit(verb, state, model)
        yield edit
        edit.write()


# --- What may be changed ------------------------------------------------------------------------------------------


_DISPATCH = "__torch_dispatch__"  # which subclasses define whose numbers are not in their own memory


def require_one_process(verb: str, context: Context, binding: Binding | None = None) -> None:
    """ValueError where other processes, or the wrappers that speak to them, would keep the old shapes."""
    if context.spread or (binding is not None and binding.parallel is not None):
        raise ValueError(
            f"{verb} is for one process: DistributedDataParallel and fully_shard keep the shapes that they were given. "
            "Change model and state before the model is wrapped, or save, change them in one process, and go on"
        )


def _require_changeable(x: Tensor, path: str, record: Record | None, verb: str) -> None:
    """ValueError where other numbers cannot be put in place of a tensor's."""
    if record is not None and (x.shape, x.dtype) != (record.shape, record.dtype):
        raise ValueError(
            f"{verb}: the model does not fit the state: {path!r} was {form(record.shape, record.dtype)} at setup and "
            f"is now {form(x.shape, x.dtype)}"
        )
    held = [] if record is None else record.tensors or []
    why = None
    if not x.is_leaf or any(t.requires_grad for t in held):
        why = "it has a history, which would end here; detach it"
    elif x.is_inference():
        why = "it was made in inference mode; clone it"
    elif x._is_view():
        why = "it is a view of another tensor, which would not follow; clone it"
    elif getattr(type(x), _DISPATCH) is not getattr(Tensor, _DISPATCH):
        why = f"it is a {type(x).__name__}"
    elif x.grad is not None and x.grad.layout != torch.strided:
        why = "its .grad is sparse; set that to None"
    if why is not None:
        raise ValueError(f"{verb} cannot change {path!r}: {why}")


def _require_no_rows(draft: Draft, dim: int) -> None:
    """ValueError for a tensor, as a hyperparameter, that has a value for each row: it would keep the old rows."""
    rule, axis = None if draft.record is None else draft.record.rule, dim - draft.value.ndim
    for inner in [] if rule is None or not rule.traced else rules_in(rule):
        for name, value in hyperparameters(inner).items():
            pair = isinstance(value, Tensor) and value.ndim and isinstance(field_of(inner, name).default, tuple)
            for t in tuple(value) if pair or isinstance(value, tuple) else (value,):
                if isinstance(t, Tensor) and t.ndim >= -axis and t.shape[axis] != 1:
                    raise ValueError(
                        f"{type(inner).__name__}: {name} is a tensor with a value for each row, which does not follow; "
                        "adjust it to a number before, and to a new tensor after"
                    )


# --- Writing ------------------------------------------------------------------------------------------------------


def perform(writes: Iterable[Callable[[], Undo]], context: Context) -> None:
    """Do writes, each of which returns what undoes it. If one raises, as the setter of a module may, all are undone."""
    undo: list[Undo] = []
    try:
        for write in writes:
            undo.append(write())
    except BaseException:
        for back in reversed(undo):
            back()
        raise
    finally:
        context.structure += 1
        torch.clear_autocast_cache()  # an autocast around this has cast the old weights


def _set(module: nn.Module, name: str, value: Any) -> Undo:
    old = getattr(module, name)
    setattr(module, name, value)
    return lambda: setattr(module, name, old)


def _writes(draft: Draft) -> list[Callable[[], Undo]]:
    """The writes that carry out a draft."""
    x, record = draft.x, draft.record
    value = _laid_out(draft.value, x)
    if value.data_ptr() == x.data_ptr():
        value = value.clone()
    grad = None if draft.grad is None else _laid_out(draft.grad, x)
    writes: list[Callable[[], Undo]] = [lambda: _assign(x, value, grad)]
    if record is not None:
        new = None
        if record.tensors is not None:
            tensors, skeleton = partition(draft.state)
            new = [_like(t, value) for t in apart(tensors, [value])], record.numbers.having(skeleton)
        writes.append(lambda: replace_state(record, value.shape, new))
    return writes


def replace_state(record: Record, shape: torch.Size, state: tuple[list[Tensor], Numbers] | None) -> Undo:
    """Give a record another shape and, if there is one, another state. Returns what undoes it."""
    old = record.shape, record.tensors, record.numbers

    def back() -> None:
        record.shape, record.tensors, record.numbers = old

    record.shape = shape
    if state is not None:
        record.tensors, record.numbers = state
    return back


def _assign(x: Tensor, value: Tensor, grad: Tensor | None) -> Undo:
    """Put other numbers, of any shape, into a tensor. Returns what undoes it."""
    old, old_grad = x.detach(), x.grad

    def put(value: Tensor, grad: Tensor | None) -> None:
        # A graph that is still alive keeps the node at which gradients of `x` arrive, with the old shape; autograd
        # makes a new one only where the dtype changes.
        other = torch.float64 if x.dtype == torch.float32 else torch.float32
        if x.is_complex():
            other = torch.complex128 if x.dtype == torch.complex64 else torch.complex64
        x.grad = None
        x.data = torch.empty(0, dtype=other, device=x.device)
        x.data = value
        x.grad = grad

    put(value, grad)
    return lambda: put(old, old_grad)


def _laid_out(value: Tensor, x: Tensor) -> Tensor:
    """A tensor in the order of memory of another with as many dimensions."""
    if x.is_contiguous():
        return value.contiguous()
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    back = sorted(range(x.ndim), key=order.__getitem__)
    return value.permute(order).contiguous().permute(back)


def _like(t: Tensor, value: Tensor) -> Tensor:
    """A tensor of the state in the order of memory of its parameter, which the engine's fast paths need."""
    real = torch.view_as_real(value) if value.is_complex() and not t.is_complex() else value
    if t.shape != real.shape or t.stride() == real.stride():
        return t
    return torch.empty_like(real, dtype=t.dtype).copy_(t)

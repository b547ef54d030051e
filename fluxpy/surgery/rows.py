"""take, grow and reset: some rows of parameters, and of all that the state has of their shape."""

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..grads import scatter
from ..leaf import Record, record_of
from ..parameters import trainables
from ..pytree import modules_in, partition, plain_arithmetic
from ..rebuild import Copies, like_parameter
from ..rule import Rule, at, title
from ..state import AnyState, bind, each_leaf, shape_of, tree_context
from ..text import form, names_of
from .edit import Change, Draft, Edit, editing, perform, replace_state, require_one_process
from .modules import Cut, Resize, own_tensors, set_size

Model = TypeVar("Model")


def take(state: AnyState, model: Model, index: Any, dim: int = 0) -> tuple[AnyState, Model]:
    """Keep these rows of every parameter under matching branches of state and model. Returns both, changed in place.

    `index` has whole numbers, negative ones counted from the end, repeated or permuted as you like, or is a mask of
    bools; a tensor, a list, an array or a slice. What the state has of a parameter's shape, and its `.grad`, are taken
    alike; counts and other numbers stay. Parameters stay the same objects, ties and frozen leaves included.

    Of PyTorch's own modules `dim` is one of their weight, and what goes with it follows: dim 0 of an `nn.Linear` are
    its outputs, bias and `out_features` with them, dim 1 its inputs. Of other modules and containers it is the dim of
    each parameter. What the rest of the model makes of it is yours: see `prune`.

    ValueError, with the path, where the index or the dim does not fit, or where a rule does not say how its state
    follows (see `Rule.take`); then nothing is changed.

    >>> model = torch.nn.Linear(2, 4)
    >>> state = fluxpy.setup(fluxpy.Adam(), model)
    >>> _ = fluxpy.surgery.take(state, model, [3, 0])
    >>> model, state.weight.state.m.shape
    (Linear(in_features=2, out_features=2, bias=True), torch.Size([2, 2]))
    """
    with editing("take", state, model) as edit:
        edit.cut(*edit.places(model, dim), Taking("take", index))
    return state, model


def grow(state: AnyState, model: Model, rows: Any, dim: int = 0) -> tuple[AnyState, Model]:
    """Append rows to every parameter under matching branches of state and model. Returns both, changed in place.

    `rows` has a tensor for each parameter, by path or in the shape of the model (for a single parameter: the tensor),
    all with equally many rows. Or it is a number of rows, made by the modules' own initialisation: a copy of the module
    with room for them runs its `reset_parameters`, and the new rows are taken from it.

    Momenta of the new rows start as the rule's `init` makes them, and `.grad` with zeros; counts and other numbers
    belong to the whole parameter and stay. So Adam corrects no bias of new rows: their first steps are up to three
    times its rate. For `dim`, and for what is refused, see `take`.

    >>> model = torch.nn.Embedding(3, 2)
    >>> state = fluxpy.setup(fluxpy.Adam(), model)
    >>> _ = fluxpy.surgery.grow(state, model, {"weight": torch.zeros(2, 2)})
    >>> model, state.weight.state.m.shape
    (Embedding(5, 2), torch.Size([5, 2]))
    """
    with editing("grow", state, model) as edit:
        cuts, resizes = edit.places(model, dim)
        if isinstance(rows, bool | float | str):
            raise TypeError(f"grow: rows must be a whole number, or a tensor for each parameter, but got {rows!r}")
        if isinstance(rows, int):
            change = Growing("grow", rows, made_rows("grow", model, cuts, resizes, rows))
        else:
            change = given_rows(edit, shape_of(state), model, cuts, rows)
        edit.cut(cuts, resizes, change)
    return state, model


def reset(state: AnyState, rows: Any, dim: int = 0, *, model: Any = None) -> AnyState:
    """Empty the momenta of some rows under this view: they start again as the rule's `init` makes them.

    `rows` is a mask or has whole numbers, as in `take`. Parameters, counts and other numbers stay; so do the rows of a
    master copy, which is no momentum. Leaves that have no state yet stay without.

    A state that starts from the parameter itself, as an average of it does, needs the `model` that belongs to the view:
    ValueError says so, and where rows or dim do not fit; then nothing is changed.

    >>> x = torch.ones(3)
    >>> state = fluxpy.setup(fluxpy.Momentum(), x)
    >>> _ = fluxpy.update(state, x, torch.ones(3))
    >>> fluxpy.surgery.reset(state, rows=[1]).state
    tensor([1., 0., 1.])
    """
    if not isinstance(dim, int):
        raise TypeError("write surgery.reset(state, rows, dim), and the model, if needed, by name: model=model")
    with plain_arithmetic():
        found = each_leaf(state, "surgery.reset")
        require_one_process("reset of rows", tree_context(state))
        tree_context(state).require_training_weights([record_of(leaf) for _, leaf in found], "surgery.reset")
        binding = None if model is None else bind(state, model)
        pairs = [] if binding is None else zip(binding.records, binding.params, strict=True)
        values = {id(record): x.detach() for record, x in pairs}
        new = []
        for path, leaf in found:
            record = record_of(leaf)
            try:
                emptied = _emptied(path, record, values.get(id(record)), rows, dim)
            except Exception as error:
                error.add_note(f"in surgery.reset of {path!r}")
                raise
            if emptied is not None:
                tensors, skeleton = partition(emptied)
                pairs = zip(record.tensors or [], tensors, strict=True)  # in memory of their own, laid out as before
                own = [torch.empty_like(old).copy_(t) if old.shape == t.shape else t.clone() for old, t in pairs]
                new.append((record, (own, record.numbers.having(skeleton))))
        writes = [partial(replace_state, record, record.shape, replacement) for record, replacement in new]
        perform(writes, tree_context(state))
    return state


# --- Keeping rows -------------------------------------------------------------------------------------------------


def row_numbers(index: Any, size: int) -> Tensor:
    """The rows that an index means, among `size`, as whole numbers from 0."""
    try:
        found = torch.as_tensor(list(range(size)[index]) if isinstance(index, slice) else index, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"the rows must be a list of whole numbers, or a mask, but got {index!r}") from error
    if found.ndim != 1:
        raise ValueError(f"the rows must be a list of whole numbers, or a mask of {size} bools, but got {index!r}")
    if found.dtype == torch.bool:
        if len(found) != size:
            raise ValueError(f"the mask has {len(found)} bools, but there are {size} rows")
        return found.nonzero()[:, 0]
    if len(found) and (found.is_floating_point() or found.is_complex()):
        raise ValueError(f"the rows must be whole numbers or bools, but are {found.dtype}")
    found = found.long()
    if ((found < -size) | (found >= size)).any():
        raise ValueError(f"a row number lies outside the {size} rows there are")
    return torch.where(found < 0, found + size, found)


class Taking(Change):
    """Keep rows."""

    def __init__(self, verb: str, index: Any) -> None:
        self.verb, self.index = verb, index

    def apply(self, draft: Draft, dim: int) -> None:
        index = row_numbers(self.index, draft.value.shape[dim]).to(draft.value.device)
        rule = draft.rule()
        if rule is not None:
            draft.state = rule.take(draft.state, draft.value, index, dim)
        draft.value = draft.value.index_select(dim, index)
        if draft.grad is not None:
            draft.grad = draft.grad.index_select(dim, index)

    def size(self, old: int) -> int:
        return len(row_numbers(self.index, old))

    def position(self, row: int, size: int) -> int:
        places = (row_numbers(self.index, size) == row).nonzero()
        if not len(places):
            raise ValueError(f"{self.verb}: row {row} is the padding of an embedding; set padding_idx to None first")
        return int(places[0, 0])


# --- New rows -----------------------------------------------------------------------------------------------------


class Growing(Change):
    """Append rows: `count` of them, for each tensor by its identity."""

    def __init__(self, verb: str, count: int, rows: dict[int, Tensor]) -> None:
        self.verb, self.count, self.rows = verb, count, rows

    def apply(self, draft: Draft, dim: int) -> None:
        rows, rule = self.rows[id(draft.x)], draft.rule()
        if rule is not None:
            draft.state = rule.grow(draft.state, draft.value, rows, dim)
        draft.value = torch.cat([draft.value, rows], dim)
        if draft.grad is not None:
            draft.grad = torch.cat([draft.grad, torch.zeros_like(rows)], dim)

    def size(self, old: int) -> int:
        return old + self.count


def made_rows(verb: str, model: Any, cuts: Sequence[Cut], resizes: Sequence[Resize], count: int) -> dict[int, Tensor]:
    """New rows for tensors of a model, by identity, as the modules that have them initialise their parameters."""
    if count < 0:
        raise ValueError(f"{verb}: a number of rows must be 0 or more, but got {count}")
    room = [_room(x, dim, count) for x, dim in cuts]
    # Parameters that do not change are copied too: an initialisation may write to all that it finds.
    others = [x for x in trainables(model) if all(x is not cut.x for cut in cuts)]
    copied = [like_parameter(x.detach().clone(), x) for x in others]
    copies = Copies(model, [*(cut.x for cut in cuts), *others], [*room, *copied])
    for module, name, size in resizes:
        for key, value in set_size(module, name, size + count).items():
            setattr(copies.known[id(module)], key, value)
    wanted = {id(cut.x) for cut in cuts}
    # From the inside out, so that a module has the last word on what is inside it; and of ties the first place.
    for module in reversed(modules_in(model, wrappers=False)):
        held = [*own_tensors(module).values(), *module._buffers.values()]
        if not any(id(x) in wanted for x in held):
            continue
        make = getattr(copies.known[id(module)], "reset_parameters", None)
        if make is not None:
            make()
    rows = {id(x): new.detach().narrow(dim, x.shape[dim], count) for (x, dim), new in zip(cuts, room, strict=True)}
    for cut in cuts:
        new = rows[id(cut.x)]
        if not new.is_meta and new.isnan().any():
            raise ValueError(
                f"{verb}: no module's reset_parameters makes rows for a parameter of shape {list(cut.x.shape)}; "
                "give a tensor for each parameter instead of a number"
            )
    return rows


def _room(x: Tensor, dim: int, count: int) -> Tensor:
    shape = [*x.shape[:dim], x.shape[dim] + count, *x.shape[dim + 1 :]]
    return like_parameter(torch.full(shape, torch.nan, dtype=x.dtype, device=x.device), x)


def given_rows(edit: Edit, spec: Any, model: Any, cuts: Sequence[Cut], rows: Any) -> Growing:
    """New rows as the user gives them; buffers, of which there are running statistics, as their module makes them."""
    verb, binding, by_number = edit.verb, edit.binding, scatter(spec, rows, "rows")
    places = {id(x): i for i, x in enumerate(binding.params)}
    found: dict[int, Tensor] = {}
    missing: list[str] = []
    for x, dim in cuts:
        if id(x) in places:
            path, given = binding.paths[places[id(x)]], by_number.pop(binding.indices[places[id(x)]], None)
            if given is None:
                missing.append(path)
            else:
                found[id(x)] = fitting(verb, path, x, dim, given)
    if missing:
        raise ValueError(f"{verb}: rows are missing for {names_of(missing)}")
    if by_number:
        extra = [binding.paths[binding.indices.index(i)] for i in by_number]
        raise ValueError(f"{verb}: rows were given for {names_of(extra)}, which has none along this dim")
    counts = {found[id(x)].shape[dim] for x, dim in cuts if id(x) in found}
    if len(counts) != 1:
        raise ValueError(f"{verb}: all parameters must get equally many rows, but got {sorted(counts)}")
    count = counts.pop()
    buffers = [cut for cut in cuts if id(cut.x) not in found]
    return Growing(verb, count, found | (made_rows(verb, model, buffers, [], count) if buffers else {}))


def fitting(verb: str, path: str, x: Tensor, dim: int, rows: Tensor) -> Tensor:
    """Rows given for a parameter, in its dtype and on its device."""
    rest = [*x.shape[:dim], *x.shape[dim + 1 :]]
    if rows.ndim != x.ndim or [*rows.shape[:dim], *rows.shape[dim + 1 :]] != rest:
        want = ", ".join("n" if i == dim else str(size) for i, size in enumerate(x.shape))
        raise ValueError(f"{verb}: rows for {path!r} must have shape [{want}], but got {list(rows.shape)}")
    if not torch.can_cast(rows.dtype, x.dtype) or rows.layout != torch.strided:
        raise ValueError(f"{verb}: {form(rows.shape, rows.dtype)} cannot be rows of {path!r}, which is {x.dtype}")
    return rows.detach().to(x.device, x.dtype)


# --- Momenta of some rows -----------------------------------------------------------------------------------------


def _emptied(path: str, record: Record, x: Tensor | None, rows: Any, dim: int) -> Any:
    """A leaf's state with new rows; None where there is nothing to empty."""
    if not -len(record.shape) <= dim < len(record.shape):
        raise ValueError(f"reset: {path!r} of shape {list(record.shape)} has no dim {dim}")
    dim %= len(record.shape)
    gone = torch.zeros(record.shape[dim], dtype=torch.bool, device="cpu")
    gone[row_numbers(rows, len(gone))] = True
    if not record.tensors or record.rule is None:
        return None
    device, rule = record.tensors[0].device, at(record.rule, record.numbers.count)
    old, new = (~gone).nonzero()[:, 0].to(device), gone.nonzero()[:, 0].to(device)
    if x is None:
        x = _stand_in(record, rule, len(new), dim)
    kept, fresh = x.index_select(dim, old), x.index_select(dim, new)
    state = rule.grow(rule.take(record.state, x, old, dim), kept, fresh, dim)
    state = rule.take(state, torch.cat([kept, fresh], dim), torch.cat([old, new]).argsort(), dim)
    if rule.keeps_master:
        tensors, skeleton = partition(state)
        state = skeleton.combine([record.tensors[0], *tensors[1:]])
    return state


def _stand_in(record: Record, rule: Rule, count: int, dim: int) -> Tensor:
    """A tensor in place of a parameter, for a rule whose state does not start from it, or that has a copy of it."""
    assert record.tensors
    if rule.keeps_master:
        return record.tensors[0].to(record.dtype)
    x = torch.zeros(record.shape, dtype=record.dtype, device=record.tensors[0].device)
    rows = x.narrow(dim, 0, count)
    pairs = zip(partition(rule.init_any(rows))[0], partition(rule.init_any(rows + 1))[0], strict=True)
    if not x.is_meta and any(not torch.equal(a, b) for a, b in pairs):
        raise ValueError(
            f"the state of {title(rule)} starts from the parameter itself, so reset needs it: "
            "write surgery.reset(state, rows, model=model)"
        )
    return x

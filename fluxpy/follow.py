"""follow: a state goes where its model went."""

from typing import Any

from torch import Tensor

from .leaf import Record, init_state
from .pytree import partition
from .state import AnyState, bind, require_state, tree_context
from .text import form


def follow(state: AnyState, model: Any) -> AnyState:
    """Bring a state to the devices and dtypes of its model, after `model.to(...)`, `model.double()` and their like.

    Momenta get the device of their parameter and the dtype in which their rule would start them now: a master copy
    keeps its own. Counts, hyperparameters and frozen flags stay. Momenta on `meta` hold no numbers: those leaves
    start anew. Changes the state in place and returns it; ValueError where the model has another structure or another
    shape, and then nothing is changed.

    >>> model = torch.nn.Linear(2, 1)
    >>> state = setup(Momentum(0.1), model)
    >>> model = model.double()
    >>> follow(state, model).weight.state.dtype
    torch.float64
    """
    require_state(state, "follow")
    binding = bind(state, model)
    tree_context(state).settle()
    pairs = list(binding.leaves)
    for record, x, path in pairs:
        if record.local_shape != x.shape:
            was, now = form(record.shape, record.dtype), form(x.shape, x.dtype)
            raise ValueError(
                f"follow: {path!r} was {was} at setup and is now {now}; call setup(rule, model, keep=state)"
            )
    moved = [_moved(*pair) for pair in pairs]
    tree_context(state).structure += 1  # first: plans are to look again also after an interrupt below
    for (record, x, _), tensors in zip(pairs, moved, strict=True):
        record.move(x.dtype, tensors)
    return state


def _moved(record: Record, x: Tensor, path: str) -> list[Tensor] | None:
    """The tensors of a state, moved to where and what their parameter is; None where they have to be made anew."""
    old = record.tensors
    if old is None or record.rule is None or (not x.is_meta and any(t.is_meta for t in old)):
        return None
    whole = record.sharding if record.needs_whole else None  # with which the state is of the whole array
    first = x if whole is None else whole.whole(x)
    like, _ = partition(init_state(record.rule, first, record.numbers.count, path))
    if [t.shape for t in like] != [t.shape for t in (old if whole is None else record.shown_tensors())]:
        raise ValueError(f"follow: the state of {path!r} no longer has the shape in which {record.rule!r} starts it")
    return [t.to(device=x.device, dtype=new.dtype) for t, new in zip(old, like, strict=True)]

"""The first states of many leaves: where a rule makes equal states for several parameters, one is made and copied."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .engine.layout import clone_all
from .leaf import Record, init_state
from .pytree import HOLE, PLAIN, is_transforming, partition
from .rule import Rule, title_key

Entry: TypeAlias = tuple[Record, Tensor, str]  # a record without a state, its parameter and the path

_SMALL = 1 << 12  # elements: filling the state of a larger parameter takes longer than asking the rule for one
# What a rule may do to a parameter without reading its values.
_ATTRIBUTES = "device dtype is_cpu is_cuda is_meta layout ndim shape"
_METHODS = "dim element_size is_complex is_contiguous is_floating_point nelement new_ones new_zeros numel size stride"
_READS_NO_VALUE = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()}
_READS_NO_VALUE |= {getattr(Tensor, name) for name in (*_METHODS.split(), "untyped_storage")}
_READS_NO_VALUE |= {torch.ones, torch.ones_like, torch.zeros, torch.zeros_like}


def make_states(todo: Iterable[Entry]) -> None:
    """Make the states of leaves. Small parameters that are alike get copies of one state, if the rule made equal states
    for the first two and did not read the values of the second."""
    alike: dict[Any, list[Entry]] = {}
    for r, x, path in todo:
        alike.setdefault((id(r.rule), r.numbers.count, r.shape, r.dtype, x.device), []).append((r, x, path))
    for entries in alike.values():
        made = _copy_one(entries) if len(entries) > 2 and _may_share(entries) else 0
        for record, x, path in entries[made:]:
            record.make_state(x, path)


def catch_up(entries: Iterable[Entry], known: dict[Any, bool]) -> None:
    """Where a rule reads a parameter's values for its state, states that no update used yet begin with those of now:
    somebody may have loaded weights since. Not where one may differentiate: there such a state is a constant. `known`
    has the answers for rules that were asked before."""
    reading: dict[int, bool] = {}  # by the id of a rule
    for record, x, path in entries:
        rule = record.rule
        if rule is None or not record.untrained or record.needs_whole:
            continue
        if id(rule) not in reading:
            key = "reads", title_key(rule)
            reading[id(rule)] = known[key] if key in known else known.setdefault(key, _reads_values(rule, x))
        if reading[id(rule)]:
            new, _ = partition(init_state(rule, x, record.numbers.count, path))
            for old, t in zip(record.tensors or (), new, strict=False):
                old.detach().copy_(t)


def _reads_values(rule: Rule, x: Tensor) -> bool:
    """Whether a rule reads the values of a parameter like `x` for its state. It is asked of one element, as a state may
    be large."""
    corner = x.detach()[(slice(1),) * x.ndim]
    try:
        with torch.random.fork_rng(devices=[]), _ValueWatch() as watch:
            init_state(rule, corner, 0, "")
    except Exception:  # an array that it does not take
        return True
    return watch.values_read


def _may_share(entries: Sequence[Entry]) -> bool:
    """Whether the states of parameters that are alike may be copies of one."""
    plain = all(type(x) in PLAIN and x.layout == torch.strided and x.is_contiguous() for _, x, _ in entries)
    new = all(record.sharding is record.pending is None for record, _, _ in entries)
    return plain and new and entries[0][1].numel() <= _SMALL and not is_transforming()


def _copy_one(entries: Sequence[Entry]) -> int:
    """Make two states and, if all must be equal, copy one to the other leaves. Returns how many leaves have one."""
    (first, x, path), (second, other, its_path), *rest = entries
    first.make_state(x, path)
    with _ValueWatch() as watch:
        second.make_state(other, its_path)
    if watch.values_read or not _same(first, second):
        return 2
    copies = [clone_all([t] * len(rest)) for t in second.tensors or ()]
    for (record, _, _), *tensors in zip(rest, *copies, strict=True):
        record.tensors, record.numbers = tensors, second.numbers
    return len(entries)


class _ValueWatch(TorchFunctionMode):
    """Notices whether anything within may read the values of a tensor, rather than its shape, dtype and the like."""

    values_read = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.values_read |= func not in _READS_NO_VALUE or bool((kwargs or {}).keys() - {"dtype", "device"})
        return func(*args, **(kwargs or {}))


def _same(one: Record, other: Record) -> bool:
    """Whether two new states hold the same numbers, and nothing else but tensors."""
    parts, others = ([*r.numbers.skeleton.parts] if r.numbers.skeleton else [] for r in (one, other))
    plain = all(part is HOLE or isinstance(part, int | float | str | None) for part in parts)
    return plain and one.numbers.skeleton == other.numbers.skeleton and parts == others

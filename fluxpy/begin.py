"""The states that many leaves begin with."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .leaf import Record
from .pytree import HOLE, PLAIN, is_transforming

New = tuple[Record, Tensor, str]  # with its parameter and path
_SMALL = 1 << 12  # elements: of a larger parameter a state takes longer to fill than to ask for
_FORM = "dim element_size is_complex is_contiguous is_floating_point nelement new_ones new_zeros numel size stride"
_LOOKS = {torch.ones, torch.ones_like, torch.zeros, torch.zeros_like, Tensor.untyped_storage}
_LOOKS |= {getattr(Tensor, name) for name in _FORM.split()}
_LOOKS |= {getattr(Tensor, name).__get__ for name in "device dtype is_cpu is_cuda is_meta layout ndim shape".split()}


def begin(todo: Iterable[New]) -> None:
    """Make states for parameters. Where a rule makes the same of two that are small and alike, without a look at their
    values, others like them get copies of that."""
    groups: dict[Any, list[New]] = {}
    for new in todo:
        record, x, _ = new
        groups.setdefault((id(record.rule), record.numbers.count, record.shape, record.dtype, x.device), []).append(new)
    for group in groups.values():
        alike = len(group) > 2 and not is_transforming() and all(map(_is_plain, group))
        for i, (record, x, path) in enumerate(group):
            with _Glance() if alike and i == 1 else nullcontext() as glance:
                record.begin(x, path)
            if glance is not None and glance.enough and _same(record, group[0][0]):
                _copy(record, [other for other, _, _ in group[2:]])
                break


class _Glance(TorchFunctionMode):
    """Whether what is done with tensors within looks at their shapes, dtypes and the like alone."""

    enough = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.enough = self.enough and func in _LOOKS and not (kwargs or {}).keys() - {"dtype", "device"}
        return func(*args, **(kwargs or {}))


def _is_plain(new: New) -> bool:
    record, x, _ = new
    dense = type(x) in PLAIN and x.layout == torch.strided and x.is_contiguous()
    return dense and x.numel() <= _SMALL and record.layout is None and record.pending is None


def _same(one: Record, other: Record) -> bool:
    """Whether new states hold, besides tensors, the same numbers and nothing else."""
    mine, its = one.numbers.skeleton, other.numbers.skeleton
    if mine is None or its is None or mine != its:
        return False
    return all(part is HOLE or isinstance(part, int | float | str | None) for part in mine.parts) and (
        mine.parts == its.parts
    )


def _copy(record: Record, others: list[Record]) -> None:
    tensors, numbers = record.tensors or [], record.numbers
    for other in others:
        other.tensors, other.numbers = [t.clone() for t in tensors], numbers

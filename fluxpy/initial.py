"""The states that many leaves begin with."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .leaf import Record
from .pytree import HOLE, PLAIN, is_transforming

_SMALL = 1 << 12  # elements: of a larger parameter a state takes longer to fill than to ask for
_ASKED = "device dtype is_cpu is_cuda is_meta layout ndim shape"
_FORM = "dim element_size is_complex is_contiguous is_floating_point nelement new_ones new_zeros numel size stride"
_LOOKS = {getattr(Tensor, name).__get__ for name in _ASKED.split()}
_LOOKS |= {getattr(Tensor, name) for name in (*_FORM.split(), "untyped_storage")}
_LOOKS |= {torch.ones, torch.ones_like, torch.zeros, torch.zeros_like}


def make_states(todo: Iterable[tuple[Record, Tensor, str]]) -> None:
    """Make states for parameters, each with its path. Where a rule makes the same of two that are small and alike,
    without a look at their values, others like them get copies of that."""
    forms: dict[Any, list[tuple[Record, Tensor, str]]] = {}
    for r, x, path in todo:
        forms.setdefault((id(r.rule), r.numbers.count, r.shape, r.dtype, x.device), []).append((r, x, path))
    for found in forms.values():
        alike = len(found) > 2 and not is_transforming() and found[0][1].numel() <= _SMALL
        alike = alike and all(type(x) in PLAIN and x.layout == torch.strided and x.is_contiguous() for _, x, _ in found)
        alike = alike and all(record.layout is record.pending is None for record, _, _ in found)
        for i, (record, x, path) in enumerate(found):
            with _Glance() if alike and i == 1 else nullcontext() as glance:
                record.make_state(x, path)
            if glance is not None and glance.enough and _same(record, found[0][0]):
                for other, _, _ in found[2:]:
                    other.tensors, other.numbers = [t.clone() for t in record.tensors or ()], record.numbers
                break


class _Glance(TorchFunctionMode):
    """Whether what is done with tensors within looks at their shapes, dtypes and the like alone."""

    enough = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.enough = self.enough and func in _LOOKS and not (kwargs or {}).keys() - {"dtype", "device"}
        return func(*args, **(kwargs or {}))


def _same(one: Record, other: Record) -> bool:
    """Whether new states hold, besides tensors, the same numbers and nothing else."""
    parts, others = ([*r.numbers.skeleton.parts] if r.numbers.skeleton else [] for r in (one, other))
    plain = all(part is HOLE or isinstance(part, int | float | str | None) for part in parts)
    return plain and one.numbers.skeleton == other.numbers.skeleton and parts == others

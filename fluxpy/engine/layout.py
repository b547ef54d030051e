"""Layout: the tensors of many leaves as one long tensor, where they lie or gathered into scratch memory.

A *flat view* shows a dense tensor as one dimension, in the order of its memory, whatever its strides. Tensors that are
adjacent in memory have one flat view together. A `Row` is one tensor of each of several leaves (their parameters, one
of their momenta); a *chunk* is what is worked on at once: neighbours in a row, or a part of one large tensor.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Elements of a chunk: 2**17 floats are half a megabyte, so what a chain touches stays in the cache.
SIZE = 1 << 17

LEAST_RUN = 4  # leaves of one shape, on average: shorter runs are not worth a stack
Runs = list[tuple[int, int]]  # of neighbours, each from the first to behind the last
copy_all: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
clone_all: Any = getattr(torch, "_foreach_clone", lambda tensors: [t.clone() for t in tensors])


# A second owner of tensors, kept beside a list that operators are called with at each step. Where Python alone owns a
# tensor, each call takes the GIL twice to count it: a fifth of the time of a fused kernel on 200 tensors.
owned: Any = getattr(torch._C, "ScriptList", tuple)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order of dimensions."""
    return x.is_contiguous() or torch.empty_like(x, device="meta").stride() == x.stride()


def flat_view(x: Tensor) -> Tensor:
    """A dense tensor as one dimension, in the order of its memory."""
    return x.view(-1) if x.is_contiguous() else x.as_strided((x.numel(),), (1,))


def adjacent(tensors: Sequence[Tensor], last: list[int] | None = None) -> Tensor | None:
    """The one flat view of dense tensors that are adjacent in memory; None where they are not. In `last` it keeps where
    tensors of these sizes were adjacent, for the next time."""
    first = tensors[0]
    if len(tensors) == 1:
        return flat_view(first)
    if first.data_ptr() + first.nbytes != tensors[1].data_ptr():
        return None
    pointers = addresses(tensors)
    if pointers != last:
        if pointers[1:] != [pointers[0] + end for end in accumulate([t.nbytes for t in tensors[:-1]])]:
            return None
        if last is not None:
            last[:] = pointers
    # One view reaches no further than one storage, and tensors of different storages can be adjacent by chance.
    storage, size = first.untyped_storage(), pointers[-1] - pointers[0] + tensors[-1].nbytes
    if storage.data_ptr() + storage.nbytes() < pointers[0] + size:
        return None
    return first.as_strided((size // first.element_size(),), (1,))


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where the tensors lie in memory."""
    return [*map(Tensor.data_ptr, tensors)]


class Extents:
    """The memory from the first to the last element of each of some tensors, by where they start and how many bytes
    they take."""

    def __init__(self, starts: Sequence[int], sizes: Sequence[int]) -> None:
        first = np.fromiter(starts, np.int64, len(starts))
        order = first.argsort()
        lasts = (first + np.fromiter(sizes, np.int64, len(sizes)))[order]
        # By the number of tensors that start before a place: where the last of them ends.
        self.as_arrays = starting, ends = first[order], np.concatenate(([0], np.maximum.accumulate(lasts)))
        inside = (starting < ends[:-1]).nonzero()[0]
        # Two of the tensors that overlap, by their numbers; None where all are apart.
        self.overlap = (order[lasts[: inside[0]].argmax()], order[inside[0]]) if len(inside) else None
        self.starts, self.ends = (array.tolist() for array in self.as_arrays)
        self.apart: list[int] = []  # what pointed nowhere into it last

    def meets(self, pointers: list[int]) -> bool:
        """Whether any of these points into the memory."""
        if not self.starts or pointers == self.apart:
            return False
        if len(pointers) > 32:
            starts, ends = self.as_arrays
            found = np.fromiter(pointers, np.int64, len(pointers))
            meets = bool((found < ends[starts.searchsorted(found, side="right")]).any())
        else:
            meets = any(pointer < self.ends[bisect_right(self.starts, pointer)] for pointer in pointers)
        self.apart = self.apart if meets else pointers
        return meets


def extent(t: Tensor) -> int:
    """Bytes from the first element to the last."""
    if t.is_contiguous():
        return t.nbytes
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def runs(tensors: Sequence[Tensor]) -> Runs:
    """The neighbours of one shape and strides."""
    forms = [(t.shape, t.stride()) for t in tensors]
    starts = [i for i, form in enumerate(forms) if not i or form != forms[i - 1]]
    return [*zip(starts, [*starts[1:], len(forms)], strict=True)]


def stacks(flat: Tensor, tensors: Sequence[Tensor], where: Runs | None = None) -> Iterator[tuple[Tensor, Any]]:
    """The parts of a long tensor for neighbours of one shape and strides, as stacks, each with those neighbours."""
    start = flat.storage_offset()
    for low, high in where or runs(tensors):
        first, many = tensors[low], high - low
        size = first.numel()
        yield flat.as_strided((many, *first.shape), (size, *first.stride()), start), tensors[low:high]
        start += many * size


def views_like(flat: Tensor, tensors: Sequence[Tensor], where: Runs | None = None) -> list[Tensor]:
    """Parts of a long tensor, in the shapes and strides of others."""
    if _differ(tensors, where):
        starts = accumulate([t.numel() for t in tensors[:-1]], initial=flat.storage_offset())
        return [flat.as_strided(t.shape, t.stride(), start) for t, start in zip(tensors, starts, strict=True)]
    return [view for stack, _ in stacks(flat, tensors, where) for view in stack.unbind()]


def pack(tensors: Sequence[Tensor], where: Runs | None = None) -> list[Tensor]:
    """Copies that are adjacent; the tensors themselves where they are already."""
    if adjacent(tensors) is not None:
        return list(tensors)
    if _differ(tensors, where):
        return views_like(torch.cat([flat_view(t) for t in tensors]), tensors, where)
    found: list[Tensor] = []
    for stack, same in stacks(tensors[0].new_empty(sum([t.numel() for t in tensors])), tensors, where):
        found += torch.stack(same, out=stack).unbind()
    return found


def _differ(tensors: Sequence[Tensor], where: Runs | None) -> bool:
    """Whether neighbours are of other shapes as a rule, so that they are faster one by one: a guess by the first two,
    where the runs are not known."""
    return len(tensors) < 2 * len(where) if where else tensors[0].shape != tensors[min(1, len(tensors) - 1)].shape


def chunks_of(sizes: Sequence[int], split: bool, breaks: Collection[int] = ()) -> Iterator[tuple[int, int, int, int]]:
    """`(low, high, start, size)` of each chunk: small neighbours together, a large tensor alone, and with `split` in
    parts. A size of -1 is the whole. A chunk ends before each of `breaks`."""
    low = taken = 0
    for i, size in enumerate(sizes):
        if i > low and (taken + size > SIZE or i in breaks):
            yield low, i, 0, -1
            low, taken = i, 0
        taken += size
        if taken > SIZE and split:
            yield from ((i, i + 1, start, min(SIZE, size - start)) for start in range(0, size, SIZE))
            low, taken = i + 1, 0
    if low < len(sizes):
        yield low, len(sizes), 0, -1


class Scratch:
    """Memory that chunks use one after another, a buffer for each role: it stays in the cache."""

    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def take(self, role: Any, dtype: torch.dtype, device: torch.device, size: int) -> Tensor:
        key = role, dtype, device
        held = self.buffers.get(key)
        if held is None or len(held) < size:
            held = self.buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return held[:size]


class Row:
    """One tensor of each of several leaves, as one flat tensor; or, of one large tensor, a part.

    The tensors are dense and detached. `flat` is their common view where they are adjacent; elsewhere they are gathered
    into scratch memory and written back. `shown` is what a rule sees: flat, unless `show_as` gives a shape.
    """

    def __init__(self, tensors: list[Tensor], scratch: Scratch, role: Any, start: int = 0, size: int = -1) -> None:
        self.tensors = tensors
        self.flat = adjacent(tensors)
        if self.flat is not None:
            self.flat = self.flat if size < 0 else self.flat[start : start + size]
            self.buffer = self.flat
        else:
            first, total = tensors[0], sum([t.numel() for t in tensors])
            self.buffer = scratch.take(role, first.dtype, first.device, total)
        self.shown = self.buffer

    @cached_property
    def views(self) -> list[Tensor]:
        """The parts of the scratch memory. Made late: where a kernel steps the tensors themselves, nobody asks."""
        views = views_like(self.buffer, self.tensors)
        self.owner = owned([*views, *self.tensors])
        return views

    def show_as(self, shape: tuple[int, ...]) -> None:
        """Let a rule see the row in this shape."""
        self.shown = self.buffer.view(shape)

    def read(self) -> Tensor:
        """The values, as a rule sees them."""
        if self.flat is None:
            copy_all(self.views, self.tensors)
        return self.shown

    def write(self, value: Tensor) -> None:
        """Set the values."""
        if value is not self.buffer:
            self.buffer.copy_(value if value.ndim == 1 else value.reshape(-1))
        if self.flat is None:
            copy_all(self.tensors, self.views)


class NumberRow(Row):
    """A number of each of several leaves, a 0-dim tensor, in a shape that broadcasts over their elements; or, where
    `sizes` says how many these are, once for each element. Of a leaf in parts the number is that of the whole: it is
    written when the `last` of them is.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        scratch: Scratch,
        role: Any,
        shape: tuple[int, ...],
        *,
        sizes: list[int] | None = None,
        last: bool = True,
    ) -> None:
        super().__init__(tensors, scratch, role)
        self.last, self.own, self.firsts = last, self.flat, None
        if sizes is None:
            self.show_as(shape)
        else:
            self.flat, first = None, tensors[0]
            self.buffer = scratch.take((role, "repeated"), first.dtype, first.device, sum(sizes))
            self.shown, self.views = self.buffer, list(self.buffer.split(sizes))
            self.firsts = [view[0] for view in self.views]

    def numbers(self) -> Tensor:
        """The number of each leaf."""
        return torch.stack(self.tensors) if self.own is None else self.own

    def write(self, value: Tensor) -> None:
        if self.firsts is not None and self.last:
            if value is not self.buffer:
                self.buffer.copy_(value.reshape(-1))
            copy_all(self.tensors, self.firsts)
        elif self.last:
            super().write(value)

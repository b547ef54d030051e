"""Tensors that lie side by side in memory, to be worked on as one long one; and those that do not, gathered."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

copy_all: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]

# Elements that are worked on at once: 2**17 floats are half a megabyte, so what a chain touches stays in the cache.
SIZE = 1 << 17


def side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """One long view of tensors that lie one after another, each contiguous; None where they do not."""
    first = tensors[0]
    storage, end, width = first.untyped_storage().data_ptr(), first.data_ptr(), first.element_size()
    for t in tensors:
        if t.data_ptr() != end or not t.is_contiguous() or t.untyped_storage().data_ptr() != storage:
            return None
        end += t.numel() * width
    if len(tensors) == 1:
        return first.detach().view(-1)
    return first.detach().as_strided((sum(t.numel() for t in tensors),), (1,))


def lay(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that lie side by side, in the shapes of the tensors; the tensors themselves where they do already."""
    if side_by_side(tensors) is not None:
        return list(tensors)
    return views(torch.cat([t.detach().reshape(-1) for t in tensors]), tensors)


def views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a long tensor in the shapes of others."""
    parts = flat.split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


class Scratch:
    """Memory that pieces use one after another, a buffer for each role: it stays in the cache."""

    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def take(self, role: str, like: Tensor, size: int) -> Tensor:
        key = role, like.dtype, like.device
        if key not in self.buffers or len(self.buffers[key]) < size:
            self.buffers[key] = torch.empty(max(size, SIZE), dtype=like.dtype, device=like.device)
        return self.buffers[key][:size]


class Slab:
    """Some tensors as one long one: themselves where they lie side by side, else copied to scratch and back.

    Of one large tensor, the elements from `start` on, `size` of them.
    """

    def __init__(self, tensors: Sequence[Tensor], scratch: Scratch, role: str, start: int = 0, size: int = -1) -> None:
        self.tensors, self.scratch, self.role = list(tensors), scratch, role
        self.flat = side_by_side(tensors)
        if self.flat is not None and size >= 0:
            self.flat = self.flat[start : start + size]

    @cached_property
    def buffer(self) -> Tensor:
        return self.scratch.take(self.role, self.tensors[0], sum(t.numel() for t in self.tensors))

    @cached_property
    def views(self) -> list[Tensor]:
        return views(self.buffer, self.tensors)

    @property
    def last(self) -> Tensor:
        """What `read` gave, if nothing used the scratch since."""
        return self.buffer if self.flat is None else self.flat

    def read(self) -> Tensor:
        if self.flat is None:
            copy_all(self.views, self.tensors)
        return self.last

    def write(self, value: Tensor) -> None:
        if self.flat is not None:
            if value is not self.flat:
                self.flat.copy_(value)
        else:
            self.buffer.copy_(value)
            copy_all(self.tensors, self.views)

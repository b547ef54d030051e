"""DataLoader: batches of arrays that are in memory."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .text import form, html_table, near

# Bytes of rows that are picked at once: few enough to stay in the cache until they are used, and for glibc to keep the
# memory of one block for the next (of a megabyte each, it gave all back at each block, which took three times as long).
_BLOCK = 1 << 19

# A batch has the type of the data where that is tensors; of NumPy arrays it is for the user to know.
Batch = TypeVar("Batch", bound=Tensor | tuple[Tensor, ...] | list[Tensor] | dict[Any, Tensor], covariant=True)


class DataLoader(Generic[Batch]):
    """Batches of `data` in the same container, as tensors: `for x, y in DataLoader((X, Y), shuffle=True)`.

    `data` is one tensor or NumPy array, or a tuple, list or dict of them, with equally many rows. Whole batches are
    taken at once, with no Python per sample. Every epoch of `shuffle` has a fresh order, from `generator` or else from
    torch's global one. Without shuffling, batches are views of `data`. `drop_last` leaves out an incomplete last batch.
    What is read-only is copied whole at first; a map of a large file is not with `np.load(path, mmap_mode="c")`.

    >>> loader = DataLoader({"x": torch.arange(5), "y": np.zeros((5, 2))}, batch_size=2)
    >>> len(loader), [batch["x"].tolist() for batch in loader]
    (3, [[0, 1], [2, 3], [4]])
    """

    if not TYPE_CHECKING:  # it would hide the types below

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            """What does not fit is refused in words of its own."""
            if len(args) > 1 and isinstance(args[1], Tensor | np.ndarray | list):
                raise TypeError("DataLoader takes all arrays in one tuple: DataLoader((x, y), batch_size=32)")
            names = ("data", "batch_size", "shuffle", "drop_last", "generator")
            if other := next((name for name in kwargs if name not in names), None):
                raise TypeError(
                    f"DataLoader has no argument {other!r} (it is for arrays in memory; for data sets, workers and "
                    f"samplers there is torch.utils.data.DataLoader); {near(other, names)}"
                )
            return super().__new__(cls)

    @overload
    def __init__(
        self,
        data: Batch,
        batch_size: int = 32,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: "DataLoader[Any]",
        data: Any,
        batch_size: int = 32,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None: ...
    def __init__(
        self,
        data: Any,
        batch_size: int = 32,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(data, Mapping):
            named = dict(data)
        else:
            named = dict(enumerate(data)) if isinstance(data, tuple | list) else {"data": data}
        self._tensors = {name: _tensor(name, array) for name, array in named.items()}
        self._like = data if isinstance(data, tuple | list | Mapping) else None
        rows = {name: len(t) for name, t in self._tensors.items()}
        if len(set(rows.values())) != 1:
            raise ValueError(f"DataLoader: arrays must have equally many rows, and there must be one; got rows {rows}")
        self._rows = next(iter(rows.values()))
        if self._rows == 0:
            raise ValueError("DataLoader: the arrays are empty (0 rows); there is no batch to give")
        if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"DataLoader: batch_size={batch_size!r} is not allowed; it must be a whole number above 0")
        if drop_last and batch_size > self._rows:
            raise ValueError(f"DataLoader: batch_size={batch_size} with drop_last gives no batch of {self._rows} rows")
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"DataLoader: write generator=torch.Generator().manual_seed(0), not {generator!r}")
        self.batch_size, self.generator = int(batch_size), generator
        self.shuffle, self.drop_last = bool(shuffle), bool(drop_last)

    if not TYPE_CHECKING:
        __new__.__signature__ = inspect.signature(__init__)  # for help and editors

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return self._rows // self.batch_size if self.drop_last else -(-self._rows // self.batch_size)

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name}: {shape}" for name, shape in self._arrays())
        return f"DataLoader({self._rows:,} rows in {len(self):,} batches of {self.batch_size}{self._order()}; {arrays})"

    def _repr_html_(self) -> str:
        what = f"{self._rows:,} rows in {len(self):,} batches of {self.batch_size}{self._order()}"
        return html_table(["array", "a row of it"], self._arrays(), f"DataLoader: {what}")

    def _arrays(self) -> list[tuple[str, str]]:
        return [(str(name), form(t.shape[1:], t.dtype)) for name, t in self._tensors.items()]

    def _order(self) -> str:
        return ", shuffled" * self.shuffle + ", the last left out if incomplete" * self.drop_last

    def __iter__(self) -> Iterator[Batch]:
        tensors, size = list(self._tensors.values()), self.batch_size
        starts = range(0, len(self) * size, size)
        if not self.shuffle:
            return (self._batch([t[i : i + size] for t in tensors]) for i in starts)
        order = torch.randperm(self._rows, generator=self.generator, device=self.generator and self.generator.device)
        orders = [order.to(t.device) for t in tensors]
        return self._shuffled(list(zip(tensors, orders, strict=True)), starts)

    def _shuffled(self, pairs: list[tuple[Tensor, Tensor]], starts: range) -> Iterator[Any]:
        """Some batches at a time: a batch is a view of a block of rows that were picked together."""
        size = self.batch_size
        bytes_of_batch = max(size * (t.nbytes // max(len(t), 1)) for t, _ in pairs)
        batches = max(1, min(_BLOCK // max(bytes_of_batch, 1), len(starts)))
        for i in range(0, len(starts), batches):
            rows = slice(starts[i], starts[min(i + batches, len(starts)) - 1] + size)
            yield from map(self._batch, zip(*(_picked(t, o[rows]).split(size) for t, o in pairs), strict=True))

    def _batch(self, tensors: Sequence[Tensor]) -> Any:
        if isinstance(self._like, Mapping):
            return dict(zip(self._tensors, tensors, strict=True))
        if isinstance(self._like, tuple):
            make: Any = getattr(self._like, "_make", tuple)  # a namedtuple stays one
            return make(tensors)
        return tensors[0] if self._like is None else list(tensors)


_UNSIGNED = torch.uint16, torch.uint32, torch.uint64  # of which index_select, the faster way, takes none


def _picked(t: Tensor, rows: Tensor) -> Tensor:
    return t[rows] if t.dtype in _UNSIGNED else t.index_select(0, rows)


def require_batches(data: Any, name: str) -> None:
    """TypeError for what is no iterable of batches: arrays, a data set that gives single samples, and other things."""
    if is_pair_of_arrays(data) or isinstance(data, Tensor | np.ndarray | Mapping):
        what = "a pair of arrays" if isinstance(data, tuple | list) else type(data).__name__
        raise TypeError(f"{name} must be an iterable of batches, not {what}: fluxpy.DataLoader((X, Y), batch_size=32)")
    by_index = hasattr(data, "__getitem__") and not hasattr(data, "__iter__")
    if by_index or (isinstance(data, Dataset) and not isinstance(data, IterableDataset)):
        raise TypeError(
            f"{name} gives single samples: torch.utils.data.DataLoader(data, batch_size=32) makes batches of them "
            "(with batch_size=None, where each is a batch already)"
        )
    if isinstance(data, str | bytes) or not hasattr(data, "__iter__"):
        raise TypeError(f"{name} must be an iterable of batches, but got {data!r}")


def is_pair_of_arrays(data: Any) -> bool:
    """Whether this is (X, Y), and no list of two batches."""
    if (
        not isinstance(data, tuple | list)
        or len(data) != 2
        or not all(isinstance(a, Tensor | np.ndarray) for a in data)
    ):
        return False
    return isinstance(data, tuple) or data[0].shape[1:] != data[1].shape[1:] or data[0].dtype != data[1].dtype


def _tensor(name: Any, array: Any) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"DataLoader: {name!r} is a masked array, whose mask would be lost; write array.filled(value)")
    if isinstance(array, np.ndarray) and array.dtype.kind in "biufc" and array.dtype.char not in "gG":
        # torch cannot share memory that is read-only, runs backwards or has the other byte order.
        shares = array.flags.writeable and min(array.strides, default=0) >= 0 and array.dtype.isnative
        array = torch.from_numpy(array if shares else array.astype(array.dtype.newbyteorder("="), order="C"))
    if not isinstance(array, Tensor) or array.ndim == 0 or array.layout != torch.strided:
        got = f"a {array.dtype} array" if isinstance(array, np.ndarray) else type(array).__name__
        if isinstance(array, Tensor):
            got = f"a tensor of {array.layout}" if array.ndim else "a tensor without dimensions"
        if isinstance(array, Dataset):
            got += "; for data sets there is torch.utils.data.DataLoader"
        raise TypeError(f"DataLoader: expected tensors or NumPy arrays of numbers with rows; {name!r} is {got}")
    return array

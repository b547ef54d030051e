"""DataLoader gives every row once an epoch, in the container it was given."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxpy.data import DataLoader


class Pair(NamedTuple):
    x: Any
    y: Any


X = torch.arange(10.0)
Y = np.arange(10) * 2


@given(rows=st.integers(1, 40), size=st.integers(1, 45), shuffle=st.booleans(), drop=st.booleans())
def test_every_row_once(rows: int, size: int, shuffle: bool, drop: bool) -> None:
    drop = drop and size <= rows
    x = torch.arange(rows)
    loader = DataLoader((x, x.numpy() * 3), batch_size=size, shuffle=shuffle, drop_last=drop)
    batches = list(loader)
    whole, rest = divmod(rows, size)
    assert [len(a) for a, _ in batches] == [size] * whole + [rest] * (rest > 0 and not drop)
    assert len(loader) == len(batches)
    seen = torch.cat([a for a, _ in batches])
    assert torch.equal(torch.cat([b for _, b in batches]), seen * 3), "rows belong together"
    assert len(set(seen.tolist())) == len(seen)
    assert shuffle or torch.equal(seen, x[: len(seen)])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("data", "take"),
    [
        (X, lambda b: [b]),
        (Y, lambda b: [b]),
        ((X,), list),
        ((X, Y), list),
        ([X, Y], list),
        (Pair(X, Y), lambda b: [b.x, b.y]),
        ({"x": X, "y": Y}, lambda b: [b["x"], b["y"]]),
    ],
    ids=["tensor", "array", "single", "tuple", "list", "namedtuple", "dict"],
)
def test_same_container(data: Any, take: Callable[[Any], list[Any]], shuffle: bool) -> None:
    for batch in DataLoader(data, batch_size=4, shuffle=shuffle):
        assert type(batch) is (torch.Tensor if isinstance(data, torch.Tensor | np.ndarray) else type(data))
        arrays = take(batch)
        assert all(isinstance(a, torch.Tensor) for a in arrays)
        assert [a.dtype for a in arrays] == [torch.as_tensor(a).dtype for a in take(data)]


def orders(seed: int | None = None, epochs: int = 3) -> list[list[float]]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    loader = DataLoader(X, batch_size=3, shuffle=True, generator=generator)
    return [torch.cat(list(loader)).tolist() for _ in range(epochs)]


def test_each_epoch_has_a_fresh_order() -> None:
    first, second, third = orders(seed=1)
    assert first != second != third != first


def test_the_generator_or_else_the_global_one_decides() -> None:
    assert orders(seed=1) == orders(seed=1) != orders(seed=2)
    torch.manual_seed(1)
    ours = orders(seed=7)
    assert torch.initial_seed() == 1 and torch.equal(torch.rand(2), torch.manual_seed(1) and torch.rand(2))
    torch.manual_seed(5)
    globally = orders()
    torch.manual_seed(5)
    assert orders() == globally != ours


def test_unshuffled_batches_are_views_and_shuffled_ones_are_not() -> None:
    x, y = torch.zeros(4), np.zeros(4)
    for a, b in DataLoader((x, y), batch_size=2):
        a += 1
        b += 1
    assert x.tolist() == [1] * 4 and y.tolist() == [1] * 4
    for a, b in DataLoader((x, y), batch_size=2, shuffle=True):
        a += 1
        b += 1
    assert x.tolist() == [1] * 4 and y.tolist() == [1] * 4


@pytest.mark.parametrize("make", [lambda a: a[::-1], lambda a: a.astype(">f4"), lambda a: np.broadcast_to(a[:1], 3)])
def test_arrays_that_torch_cannot_share_are_copied(make: Callable[[np.ndarray], np.ndarray]) -> None:
    array = make(np.arange(3, dtype=np.float32))
    assert torch.cat(list(DataLoader(array, batch_size=2))).tolist() == array.tolist()


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int16", "bool", "float16", "complex64"])
def test_every_kind_of_number_is_shuffled(kind: str) -> None:
    array = (np.arange(20)).reshape(10, 2).astype(kind)
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat(list(DataLoader(array, batch_size=3, shuffle=True, generator=generator))).numpy()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert rows.dtype == array.dtype and (rows == array[order.numpy()]).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((X, Y[:9]),), ValueError, r"equally many rows.*\{0: 10, 1: 9\}"),
        (({"x": X, "y": Y[:9]},), ValueError, r"equally many rows.*'x': 10, 'y': 9"),
        (((),), ValueError, "there must be one"),
        ((X[:0],), ValueError, "empty"),
        ((X, 0), ValueError, "batch_size=0 is not allowed"),
        ((X, 2.0), ValueError, "batch_size=2.0 is not allowed"),
        ((X, 11, False, True), ValueError, "batch_size=11 with drop_last gives no batch of 10 rows"),
        ((torch.tensor(1.0),), TypeError, "without dimensions"),
        (((X, ["a"] * 10),), TypeError, "1 is list"),
        ((np.array(["a", "b"]),), TypeError, "array"),
        (("text",), TypeError, "str"),
        ((torch.eye(3).to_sparse(),), TypeError, "a tensor of torch.sparse_coo"),
        ((X, 4, True, False, 5), TypeError, r"write generator=torch.Generator\(\).manual_seed\(0\), not 5"),
        ((np.ma.array([1.0, 2.0], mask=[0, 1]),), TypeError, "mask would be lost"),
    ],
)
def test_what_is_wrong_is_said(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DataLoader(*arguments)


def test_numbers_and_flags_of_numpy() -> None:
    loader = DataLoader(X, batch_size=np.int64(4), shuffle=np.bool_(True))
    assert len(loader) == 3 and repr(loader).count("shuffled") == 1 and sum(map(len, loader)) == 10

"""Adafactor: Adam's division, in the memory of a row and a column for each matrix."""

from dataclasses import KW_ONLY
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fields import Hyper, hyper
from ..rule import Rule
from .average import average, decayed, larger, smaller, spare, wide


class Factors(NamedTuple):
    """State of `Adafactor` for matrices: the averages of the squared gradient over each row and each column."""

    row: Tensor
    column: Tensor
    t: int


class Variance(NamedTuple):
    """State of `Adafactor` for vectors: the average of the squared gradient."""

    v: Tensor
    t: int


class Adafactor(Rule):
    """Adafactor [Shazeer & Stern 2018]: `dx / √v`, its size bounded, times the size of the parameter itself.

    `v` is the average of `dx²` with the decay `1 - t^beta2_decay`. Of a matrix (of the last two dimensions, where there
    are more) only the averages of its rows and columns are kept: `v = row · column / mean(row)`, at least `eps[0]²`
    (None: the precision of the dtype). The step is `rate · u / max(1, rms(u) / d)` with `u = dx / √v`, `rms` the root
    of the mean square over the array and `rate = min(lr, 1/√t) · max(eps[1], rms(x))`; beside it
    `lr · weight_decay · x`. No momentum.

    Numbers of `torch.optim.Adafactor`. Of parameters in bfloat16 and float16, `v` is kept in float32 and what is
    between is computed there, where torch rounds each to the parameter's dtype. Complex parameters are refused.

    >>> [list(t.shape) for t in Adafactor().init(torch.zeros(1000, 500))[:2]]
    [[1000, 1], [1, 500]]
    """

    lr: Hyper = hyper(default=1e-2, allowed="[0, inf)")
    _: KW_ONLY
    beta2_decay: Hyper = hyper(default=-0.8, allowed="(-inf, 0]")
    eps: Hyper = hyper(default=(None, 1e-3), allowed="[0, inf)")
    d: Hyper = hyper(default=1.0, allowed="[1, inf)")
    weight_decay: Hyper = hyper(default=0.0, allowed="[0, inf)")

    def init(self, x: Tensor) -> Factors | Variance:
        if x.is_complex():
            raise ValueError("Adafactor takes real parameters, but this one is complex")
        x = wide(x)
        if x.ndim > 1 and x.numel():
            return Factors(torch.zeros_like(x[..., :1]), torch.zeros_like(x[..., :1, :]), 0)
        return Variance(torch.zeros_like(x), 0)

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        eps1, eps2 = self.eps
        eps1 = torch.finfo(x.dtype).eps if eps1 is None else eps1
        t, dtype, x, dx = state.t + 1, x.dtype, wide(x), wide(dx)
        beta2 = 1 - t**self.beta2_decay
        smallest = larger(eps1 * eps1, torch.finfo(x.dtype).tiny)
        square = dx * dx
        room = spare(square, x)  # once it is averaged
        if isinstance(state, Factors):
            row = average(beta2, state.row, square.mean(-1, keepdim=True))
            column = average(beta2, state.column, square.mean(-2, keepdim=True))
            state = Factors(row, column, t)
            v = torch.mul(row / larger(row.mean(-2, keepdim=True), eps1), column, out=room)
        else:
            v = average(beta2, state.v, square)
            state = Variance(v, t)
        u = torch.rsqrt(torch.clamp(v, min=smallest, out=room), out=room)
        u = torch.mul(u, dx, out=room)
        one = max(x.numel(), 1) ** 0.5  # the norm of an array whose rms is 1
        size = larger(torch.linalg.vector_norm(x), eps2 * one) / larger(torch.linalg.vector_norm(u), self.d * one)
        u = torch.mul(u, smaller(self.lr, t**-0.5) * self.d * size, out=room)
        return state, decayed(u, self.lr * self.weight_decay, x, room).to(dtype)

    def take(self, state: Any, x: Tensor, index: Tensor, dim: int) -> Any:
        """Averages of what stays; those over a dimension that is changed stay as they were."""
        if isinstance(state, Variance):
            return super().take(state, x, index, dim)
        if not len(index):
            return self.init(x.index_select(dim, index))._replace(t=state.t)
        row = state.row if dim == x.ndim - 1 else state.row.index_select(dim, index)
        column = state.column if dim == x.ndim - 2 else state.column.index_select(dim, index)
        return Factors(row, column, state.t)

    def grow(self, state: Any, x: Tensor, rows: Tensor, dim: int) -> Any:
        if not rows.numel():
            return state
        new = self.init(rows)
        if isinstance(new, Variance):
            return super().grow(state, x, rows, dim)
        if isinstance(state, Variance):  # of a matrix that had no element
            return self.init(torch.cat([x, rows], dim))._replace(t=state.t)
        row = state.row if dim == x.ndim - 1 else torch.cat([state.row, new.row], dim)
        column = state.column if dim == x.ndim - 2 else torch.cat([state.column, new.column], dim)
        return Factors(row, column, state.t)

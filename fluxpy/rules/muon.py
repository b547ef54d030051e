"""Muon: momentum for matrices, made orthogonal."""

import math
from dataclasses import KW_ONLY
from typing import Any

import torch
from torch import Tensor

from ..fields import Hyper, hyper
from ..rule import Rule, is_wrapped
from .average import average, plus, spare


class Muon(Rule):
    """Muon [Jordan et al. 2024]: `lr · scale · O + lr · weight_decay · x`, where `O` is the momentum made orthogonal.

    Of the momentum `U S Vᵀ` only `U Vᵀ` is left, roughly: five Newton-Schulz iterations in bfloat16 (`ns_steps`) bring
    all singular values near 1. `m` is the average of `dx`, and `nesterov` takes one more average of `dx` into it.
    `adjust_lr_fn` says how `scale` follows from the numbers of rows and columns: `√max(1, rows / columns)` by None or
    "original", `0.2 · √max(rows, columns)` by "match_rms_adamw" [Liu et al. 2025], with which a rate of AdamW fits.

    For the hidden matrices of a network; embeddings, heads, norms and biases are for another rule, in one `setup`:
    `setup({"blocks.*.weight": Muon(0.02), "*": AdamW(3e-4)}, model)`. Two dimensions are a matrix and three a batch of
    matrices. Of four and five, a convolution's, each output channel is a row: `flatten(1)`, for `scale` too. (A
    `Conv1d` has three, and so would be a batch: give it another rule.) Other parameters are refused, and complex ones.

    Numbers of `torch.optim.Muon`, which takes matrices alone. Gradients through a step are computed in bfloat16 too:
    they are right to a few per cent.

    >>> rule, x = Muon(1.0, momentum=0.0, weight_decay=0.0), torch.zeros(2, 2)
    >>> _, change = rule.apply(rule.init(x), x, torch.tensor([[3.0, 0.0], [0.0, -0.1]]))
    >>> torch.linalg.svdvals(change).round(decimals=1)  # of 3 and 0.1
    tensor([1.1000, 0.7000])
    """

    lr: Hyper = hyper(default=1e-3, allowed="[0, inf)")
    momentum: Hyper = hyper(default=0.95, allowed="[0, 1]")
    _: KW_ONLY
    weight_decay: Hyper = hyper(default=0.1, allowed="[0, inf)")
    nesterov: Hyper = hyper(default=True, allowed=(True, False))
    ns_steps: Hyper = hyper(default=5, allowed="1, 2, ...")
    adjust_lr_fn: Hyper = hyper(default=None, allowed=(None, "original", "match_rms_adamw"))

    def init(self, x: Tensor) -> Tensor:
        if x.ndim not in (2, 3, 4, 5) or x.is_complex():
            got = "is complex" if x.is_complex() else f"has {x.ndim} dimension{'s' * (x.ndim != 1)}"
            raise ValueError(
                f"Muon takes matrices of real numbers, but this parameter {got}: give it another rule, as in "
                'setup({"blocks.*.weight": Muon(0.02), "*": AdamW(3e-4)}, model)'
            )
        return torch.zeros_like(x)

    def apply(self, state: Tensor, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        m = average(self.momentum, state, dx)
        ahead = average(self.momentum, m, dx) if self.nesterov else m
        matrix = ahead.flatten(1) if x.ndim > 3 else ahead
        rows, columns = matrix.shape[-2:]
        step = orthogonal(matrix, self.ns_steps).to(x.dtype, memory_format=torch.contiguous_format).reshape(x.shape)
        match = self.adjust_lr_fn == "match_rms_adamw"
        scale = 0.2 * math.sqrt(max(rows, columns)) if match else math.sqrt(max(1, rows / max(columns, 1)))
        room = spare(step, x)
        return m, plus(torch.mul(step, self.lr * scale, out=room), self.lr * self.weight_decay, x, room)


def orthogonal(x: Tensor, steps: int) -> Tensor:
    """`x`, a matrix or a batch of them, with singular values near 1, in bfloat16: those of `Muon`.

    A batch of matrices gives what each gives alone, under `torch.func.vmap` too: bit for bit, but where PyTorch has
    another product for very small ones.
    """
    if torch.compiler.is_compiling() or x.requires_grad or is_wrapped(x):
        return _Orthogonal.apply(x, steps)
    return _newton_schulz(x, steps)  # alone it need not be one operation, which would cost as much as a small matrix


def _newton_schulz(x: Tensor, steps: int) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at zero: what is small grows fastest
    tall = x.shape[-2] > x.shape[-1]
    wide = (x.mT if tall else x).bfloat16()
    many = math.prod(wide.shape[:-2])
    # One matrix alone by the product of two, which rounds as that of stacks does; a stack of one may not.
    product = torch.addmm if many == 1 else torch.baddbmm
    o = wide.reshape(wide.shape[-2:] if many == 1 else (many, *wide.shape[-2:]))
    o = o / torch.linalg.vector_norm(o, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = o @ o.mT
        o = product(o, product(gram, gram, gram, beta=b, alpha=c), o, beta=a)
    o = o.reshape(wide.shape)
    return o.mT if tall else o


class _Orthogonal(torch.autograd.Function):
    """`_newton_schulz` as one operation: `vmap` would take its sums of products apart, and round once more in each."""

    @staticmethod
    def forward(x: Tensor, steps: int) -> Tensor:
        return _newton_schulz(x, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.steps = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        (x,), steps = ctx.saved_tensors, ctx.steps
        return torch.func.vjp(lambda x: _newton_schulz(x, steps), x)[1](slopes[0])[0], None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (x,), steps = ctx.saved_tensors, ctx.steps
        return torch.func.jvp(lambda x: _newton_schulz(x, steps), (x,), tangents[:1])[1]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        x, steps = args
        return _Orthogonal.apply(x.movedim(in_dims[0], 0), steps), 0

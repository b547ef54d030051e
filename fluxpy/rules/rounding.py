"""Parameters of 16 bits without a master copy: rounded at random, so that small steps are not lost."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rule import Assign, Rule, Run, Steps
from .average import is_differentiable, wide
from .wrap import Wrapper, inner_accumulates, inner_elementwise

# Of a float32, how many bits a dtype has no room for, and the factor that makes its smallest number, and with it the
# steps between its subnormal ones, those of a float32 without these bits.
_FORMS = {torch.bfloat16: (16, 1.0), torch.float16: (13, 2.0**-112)}


class Rounded(NamedTuple):
    """State of `StochasticRounding`: how many steps were rounded, and the state of the rule that steps."""

    t: int
    state: Any


class StochasticRounding(Wrapper):
    """`rule`, in float32, for parameters in bfloat16 without a master copy: what each becomes is rounded up or down at
    random, the nearer the likelier [Gupta et al. 2015; Zamirai et al. 2020].

    So it is exact in expectation, and steps far below the parameter's resolution, which rounding to nearest loses, add
    up. What bfloat16 can hold is not changed. The momenta are in float32: `StochasticRounding(Lowered(Adam()))` keeps
    them in bfloat16. Must be outermost. Float16 is rounded likewise; parameters of other dtypes step as by `rule`
    alone.

    There is no generator: the random bits of an element are a hash of its bits, those of its gradient, and the number
    of the step. So they are the same however leaves are packed, sharded or resumed. Elements that are equal and have
    equal gradients are rounded alike.

    >>> rule, x = StochasticRounding(Descent(1.0)), torch.linspace(1, 2, 10_000).bfloat16()
    >>> dx = (torch.arange(10_000) * 0.618 % 1 / 1000).bfloat16()  # the step from 1 down is 1/256
    >>> state, change = rule.apply(rule.init(x), x, dx)
    >>> bool((x - dx == x).all())  # rounded to nearest
    True
    >>> f"{(x.float() - change.value).mean() / dx.float().mean():.1f}"
    '1.0'
    """

    rule: Rule
    delegates = assigns = passes_evaluation = True
    outermost = "it rounds what the parameter becomes"
    accumulates, elementwise = inner_accumulates, inner_elementwise

    def init(self, x: Tensor) -> Rounded:
        return Rounded(0, self.rule.init_any(wide(x)))

    def steps(self, state: Rounded, x: Tensor, dx: Any) -> Steps:
        own, slope = wide(x), None if dx is None else wide(dx)
        run = Run(self.rule.steps(state.state, own, slope))
        while run.asks is not None:
            run.tell((yield run.asks))
        inner, change = run.result
        if change is None:
            return state._replace(state=inner), None
        if x.dtype in _FORMS:
            new = change.value if isinstance(change, Assign) else own - change
            change = Assign(_rounded(new.float(), own, slope, state.t, x.dtype))
        return Rounded(state.t + 1, inner), change

    def evaluation(self, state: Rounded, x: Tensor) -> Tensor:
        own = wide(x)
        value = self.rule.evaluation_any(state.state, own)
        return x if value is own else value.to(x.dtype)


def _noise(x: Tensor, dx: Tensor | None, t: int, lost: int) -> Tensor:
    """As many random bits as are lost, for each element: `lowbias32` [C. Wellons, hash-prospector, 2018] of the bits of
    `x` and `dx`, of 16 bits and now in float32, and a number of the step, which no other of 2²⁴ has.

    The first product, of Fibonacci hashing [Knuth], is for gradients that are like their parameters, as those of a
    square are: to `lowbias32` alone equal halves are nearly all the same. What is rounded has no part in it: where two
    ways to step differ in the last bit of that, all random bits would.
    """
    key = x.detach().view(torch.int32)  # not the 16 bits themselves, for which compiled code is not vectorised
    if dx is not None:
        key = key + _shifted(dx.detach().view(torch.int32), lost)
    key = (key * _signed(0x9E3779B1)).add_(t * 0x9E3779 % (1 << 24))  # below 2²⁴ a kernel takes it as an input
    key = key.bitwise_xor_(_shifted(key, 16)).mul_(_signed(0x7FEB352D))
    key = key.bitwise_xor_(_shifted(key, 15)).mul_(_signed(0x846CA68B))
    return key.bitwise_xor_(key >> 16).bitwise_and_((1 << lost) - 1)


def _signed(constant: int) -> int:
    """32 bits as the integer that they are in an int32."""
    return (constant ^ 1 << 31) - (1 << 31)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """32 bits shifted to the right, with zeros coming in."""
    return (bits >> places).bitwise_and_((1 << (32 - places)) - 1)


def _rounded(value: Tensor, x: Tensor, dx: Tensor | None, t: int, dtype: torch.dtype) -> Tensor:
    """A float32 in `dtype`: up in size where its bits that there is no room for and as many random ones carry, else
    down. The noise is that of `x`, `dx` and `t`."""
    lost, scale = _FORMS[dtype]
    exact = value.detach() if scale == 1 else value.detach() * scale
    bits = _noise(x, dx, t, lost).add_(exact.view(torch.int32)).bitwise_and_(-(1 << lost))
    near = bits.view(torch.float32)
    near = torch.maximum(near, torch.minimum(near, exact))  # the same; but of a NaN, which may have wrapped around, NaN
    near = near if scale == 1 else near / scale
    if is_differentiable():  # straight through; to add -0.0 changes nothing, not even -0.0
        near = value + torch.where(near == value.detach(), -0.0, near - value.detach())
    return near.to(dtype)

"""PyTorch's fused kernels: which rules they compute, called how, and what of a chain is left to its own `steps`.

A kernel writes into parameters and momenta. It would write a scaled gradient into the gradient too, so clipping is not
left to it. `KERNELS` is the one place of the engine that knows rules by their class.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rule import Rule, is_packable, rule_key
from ..rules.adam import Adam, AdamW, AMSGrad
from ..rules.adaptive import AdaGrad
from ..rules.average import eps_for
from ..rules.decay import WeightDecay
from ..rules.descent import Descent, Momentum, Nesterov
from ..rules.wrap import OptimiserChain

Launch = Callable[[list[Tensor], dict[str, Any]], Any]
Lists = list[list[Tensor]]
_TORCH: Any = torch  # where the kernels are, though not among its public names


class Kernel(NamedTuple):
    """A fused kernel as one rule calls it: `bind(params, momenta, steps)` gives `run(grads, options)`, and
    `options(rule, x, weight_decay)` the options."""

    bind: Callable[[list[Tensor], Lists, list[Tensor]], Launch]
    options: Callable[[Any, Tensor, float], dict[str, Any]]


def _adam(kernel: Any) -> Any:
    def bind(params: list[Tensor], momenta: Lists, steps: list[Tensor]) -> Launch:
        m, v, peak = (*momenta, [])[:3]
        return lambda grads, options: kernel(params, grads, m, v, peak, steps, **options)

    return bind


def _sgd(params: list[Tensor], momenta: Lists, steps: list[Tensor]) -> Launch:
    (buffers,) = momenta or [[]]
    return lambda grads, options: _TORCH._fused_sgd_(params, grads, buffers, **options)


def _adagrad(params: list[Tensor], momenta: Lists, steps: list[Tensor]) -> Launch:
    return lambda grads, options: _TORCH._fused_adagrad_(params, grads, momenta[0], steps, **options)


def _adam_options(rule: Any, x: Tensor, weight_decay: float) -> dict[str, Any]:
    (beta1, beta2), eps = rule.betas, eps_for(x, rule.eps)
    common = {"lr": rule.lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    return common | {"amsgrad": isinstance(rule, AMSGrad), "maximize": False}


def _sgd_options(rule: Any, x: Tensor, weight_decay: float) -> dict[str, Any]:
    momentum = getattr(rule, "momentum", 0.0)
    common = {"lr": rule.lr, "momentum": momentum, "weight_decay": weight_decay, "dampening": 0.0}
    return common | {"nesterov": isinstance(rule, Nesterov), "maximize": False, "is_first_step": False}


def _adagrad_options(rule: Any, x: Tensor, weight_decay: float) -> dict[str, Any]:
    eps = eps_for(x, rule.eps)
    return {"lr": rule.lr, "lr_decay": 0.0, "weight_decay": weight_decay, "eps": eps, "maximize": False}


KERNELS: dict[type[Rule], Kernel] = {
    Adam: Kernel(_adam(_TORCH._fused_adam_), _adam_options),
    AMSGrad: Kernel(_adam(_TORCH._fused_adam_), _adam_options),
    AdamW: Kernel(_adam(_TORCH._fused_adamw_), _adam_options),
    Descent: Kernel(_sgd, _sgd_options),
    Momentum: Kernel(_sgd, _sgd_options),
    Nesterov: Kernel(_sgd, _sgd_options),
    AdaGrad: Kernel(_adagrad, _adagrad_options),
}


class Links(NamedTuple):
    """A rule taken apart: a master copy around it, what is before the last rule (of several a chain), a penalty that
    the last rule's kernel can add itself, and the last."""

    master: Any
    front: Rule | None
    decay: WeightDecay | None
    last: Rule

    @staticmethod
    def of(rule: Rule) -> "Links":
        master: Any = rule if rule.keeps_master else None
        inner: Any = rule if master is None else master.rule
        *front, last = inner.rules if type(inner) is OptimiserChain and inner.rules else (inner,)
        decay = front[-1] if front else None
        if type(decay) is WeightDecay and type(last) is not AdamW:  # whose kernel adds a decay of its own
            front.pop()
        else:
            decay = None
        return Links(master, OptimiserChain(*front) if len(front) > 1 else next(iter(front), None), decay, last)

    def options(self, kernel: Kernel, x: Tensor) -> dict[str, Any]:
        own = getattr(self.last, "weight_decay", 0.0)  # that of AdamW
        return kernel.options(self.last, x, self.decay.weight_decay if self.decay else own)


def has_front(rule: Rule) -> bool:
    """Whether there are rules before the one that a kernel computes."""
    return Links.of(rule).front is not None


def takes(rule: Rule, x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel of PyTorch computes the last link of this rule, for a parameter with these momenta."""
    master, front, _, last = Links.of(rule)
    if type(last) not in KERNELS or not (front is None or is_packable(front)):
        return False
    dtype = x.dtype if master is None else master.dtype
    if master is not None and dtype.itemsize <= x.dtype.itemsize:
        return False  # the master copy is no finer than the parameter: the kernel's other roundings would show
    if not dtype.is_floating_point or dtype.itemsize not in (2, 4, 8) or x.device.type not in ("cpu", "cuda"):
        return False
    if any(t.dtype != dtype for t in tensors):
        return False
    if type(last) in (Descent, Momentum, Nesterov):
        if dtype.itemsize == 2 and x.device.type == "cpu":
            return False  # there PyTorch's kernel for SGD computes wrong numbers
        moving = getattr(last, "momentum", 1.0)
        # Without momentum the kernel leaves the buffer as it is, where the rule would keep the gradient in it.
        return not callable(moving) and moving != 0
    return True


def bucket_key(rule: Rule) -> Any:
    """What rules must have in common to go together: everything before the kernel, and the kernel's own rule but for
    its real numbers."""
    master, front, decay, last = Links.of(rule)
    return (
        None if master is None else master.dtype,
        None if front is None else rule_key(front),
        None if decay is None else rule_key(decay, loose=True),
        rule_key(last, loose=True),
    )


def states_of(rule: Rule, state: Any) -> tuple[Any, Any]:
    """The states of what is before a rule's last one (see `Links`), and of the last, which a kernel computes."""
    master, _, decay, _ = Links.of(rule)
    inner, state = (rule, state) if master is None else (master.rule, state.state)
    if type(inner) is not OptimiserChain:
        return (), state
    before = state[:-1] if decay is None else state[:-2]
    return before[0] if len(before) == 1 else before, state[-1]

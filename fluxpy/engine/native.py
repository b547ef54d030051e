"""The native path: PyTorch's fused kernels for the last rule of a chain, and the flat path for what stands before it.

A kernel writes into the parameters and momenta themselves. It would write a scaled gradient into the gradient too, so
clipping is not left to it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..guard import Guard
from ..rule import Rule, Steps, at, eps_for, hyperparameters
from ..rules.adam import Adam, AdamW, AMSGrad
from ..rules.adaptive import AdaGrad
from ..rules.clip import ClipGlobalNorm, ClipGrad, ClipNorm, shrink
from ..rules.decay import SignDecay, WeightDecay
from ..rules.descent import Descent, Momentum, Nesterov
from ..rules.wrap import OptimiserChain
from .flat import Flat, Piece
from .group import Member, same
from .slab import Scratch, side_by_side

Lists = list[list[Tensor]]
Run = Callable[[list[Tensor], dict[str, Any]], Any]
_FUSED: Any = torch  # where the kernels are, though not among its public names


class Kernel(NamedTuple):
    """A fused kernel as one rule calls it: `bind(params, momenta, steps)` gives `run(grads, options)`, and
    `options(rule, x, weight_decay)` the options."""

    bind: Callable[[list[Tensor], Lists, list[Tensor]], Run]
    options: Callable[[Any, Tensor, float], dict[str, Any]]


def _adam(kernel: Any) -> Any:
    def bind(params: list[Tensor], momenta: Lists, steps: list[Tensor]) -> Run:
        m, v, peak = (*momenta, [])[:3]
        return lambda grads, options: kernel(params, grads, m, v, peak, steps, **options)

    return bind


def _sgd(params: list[Tensor], momenta: Lists, steps: list[Tensor]) -> Run:
    (buffers,) = momenta or [[]]
    return lambda grads, options: _FUSED._fused_sgd_(params, grads, buffers, **options)


def _adagrad(params: list[Tensor], momenta: Lists, steps: list[Tensor]) -> Run:
    return lambda grads, options: _FUSED._fused_adagrad_(params, grads, momenta[0], steps, **options)


def _adam_options(rule: Any, x: Tensor, weight_decay: float) -> dict[str, Any]:
    (beta1, beta2), eps = rule.betas, eps_for(x, rule.eps)
    common = {"lr": rule.lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    return common | {"amsgrad": isinstance(rule, AMSGrad), "maximize": False}


def _adamw_options(rule: Any, x: Tensor, weight_decay: float) -> dict[str, Any]:
    return _adam_options(rule, x, rule.weight_decay)


def _sgd_options(rule: Any, x: Tensor, weight_decay: float) -> dict[str, Any]:
    momentum = getattr(rule, "momentum", 0.0)
    common = {"lr": rule.lr, "momentum": momentum, "weight_decay": weight_decay, "dampening": 0.0}
    return common | {"nesterov": isinstance(rule, Nesterov), "maximize": False, "is_first_step": False}


def _adagrad_options(rule: Any, x: Tensor, weight_decay: float) -> dict[str, Any]:
    eps = eps_for(x, rule.eps)
    return {"lr": rule.lr, "lr_decay": 0.0, "weight_decay": weight_decay, "eps": eps, "maximize": False}


KERNELS: dict[type[Rule], Kernel] = {
    Adam: Kernel(_adam(_FUSED._fused_adam_), _adam_options),
    AMSGrad: Kernel(_adam(_FUSED._fused_adam_), _adam_options),
    AdamW: Kernel(_adam(_FUSED._fused_adamw_), _adamw_options),
    Descent: Kernel(_sgd, _sgd_options),
    Momentum: Kernel(_sgd, _sgd_options),
    Nesterov: Kernel(_sgd, _sgd_options),
    AdaGrad: Kernel(_adagrad, _adagrad_options),
}
FRONT = (WeightDecay, SignDecay, ClipGrad, ClipNorm, ClipGlobalNorm)


def links(rule: Rule) -> tuple[Rule, ...]:
    return rule.rules if type(rule) is OptimiserChain else (rule,)


def takes(rule: Rule, x: Tensor) -> bool:
    """Whether a kernel of PyTorch computes this rule, with what stands in front of it on the flat path."""
    *front, last = links(rule) or (rule,)
    fits = x.is_floating_point() and x.element_size() in (2, 4, 8) and x.device.type in ("cpu", "cuda")
    if type(last) in (Descent, Momentum, Nesterov) and x.element_size() == 2 and x.device.type == "cpu":
        return False  # there PyTorch's kernel for SGD computes wrong numbers
    moving = getattr(last, "momentum", 1.0)
    # Without momentum the kernel leaves the buffer as it is, where the rule would keep the gradient in it.
    return (
        fits and type(last) in KERNELS and not callable(moving) and moving != 0 and all(type(r) in FRONT for r in front)
    )


def through(rules: Sequence[Rule], x: Tensor, dx: Tensor) -> Steps:
    """Rules without a state, one after another."""
    for rule in rules:
        _, dx = yield from rule.steps((), x, dx)
    return (), dx


def form(rule: Rule) -> Any:
    """What rules must have in common to go together: all that stands in front, and the kernel's own but for rates."""
    *front, last = links(rule)
    return tuple(map(same, front)), same(last, loose=True)


class Call(NamedTuple):
    """A call of the kernel, for the gradients at these places of a list (None: for all of them)."""

    run: Run
    places: list[int] | None
    leaf: int  # one that has its rule
    long: bool = False  # whether it takes one long tensor


class Native(Flat):
    """Leaves of chains that a fused kernel ends. Where their rates differ there is a call for each rate."""

    def __init__(self, members: Sequence[Member], scratch: Scratch) -> None:
        whole: Any = links(members[0].leaf.rule)
        # A penalty right before the kernel is its own `weight_decay`; that of AdamW's is another one.
        folded = len(whole) > 1 and type(whole[-2]) is WeightDecay and type(whole[-1]) is not AdamW
        self.front = len(whole) - 1 - folded
        self.reads_x = any(isinstance(rule, WeightDecay | SignDecay) for rule in whole[: self.front])
        self.kernel = KERNELS[type(whole[-1])]
        # As they are, without pieces, where nothing stands in front and nothing lies side by side.
        pair = [member.x for member in members[:2]]
        self.aside = len(pair) == 2 and side_by_side(pair) is not None
        self.direct = not self.front and not self.aside
        self.split = self.front > 0
        super().__init__(members, scratch)
        self.rewrites_views = True  # autograd does not hear of these kernels either
        self.clock = torch.zeros((), dtype=torch.float32, device=pair[0].device)
        self.clocks = [self.clock] * len(members)
        self.counter = next((i for i, part in enumerate(self.frame.parts) if type(part) is int), None)
        # The kernels read the factor in float32.
        self.scales = self.front > 0 and pair[0].dtype != torch.float64
        self.scales &= all(type(rule) is ClipGlobalNorm for rule in whole[: self.front])
        self.scale = torch.ones((), dtype=torch.float32, device=pair[0].device)
        self.share_out()

    def arrange(self) -> None:
        if not self.direct:
            super().arrange()

    def lay(self, single: bool) -> None:
        if self.aside:
            super().lay(single)

    def share_out(self) -> None:
        """Make the calls: of leaves with one rule, as one long tensor where they are."""
        self.options: dict[int, dict[str, Any]] = {}
        rules = {id(m.leaf._rule): same(m.leaf._rule) for m in self.members}
        keys = [rules[id(m.leaf._rule)] for m in self.members]
        self.calls = self.calls_for(keys, 0, len(keys)) if self.direct else []
        for piece in self.pieces:
            slabs = [piece.x, *piece.momenta]
            if all(slab.flat is not None for slab in slabs) and len(set(keys[piece.low : piece.high])) == 1:
                x, *momenta = ([slab.last] for slab in slabs)
                piece.calls = [Call(self.kernel.bind(x, momenta, self.clocks[:1]), None, piece.low, long=True)]
            else:
                piece.calls = self.calls_for(keys, piece.low, piece.high)

        longs = [call for piece in self.pieces for call in piece.calls if call.long]
        self.joined: Run | None = None
        if not self.front and len(longs) == len(self.pieces) > 0 and len(set(keys)) == 1:
            x, *momenta = zip(
                *([piece.x.last, *(slab.last for slab in piece.momenta)] for piece in self.pieces), strict=True
            )
            self.joined = self.kernel.bind(list(x), [*map(list, momenta)], self.clocks[: len(longs)])

    def calls_for(self, keys: list[Any], low: int, high: int) -> list[Call]:
        places: dict[Any, list[int]] = {}
        for i in range(low, high):
            places.setdefault(keys[i], []).append(i - low)
        calls = []
        for own in places.values():
            params, *momenta = ([row[low + i] for i in own] for row in (self.params, *self.momenta))
            run = self.kernel.bind(params, momenta, self.clocks[: len(own)])
            calls.append(Call(run, own if len(places) > 1 else None, low + own[0]))
        return calls

    def retune(self) -> bool:
        self.rule = self.members[0].leaf._rule
        rules = {id(m.leaf._rule): m.leaf._rule for m in self.members}.values()
        self.share_out()
        return len(set(map(form, rules))) == 1 and all(takes(rule, self.params[0]) for rule in rules)

    def begin(self, grads: list[Tensor]) -> None:
        super().begin(grads)
        for i in self.odd if self.direct else ():  # a kernel would read other strides as if they were the parameter's
            grads[i] = torch.empty_like(self.params[i]).copy_(grads[i])
        if not self.options or self.rule.scheduled:
            self.options, known = {}, {}
            for call in (*self.calls, *(call for piece in self.pieces for call in piece.calls)):
                own = self.members[call.leaf].leaf._rule
                if id(own) not in known:
                    *front, last = links(at(own, self.count))
                    decay = hyperparameters(front[-1])["weight_decay"] if len(front) > self.front else 0.0
                    known[id(own)] = self.kernel.options(last, self.params[0], decay)
                self.options[call.leaf] = known[id(own)]

    def scaled(self, options: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The options with which a kernel does what stands in front: what that makes of a one is its factor."""
        limits: list[Any] = [hyperparameters(rule)["max_norm"] for rule in links(self.now)[: self.front]]
        pairs = list(zip(self.pieces[0].answers, limits, strict=True))
        tensors = any(isinstance(v, Tensor) for pair in pairs for v in pair)
        factor: Any = torch.ones_like(self.scale) if tensors else 1.0
        for norm, limit in pairs:
            factor = shrink(factor, norm, limit)
        if isinstance(factor, float) and factor == 1:
            return options
        scale = self.scale.fill_(1 / factor) if isinstance(factor, float) else factor.reciprocal()
        return {leaf: own | {"grad_scale": scale} for leaf, own in options.items()}

    def start(self, piece: Piece) -> Steps:
        x = piece.x.read() if self.reads_x else piece.x.last
        return through(links(self.now)[: self.front], x, piece.gradient(self.grads))

    def long_gradients(self) -> list[Tensor] | None:
        """The gradients of all pieces where they lie; None where one must be gathered, for there is one scratch."""
        found = []
        for piece in self.pieces:
            found.append(piece.gradient(self.grads))
            if piece.views and found[-1] is piece.buffer:
                return None
        return found

    def commit(self, guard: Guard) -> None:
        if self.counter is not None:
            self.frame.parts[self.counter] += 1
            self.clock.fill_(self.frame.parts[self.counter])
        options = self.options
        if guard.bad is not None:
            held = {"found_inf": guard.bad.to(self.clock)}
            options = {leaf: own | held for leaf, own in options.items()}
        if self.joined is not None and (long := self.long_gradients()) is not None:
            self.joined(long, options[self.pieces[0].low])
            self.stepped()
            return
        scaled = self.scaled(options) if self.scales else options
        for run, places, leaf, _ in self.calls:
            run(self.grads if places is None else [self.grads[i] for i in places], options[leaf])
        for piece in self.pieces:
            now = options
            if self.scales and piece.views and (dx := piece.gathered(self.grads)) is piece.buffer:
                now = scaled  # in scratch the kernel may write the scaled gradient
            else:
                dx = self.run(piece)[1] if self.front else piece.gradient(self.grads)
            grads = [dx]
            if not piece.calls[0].long:
                if dx is not piece.buffer:
                    piece.buffer.copy_(dx)
                grads = piece.views
            for run, places, leaf, _ in piece.calls:
                run(grads if places is None else [grads[i] for i in places], now[leaf])
        self.stepped()

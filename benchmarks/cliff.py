"""No cliff: the next ordinary thing that a user does must not cost several times its neighbour.

Each row is a function of the layers that gives its two sides. What one would write with torch stands beside what one
writes with fluxpy, each as an expert would write it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.adamw import adamw

import fluxpy
from fluxpy import AdamW, OptimiserChain

from .harness import Column, Meter, figure, ratios
from .pairs import Layers, Side, Sides, by_fluxpy, by_hand, by_torch
from .sides import fused

TITLE = "No cliff"
NOTE = """One update of 100 `Linear(32, 32)` (200 leaves), an encoder and two heads: ratios to what one would write for
the same with torch, with its fused AdamW wherever it has it. Gradients are new tensors in `.grad` before each step.
Afterwards the parameters are compared with those that torch comes to by the same steps."""
COLUMNS = {"1 thread": ("layers", 1)}

FOREACH: Any = torch  # has them, though not among its public names
LR = 1e-3
MAX_NORM = 20.0  # of an array: of the three sets of gradients it clips all weights, and the biases of one
MAX_GLOBAL_NORM = 600.0  # clips two of the three


def rate(step: int) -> float:
    """A rate that was not there before, so that nothing kept for an earlier one serves."""
    return LR / (1 + 1e-3 * step)


def clip_each(params: list[Tensor]) -> None:
    for p in params:
        clip_grad_norm_(p, MAX_NORM)


def plain(layers: Layers) -> Sides:
    return Sides(by_fluxpy(layers, AdamW(LR)), by_torch(layers))


def decay_and_clip(layers: Layers) -> Sides:
    """The penalty is part of what is clipped, so that torch's own `weight_decay`, which comes later, cannot serve."""
    decay = 1.0  # enough to be seen in the parameters

    def make(params: list[Any]) -> Callable[[int], object]:
        optimiser = torch.optim.AdamW(params, LR, weight_decay=0.0, fused=True)

        def step(n: int) -> None:
            FOREACH._foreach_add_([p.grad for p in params], params, alpha=decay)
            clip_each(params)
            optimiser.step()

        return step

    chain = OptimiserChain(fluxpy.WeightDecay(decay), fluxpy.ClipNorm(MAX_NORM), fluxpy.Adam(LR))
    return Sides(by_fluxpy(layers, chain), by_hand(layers, make))


def clip_norm(layers: Layers) -> Sides:
    chain = OptimiserChain(fluxpy.ClipNorm(MAX_NORM), AdamW(LR))
    clipped = by_torch(layers, lambda n, params, optimiser: clip_each(params))
    return Sides(by_fluxpy(layers, chain), by_torch(layers), same=clipped)


def adjusted(layers: Layers) -> Sides:
    def set_rate(n: int, params: list[Tensor], optimiser: torch.optim.Optimizer) -> None:
        optimiser.param_groups[0]["lr"] = rate(n)

    ours = by_fluxpy(layers, AdamW(LR), lambda n, state: fluxpy.adjust(state, rate(n)))
    return Sides(ours, by_torch(layers, set_rate))


def adjusted_branches(layers: Layers) -> Sides:
    def adjust(n: int, state: Any) -> None:
        fluxpy.adjust(state.encoder, 0.1 * rate(n))
        fluxpy.adjust(state.heads, rate(n))

    def groups(params: list[Tensor]) -> torch.optim.Optimizer:
        encoder, heads = params[: len(Layers.encoder)], params[len(Layers.encoder) :]
        return torch.optim.AdamW([{"params": encoder}, {"params": heads}], fused=True)

    def set_rates(n: int, params: list[Tensor], optimiser: torch.optim.Optimizer) -> None:
        encoder, heads = optimiser.param_groups
        encoder["lr"], heads["lr"] = 0.1 * rate(n), rate(n)

    return Sides(by_fluxpy(layers, AdamW(LR), adjust), by_torch(layers, set_rates, groups))


def scheduled(layers: Layers) -> Sides:
    decay = 0.999

    def set_rate(n: int, params: list[Tensor], optimiser: torch.optim.Optimizer) -> None:
        optimiser.param_groups[0]["lr"] = LR * decay**n

    return Sides(by_fluxpy(layers, AdamW(fluxpy.schedules.exponential(LR, decay))), by_torch(layers, set_rate))


def heads_in_turn(layers: Layers) -> Sides:
    def other(step: int) -> range:
        return Layers.first if step % 2 else Layers.second

    return Sides(by_fluxpy(layers, AdamW(LR), without=other), by_torch(layers, without=other))


def frozen_in_turn(layers: Layers) -> Sides:
    """Our frozen leaves have gradients, as after `backward`: `freeze` alone holds them back."""

    def turn(step: int, state: Any) -> None:
        (fluxpy.freeze if step % 2 else fluxpy.thaw)(state.encoder)

    def frozen(step: int) -> range:
        return Layers.encoder if step % 2 else range(0)

    return Sides(by_fluxpy(layers, AdamW(LR), turn), by_torch(layers, without=frozen))


def mixed_precision(layers: Layers) -> Sides:
    def make(params: list[Any]) -> Callable[[int], object]:
        masters = [p.detach().float() for p in params]
        grads = [torch.empty_like(master) for master in masters]
        for master, g in zip(masters, grads, strict=True):
            master.grad = g
        optimiser = fused(masters)

        def step(n: int) -> None:
            FOREACH._foreach_copy_(grads, [p.grad for p in params])
            optimiser.step()
            FOREACH._foreach_copy_(params, masters)

        return step

    return Sides(by_fluxpy(layers, fluxpy.MixedPrecision(AdamW(LR))), by_hand(layers, make))


def accumulated(layers: Layers) -> Sides:
    def make(params: list[Any]) -> Callable[[int], object]:
        sums = [torch.zeros_like(p) for p in params]
        optimiser = fused(params)

        def step(n: int) -> None:
            FOREACH._foreach_add_(sums, [p.grad for p in params], alpha=0.25)
            if n % 4 == 3:
                for p, total in zip(params, sums, strict=True):
                    p.grad = total
                optimiser.step()
                FOREACH._foreach_zero_(sums)

        return step

    chain = OptimiserChain(fluxpy.AccumGrad(4), AdamW(LR))
    return Sides(by_fluxpy(layers, chain), by_torch(layers), same=by_hand(layers, make))


def clip_global_norm(layers: Layers) -> Sides:
    chain = OptimiserChain(fluxpy.ClipGlobalNorm(MAX_GLOBAL_NORM), AdamW(LR))
    theirs = by_torch(layers, lambda n, params, optimiser: clip_grad_norm_(params, MAX_GLOBAL_NORM))
    return Sides(by_fluxpy(layers, chain), theirs)


def not_fused(layers: Layers) -> Sides:
    return Sides(by_fluxpy(layers, AdamW(LR)), by_torch(layers, make=torch.optim.AdamW))


class SoftSign(fluxpy.Rule):
    """A rule of one's own: momentum, softly bounded."""

    lr: float = LR
    beta: float = 0.9
    elementwise = True

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def apply(self, state: Tensor, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        m = self.beta * state + (1 - self.beta) * dx
        return m, self.lr * m / (1 + m.abs())


def own_elementwise(layers: Layers) -> Sides:
    def make(params: list[Any]) -> Callable[[int], object]:
        momenta = [torch.zeros_like(p) for p in params]

        def step(n: int) -> None:
            for p, m in zip(params, momenta, strict=True):
                m.mul_(0.9).add_(p.grad, alpha=0.1)
                p.addcdiv_(m, m.abs().add_(1), value=-LR)

        return step

    return Sides(by_fluxpy(layers, SoftSign()), by_hand(layers, make))


class UnitNorm(fluxpy.Rule):
    """A rule of one's own which needs the whole array: the gradient at unit norm."""

    lr: float = LR

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Tensor]:
        return state, self.lr * dx / dx.norm()


def own_unit_norm(layers: Layers) -> Sides:
    def make(params: list[Any]) -> Callable[[int], object]:
        def step(n: int) -> None:
            for p in params:
                p.sub_(p.grad / p.grad.norm(), alpha=LR)

        return step

    return Sides(by_fluxpy(layers, UnitNorm()), by_hand(layers, make))


def pure(layers: Layers) -> Sides:
    return _pure(layers, layers.fresh())


def pure_of_dicts(layers: Layers) -> Sides:
    """Nothing is copied but tensors and the dicts that hold them."""
    tensors = {f"layer {i:03}": list(layer.parameters()) for i, layer in enumerate(_linears(layers.fresh()))}
    return _pure(layers, {name: {"0": weight, "1": bias} for name, (weight, bias) in tensors.items()})


def _linears(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def _pure(layers: Layers, model: Any) -> Sides:
    state = fluxpy.setup(AdamW(LR), model)
    params: list[Tensor] = list(layers.fresh().parameters())
    # Both averages and the count of each parameter, as torch's functional AdamW takes them.
    held = [
        [torch.zeros_like(p) for p in params],
        [torch.zeros_like(p) for p in params],
        [torch.zeros(()) for _ in params],
    ]

    def update(step: int) -> None:
        nonlocal state, model
        state, model = fluxpy.update(state, model, inplace=False)

    @torch.no_grad()
    def on_clones(step: int) -> None:
        nonlocal params, held
        grads = [p.grad for p in params if p.grad is not None]
        params, *held = [[t.clone() for t in tensors] for tensors in (params, *held)]
        means, squares, counts = held
        options = {"amsgrad": False, "maximize": False, "fused": True, "weight_decay": 1e-2, "eps": 1e-8}
        adamw(params, grads, means, squares, [], counts, lr=LR, beta1=0.9, beta2=0.999, **options)

    def own() -> list[Tensor]:
        if isinstance(model, nn.Module):
            return list(model.parameters())
        return [p for layer in model.values() for p in layer.values()]

    return Sides(Side(layers, own, update), Side(layers, lambda: params, on_clones))


def linear(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Linear(32, 32, dtype=dtype)


def of_bfloat16() -> nn.Module:
    return linear(torch.bfloat16)


def of_complex() -> nn.Module:
    return linear(torch.complex64)


def channels_last() -> nn.Module:
    layer: Any = nn.Conv2d(16, 8, 3)
    return layer.to(memory_format=torch.channels_last)


class Row(NamedTuple):
    """What was aimed at, and the two sides, of which layers. Steps repeat after `cycle`. The sides may end apart by
    `tolerance` of the way that they went."""

    target: float
    sides: Callable[[Layers], Sides]
    layer: Callable[[], nn.Module] = linear
    cycle: int = 1
    tolerance: float = 1e-3


ROWS = {
    "`AdamW`": Row(0.30, plain),
    "`WeightDecay, ClipNorm, Adam`: against `clip_grad_norm_` on each array and fused AdamW": Row(0.35, decay_and_clip),
    "`ClipNorm, AdamW` against fused AdamW without any clip": Row(1.0, clip_norm),
    "`adjust(state, lr)` before each step": Row(0.5, adjusted),
    "two branches adjusted before each step": Row(0.6, adjusted_branches),
    "a schedule in the rule": Row(0.40, scheduled),
    "two heads in turn, each step's other head without a gradient": Row(1.0, heads_in_turn, cycle=2),
    "a branch frozen and thawed in turn": Row(1.0, frozen_in_turn, cycle=2),
    "`MixedPrecision(AdamW)` of bfloat16, against float32 masters by hand with fused AdamW and `_foreach_copy_`": Row(
        0.8, mixed_precision, of_bfloat16, tolerance=1e-2
    ),
    "`AccumGrad(4), AdamW`, mean step against fused AdamW's": Row(0.6, accumulated, cycle=4),
    "clip and AdamW on channels_last convolutions": Row(0.6, clip_global_norm, channels_last),
    "AdamW on complex parameters, against torch's default": Row(1.0, not_fused, of_complex),
    "a rule of one's own, elementwise, against the same formula in a loop by hand": Row(0.6, own_elementwise),
    "a rule of one's own, not elementwise (gradient at unit norm), against the same by hand": Row(1.0, own_unit_norm),
    "pure update, against cloning parameters and momenta and fused AdamW": Row(1.5, pure),
    "pure update of nested dicts of tensors, against the same": Row(1.5, pure_of_dicts),
}


def measure(column: str, meter: Meter) -> Column:
    found: Column = {}
    for name, row in ROWS.items():
        if not meter.wants(name):
            continue
        layers = Layers(meter.device, row.layer)
        sides = row.sides(layers)
        times = meter.compare({"theirs": sides.theirs, "ours": sides.ours}, row.cycle)
        try:
            sides.agree(layers, row.tolerance)
        except AssertionError as error:
            error.add_note(f"in the row {name!r}")
            raise
        found[name] = figure(ratios(times["ours"], times["theirs"]), target=row.target)
    return found

"""The contenders on a `Problem`: an optimiser of torch's kind, fluxpy on each of its paths, and a bare copy.

Before each step, untimed, the gradients are made anew, as `zero_grad` and `backward` do: new tensors in `.grad`, or in
a new tree. So no contender lives on having seen the same tensors a moment ago, and clipping has something to clip.
"""

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

import fluxpy

from .harness import Contender
from .sets import Problem


def of_torch(
    problem: Problem, make: Callable[[list[Tensor]], Any], clip: bool = False, check: bool = True
) -> Contender:
    """`make(parameters)` gives an optimiser."""
    params: list[Tensor] = list(problem.fresh().parameters())
    optimiser = make(params)

    def step() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(params, problem.max_norm)
        optimiser.step()

    return Contender(step, _renew(problem, params), (lambda n: problem.check(params, n, clip)) if check else None)


def fused(params: list[Tensor]) -> torch.optim.Optimizer:
    """What is to be beaten."""
    return torch.optim.AdamW(params, fused=True)


def of_fluxpy(
    problem: Problem,
    rule: fluxpy.Rule | None = None,
    *,
    clip: bool = False,
    flat: bool = False,
    compile: bool = False,
    tree: bool = False,
    rates: int = 1,
    check: bool = True,
) -> Contender | None:
    """AdamW (or `rule`). `clip` puts ClipGlobalNorm in front; `flat` lays the model out flat; with `tree` gradients
    come as a tree; so many different `rates` go round the leaves. None where fluxpy has no such thing."""
    if flat and not hasattr(fluxpy, "flatten_parameters"):
        return None
    model, rule = problem.fresh(), rule or fluxpy.AdamW(1e-3)
    if flat:
        lay_flat: Any = fluxpy.flatten_parameters
        lay_flat(model, grad=True)
    rule = fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(problem.max_norm), rule) if clip else rule
    state = fluxpy.setup(rule, model, compile=compile)
    params: list[Tensor] = list(model.parameters())
    numbers = [1e-3 * (1 + i % rates / rates) for i in range(len(params))]
    if rates > 1:
        for number, (_, leaf) in zip(numbers, fluxpy.leaves(state), strict=True):
            fluxpy.adjust(leaf, number)
    prepare = _renew(problem, params)
    grads: list[Any] = [None]  # `.grad` is used
    if tree:
        pairs = zip(params, problem.grads, strict=True)
        given = fluxpy.gradient(lambda m: torch.stack([(p * g).sum() for p, g in pairs]).sum(), model)
        tensors, spec = optree.tree_flatten(given, namespace="fluxpy")

        def prepare() -> None:
            grads[0] = optree.tree_unflatten(spec, [t.clone() for t in tensors])

    verify = (lambda n: problem.check(params, n, clip, numbers)) if check else None
    return Contender(lambda: fluxpy.update(state, model, grads[0]), prepare, verify)


def kernel(problem: Problem, flat: bool = False) -> Contender:
    """torch's fused kernel alone, on lists that were made once: what nobody who calls it can do without. `flat`: on one
    long tensor."""
    params = [p.detach() for p in problem.fresh().parameters()]
    params = [torch.cat([p.flatten() for p in params])] if flat else params
    grads: list[Tensor] = []
    means, squares = ([torch.zeros_like(p) for p in params] for _ in range(2))
    clock = params[0].new_zeros(())
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 1e-2, "eps": 1e-8}
    options |= {"amsgrad": False, "maximize": False}
    call: Any = torch._fused_adamw_  # pyright: ignore[reportPrivateImportUsage]

    def prepare() -> None:
        grads[:] = [torch.cat([g.flatten() for g in problem.grads])] if flat else [g.clone() for g in problem.grads]

    def step() -> None:
        clock.add_(1)
        call(params, grads, means, squares, [], [clock] * len(params), **options)

    return Contender(step, prepare, None if flat else lambda n: problem.check(params, n))


def copying(problem: Problem) -> Contender:
    """A copy of the parameters' size, which moves 8 bytes a number: how fast the machine moves memory."""
    source = torch.cat([p.detach().flatten() for p in problem.params])
    target = torch.empty_like(source)
    return Contender(lambda: target.copy_(source))


def _renew(problem: Problem, params: list[Tensor]) -> Callable[[], None]:
    flat = params[0].grad is not None  # then backward adds to what is there

    def prepare() -> None:
        for p, g in zip(params, problem.grads, strict=True):
            if flat and p.grad is not None:
                p.grad.copy_(g)
            else:
                p.grad = g.clone()

    return prepare

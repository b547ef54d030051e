"""Algorithms that torch.optim does not have, as steps made of the formulas in reference.py.

Each makes a step: from all parameters and gradients (lists of arrays) and the hyperparameters to the new parameters.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import reference
from reference import Array

Step: TypeAlias = Callable[..., list[Array]]


def each(algorithm: Callable[..., Any]) -> Callable[[], Step]:
    """From a formula for one array, `f(memory, x, g, **hyperparameters) -> change`, to a maker of steps on many."""

    def make() -> Step:
        memories: dict[int, Any] = {}

        def step(xs: list[Array], gs: list[Array], **h: Any) -> list[Array]:
            return [
                x - algorithm(memories.setdefault(i, {}), x, g, **h)
                for i, (x, g) in enumerate(zip(xs, gs, strict=True))
            ]

        return step

    return make


def clip_norm_change(memory: Any, x: Array, g: Array, max_norm: float, norm_type: float, nonfinite: str) -> Array:
    return reference.shrink(g, reference.norm_of(np.abs(g), norm_type), max_norm)


lion = each(reference.lion)
oadam = each(reference.oadam)
adabelief = each(reference.adabelief)
adopt = each(reference.adopt)
weight_decay = each(reference.weight_decay)
sign_decay = each(reference.sign_decay)
clip_grad = each(reference.clip_grad)
clip_norm = each(clip_norm_change)


def clip_global_norm() -> Step:
    def step(xs: list[Array], gs: list[Array], **h: Any) -> list[Array]:
        flat = clip_norm()([np.concatenate([x.ravel() for x in xs])], [np.concatenate([g.ravel() for g in gs])], **h)[0]
        ends = np.cumsum([x.size for x in xs])[:-1]
        return [part.reshape(x.shape) for part, x in zip(np.split(flat, ends), xs, strict=True)]

    return step


@each
def accumulated_momentum(memory: Any, x: Array, g: Array, n: int, lr: float, momentum: float) -> Array:
    """SGD with momentum on the mean of every `n` gradients; a smaller `n` may end a window early."""
    window = memory.setdefault("window", [])
    window.append(g)
    if len(window) < n:
        return np.zeros_like(x)
    mean = np.mean(window, axis=0)
    window.clear()
    return reference.momentum(memory, x, mean, lr, momentum)


@each
def ademamix(
    memory: Any, x: Array, g: Array, lr: float, betas: Any, eps: float, alpha: float, weight_decay: float
) -> Array:
    """Algorithm 1 of Pagliardini et al. 2024 (arXiv 2409.03137), its decay rates and alpha as they are given."""
    m, v, t = reference.moments(memory, g, betas)
    slow = memory["slow"] = betas[2] * memory.get("slow", 0.0) + (1 - betas[2]) * g
    ahead = m / (1 - betas[0] ** t) + alpha * slow
    return lr * (ahead / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + weight_decay * x)


@each
def lookahead(memory: Any, x: Array, g: Array, k: int, alpha: float, **adam: Any) -> Array:
    """Algorithm 1 of Zhang et al. 2019 (arXiv 1907.08610) around Adam, whose memory is kept."""
    slow = memory.setdefault("slow", x)
    fast = x - reference.adam(memory, x, g, **adam)
    memory["steps"] = memory.get("steps", 0) + 1
    if memory["steps"] < k:
        return x - fast
    memory.update(steps=0, slow=slow + alpha * (fast - slow))
    return x - memory["slow"]


@each
def cautious(memory: Any, x: Array, g: Array, **adam: Any) -> Array:
    """Liang et al. 2024 (arXiv 2411.16085), the authors' code, around Adam."""
    u = reference.adam(memory, x, g, **adam)
    mask = (u * g > 0).astype(float)
    return u * mask / max(mask.mean(), 1e-3)

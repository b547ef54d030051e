"""Algorithms that torch.optim does not have, written in NumPy from the papers. They share nothing with fluxpy.

Each makes a step: from all parameters and gradients (lists of arrays) and the hyperparameters to the new parameters.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Step: TypeAlias = Callable[..., list[Array]]


def each(algorithm: Callable[..., Any]) -> Callable[[], Step]:
    """From an algorithm on one array, `f(memory, x, g, **hyperparameters) -> x`, to a maker of steps on many."""

    def make() -> Step:
        memories: dict[int, Any] = {}

        def step(xs: list[Array], gs: list[Array], **h: Any) -> list[Array]:
            return [
                algorithm(memories.setdefault(i, {}), x, g, **h) for i, (x, g) in enumerate(zip(xs, gs, strict=True))
            ]

        return step

    return make


@each
def lion(memory: Any, x: Array, g: Array, lr: float, betas: Any) -> Array:
    """Algorithm 2 of Chen et al. 2023 (arXiv 2302.06675), without its weight decay."""
    m = memory.get("m", np.zeros_like(x))
    c = betas[0] * m + (1 - betas[0]) * g
    memory["m"] = betas[1] * m + (1 - betas[1]) * g
    return x - lr * np.sign(c)


@each
def oadam(memory: Any, x: Array, g: Array, lr: float, betas: Any, eps: float) -> Array:
    """Algorithm 1 of Daskalakis et al. 2018 (arXiv 1711.00141), the step before the first being zero."""
    t = memory["t"] = memory.get("t", 0) + 1
    m = memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * g
    v = memory["v"] = betas[1] * memory.get("v", 0.0) + (1 - betas[1]) * g**2
    now = lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    before, memory["now"] = memory.get("now", 0.0), now
    return x - 2 * now + before


@each
def adabelief(memory: Any, x: Array, g: Array, lr: float, betas: Any, eps: float) -> Array:
    """Algorithm 2 of Zhuang et al. 2020 (arXiv 2010.07468)."""
    t = memory["t"] = memory.get("t", 0) + 1
    m = memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * g
    s = memory["s"] = betas[1] * memory.get("s", 0.0) + (1 - betas[1]) * (g - m) ** 2 + eps
    return x - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(s / (1 - betas[1] ** t)) + eps)


@each
def weight_decay(memory: Any, x: Array, g: Array, weight_decay: float) -> Array:
    return x - (g + weight_decay * x)


@each
def sign_decay(memory: Any, x: Array, g: Array, sign_decay: float) -> Array:
    return x - (g + sign_decay * np.sign(x))


@each
def clip_grad(memory: Any, x: Array, g: Array, clip_value: float) -> Array:
    return x - np.minimum(np.maximum(g, -clip_value), clip_value)


@each
def clip_norm(memory: Any, x: Array, g: Array, max_norm: float, norm_type: float, nonfinite: str) -> Array:
    norm = np.sum(np.abs(g) ** norm_type) ** (1 / norm_type)
    return x - g * min(1.0, max_norm / norm)


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
        return x
    buffer = memory["buffer"] = momentum * memory.get("buffer", 0.0) + np.mean(window, axis=0)
    window.clear()
    return x - lr * buffer

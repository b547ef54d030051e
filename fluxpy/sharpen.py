"""sharpened: the gradient of sharpness-aware minimisation, which is a gradient at another point and not a rule."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .gradient import Gradients, LossFunction, Model, Value, withgradient
from .leaf import Leaf
from .pytree import modules_in
from .rules.clip import norm_of
from .state import State
from .tree import values_of, walk


def sharpened(
    f: LossFunction[Model, Value], model: Model, rho: float, *args: Any, state: State | Leaf | None = None
) -> tuple[Value, Gradients | Tensor]:
    """`(value, grads)` of `f(model, *args)` as `withgradient` gives them, but with the gradient where the loss is worst
    nearby: sharpness-aware minimisation (SAM) [Foret et al. 2021].

    The gradient is that at `x + rho · g / ‖g‖`, with `g` the gradient at the parameters `x` and one norm over all of
    them. `rho` is the radius, 0 or more; 0.05 is the paper's choice. `value` is that at `x`. It costs two passes
    forward and backward. With `state`, frozen leaves stay where they are.

    Parameters are written and put back, bit for bit, whatever happens. So are the buffers of modules after the second
    pass: running statistics see each batch once, at `x`. Dropout draws anew in the second pass, as in the paper.
    ValueError for a `rho` below 0; for the rest see `withgradient`.

    >>> def loss(m):
    ...     return m["w"].square().sum()
    >>> value, grads = sharpened(loss, {"w": torch.tensor([3.0, 4.0])}, 0.5)
    >>> value, grads["w"]
    (tensor(25.), tensor([6.6000, 8.8000]))
    """
    if isinstance(rho, Tensor | tuple | list):
        raise TypeError(f"sharpened(f, model, rho, *args) needs a radius there, but got {type(rho).__name__}")
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not rho >= 0:
        raise ValueError(f"sharpened: rho={rho!r} is not allowed; it must be a number, 0 or more")
    value, grads = withgradient(f, model, *args, state=state)
    params = walk(model)[1]
    found = [grads] if isinstance(grads, Tensor) else values_of(grads)
    pairs = [(x, g) for x, g in zip(params, found, strict=True) if g is not None]
    with _moved(pairs, rho), _kept_buffers(model):
        return value, withgradient(f, model, *args, state=state)[1]


@contextmanager
def _moved(pairs: Sequence[tuple[Tensor, Tensor]], rho: float) -> Iterator[None]:
    """With the parameters moved along their gradients."""
    with torch.no_grad():
        norms = [norm_of(g, 2.0).double().to(pairs[0][1].device) for _, g in pairs]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        step = torch.where(norm == 0, 0.0, rho / norm)  # at the bottom there is nowhere to go
    with _kept([x for x, _ in pairs]):
        with torch.no_grad():
            for x, g in pairs:
                x.add_((step.to(x.device) * g).to(x.dtype))
        torch.clear_autocast_cache()  # an autocast around this has cast the weights as they were
        yield


@contextmanager
def _kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put the values of tensors back at the end."""
    old = [x.detach().clone() for x in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, before in zip(tensors, old, strict=True):
                x.copy_(before)
        torch.clear_autocast_cache()


@contextmanager
def _kept_buffers(model: Any) -> Iterator[None]:
    """Put the buffers of modules back at the end; a forward pass may have put others in their place."""
    held = [(m, name, b) for m in modules_in(model) for name, b in m.named_buffers(recurse=False)]
    with _kept([b for _, _, b in held]):
        try:
            yield
        finally:
            for module, name, buffer in held:
                setattr(module, name, buffer)

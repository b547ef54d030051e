"""Sixteen learning rates in one process: one run over stacked models, by `torch.func.vmap`.

    python examples/ensemble_vmap.py

A pure update of a state whose rate is a tensor is a function like any other: `vmap` runs it for all rates at once. For
small models that is much faster than one run after the other, and it gives the same numbers.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import fluxpy

NET = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))
SHAPES = {name: x.shape for name, x in NET.named_parameters()}


def spirals(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points of three spirals, which belong apart."""
    y = torch.randint(0, 3, (count,), generator=generator)
    radius = torch.rand(count, generator=generator)
    angle = 4 * radius + 2.1 * y + 0.1 * torch.randn(count, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), y


def loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of a model whose parameters are one vector: each step is then a few operations on one tensor."""
    parts = flat.split([shape.numel() for shape in SHAPES.values()])
    params = {name: part.view(shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}
    return cross_entropy(functional_call(NET, params, (x,)), y)


def step(state: Any, flat: Tensor, x: Tensor, y: Tensor) -> Any:
    """One step of one model."""
    return fluxpy.update(state, flat, grad(loss)(flat, x, y), inplace=False)


def all_at_once(rates: Tensor, start: Tensor, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The models are rows of a matrix. The state is a pytree: its momenta and its rate get a first dimension too."""
    rows = start.expand(len(rates), -1)
    state = vmap(lambda lr, flat: fluxpy.setup(fluxpy.Adam(lr), flat))(rates, rows)
    for x, y in batches:
        state, rows = vmap(step, in_dims=(0, 0, None, None))(state, rows, x, y)
    return rows


def one_by_one(rates: Tensor, start: Tensor, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The usual way: a run in place for each rate."""
    ends = []
    for lr in rates.tolist():
        flat = start.clone()
        state = fluxpy.setup(fluxpy.Adam(lr), flat)
        for x, y in batches:
            fluxpy.update(state, flat, fluxpy.gradient(loss, flat, x, y))
        ends.append(flat)
    return torch.stack(ends)


def main(steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rates = torch.logspace(-4, -0.5, 16)
    start, _ = fluxpy.destructure(NET)
    start = start.detach()
    batches = [spirals(32, generator) for _ in range(steps)]
    seconds, ends = [], []
    for way in (all_at_once, one_by_one):
        way(rates, start, batches[:2])  # to warm up
        began = time.perf_counter()
        ends.append(way(rates, start, batches))
        seconds.append(time.perf_counter() - began)

    x, y = spirals(2000, generator)
    found, other = (vmap(loss, in_dims=(0, None, None))(rows, x, y) for rows in ends)
    for lr, value in zip(rates.tolist(), found.tolist(), strict=True):
        print(f"lr {lr:.5f}  loss {value:.4f}")
    best = int(found.argmin())
    print(f"best: lr {rates[best]:.5f}, loss {found[best]:.4f}")
    small = rates < 0.01  # in large steps, the roundings of float32 grow
    assert torch.allclose(found[small], other[small], rtol=1e-3)
    print(
        f"16 rates at once: {seconds[0]:.2f} s; one by one: {seconds[1]:.2f} s; speed-up {seconds[1] / seconds[0]:.1f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sixteen rates in one process.")
    parser.add_argument("--short", action="store_true", help="for a quick check: fewer steps")
    main(steps=60 if parser.parse_args().short else 600)

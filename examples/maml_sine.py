"""Learn where to start from: five steps on ten points, and the model is a new sine (MAML, Finn et al. 2017).

    python examples/maml_sine.py

A task is a sine of some amplitude and phase. The inner loop takes five pure updates on ten of its points; the outer
loop differentiates through them, by the loss on ten other points. The baseline is trained on all tasks at once, which
knows nothing better than their mean, and then takes the same five steps.
"""

import argparse
import math
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

import fluxpy

Model = dict[str, Tensor]
INNER_STEPS, POINTS = 5, 10


def make_model(width: int = 40) -> Model:
    sizes = [1, width, width, 1]
    model = {}
    for i, (a, b) in enumerate(pairwise(sizes)):
        model[f"weight{i}"] = (2 * torch.rand(b, a) - 1) / math.sqrt(a)
        model[f"bias{i}"] = (2 * torch.rand(b) - 1) / math.sqrt(a)
    return model


def predict(model: Model, x: Tensor) -> Tensor:
    for i in range(3):
        x = torch.nn.functional.linear(x, model[f"weight{i}"], model[f"bias{i}"])
        x = x.relu() if i < 2 else x
    return x


def loss(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return (predict(model, x) - y).square().mean()


def draw_tasks(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points of many sines: the first half to learn from, the second half to be judged by."""
    amplitude = 0.1 + 4.9 * torch.rand(count, 1, 1, generator=generator)
    phase = math.pi * torch.rand(count, 1, 1, generator=generator)
    x = 10 * torch.rand(count, 2 * POINTS, 1, generator=generator) - 5
    return x, amplitude * (x - phase).sin()


def adapt(model: Model, x: Tensor, y: Tensor, lr: float) -> Model:
    """A few steps on one task. Nothing given is changed, and one can differentiate through it."""
    state: Any = fluxpy.setup(fluxpy.Descent(lr), model)
    for _ in range(INNER_STEPS):
        state, model = fluxpy.update(state, model, grad(loss)(model, x, y), inplace=False)
    return model


def after_adapting(model: Model, x: Tensor, y: Tensor, lr: float) -> Tensor:
    """The loss on new points of each task, after some steps on others. `vmap` runs all tasks at once."""

    def one(x: Tensor, y: Tensor) -> Tensor:
        return loss(adapt(model, x[:POINTS], y[:POINTS], lr), x[POINTS:], y[POINTS:])

    return vmap(one)(x, y).mean()


def fit(objective: Any, steps: int, generator: torch.Generator) -> Model:
    """The outer loop: an ordinary one."""
    model = make_model()
    state = fluxpy.setup(fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(10.0), fluxpy.Adam(1e-3)), model)
    for step in range(steps):
        value, grads = fluxpy.withgradient(objective, model, *draw_tasks(25, generator))
        fluxpy.update(state, model, grads)
        if step % (steps // 5) == 0:
            print(f"  step {step:5d}: loss {value.item():.3f}")
    return model


def main(steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    print("MAML: the loss after adapting")
    maml = fit(partial(after_adapting, lr=0.01), steps, generator)
    print("Baseline: the loss on all tasks at once")
    baseline = fit(loss, steps, generator)

    tasks = draw_tasks(200, torch.Generator().manual_seed(2))
    found = {"MAML": after_adapting(maml, *tasks, lr=0.01)}
    found["baseline"] = torch.stack([after_adapting(baseline, *tasks, lr=lr) for lr in (1e-3, 3e-3, 1e-2, 3e-2)]).min()
    print(f"{INNER_STEPS} steps on 200 new tasks: " + ", ".join(f"{name} {x.item():.3f}" for name, x in found.items()))
    assert found["MAML"] < found["baseline"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learn where to start from.")
    parser.add_argument("--short", action="store_true", help="for a quick check: fewer steps")
    args = parser.parse_args()
    main(steps=200 if args.short else 4000)

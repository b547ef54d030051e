"""Find the rate of each part of a model by the gradient of the final loss with respect to the rates.

    python examples/learned_rates.py

The parts of this model want rates that are far apart. A run of 20 steps is a function of its rates: hyperparameters
that are tensors. Their logarithms are a small model themselves, trained by fluxpy as any other.
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import fluxpy

STEPS = 15
PARTS = ("loud", "quiet")


class Net(nn.Module):
    """Features of two kinds: some are measured in large numbers, some in small ones. Nobody has scaled them."""

    def __init__(self) -> None:
        super().__init__()
        self.loud = nn.Linear(4, 1, bias=False)
        self.quiet = nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.loud(10 * x[:, :4]) + self.quiet(x[:, 4:] / 3)


def make_data(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 8)
    return x, x.sum(1, keepdim=True) + 0.1 * torch.randn(count, 1)


class Search:
    """A problem with a start, and what comes out of it for some rates."""

    def __init__(self) -> None:
        self.net = Net()
        self.start = {name: x.detach().clone() for name, x in self.net.named_parameters()}
        self.train, self.valid = make_data(256), make_data(256)

    def loss(self, params: Any, x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(self.net, params, (x,)) - y).square().mean()

    def run(self, rates: dict[str, Any]) -> Tensor:
        """The validation loss after some steps: a function of the rates that one can differentiate."""
        params: Any = self.start
        state: Any = fluxpy.setup({f"{part}.*": fluxpy.Descent(rates[part]) for part in PARTS}, params)
        for _ in range(STEPS):
            state, params = fluxpy.update(state, params, grad(self.loss)(params, *self.train), inplace=False)
        return self.loss(params, *self.valid)


def main(steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    search = Search()

    grid = {10**i: search.run(dict.fromkeys(PARTS, 10**i)).item() for i in (-4.0, -3.5, -3.0, -2.5, -2.0, -1.5)}
    best = min(grid, key=grid.__getitem__)
    print(f"One rate for all, the best of {len(grid)}: {best:.3g}, loss {grid[best]:.4f}")

    logs = {part: torch.tensor(1e-3).log() for part in PARTS}
    state = fluxpy.setup(fluxpy.Adam(0.2), logs)
    found, value = {}, float("inf")
    for step in range(steps):
        now, grads = fluxpy.withgradient(lambda m: search.run({part: x.exp() for part, x in m.items()}), logs)
        if now.item() < value:
            found, value = {part: x.exp().item() for part, x in logs.items()}, now.item()
        if step % (steps // 5) == 0:
            rates = ", ".join(f"{part} {x.exp().item():.4f}" for part, x in logs.items())
            print(f"  step {step:3d}: {rates}, loss {now.item():.4f}")
        fluxpy.update(state, logs, grads)
    print("Found: " + ", ".join(f"{part} {rate:.3g}" for part, rate in found.items()) + f", loss {value:.4f}")
    assert value < grid[best]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Find the rates of the parts of a model by gradients.")
    parser.add_argument("--short", action="store_true", help="for a quick check: fewer steps")
    main(steps=50 if parser.parse_args().short else 120)

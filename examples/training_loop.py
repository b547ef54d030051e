"""A typical training loop: accuracy, a bad batch, an early stop, a change of the rate.

    python examples/training_loop.py

First with `withgradient` and `update`, then with `train`, which gives the same losses; then an L2 penalty in the loss,
which equals `OptimiserChain(WeightDecay(λ), ...)`.
"""

import argparse
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fluxpy

Batch = tuple[Tensor, Tensor]


def make_data(rows: int) -> Batch:
    """Points in the plane, labelled by whether their two coordinates have the same sign."""
    x = torch.randn(rows, 2)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


def loss_and_logits(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The first element of the tuple is the loss; the whole tuple is returned."""
    logits = model(x)
    return cross_entropy(logits, y), logits


def accuracy(logits: Tensor, y: Tensor) -> float:
    return (logits.argmax(1) == y).float().mean().item()


def by_hand(model: nn.Module, epochs: list[list[Batch]], test: Batch, goal: float) -> list[float]:
    state = fluxpy.setup(fluxpy.Adam(0.01), model)
    losses: list[float] = []
    for epoch, batches in enumerate(epochs):
        if epoch == 2:
            fluxpy.adjust(state, 3e-3)
        right = []
        for i, (x, y) in enumerate(batches):
            (value, logits), grads = fluxpy.withgradient(loss_and_logits, model, x, y, state=state)
            if not value.isfinite():
                warnings.warn(f"epoch {epoch}: the loss of batch {i} is {value.item()}; skipped", stacklevel=2)
                continue
            fluxpy.update(state, model, grads)
            # The value and the logits are detached.
            losses.append(value.item())
            right.append(accuracy(logits, y))
        with torch.no_grad():
            reached = accuracy(model(test[0]), test[1])
        rate = fluxpy.value(state["0.weight"], "lr")
        print(f"epoch {epoch}: lr {rate:g}, train accuracy {sum(right) / len(right):.3f}, test accuracy {reached:.3f}")
        if reached > goal:
            print(f"stopped: the test accuracy is above {goal}")
            break
    return losses


def by_train(model: nn.Module, epochs: list[list[Batch]], test: Batch, goal: float) -> list[float]:
    state = fluxpy.setup(fluxpy.Adam(0.01), model)
    losses: list[float] = []
    for epoch, batches in enumerate(epochs):
        if epoch == 2:
            fluxpy.adjust(state, 3e-3)
        good = (batch for batch in batches if batch[0].isfinite().all())
        losses += fluxpy.train(loss, model, good, state)
        with torch.no_grad():
            if accuracy(model(test[0]), test[1]) > goal:
                break
    return losses


def fit(rule: fluxpy.Rule, loss: Callable[..., Tensor], batches: list[Batch]) -> dict[str, Any]:
    model = make_model()
    fluxpy.train(loss, model, batches, fluxpy.setup(rule, model))
    return dict(fluxpy.trainables(model, path=True))


def main(epochs: int = 30, goal: float = 0.97) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, test = make_data(1024), make_data(512)
    loader = fluxpy.DataLoader(train, batch_size=64, shuffle=True)
    # Drawn in advance, so that both loops see the same batches; usually: `for x, y in loader` in each epoch.
    drawn = [list(loader) for _ in range(epochs)]
    drawn[1][3][0][0, 0] = math.nan

    losses = by_hand(make_model(), drawn, test, goal)
    assert losses == by_train(make_model(), drawn, test, goal)
    print(f"train gives the same {len(losses)} losses")

    try:  # train itself stops at a bad batch and leaves the model as it was before that batch
        model = make_model()
        fluxpy.train(loss, model, drawn[1], fluxpy.setup(fluxpy.Adam(), model))
    except FloatingPointError as error:
        print(f"on the bad batch train says: {error}")

    def penalised(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return loss(model, x, y) + 0.42 / 2 * sum(p.square().sum() for p in fluxpy.trainables(model))

    one = fit(fluxpy.Momentum(0.05), penalised, drawn[0])
    two = fit(fluxpy.OptimiserChain(fluxpy.WeightDecay(0.42), fluxpy.Momentum(0.05)), loss, drawn[0])
    torch.testing.assert_close(one, two)
    print("an L2 penalty in the loss equals WeightDecay in the chain")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A typical training loop.")
    parser.add_argument("--short", action="store_true", help="a few epochs, for a quick check")
    main(*(6, 0.95) if parser.parse_args().short else (30, 0.97))

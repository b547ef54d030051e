"""Fit a line by gradient descent: by a loop, by `fluxpy.train`, and by the Learner.

    python examples/linear_regression.py

The data is y = 3x + 2 with noise; the model starts at W = 5, b = 0. Two pictures go to linear_regression.png: the data
with the line before and after, and the weights over the epochs. Needs matplotlib.
"""

import argparse
from typing import Any

import matplotlib
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import fluxpy
from fluxpy.learner import Callback, Learner

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TRUE_W, TRUE_B, EPOCHS = 3.0, 2.0, 10

Model = dict[str, Tensor]


def make_data() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-2, 2, 201)
    noise = torch.randn(201, generator=torch.Generator().manual_seed(22))
    return x, TRUE_W * x + TRUE_B + noise


def make_model() -> Model:
    """A model need not be an nn.Module: any tree of tensors works."""
    return {"W": torch.tensor(5.0), "b": torch.tensor(0.0)}


def predict(model: Model, x: Tensor) -> Tensor:
    return model["W"] * x + model["b"]


def loss(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return (predict(model, x) - y).square().mean()


def report(model: Model, loss: float) -> str:
    return f"     W = {model['W'].item():1.2f}, b = {model['b'].item():1.2f}, loss={loss:2.5f}"


def fit_by_hand(model: Model, x: Tensor, y: Tensor) -> tuple[list[str], list[tuple[float, float]]]:
    """The loop written out. An epoch's line has the weights after its update and the loss before it."""
    state = fluxpy.setup(fluxpy.Descent(0.1), model)
    lines = ["Starting:", report(model, loss(model, x, y).item())]
    weights = [(model["W"].item(), model["b"].item())]
    for epoch in range(EPOCHS):
        value, grads = fluxpy.withgradient(loss, model, x, y)
        fluxpy.update(state, model, grads)
        lines += [f"Epoch {epoch:2d}:", report(model, value.item())]
        weights.append((model["W"].item(), model["b"].item()))
    return lines, weights


def fit_by_train(model: Model, x: Tensor, y: Tensor) -> list[str]:
    """The same with `train`: the data is any iterable of batches, here one batch with all points."""
    state = fluxpy.setup(fluxpy.Descent(0.1), model)
    lines = ["Starting:", report(model, loss(model, x, y).item())]
    for epoch in range(EPOCHS):
        losses = fluxpy.train(loss, model, [(x, y)], state, progress=False)
        lines += [f"Epoch {epoch:2d}:", report(model, losses[0])]
    return lines


class Line(Learner):
    """The model cannot be called here, so the step is defined; an nn.Module does not need this."""

    def training_step(self, model: Model, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        output = predict(model, input)
        return self.loss(output, target), output


class Lines(Callback):
    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)

    def on_epoch_end(self, learner: Any) -> None:
        self.lines += [f"Epoch {learner.epoch_index:2d}:", report(learner.model, learner.stats["loss"])]


def fit_by_learner(model: Model, x: Tensor, y: Tensor) -> list[str]:
    """The same with the Learner: epochs are its business, and a callback writes the lines."""
    callback = Lines("Starting:", report(model, loss(model, x, y).item()))
    learner = Line(model, mse_loss, fluxpy.Descent(0.1), callbacks=[callback], default_callbacks=False)
    learner.fit([(x, y)], epochs=EPOCHS)
    return callback.lines


def plot(path: str, x: Tensor, y: Tensor, before: Model, after: Model, weights: list[tuple[float, float]]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(x, y, ".", color="0.6", label="data")
    left.plot(x, predict(before, x), "--", color="C1", label="before")
    left.plot(x, predict(after, x), color="C0", label="after")
    left.set(title="Data and fit", xlabel="x", ylabel="y")
    left.legend()
    for name, values, true, color in zip("Wb", zip(*weights, strict=True), (TRUE_W, TRUE_B), ("C0", "C1"), strict=True):
        right.plot(values, "o-", color=color, label=name)
        right.axhline(true, linestyle="--", color=color, label=f"true {name}")
    right.set(title="Weights over the epochs", xlabel="epochs", ylim=(-0.3, 5.3))
    right.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(out: str = "linear_regression.png") -> None:
    torch.set_num_threads(1)
    x, y = make_data()
    model = make_model()
    lines, weights = fit_by_hand(model, x, y)
    print("\n".join(lines))
    assert abs(weights[1][0] - 4.46) < 0.1 and abs(weights[1][1] - 0.40) < 0.1
    assert abs(weights[-1][0] - TRUE_W) < 0.3 and abs(weights[-1][1] - TRUE_B) < 0.3

    assert fit_by_train(make_model(), x, y) == lines
    print("fluxpy.train gives the same lines")

    beside = fit_by_learner(make_model(), x, y)
    assert beside == lines
    print(f"\n{'The loop':<44}The Learner")
    for left, right in zip(lines, beside, strict=True):
        print(f"{left:<44}{right}")

    if out:
        plot(out, x, y, make_model(), model, weights)
        print(f"wrote {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fit a line by gradient descent.")
    parser.add_argument("--out", default="linear_regression.png", help="where the picture goes")
    parser.add_argument("--short", action="store_true", help="for a quick check: no picture unless --out is given")
    args = parser.parse_args()
    main("" if args.short and args.out == parser.get_default("out") else args.out)

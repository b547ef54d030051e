"""A sparse autoencoder that revives its dead features, and empties the momenta of those rows only.

    python examples/dead_features.py

An autoencoder with more features than inputs learns the handwritten digits of scikit-learn under an L1 penalty on its
features. Some features die: they fire on no image, get no gradient and never come back. Every so often each dead one
gets new weights, from an image that is reconstructed badly, and `surgery.reset` empties the momenta of its row of the
encoder and of its column of the decoder. Beside it: all momenta started anew, the momenta of the dead left as they are,
and no reviving. A minute on a laptop; needs scikit-learn.

Reviving pays. What is done with the momenta hardly matters here: over three seeds the differences are smaller than
those between seeds. The example shows how to do it; measure on your own data.
"""

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fluxpy
from fluxpy import surgery

WAYS = {
    "rows": "revive, reset their rows",
    "all": "revive, reset all",
    "none": "revive, reset nothing",
    "never": "never revive",
}


class Autoencoder(nn.Module):
    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(inputs, features), nn.Linear(features, inputs)

    def features(self, x: Tensor) -> Tensor:
        return self.encoder(x - self.decoder.bias).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.features(x))


def loss(model: Autoencoder, x: Tensor) -> Tensor:
    features = model.features(x)
    return (model.decoder(features) - x).square().sum(1).mean() + 0.3 * (
        features * model.decoder.weight.norm(dim=0)
    ).sum(1).mean()


@torch.no_grad()
def dead_features(model: Autoencoder, x: Tensor) -> Tensor:
    return (model.features(x) <= 0).all(0)


@torch.no_grad()
def revive(model: Autoencoder, dead: Tensor, x: Tensor) -> None:
    """Point dead features at images, the more likely the worse they are reconstructed [Bricken et al. 2023]."""
    missing = x - model(x)
    chosen = torch.multinomial(missing.square().sum(1) ** 2, int(dead.sum()))
    directions = nn.functional.normalize(missing[chosen], dim=1)
    model.decoder.weight[:, dead] = directions.T
    model.encoder.weight[dead] = 0.2 * directions * model.encoder.weight[~dead].norm(dim=1).mean()
    model.encoder.bias[dead] = 0


def fit(images: Tensor, way: str, seed: int, updates: int, every: int) -> tuple[list[float], int]:
    """The loss on all images `every // 10` updates after each time of reviving, and at the end; and the dead then."""
    torch.manual_seed(seed)
    model = Autoencoder(64, 256)
    state = fluxpy.setup(fluxpy.Adam(3e-3, betas=(0.9, 0.95)), model)
    losses = []
    for i in range(1, updates + 1):
        batch = images[torch.randint(len(images), (128,))]
        _, grads = fluxpy.withgradient(loss, model, batch, state=state)
        fluxpy.update(state, model, grads)
        if i % every == every // 10 or i == updates:
            with torch.no_grad():
                losses.append(loss(model, images).item())
        dead = dead_features(model, images) if i % every == 0 and i < updates else torch.zeros(0)
        if way == "never" or not dead.any():
            continue
        revive(model, dead, images)
        if way == "rows":
            surgery.reset(state.encoder, rows=dead)
            surgery.reset(state.decoder.weight, rows=dead, dim=1)
        elif way == "all":
            fluxpy.reset(state)
    return losses, int(dead_features(model, images).sum())


def main(updates: int, every: int, seeds: int) -> None:
    torch.set_num_threads(1)
    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).view(-1, 64) / 16
    print("seed  way                        loss soon after  loss at the end  dead")
    means = {}
    for way, title in WAYS.items():
        runs = [fit(images, way, seed, updates, every) for seed in range(seeds)]
        for seed, (losses, dead) in enumerate(runs):
            soon = sum(losses[1:-1]) / len(losses[1:-1])
            print(f"{seed:4}  {title:25}  {soon:15.4f}  {losses[-1]:15.4f}  {dead:4}")
        means[way] = [sum(column) / seeds for column in zip(*(losses for losses, _ in runs), strict=True)]
    for way in ("all", "none", "never"):
        soon = [a - b for a, b in zip(means[way][1:-1], means["rows"][1:-1], strict=True)]
        print(
            f"{WAYS[way]}: loss {sum(soon) / len(soon):+.4f} soon after, {means[way][-1] - means['rows'][-1]:+.4f} "
            "at the end, against resetting rows"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Revive the dead features of a sparse autoencoder.")
    parser.add_argument("--short", action="store_true", help="a quick check: one seed, 120 updates")
    args = parser.parse_args()
    if args.short:
        main(120, 30, 1)
    else:
        main(3000, 300, 3)

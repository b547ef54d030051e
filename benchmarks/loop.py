"""Training a small MLP: a loop by hand, `train`, and the Learner with all that it does by default."""

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxpy

from .harness import Column, Contender, Meter, figure, ratios

TITLE = "The loop"
NOTE = """An MLP 64-64-10, batches of 32 in memory, Adam, cross entropy: ratios to a hand-written loop with
`torch.optim.Adam(fused=True)`. Where a bar is shown, it is drawn to a terminal."""
COLUMNS = {"1 thread": ("mlp", 1)}
TARGETS = {"fluxpy.train": 0.65, "fluxpy.Learner: loss, accuracy, bar, its defaults": 0.90}
Batches = list[tuple[Tensor, Tensor]]
Optimiser = Callable[[Any], torch.optim.Optimizer]
Epoch = Callable[[], object]


def _fused(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, fused=True)


def by_hand(model: nn.Module, batches: Batches, make: Optimiser | None = _fused, item: bool = False) -> Epoch:
    """Without an optimiser, forward and backward alone."""
    optimiser = make(model.parameters()) if make else None

    def epoch() -> None:
        for x, y in batches:
            loss = F.cross_entropy(model(x), y)
            model.zero_grad()
            loss.backward()
            if optimiser:
                optimiser.step()
            if item:
                loss.item()

    return epoch


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def by_train(model: nn.Module, batches: Batches, progress: bool | None = None) -> Epoch:
    state = fluxpy.setup(fluxpy.Adam(1e-3), model)
    return lambda: fluxpy.train(loss_of, model, batches, state, progress=progress)


def by_gradient(model: nn.Module, batches: Batches) -> Epoch:
    state = fluxpy.setup(fluxpy.Adam(1e-3), model)

    def epoch() -> None:
        for x, y in batches:
            _, grads = fluxpy.withgradient(loss_of, model, x, y)
            fluxpy.update(state, model, grads)

    return epoch


def by_learner(model: nn.Module, batches: Batches) -> Epoch:
    kind: Any = fluxpy.Learner
    learner = kind(model, F.cross_entropy, fluxpy.Adam(1e-3), metrics=["accuracy"])
    return lambda: learner.fit(batches, epochs=1)


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Standard output and error are a terminal that somebody reads."""
    import pty

    master, slave = pty.openpty()
    kept = sys.stdout, sys.stderr
    with subprocess.Popen(["cat"], stdin=master, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as reader:
        sys.stdout, sys.stderr = (os.fdopen(os.dup(slave), "w", buffering=1) for _ in range(2))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = kept
            reader.terminate()


def measure(column: str, meter: Meter) -> Column:
    torch.manual_seed(0)
    n = 40 if meter.quick else 200
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(meter.device)
    drawn = [(torch.randn(32, 64), torch.randint(10, (32,))) for _ in range(n)]
    batches = [(x.to(meter.device), y.to(meter.device)) for x, y in drawn]
    base = "by hand, torch.optim.Adam(fused=True)"
    runs: dict[str, Callable[..., Epoch]] = {
        base: by_hand,
        "forward and backward alone": lambda m, b: by_hand(m, b, None),
        "by hand, loss.item() each step": lambda m, b: by_hand(m, b, item=True),
        "by hand, torch.optim.Adam": lambda m, b: by_hand(m, b, torch.optim.Adam),
        "fluxpy.train": by_train,
        "fluxpy.withgradient, fluxpy.update": by_gradient,
        "fluxpy.train, with its bar": lambda m, b: by_train(m, b, progress=True),
    }
    if hasattr(fluxpy, "Learner"):
        runs["fluxpy.Learner: loss, accuracy, bar, its defaults"] = by_learner
    contenders = {}
    for name, make in runs.items():
        if "alone" not in name:
            terminal()(_same_steps)(name, make, model, batches[:20])
        epoch = make(copy.deepcopy(model), batches)
        contenders[name] = Contender(terminal()(epoch) if "bar" in name else epoch)
    times = {name: [t / n for t in found] for name, found in meter.compare(contenders).items()}
    found = {name: figure(ratios(t, times[base]), target=TARGETS.get(name)) for name, t in times.items()}
    return found | {base: figure(times[base], "s")}


def _same_steps(name: str, make: Callable[..., Epoch], model: nn.Module, batches: Batches) -> None:
    """Every way of training goes to the same place."""
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    make(ours, batches)()
    by_hand(theirs, batches)()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=lambda m: f"{name!r} did other steps: {m}")

"""lr_find: which learning rate to begin with."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ... import leaves
from ...schedules import exponential
from ..core import rates
from ..data import Source
from ..events import Callback, CancelFit
from ..learner import Learner
from ..rng import data_state, random_state, set_data_state, set_random_state
from .scheduler import LearningRateScheduler


@dataclass(frozen=True)
class LRFind:
    """The losses (smoothed) by learning rate, and the rate where they fell most steeply."""

    rates: list[float]
    losses: list[float]
    suggestion: float

    def __repr__(self) -> str:
        return f"LRFind(suggestion={self.suggestion:.2e}, {len(self.rates)} rates up to {self.rates[-1]:.2e})"

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw loss over learning rate into a file, by its suffix a PNG, SVG or PDF. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel="learning rate", ylabel="loss (smoothed)")
        axes.plot(self.rates, self.losses)
        axes.axvline(self.suggestion, color="grey", linestyle="--", label=f"suggestion {self.suggestion:.1e}")
        axes.legend()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
        return Path(path)


def lr_find(
    learner: Learner,
    data: Any,
    *,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    stop_at: float = 4.0,
    member: Any = None,
) -> LRFind:
    """Train a copy with a rate that grows from `start` to `end` in `steps` batches, and see how the loss goes
    [Smith 2017]. Ends early where the smoothed loss is not finite or above `stop_at` times the lowest.

    Model, state, random numbers and the order of the data are afterwards what they were. Where leaves have different
    rates, those keep their ratios, and the rate is that of the fastest: `adjust(learner.state, lr=result.suggestion)`
    if all have one, else `adjust(learner.state, scale(result.suggestion / fastest))`. Where a chain has several rates
    that differ, `member` says which grows, as in `adjust`. Each batch reads the loss.
    """
    if not isinstance(learner, Learner):
        raise TypeError(f"the Learner comes first: lr_find(learner, data), but got {type(learner).__name__}")
    if learner.fitting:
        raise RuntimeError("lr_find cannot run within a fit")
    if not 0 < start < end or steps < 5:
        raise ValueError(f"lr_find: start={start}, end={end}, steps={steps} need 0 < start < end, 5 steps or more")
    trial = learner.trial()
    trained = [leaf for _, leaf in leaves(trial.state) if not leaf.frozen]
    top = max((rate for leaf in trained for rate in rates(leaf, member) if not callable(rate)), default=0.0)
    growth = exponential(start, end / start, steps - 1)
    follow: Any = {"scale": lambda n: growth(n) / top} if top else {"lr": growth}
    scheduler = LearningRateScheduler(**follow, member=member)
    source = Source(data, "the data")
    before = random_state(())
    source.make(0)
    orders = data_state([source])
    watch = _Watch(growth, steps, stop_at)

    def again(epoch: int) -> Any:
        if epoch:
            source.make(0)
        return source.loader

    try:
        trial.fit(again, epochs=steps, callbacks=[scheduler, watch])
    finally:
        set_random_state(before)
        set_data_state([source], orders)
    return watch.result()


class _Watch(Callback):
    stops_on_nonfinite = True

    def __init__(self, growth: Any, steps: int, stop_at: float) -> None:
        self.growth, self.steps, self.stop_at = growth, steps, stop_at
        self.rates, self.losses = list[float](), list[float]()
        self.width = max(1, steps // 20)

    def on_batch_end(self, learner: Learner) -> None:
        loss = float(learner.step.loss) if learner.step.loss is not None else math.nan
        loss = fmean(learner.ranks.numbers("lr_find", loss))
        if not math.isfinite(loss):
            raise CancelFit("the loss is not finite")
        self.rates.append(self.growth(learner.step_index))
        self.losses.append(loss)
        mean = fmean(self.losses[-self.width :])
        self.lowest = mean if len(self.losses) <= self.width else min(self.lowest, mean)
        if mean > self.lowest + (self.stop_at - 1) * abs(self.lowest) and len(self.losses) > 2 * self.width:
            raise CancelFit("the loss grows")
        if len(self.rates) >= self.steps:
            raise CancelFit("all rates were tried")

    def result(self) -> LRFind:
        """With the losses smoothed, each over its neighbours on both sides, and the steepest fall before the lowest."""
        n, width = len(self.losses), self.width
        smooth = [fmean(self.losses[max(0, i - width) : i + width + 1]) for i in range(n)]
        low = smooth.index(min(smooth)) if smooth else 0
        falls = {i: smooth[i + width] - smooth[i - width] for i in range(width, min(low, n - width))}
        if not falls or min(falls.values()) >= 0:
            raise ValueError("lr_find: the loss fell at no rate; try a smaller start=, or look at loss and data")
        return LRFind(self.rates, smooth, self.rates[min(falls, key=lambda i: falls[i])])

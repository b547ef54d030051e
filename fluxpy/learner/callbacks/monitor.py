"""Which number says how good a model is, for callbacks that compare epochs."""

import math
import re

from ..core import near
from ..learner import Learner

_MODES = {
    "loss": "min",
    "perplexity": "min",
    "accuracy": "max",
    "top5_accuracy": "max",
    "matthews_correlation_coefficient": "max",
}


class Monitor:
    """A metric by name: `"loss"` is that of validation (of training, where a fit has no validation); `"train.loss"` and
    `"validation.loss"` say which. `mode` is whether `"min"` or `"max"` is best; known metrics need none."""

    def __init__(self, name: str, mode: str | None) -> None:
        if not isinstance(name, str):
            raise TypeError(f"monitor is the name of a metric, but got {name!r}; give the others by name: patience=3")
        found = re.match("(train|val|valid|validation)([._])(.+)", name)
        phase, mark, metric = found.groups() if found else ("", "", name)
        if (mark == "_" and metric in _MODES) or (mark == "." and phase in ("val", "valid")):  # as others write it
            usual = "" if phase == "train" else f"{metric!r} or 'validation.{metric}', and of training "
            raise ValueError(f"monitor={name!r}: write {usual}'train.{metric}'")
        self.phase, self.metric = (phase, metric) if mark == "." else ("", name)
        self.name, self.mode = name, mode or _MODES.get(self.metric)
        if self.mode not in ("min", "max"):
            came = "is not known" if mode is None else f"is not {mode!r}"
            raise ValueError(f"monitor={name!r}: what is best {came}; say mode='min' or mode='max'")
        self.key = f"{self.mode} {name}"  # what is saved of it: bests by another one are not to be compared with

    def require(self, learner: Learner) -> None:
        """ValueError where a fit that starts will not have this number."""
        if self.metric not in learner.metrics.names:
            raise ValueError(f"monitor={self.name!r}: no such metric; {near(self.metric, learner.metrics.names)}")
        if self.phase == "validation" and not learner.has_validation:
            raise ValueError(f"monitor={self.name!r}, but the fit has no validation data")

    def value(self, learner: Learner) -> float | None:
        """The number of the epoch that ends; None where it was cut short."""
        if learner.progress.epoch <= learner.epoch_index:
            return None
        phase = self.phase or ("validation" if learner.has_validation else "train")
        return learner.history[-1][phase].get(self.metric)

    def rank(self, value: float) -> float:
        """The lower, the better. What is not a number is worst."""
        if math.isnan(value):
            return math.inf
        return value if self.mode == "min" else -value

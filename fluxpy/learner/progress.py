"""Progress: where a run is. Step: the present batch."""

import math
from dataclasses import dataclass
from typing import Any

_ORDER = {"start": 0, "train": 0, "validation": 1, "end": 2}


@dataclass
class Progress:
    """What comes next in a run: where it would go on, were it saved now. `learner.progress` for callbacks.

    A phase is called "train" or "validation" here and in all records; "start" is before both, "end" after them.
    """

    epoch: int = 0  # the one that runs or comes next; an epoch that is over was not cut short if this is beyond it
    phase: str = "start"  # the one of that epoch that runs or comes next
    batch: int = 0  # batches of that phase that are done
    step: int = 0  # training batches of the fit that are done
    within: str = "fit"  # the innermost level that began and is not done: "fit", "epoch", "training" or "validation"
    resumed: bool = False  # whether the fit goes on with a saved run
    cancelled: str | None = None  # the level that a cancel is ending: "batch", "training", "epoch", ...

    def position(self) -> dict[str, int | str]:
        """What is saved of it."""
        return {"epoch": self.epoch, "phase": self.phase, "batch": self.batch, "step": self.step}

    def is_past(self, epoch: int, phase: str, batch: float = math.inf) -> bool:
        """Whether a run that goes on from here will not come to that batch again; without `batch`, to that phase."""
        return (epoch, _ORDER[phase], batch) < (self.epoch, _ORDER[self.phase], self.batch)


@dataclass(slots=True, eq=False)
class Step:
    """What the present batch has so far; all None between batches.

    `input` and `target` are set before `batch_start`, where callbacks may change them; `output`, `loss` and `grads`
    before `update_start`, where they may change `grads`. In validation there are no `grads`, and `output` may be
    changed in `inference_prediction_end`. `samples` weights what the batch counts in metrics, and `weight`, which a
    step may set, in the mean of `accumulate`: by default how many targets count, or else the samples.
    """

    input: Any = None
    target: Any = None
    samples: int = 0
    weight: Any = None
    scored: Any = True  # whether metrics count it; on a device a flag that is not read; not where others go on alone
    output: Any = None
    loss: Any = None
    number: Any = None  # the loss, read: a plain number on the CPU
    grads: Any = None

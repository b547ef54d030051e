"""Progress: where a run is."""

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """What comes next in a run: where it would go on, were it saved now. `learner.progress` for callbacks.

    A phase is called "train" or "validation" here and in all records; "start" is before both.
    """

    epoch: int = 0  # the one that runs or comes next; an epoch that is over was not cut short if this is beyond it
    phase: str = "start"  # the one of that epoch that runs or comes next
    batch: int = 0  # training batches of that epoch that are done
    step: int = 0  # training batches of the fit that are done
    resumed: bool = False  # whether the fit goes on with a saved run
    cancelled: str | None = None  # the level that a cancel is ending: "batch", "training", "epoch", ...

    def end_batch(self) -> None:
        """A training batch is done."""
        self.batch += 1
        self.step += 1

    def end_epoch(self) -> None:
        """An epoch is done."""
        self.epoch, self.phase, self.batch = self.epoch + 1, "start", 0

    def position(self) -> dict[str, int | str]:
        """What is saved of it."""
        return {"epoch": self.epoch, "phase": self.phase, "batch": self.batch, "step": self.step}

    def is_past(self, epoch: int, phase: str, batch: float = math.inf) -> bool:
        """Whether a run that goes on from here will not come to that batch again; without `batch`, to that phase."""
        done = self.batch if self.phase == "train" else 0
        return (epoch, phase == "validation", batch) < (self.epoch, self.phase == "validation", done)

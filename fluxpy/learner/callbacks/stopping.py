"""EarlyStopping and StopOnNaN: when it is no use to go on."""

import math
from typing import Any

from ..core import parameters
from ..events import Callback, CancelFit
from ..learner import Learner
from .monitor import Monitor


class EarlyStopping(Callback):
    """Ends the fit when `patience` epochs in a row were not better than the best by more than `min_delta`.

    `monitor` is a metric, by default the loss of validation (of training, where there is no validation);
    `"train.accuracy"` names another phase. `mode` says whether `"min"` or `"max"` is best, for metrics that fluxpy does
    not know. The weights stay those of the last epoch; `Checkpoint` keeps the best.
    """

    def __init__(
        self, monitor: str = "loss", patience: int = 3, min_delta: float = 0.0, *, mode: str | None = None
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience!r} is not allowed; it is a number of epochs, at least 1")
        if not min_delta >= 0:
            raise ValueError(f"min_delta={min_delta!r} is not allowed; it is what counts as better, at least 0")
        self.monitor, self.patience, self.min_delta = Monitor(monitor, mode), patience, min_delta
        self.best: float | None = None
        self.waited = 0  # epochs since the best

    def on_fit_start(self, learner: Learner) -> None:
        self.monitor.require(learner)
        if not learner.progress.resumed:
            self.best, self.waited = None, 0
        self._stop()  # a run that had stopped, and is resumed

    def on_epoch_end(self, learner: Learner) -> None:
        value, rank = self.monitor.value(learner), self.monitor.rank
        if value is None:
            return
        if self.best is None or rank(value) < rank(self.best) - self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        self._stop()

    def _stop(self) -> None:
        if self.waited >= self.patience:
            raise CancelFit(f"{self.monitor.name} was not better than {self.best:.6g} for {self.waited} epochs")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        self.best, self.waited = d["best"], d["waited"]


class StopOnNaN(Callback):
    """Ends the fit when a loss is not finite. That batch updates nothing.

    A finite loss may have a gradient that is not, which makes weights NaN one batch before the loss shows it. The rule
    prevents that: `OptimiserChain(ClipGlobalNorm(math.inf, nonfinite="skip"), Adam(1e-3))` leaves such updates out.

    On a device that is looked at every few batches (`every`), and at the end of each phase."""

    stops_on_nonfinite = True

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"every={every!r} is not allowed; it is a number of batches, at least 1")
        self.every = every

    def on_batch_end(self, learner: Learner) -> None:
        if learner.training and (learner.batch_index + 1) % self.every == 0:
            learner.check_finite()
        if learner.training and learner.nonfinite is not None:
            self._stop(learner)

    def on_training_end(self, learner: Learner) -> None:
        if learner.nonfinite is not None:
            self._stop(learner)

    def on_validation_end(self, learner: Learner) -> None:
        loss = learner.stats.get("loss", 0.0)
        if learner.phase is not None and not math.isfinite(loss):
            raise CancelFit(f"the validation loss of epoch {learner.epoch_index} is {loss}")

    def _stop(self, learner: Learner) -> None:
        sound = all(bool(x.isfinite().all()) for x in parameters(learner.state, learner.model))
        raise CancelFit(f"{learner.nonfinite}{'' if sound else _CURE}")


_CURE = (
    ". Weights are not finite either: an update before had a gradient that was not, with a finite loss. "
    'ClipGlobalNorm(math.inf, nonfinite="skip") in front of the rule leaves such updates out'
)

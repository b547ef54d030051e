"""EarlyStopping, ReduceOnPlateau and StopOnNaN: what to do when it is no use to go on like this."""

import math
from typing import Any

from ... import averaged, leaves, scale
from ..core import adjust_rates, bind, match_model, model_dict, rates, write_tensors
from ..events import Callback, CancelFit, require_whole
from ..learner import Learner
from .monitor import Monitor


class Plateau(Callback):
    """Acts when `patience` epochs in a row were not better than the best by more than `min_delta`. Subclasses give
    `stuck`, and `better` for an epoch that was."""

    def __init__(self, monitor: str, patience: int, min_delta: float, mode: str | None) -> None:
        require_whole("patience", patience)
        if not min_delta >= 0:
            raise ValueError(f"min_delta={min_delta!r} is not allowed; it is what counts as better, at least 0")
        self.monitor, self.patience, self.min_delta = Monitor(monitor, mode), patience, min_delta
        self.best: float | None = None
        self.waited = 0  # epochs since the best, or since it acted

    def stuck(self, learner: Learner) -> None:
        raise NotImplementedError

    def better(self, learner: Learner) -> None:
        pass

    def on_fit_start(self, learner: Learner) -> None:
        self.monitor.require(learner)
        if not learner.progress.resumed:
            self.best, self.waited = None, 0

    def on_epoch_end(self, learner: Learner) -> None:
        value, rank = self.monitor.value(learner), self.monitor.rank
        if value is None:
            return
        if self.best is None or rank(value) < rank(self.best) - self.min_delta:
            self.best, self.waited = value, 0
            self.better(learner)
        else:
            self.waited += 1
        if self.waited >= self.patience:
            self.stuck(learner)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "monitor": self.monitor.key}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        same = d.get("monitor", self.monitor.key) == self.monitor.key  # older files do not say
        self.best, self.waited = (d["best"], d["waited"]) if same else (None, 0)


class EarlyStopping(Plateau):
    """Ends the fit when `patience` epochs in a row were not better than the best by more than `min_delta`.

    `monitor` is a metric, by default the loss of validation (of training, where there is no validation);
    `"train.accuracy"` names another phase. `mode` says whether `"min"` or `"max"` is best, for metrics that fluxpy does
    not know. The weights stay those of the last epoch; with `restore_best` the model (parameters and buffers, not the
    momenta) gets back those that were scored best when the fit was stopped by this or came to its end. `Checkpoint`
    keeps the best in files.
    """

    def __init__(
        self,
        monitor: str = "loss",
        patience: int = 3,
        min_delta: float = 0.0,
        *,
        mode: str | None = None,
        restore_best: bool = False,
    ) -> None:
        super().__init__(monitor, patience, min_delta, mode)
        self.restore_best = restore_best
        self._weights: Any = None  # of the best epoch

    def on_fit_start(self, learner: Learner) -> None:
        super().on_fit_start(learner)
        if not learner.progress.resumed:
            self._weights = None
        if self.waited >= self.patience:  # a run that had stopped, and is resumed
            self.stuck(learner)

    def better(self, learner: Learner) -> None:
        if self.restore_best:
            with averaged(learner.state, learner.model):  # those that were scored
                self._weights = model_dict(learner.model)

    def stuck(self, learner: Learner) -> None:
        raise CancelFit(f"{self.monitor.name} was not better than {self.best:.6g} for {self.waited} epochs")

    def on_fit_end(self, learner: Learner) -> None:
        # Not where something else stopped it: what is saved then has to go on with the present weights.
        over = self.waited >= self.patience or learner.progress.epoch >= learner.epoch_count
        if self._weights is not None and over and learner.error is None:
            write_tensors(match_model(learner.model, self._weights))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"weights": self._weights}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        super().load_state_dict(d)
        self._weights = None if self.best is None else d["weights"]


class ReduceOnPlateau(Plateau):
    """Multiplies every learning rate by `factor` when `patience` epochs in a row were not better, and waits anew.

    `monitor`, `min_delta` and `mode` as in `EarlyStopping`. No rate gets below `min_lr`, unless it was before. Ratios
    between subtrees survive; a schedule is scaled as a schedule, without a lowest rate. Under a `LearningRateScheduler`
    it is the base rate that is multiplied. In a chain with several rates that differ, `member` says which, as in
    `adjust`.
    """

    def __init__(
        self,
        monitor: str = "loss",
        factor: float = 0.1,
        patience: int = 3,
        min_delta: float = 0.0,
        *,
        min_lr: float = 0.0,
        mode: str | None = None,
        member: Any = None,
    ) -> None:
        super().__init__(monitor, patience, min_delta, mode)
        if not 0 < factor < 1:
            raise ValueError(f"factor={factor!r} is not allowed; it is between 0 and 1")
        if not min_lr >= 0:
            raise ValueError(f"min_lr={min_lr!r} is not allowed; it is the lowest rate, at least 0")
        self.factor, self.min_lr, self.member = factor, min_lr, member

    def on_fit_start(self, learner: Learner) -> None:
        super().on_fit_start(learner)
        if not any(rates(leaf, self.member) for _, leaf in leaves(learner.state)):
            raise ValueError("ReduceOnPlateau: no leaf has a rule with the hyperparameter 'lr'")
        adjust_rates(learner.state, lambda rate: rate, self.member)  # what cannot be adjusted is told now

    def stuck(self, learner: Learner) -> None:
        self.waited = 0
        adjust_rates(learner.state, self._lowered, self.member)

    def _lowered(self, rate: Any) -> Any:
        new = scale(self.factor).of(rate)
        return max(new, min(rate, self.min_lr)) if isinstance(new, int | float) else new


class StopOnNaN(Callback):
    """Ends the fit when a loss is not finite. That batch updates nothing.

    A finite loss may have a gradient that is not, which makes weights NaN one batch before the loss shows it. The rule
    prevents that: `OptimiserChain(ClipGlobalNorm(math.inf, nonfinite="skip"), Adam(1e-3))` leaves such updates out.

    On a device that is looked at every few batches (`every`), and at the end of each phase."""

    stops_on_nonfinite = True

    def __init__(self, every: int = 50) -> None:
        require_whole("every", every)
        self.every = every

    def on_batch_end(self, learner: Learner) -> None:
        if learner.training:
            if (learner.batch_index + 1) % self.every == 0:
                learner.check_finite()
            self._stop(learner)

    def on_training_end(self, learner: Learner) -> None:
        self._stop(learner)

    def on_validation_end(self, learner: Learner) -> None:
        loss = learner.stats.get("loss", 0.0)
        if learner.phase is not None and not math.isfinite(loss):
            raise CancelFit(f"the validation loss of epoch {learner.epoch_index} is {loss}")

    def _stop(self, learner: Learner) -> None:
        if learner.nonfinite is not None:
            here = all(bool(x.isfinite().all()) for x in bind(learner.state, learner.model).local)
            sound = not any(learner.ranks.numbers("StopOnNaN", not here))
            raise CancelFit(f"{learner.nonfinite}{'' if sound else _CURE}")


_CURE = (
    ". Weights are not finite either: an update before had a gradient that was not, with a finite loss. "
    'ClipGlobalNorm(math.inf, nonfinite="skip") in front of the rule leaves such updates out'
)

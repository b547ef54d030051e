"""Checkpoint: the run in files, to go on after any kill, and its best epochs."""

import os
import re
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ... import averaged
from ..core import model_dict, read_file, remove_leftovers, write_checkpoint
from ..events import Callback, CancelFit, require_one_of, require_whole
from ..learner import Learner
from ..lock import Lock
from .monitor import Monitor


class Checkpoint(Callback):
    """Saves the run, so that the same script, started again after a kill, goes on where it was.

        learner = fluxpy.Learner(model, loss, rule, callbacks=[CSVLogger(), Checkpoint("run/checkpoints")])
        learner.fit(train, valid, epochs=12)

    `last.flux` is written at the end of each epoch, and after every so many batches (`every`); a fit that finds one
    loads it and goes on from there, in the middle of an epoch too, bit for bit as if it had never stopped, if it is
    given the same data. Rates and other hyperparameters are those of the file; where the script says others, a
    warning tells, and with `hyperparameters="keep"` those of the script count. With `resume=False` it begins anew.
    A later fit with the same object begins anew as well, but a script with several fits needs a Checkpoint with its
    own directory for each: `fit(..., callbacks=[...])`.

    The `keep` best epochs stay in files of their own, `best` names them. `monitor` is a metric, by default the loss
    of validation (of training, where there is no validation); `"train.accuracy"` names another phase. `mode` says
    whether `"min"` or `"max"` is best, for metrics that fluxpy does not know. `fluxpy.load(path, model=model)`
    reads a file.

    `last.flux` has the training weights. Where the rule has weights to evaluate with (`Averaged`), a file of a best
    epoch has those, which were scored, and no state: it is for use, not for training on. What `load` returns says under
    `"weights"` which they are: `"training"` or `"evaluation"`.

    On SIGTERM and SIGINT (Ctrl-C) the present batch is finished and saved, and the fit ends with a reason; a second
    SIGINT interrupts at once. A kill at any instant leaves whole files. While a fit runs, no other may use the
    directory. Acts after all other callbacks.
    """

    acts_last = True

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int | None = None,
        monitor: str = "loss",
        mode: str | None = None,
        keep: int = 1,
        resume: bool = True,
        hyperparameters: Literal["load", "keep"] = "load",
    ) -> None:
        if every is not None:
            require_whole("every", every)
        require_whole("keep", keep, 0)
        require_one_of("hyperparameters", hyperparameters, ("load", "keep"))
        self.directory, self.every, self.keep, self.resume = Path(directory), every, keep, resume
        self.hyperparameters = hyperparameters
        self.monitor = Monitor(monitor, mode)
        self._best: list[tuple[float, str]] = []  # value and file name, best first
        self._fits = 0  # how many were completed
        self._saved: dict[str, Any] = {}  # where the run was then; in a fit that has not saved, the step it began at
        self._lock = Lock(self.directory)
        self._signal: str | None = None
        self._previous: dict[int, Any] = {}  # handlers

    @property
    def last(self) -> Path:
        """The file with which a fit goes on."""
        return self.directory / "last.flux"

    @property
    def best(self) -> list[tuple[float, Path]]:
        """Value and file of the best epochs, best first."""
        return [(value, self.directory / name) for value, name in self._best]

    def saved_run(self) -> dict[str, Any] | None:
        if not self.resume or not self.last.exists():
            return None
        at = f"Checkpoint: {str(self.last)!r}"
        data = read_file(str(self.last), at)
        if not isinstance(data, dict) or "run" not in data.get("extra", ()):
            raise ValueError(f"{at} was not saved by a Checkpoint")
        if data["extra"]["fits"] > self._fits:
            raise ValueError(
                f"{at} is from fit {data['extra']['fits'] + 1} with one Checkpoint, but this is fit {self._fits + 1}; "
                "give each its own: fit(..., callbacks=[Checkpoint(directory)]), or begin anew with resume=False"
            )
        if data["extra"]["fits"] < self._fits:
            return None
        more = {"model": data["model"], "state": data["state"], "hyperparameters": self.hyperparameters}
        return data["extra"]["run"] | more

    def on_fit_start(self, learner: Learner) -> None:
        self.monitor.require(learner)
        if learner.ranks.first:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            remove_leftovers(self.directory)  # by a kill in the middle of a save
        if not learner.progress.resumed:
            self._best = []
        self._saved, self._signal = {"step": learner.progress.step}, None
        self._catch_signals()

    def on_batch_end(self, learner: Learner) -> None:
        if learner.training and self.every is not None:
            # Of a phase that is being cancelled the next batch never comes.
            ends = self._signal is not None or learner.progress.cancelled is not None
            due = learner.progress.step - self._saved["step"] >= self.every
            if due and not any(learner.ranks.numbers("Checkpoint", ends)):
                self._save(learner, self.last)
        self._stop_at_signal(learner)

    def on_epoch_end(self, learner: Learner) -> None:
        if learner.error is not None:
            return
        if (value := self.monitor.value(learner)) is not None:
            self._rank(learner, value)
        if learner.progress.epoch > learner.epoch_index:  # it was not cut short
            self._save(learner, self.last)
        self._stop_at_signal(learner)

    def on_fit_end(self, learner: Learner) -> None:
        try:
            if learner.error is None and self._saved != learner.progress.position():
                self._save(learner, self.last)
        finally:
            for number, previous in self._previous.items():
                if signal.getsignal(number) == self._on_signal:
                    signal.signal(number, previous)
            self._previous = {}
            self._lock.release()
        if learner.error is None:
            signals = learner.ranks.gather("Checkpoint", self._signal)
            self._signal = next((name for name in signals if name is not None), None)
        if self._signal is not None and learner.history.stop_reason is None:
            learner.history.stop_reason = self._signal  # it came after the last epoch
        if learner.error is None and self._signal is None:
            self._fits += 1

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "monitor": self.monitor.key}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        best = d["best"] if d.get("monitor", self.monitor.key) == self.monitor.key else ()  # older files do not say
        self._best = [(value, name) for value, name in best if (self.directory / name).exists()]

    # --- Files --------------------------------------------------------------------------------------------------------

    def _save(self, learner: Learner, path: Path) -> None:
        model, state, extra = None, None, dict[str, Any](weights="evaluation")
        if path != self.last:
            with averaged(learner.state, learner.model) as exchanged:
                model = learner.ranks.whole(model_dict(learner.model)) if exchanged else None
        if model is None:
            run = learner.state_dict()
            model, state = run.pop("model"), run.pop("state")
            run.pop("hyperparameters", None)
            extra = {"run": run, "fits": self._fits, "weights": "training"}
        write = partial(write_checkpoint, path, model, state, extra)
        learner.ranks.attempt(f"Checkpoint of {path.name}", write if learner.ranks.first else lambda: None)
        if path == self.last:
            self._saved = learner.progress.position()

    def _rank(self, learner: Learner, value: float) -> None:
        """Keep this epoch if it is among the best. `last.flux` comes after that: should the run be killed in between,
        the epoch is done again and comes to the same files."""
        metric = re.sub(r'[\\/:*?"<>|]', "_", self.monitor.metric)  # what names of files may not have
        name = f"epoch_{learner.epoch_index:03d}_{metric}_{value:.4g}.flux"
        ranked = sorted([*self._best, (value, name)], key=lambda entry: self.monitor.rank(entry[0]))
        self._best, dropped = ranked[: self.keep], ranked[self.keep :]
        if (value, name) in self._best:
            self._save(learner, self.directory / name)
        for _, old in dropped:
            if learner.ranks.first and old not in [kept for _, kept in self._best] and old != name:
                (self.directory / old).unlink(missing_ok=True)

    # --- Signals ------------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            previous = signal.getsignal(number)
            other = isinstance(getattr(previous, "__self__", None), Checkpoint)  # which ends the fit just as well
            if previous not in (None, signal.SIG_IGN) and not other:
                self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name

    def _stop_at_signal(self, learner: Learner) -> None:
        if self._signal is not None and learner.fitting:
            raise CancelFit(f"{self._signal}; the run was saved to {str(self.last)!r}")

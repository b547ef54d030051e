"""Loop: what a Learner does in one call of `fit` or `validate`: epochs, phases, batches."""

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .. import averaged, update, withgradient
from .core import (
    as_gradients,
    gradients_in_order,
    note_loss,
    over_ranks,
    parameters,
    place,
    reads_at_once,
    training_mode,
)
from .data import Source, evaluation_mode, samples_of, split
from .dispatcher import Dispatcher
from .events import Cancel, CancelTraining
from .resume import Run, restore
from .rng import data_state, random_state, set_data_state, set_random_state
from .scores import number
from .step import Step
from .window import weight_of

if TYPE_CHECKING:
    from .learner import Learner

LOSS = "the loss"  # how messages about it begin


class Loop:
    """Epochs, phases and batches of one call of `fit` or `validate`. The Learner has what callbacks see of it."""

    def __init__(self, learner: "Learner", run: Run) -> None:
        self.learner = learner
        self.run = run
        self.ranks = learner.ranks
        self.dispatcher = Dispatcher(learner, [*learner.callbacks, *run.callbacks])
        self.predicted = False  # whether the present batch of validation has told its output
        self.losses: list[float] = []  # of the present batch on each process, where there are several
        self.compared: set[str] = set()  # the phases whose data was compared with that of the saved run

    # --- Epochs -------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        self.dispatcher.run("fit", self._epochs)

    def _epochs(self) -> None:
        learner = self.learner
        self._restore("fit")
        self.dispatcher.again = self.run.saved is not None
        for epoch in range(learner.progress.epoch, learner.epoch_count):
            learner.epoch_index, learner.progress.within = epoch, "epoch"
            self.run.epoch_began = time.monotonic() - self._spent("epoch")
            self.dispatcher.run("epoch", self._epoch, self._end_epoch)

    def _epoch(self) -> None:
        run, progress = self.run, self.learner.progress
        self.ranks.require_same_state(self.learner.state)
        run.row = {} if run.saved is None else dict(run.saved["row"])
        self._restore("epoch")
        if progress.phase in ("start", "train"):
            self._training()
        if run.valid is not None and progress.phase == "validation":
            self.validation(run.valid, self._open(run.valid, "validation"), "validation")

    def _end_epoch(self, done: bool) -> None:
        learner = self.learner
        learner.history.append({"epoch": learner.epoch_index, "train": {}, "validation": {}} | self.run.row)
        learner.history.seconds.append(time.monotonic() - self.run.epoch_began)
        if done:
            learner.progress.end_epoch()

    def _spent(self, on: str) -> float:
        """The seconds that the saved run, with which this one goes on, had spent."""
        return 0.0 if self.run.saved is None else self.run.saved["seconds"][on]

    def _restore(self, level: str) -> None:
        """Within this level the saved run goes on. Start events that it had fired were fired again, for callbacks to
        open what they need; what they changed of the run is put back, so that nothing acts twice."""
        saved = self.run.saved
        if saved is None or saved["within"] != level:
            return
        restore(self.learner, self.run, saved)
        if (random := saved["random"]) is not None:
            set_random_state(random)
            if level in ("fit", "epoch"):  # otherwise the data was begun before, and is at its place
                set_data_state(self.run.sources, random["data"])
        self.run.saved, self.dispatcher.again = None, False

    # --- Phases -------------------------------------------------------------------------------------------------------

    def _open(self, source: Source, level: str) -> Iterator[Any]:
        """Begin an epoch of the data, in a resumed run with the random numbers with which it was begun before."""
        run, progress = self.run, self.learner.progress
        saved = run.saved
        rng = None if saved is None else saved["rng_at_start"]
        if rng is not None:
            set_random_state(rng)
        run.rng_at_start = random_state(())
        source.make(self.learner.epoch_index)
        if rng is not None:
            set_data_state(run.sources, rng["data"])
        source.tell_epoch(self.learner.epoch_index)
        run.rng_at_start["data"] = data_state(run.sources)
        self._start_phase("train" if level == "training" else level, source)
        progress.phase, progress.within = self.learner.phase or "", level
        self._compare(level, source)
        self.run.window.clear()
        if saved is not None:
            self.run.window.load_state_dict(saved["window"], parameters(self.learner.state, self.learner.model))
            self.learner.metrics.load_state_dict(saved["metrics"], self.learner.device)
            self.learner.batch_index, self.learner.step_index = max(progress.batch - 1, 0), max(progress.step - 1, 0)
        return source.batches(progress.batch, may_end=level == "validation" and not self.ranks.alone)

    def _compare(self, level: str, source: Source) -> None:
        """Keep how many batches the phase has. When a resumed run first comes to its data, warn of what is inexact."""
        before, now = self.run.lengths.get(level), self.learner.batch_count
        self.run.lengths[level] = now
        if level in self.compared or not self.learner.progress.resumed:
            return
        self.compared.add(level)
        if None not in (before, now) and before != now and not source.each:
            self.ranks.warn(
                f"{source.name} has {now} batches, but in the saved run it had {before}: the resumed run goes on with "
                "other data, and a schedule over the fit has another length",
                stacklevel=2,
            )
        if source.keeps_workers():
            self.ranks.warn(
                f"{source.name} has persistent_workers=True, whose random numbers nobody can save: the resumed run is "
                "not exactly the one that was saved; with persistent_workers=False it is",
                stacklevel=2,
            )

    def _training(self) -> None:
        learner, source, progress = self.learner, self.run.train, self.learner.progress
        assert source is not None
        batches = self._open(source, "training")
        learner.step_count = self.ranks.length("training_start", source.total(learner.epoch_count))

        def body() -> None:
            self._restore("training")
            training_mode(learner.model, learner.state)
            cancel: CancelTraining | None = None
            try:
                for index, (batch, _) in enumerate(self.ranks.together(source, batches, True), progress.batch):
                    learner.batch_index, learner.step_index = index, progress.step
                    self._batch(batch, self._training_batch)
            except CancelTraining as raised:
                cancel = raised
            if self.run.window.batches:  # of data whose length was not known, or the training was cancelled
                self._update_by_window()
                learner.step = Step()
            if cancel is not None:
                raise cancel

        self._run_phase("training", body)

    def validation(self, source: Source, batches: Iterator[Any], phase: str | None) -> None:
        """The phase of a fit; or with None a call of `validate`."""
        learner = self.learner
        if phase is None:
            self._start_phase(None, source)

        def body() -> None:
            if phase is not None:
                self._restore("validation")
            with evaluation_mode(learner.model), averaged(learner.state, learner.model), torch.no_grad():
                done = 0 if phase is None else learner.progress.batch
                for index, (batch, counts) in enumerate(self.ranks.together(source, batches, False), done):
                    learner.batch_index = index
                    self._batch(batch, self._validation_batch, counts)

        self._run_phase("validation", body)

    def _start_phase(self, phase: str | None, source: Source) -> None:
        learner = self.learner
        learner.phase, learner.training, learner.nonfinite, learner.stats = phase, phase == "train", None, {}
        learner.batch_count = self.ranks.length("the length of the data", source.length(), longest=phase != "train")
        learner.batch_index, learner.seconds = 0, 0.0
        self.run.phase_began = time.monotonic() - self._spent("phase")
        learner.metrics.reset()

    def _run_phase(self, level: str, body: Callable[[], None]) -> None:
        try:
            self.dispatcher.run(level, body, self._end_phase)
        finally:
            self.learner.phase, self.learner.training = None, False

    def _end_phase(self, done: bool) -> None:
        """The numbers of the phase are final."""
        learner, run = self.learner, self.run
        learner.stats, learner.seconds = learner.running(), time.monotonic() - run.phase_began
        if learner.phase is None:
            return
        if learner.nonfinite is not None and not learner.stats:  # no batch had a loss
            learner.stats = dict.fromkeys(learner.metrics.names, math.nan)
        run.row[learner.phase] = learner.stats
        if done:
            learner.progress.end_phase()
        if learner.training:
            stops = [getattr(c, "stops_on_nonfinite", False) for c in (*learner.callbacks, *run.callbacks)]
            if learner.check_finite() is not None and not any(stops):
                self.ranks.warn(
                    f"{learner.nonfinite}; the fit goes on, the callback StopOnNaN would end it", stacklevel=2
                )

    # --- Batches ------------------------------------------------------------------------------------------------------

    def _batch(self, batch: Any, body: Callable[[], None], counts: bool = True) -> None:
        """One batch. Nothing of it is left afterwards."""
        learner = self.learner
        input, target = split(place(batch, learner.device))
        learner.step = Step(input, target, samples_of(target, input), scored=counts)
        try:
            self.dispatcher.run("batch", body, self._end_batch)
        finally:
            learner.step = Step()

    def _training_batch(self) -> None:
        learner, step = self.learner, self.learner.step
        f = self._agreed(learner.training_step if learner.autocast is None else self._cast(learner.training_step))
        value, step.grads = withgradient(f, learner.model, step.input, step.target, state=learner.state)
        self.ranks.busy = False
        step.loss, step.output = value if isinstance(value, tuple) else (value, None)
        step.number = number(step.loss)
        if not self._is_finite(step):
            return
        if learner.accumulate == 1:
            self._update()
        else:
            self._gather(step)
        learner.metrics.update(step)

    def _agreed(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A step after whose forward pass all processes know each other's losses, and whether to go on."""
        if self.ranks.alone:
            return step

        def agreed(*args: Any) -> Any:
            value: Any = None
            error: Exception | None = None
            self.ranks.busy = self.ranks.spread
            try:
                value = step(*args)
            except Exception as raised:
                if self.ranks.busy and not isinstance(raised, Cancel):
                    raise
                error = raised
            loss = value[0] if isinstance(value, tuple) else value
            read = isinstance(loss, torch.Tensor) and reads_at_once(loss)
            self.losses = self.ranks.numbers("a step", loss.item() if read else 0.0, error)
            self.ranks.busy = self.learner.training
            return value

        return agreed

    def _update(self) -> None:
        learner = self.learner
        self.dispatcher.fire("update_start")
        self.ranks.busy = self.ranks.spread
        update(learner.state, learner.model, learner.step.grads)
        self.ranks.busy = False

    def _gather(self, step: Step) -> None:
        """Keep the gradients for the update at the end of the window, or of the data."""
        learner, window = self.learner, self.run.window
        weight = weight_of(step, learner.loss)
        if isinstance(weight, torch.Tensor):
            weight = over_ranks(learner.state, learner.model, weight)
        else:
            weight = self.ranks.mean("accumulate", weight)
        window.add(gradients_in_order(learner.state, learner.model, step.grads), weight)
        if window.batches == learner.accumulate or learner.batch_index + 1 == learner.batch_count:
            self._update_by_window()

    def _update_by_window(self) -> None:
        learner = self.learner
        grads = self.run.window.take(parameters(learner.state, learner.model))
        learner.step.grads = as_gradients(learner.state, learner.model, grads)
        self._update()

    def _cast(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A step under autocast."""

        def under_autocast(*args: Any) -> Any:
            with self.learner.casting():
                return step(*args)

        return under_autocast

    def _is_finite(self, step: Step) -> bool:
        """Whether the loss is. On a device nothing is read: there what is not finite holds back update and metrics."""
        learner = self.learner
        if not reads_at_once(step.loss):
            step.scored = over_ranks(learner.state, learner.model, step.loss.detach()).isfinite()
            note_loss(learner.state, step.scored, LOSS)
            return True
        losses = [step.number] if self.ranks.alone else self.losses
        bad = next((rank for rank, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is None:
            return True
        if learner.nonfinite is None:
            where = f"batch {learner.batch_index} of epoch {learner.epoch_index}"
            where += "" if self.ranks.alone else f" on rank {bad}"
            learner.nonfinite = f"{LOSS} of {where} is {losses[bad]}; that batch updated nothing"
        return False

    def _end_batch(self, done: bool) -> None:
        self.ranks.busy = False
        if self.learner.phase is not None and self.dispatcher.error is None:
            self.learner.progress.end_batch(self.learner.training)

    def _validation_batch(self) -> None:
        learner, step = self.learner, self.learner.step
        self.predicted = False
        with learner.casting():
            value = self._agreed(learner.validation_step)(learner.model, step.input, step.target)
        step.loss, step.output = value if isinstance(value, tuple) else (value, step.output)
        step.number = number(step.loss)
        if not self.predicted:
            learner.predicted(step.output)
        learner.metrics.update(step)

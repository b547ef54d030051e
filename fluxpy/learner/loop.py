"""Loop: what a Learner does in one call of `fit` or `validate`: epochs, phases, batches."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from .. import averaged, flush, update, withgradient
from .core import as_gradients, bind, in_order, note_loss, over_ranks, place, reads_at_once, training_mode
from .data import Source, evaluation_mode, kind, samples_of, split
from .dispatcher import Dispatcher
from .events import CancelEpoch, CancelTraining
from .metrics import number
from .progress import Step
from .ranks import Ranks
from .resume import as_now, beginning_of, load_callbacks, load_weights
from .rng import data_state, random_state, set_data_state, set_random_state
from .window import Window, weight_of

if TYPE_CHECKING:
    from .learner import Learner

LOSS = "the loss"  # how messages about it begin


class Loop:
    """Epochs, phases and batches of one call of `fit` or `validate`. The Learner has what callbacks see of it.

    It keeps that of its last fit, which can be saved then too. Not the other way, or nothing would be freed at once.
    """

    learner: "Learner"  # while one of its calls runs
    ranks: Ranks

    def __init__(
        self,
        train: Source | None = None,
        valid: Source | None = None,
        callbacks: list[Any] | None = None,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self.train, self.valid = self.sources = train, valid
        self.callbacks = callbacks or []  # those of this fit only
        self.dispatcher = Dispatcher()
        self.saved = saved  # the saved run to go on with, until that is done
        kept = saved or {}
        # The state with which the run began; before it has, nothing.
        self.beginning: dict[str, Any] = {name: kept[name] for name in ("rules", "frozen") if name in kept}
        self.lengths: dict[str, int | None] = dict(kept.get("lengths", {}))  # how many batches each phase had
        self.uncompared = set(self.lengths)  # the phases of a saved run whose data was not seen yet
        # Of the epoch and the phase, until they are done:
        self.row: dict[str, Any] = dict(kept.get("row", {}))  # what the history will have of the epoch
        self.spent: dict[str, float] = dict(kept.get("seconds", {}))  # what a saved run had spent on them
        self.epoch_began = self.phase_began = 0.0  # by `time.monotonic`; earlier by what was spent
        self.rng_at_start: dict[str, Any] | None = kept.get("rng_at_start")  # with which the data was begun
        self.window = Window(**kept.get("window", {}))  # gradients that wait for an update
        self.nonfinite: str | None = kept.get("nonfinite")  # what was not in the saved part of the phase
        # Of the batch:
        self.predicted = False  # whether it has told its output, in validation
        self.losses: list[float] = []  # on each of several processes

    @contextmanager
    def of(self, learner: "Learner") -> Iterator[None]:
        """A call of that Learner's, or one within another."""
        if self.dispatcher.levels:
            yield
            return
        self.learner, self.ranks = learner, learner.ranks
        self.dispatcher = Dispatcher(learner, [*learner.callbacks, *self.callbacks])
        try:
            yield
        finally:
            del self.learner
            self.dispatcher = Dispatcher()

    # --- Epochs -------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        learner = self.learner
        self.beginning = self.beginning or beginning_of(learner.state)
        if self.saved is not None:
            self.saved = as_now(learner, self.saved)
        try:
            with self.dispatcher.level("fit"):
                self.dispatcher.fire("fit_start")
                self._restore("fit")
                self.dispatcher.again = self.saved is not None
                for epoch in range(learner.progress.epoch, learner.epoch_count):
                    self._epoch(epoch)
        finally:
            self.callbacks = []
            if self.dispatcher.error is None:  # else the next fit goes on, if this one did not come to it
                self.saved = None

    def _epoch(self, epoch: int) -> None:
        learner, progress = self.learner, self.learner.progress
        learner.epoch_index, progress.within = epoch, "epoch"
        self.epoch_began = time.monotonic() - self.spent.pop("epoch", 0.0)
        with self.dispatcher.level("epoch", self._end_epoch):
            self.dispatcher.fire("epoch_start")
            self.ranks.require_same_state(learner.state)
            self._restore("epoch")
            if progress.phase in ("start", "train"):
                self._training()
            if self.valid is not None and progress.phase == "validation":
                self.validation(self.valid, self._open(self.valid, "validation"), "validation")

    def _end_epoch(self, done: bool) -> None:
        learner = self.learner
        learner.phase, learner.training = None, False
        learner.history.append({"epoch": learner.epoch_index, "train": {}, "validation": {}} | self.row)
        learner.history.seconds.append(time.monotonic() - self.epoch_began)
        if done:
            self.row, self.rng_at_start, self.window, self.nonfinite = {}, None, Window(), None
            progress = learner.progress
            progress.epoch, progress.phase, progress.batch, progress.within = progress.epoch + 1, "start", 0, "fit"

    def _restore(self, level: str) -> None:
        """Within this level the saved run goes on. Start events that it had fired were fired again, for callbacks to
        open what they need; what they changed of the run is put back, so that nothing acts twice."""
        saved = self.saved
        if saved is None or saved["within"] != level:
            return
        load_weights(self.learner, saved)
        load_callbacks([*self.learner.callbacks, *self.callbacks], saved["callbacks"])
        if (random := saved["random"]) is not None:
            set_random_state(random)
            if level in ("fit", "epoch"):  # otherwise the data was begun before, and is at its place
                set_data_state(self.sources, random["data"])
        self.saved, self.dispatcher.again = None, False

    # --- Phases -------------------------------------------------------------------------------------------------------

    def _open(self, source: Source, level: str) -> Iterator[Any]:
        """Begin an epoch of the data, in a resumed run with the random numbers with which it was begun before."""
        learner, progress, begun = self.learner, self.learner.progress, self.rng_at_start
        if begun is not None:
            set_random_state(begun)
        self.rng_at_start = random_state(())
        source.make(learner.epoch_index)
        if begun is not None:
            set_data_state(self.sources, begun["data"])
        source.tell_epoch(learner.epoch_index)
        self.rng_at_start["data"] = data_state(self.sources)
        self._start_phase("train" if level == "training" else level, source)
        progress.phase, progress.within = learner.phase or "", level
        self._compare(level, source)
        if self.saved is not None:
            learner.metrics.load_state_dict(self.saved["metrics"], learner.device)
            learner.batch_index, learner.step_index = max(progress.batch - 1, 0), max(progress.step - 1, 0)
        return source.batches(progress.batch, may_end=level == "validation" and not self.ranks.alone)

    def _compare(self, level: str, source: Source) -> None:
        """Keep how many batches the phase has. When a resumed run first comes to its data, warn of what is inexact."""
        before, now = self.lengths.get(level), self.learner.batch_count
        self.lengths[level] = now
        if level not in self.uncompared:
            return
        self.uncompared.remove(level)
        if None not in (before, now) and before != now and not source.each:
            self.ranks.warn(
                f"{source.name} has {now} batches, but in the saved run it had {before}: the resumed run goes on with "
                "other data, and a schedule over the fit has another length"
            )
        if getattr(source.loader, "persistent_workers", False):
            self.ranks.warn(
                f"{source.name} has persistent_workers=True, whose random numbers nobody can save: the resumed run is "
                "exactly the one that was saved only with persistent_workers=False"
            )

    def _training(self) -> None:
        learner, source, progress = self.learner, self.train, self.learner.progress
        assert source is not None
        batches = self._open(source, "training")
        learner.step_count = self.ranks.length("training_start", source.total(learner.epoch_count))
        with self.dispatcher.level("training", self._end_phase):
            self.dispatcher.fire("training_start")
            self._restore("training")
            training_mode(learner.model, learner.state)
            try:
                self._batches(source, batches, progress.batch)
            except (CancelTraining, CancelEpoch):
                self._end_windows()
                raise
            self._end_windows()

    def validation(self, source: Source, batches: Iterator[Any], phase: str | None) -> None:
        """The phase of a fit; or with None a call of `validate`."""
        learner, done = self.learner, 0
        if phase is None:
            self._start_phase(None, source)
        with self.dispatcher.level("validation", self._end_phase):
            self.dispatcher.fire("validation_start")
            if phase is not None:
                self._restore("validation")
                done = learner.progress.batch
            parts = [learner.model, learner.loss]
            with evaluation_mode(parts), averaged(learner.state, learner.model), torch.no_grad():
                self._batches(source, batches, done)

    def _start_phase(self, phase: str | None, source: Source) -> None:
        learner = self.learner
        learner.phase, learner.training, learner.nonfinite, learner.stats = phase, phase == "train", None, {}
        learner.batch_count = self.ranks.length("the length of the data", source.length(), longest=phase != "train")
        learner.batch_index, learner.seconds = 0, 0.0
        self.phase_began = time.monotonic() - (0.0 if phase is None else self.spent.pop("phase", 0.0))
        learner.metrics.reset()

    def _end_phase(self, done: bool) -> None:
        """The numbers of the phase are final."""
        learner = self.learner
        learner.step = Step()  # of an update by what was left of a window
        learner.stats, learner.seconds = learner.running(), time.monotonic() - self.phase_began
        if learner.phase is None:
            return
        if (learner.nonfinite or self.nonfinite) and not learner.stats:  # no batch had a loss
            learner.stats = dict.fromkeys(learner.metrics.names, math.nan)
        self.row[learner.phase] = learner.stats
        if done:
            self.rng_at_start = None
            progress = learner.progress
            progress.phase, progress.batch = "validation" if progress.phase == "train" else "end", 0
            progress.within = "epoch"
        if learner.training:
            stops = [getattr(c, "stops_on_nonfinite", False) for c in (*learner.callbacks, *self.callbacks)]
            found = next(filter(None, (self.nonfinite, learner.check_finite())), None)
            if found is not None and not any(stops):
                self.ranks.warn(f"{found}; the fit goes on, the callback StopOnNaN would end it")
            self.nonfinite = None if done else self.nonfinite

    # --- Batches ------------------------------------------------------------------------------------------------------

    def _batches(self, source: Source, batches: Iterator[Any], done: int) -> None:
        """The batches of a phase, of which so many are done. Nothing of one is left afterwards."""
        learner, index = self.learner, done - 1
        for index, (batch, counts) in enumerate(self.ranks.together(source, batches, learner.training), done):
            learner.batch_index = index
            if learner.training:
                learner.step_index = learner.progress.step
            input, target = split(place(batch, learner.device))
            learner.step = Step(input, target, samples_of(target, input), scored=counts)
            try:
                with self.dispatcher.level("batch", self._end_batch):
                    self.dispatcher.fire("batch_start")
                    self._training_batch() if learner.training else self._validation_batch()
            finally:
                learner.step = Step()
        if learner.batch_count not in (None, index + 1) and self.ranks.alone:
            said = f"says that it has {learner.batch_count} batches, and gave {index + 1}"
            self.ranks.warn(f"{source.name} {said}: what goes by their number, as schedules over the fit, was off")

    def _end_batch(self, done: bool) -> None:
        self.ranks.busy = False
        if self.learner.phase is not None and self.dispatcher.error is None:
            self.learner.progress.batch += 1
            self.learner.progress.step += self.learner.training

    def _training_batch(self) -> None:
        learner, step = self.learner, self.learner.step
        f = partial(self._run, learner.training_step)
        args = learner.model, step.input, step.target
        (step.loss, step.output), step.grads = withgradient(f, *args, state=learner.state)
        self.ranks.busy = False
        step.number = number(step.loss)
        if not self._is_finite(step):
            return
        if learner.accumulate == 1 and not self.window.batches:
            self._update()
        else:
            self._gather(step)
        learner.metrics.update(step)

    def _validation_batch(self) -> None:
        learner, step = self.learner, self.learner.step
        self.predicted = False
        step.loss, step.output = self._run(learner.validation_step, learner.model, step.input, step.target)
        step.number = number(step.loss)
        if not self.predicted:
            learner.predicted(step.output)
        learner.metrics.update(step)

    def _run(self, step: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
        """A step under the autocast that was asked for, as (loss, output). After it all processes know each other's
        losses, and whether to go on."""
        learner, ranks = self.learner, self.ranks

        def act() -> tuple[Any, Any]:
            with learner.casting():
                return loss_and_output(step(*args), learner.step.output)

        def loss(value: tuple[Any, Any]) -> float:
            return value[0].item() if reads_at_once(value[0]) else 0.0

        ranks.busy = ranks.spread
        value, self.losses = ranks.attempt("a step", act, loss)
        ranks.busy = learner.training
        return value

    def _is_finite(self, step: Step) -> bool:
        """Whether the loss is. On a device nothing is read: there what is not finite holds back update and metrics."""
        learner = self.learner
        if not reads_at_once(step.loss):
            step.scored = over_ranks(learner.state, learner.model, step.loss.detach()).isfinite()
            note_loss(learner.state, step.scored, LOSS)
            return True
        losses = self.losses or [step.number]
        bad = next((rank for rank, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is not None and learner.nonfinite is None:
            where = f"batch {learner.batch_index} of epoch {learner.epoch_index}"
            where += "" if self.ranks.alone else f" on rank {bad}"
            learner.nonfinite = f"{LOSS} of {where} is {losses[bad]}; that batch updated nothing"
        return bad is None

    def _gather(self, step: Step) -> None:
        """Keep the gradients for the update at the end of the window, or of the data."""
        learner = self.learner
        weight = weight_of(step, learner.loss)
        if isinstance(weight, torch.Tensor):
            weight = over_ranks(learner.state, learner.model, weight)
        else:
            weight = fmean(self.ranks.numbers("accumulate", weight))
        self.window.add(in_order(bind(learner.state, learner.model), step.grads), weight)
        if self.window.batches >= learner.accumulate or learner.batch_index + 1 == learner.batch_count:
            self._update_by_window()

    def _update_by_window(self) -> None:
        """Update by what was gathered, if anything was."""
        learner, window, self.window = self.learner, self.window, Window()
        if window.batches:
            mean = window.mean(bind(learner.state, learner.model).params)
            learner.step.grads = as_gradients(learner.state, learner.model, mean)
            self._update()

    def _end_windows(self) -> None:
        """Of data whose length was not known, and what `AccumGrad` holds: neither waits for another epoch."""
        self._update_by_window()
        self.ranks.busy = self.ranks.spread
        flush(self.learner.state, self.learner.model)
        self.ranks.busy = False

    def _update(self) -> None:
        learner = self.learner
        self.dispatcher.fire("update_start")
        self.ranks.busy = self.ranks.spread
        update(learner.state, learner.model, learner.step.grads)
        self.ranks.busy = False


def loss_and_output(value: Any, output: Any) -> tuple[Any, Any]:
    """What a step returned. ValueError where the loss is not one number, or more comes than an output."""
    loss, *more = value if isinstance(value, tuple) else (value, output)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or len(more) != 1:
        got = f"a tuple of {len(value)}" if isinstance(value, tuple) and len(more) != 1 else kind(loss)
        raise ValueError(f"a step returns the loss, one number in a tensor, or (loss, output), but this gave {got}")
    return loss, more[0]

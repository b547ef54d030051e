"""The loop that the Learner runs: fit, epochs, phases, batches."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from ..gradient import differentiate, trained
from ..guard import reads_at_once
from ..state import fit_of
from ..train import place, training_mode
from ..update import check, guard_of, update
from . import resume
from .data import Source, evaluation_mode, samples_of, split
from .events import Cancel
from .levels import Levels
from .measured import Metrics
from .resume import Position
from .scores import number

_LOSS = "the loss"


class Step:
    """What the present batch has so far; all None between batches.

    `input` and `target` are set before `batch_start`, where callbacks may change them; `output`, `loss` and `grads`
    before `update_start`, where they may change `grads`. In validation there are no `grads`, and `output` may be
    changed in `inference_prediction_end`. `samples` weights what the batch counts in metrics.
    """

    __slots__ = ("grads", "input", "loss", "number", "output", "samples", "target")

    def __init__(self, input: Any = None, target: Any = None, samples: int = 0) -> None:
        self.input, self.target, self.samples = input, target, samples
        self.output: Any = None
        self.loss: Any = None
        self.number: Any = None  # the loss, read: a plain number on the CPU
        self.grads: Any = None


class Loop(Levels):
    """What a Learner does between its events, and what it knows meanwhile."""

    model: Any
    state: Any
    device: torch.device | None
    metrics: Metrics
    callbacks: list[Any]
    training_step: Any
    validation_step: Any
    predicted: Any

    def __init__(self) -> None:
        super().__init__()
        self.step, self.stats, self.training = Step(), dict[str, float](), False
        self.epoch_index = self.epoch_count = self.batch_index = self.step_index = 0
        self.batch_count: int | None = None
        self.step_count: int | None = None
        self.nonfinite: str | None = None
        self._sources: tuple[Source | None, Source | None] = (None, None)
        self._extra: list[Any] = []  # the callbacks of this fit only
        self._at, self._row, self._done = Position(), dict[str, Any](), True
        self._opened: dict[str, Any] | None = None  # the random state with which the data of this phase was begun
        self._saved: dict[str, Any] | None = None  # what was loaded and is still to be gone on with
        self._predicted = False

    @property
    def fitting(self) -> bool:
        """Whether a fit is running; it is not in `validate`."""
        return "fit" in self._levels

    def running(self) -> dict[str, float]:
        """The numbers of the present phase so far. Reads them from the device, so call it seldom; `metrics.peek()`
        keeps them unread, for `metrics.read` at a later time."""
        return self.metrics.read(self.metrics.peek())

    def check(self) -> str | None:
        """Read from the device whether a loss was not finite: `nonfinite`. On the CPU that is known at once."""
        if self.device is None or not reads_at_once(torch.empty(0, device=self.device)):
            try:
                check(self.state)
            except FloatingPointError as error:
                if not str(error).startswith(_LOSS):
                    raise
                self.nonfinite = str(error)
        return self.nonfinite

    def _epochs(self) -> None:
        if self._at.phase == "start" and self._saved:
            saved, self._saved = self._saved["random"], None
            resume.set_random_state(saved)
            resume.set_data_state(self._sources, saved["data"])
        for epoch in range(self._at.epoch, self.epoch_count):
            self.epoch_index = epoch
            self._level("epoch", self._epoch, close=self._record)

    def _epoch(self) -> None:
        train, valid = self._sources
        saved, self._saved = self._saved, None
        assert train is not None
        self._row = dict(saved["row"]) if saved else {}
        if self._at.phase != "validation":
            batches = self._open(train, saved["opened"] if saved else None, self._at.batch)
            self.step_count, self._at.phase = train.total(self.epoch_count), "training"
            self._phase("training", train, batches, saved)
            saved = None
        if valid is not None:
            self._phase("validation", valid, self._open(valid, saved["random"] if saved else None))

    def _open(self, source: Source, saved: dict[str, Any] | None, skip: int = 0) -> Iterator[Any]:
        """Begin an epoch of the data, where a run is resumed with the random numbers with which that run began it."""
        if saved:
            resume.set_random_state(saved)
        self._opened = resume.random_state(())
        source.make(self.epoch_index)
        if saved:
            resume.set_data_state(self._sources, saved["data"])
        self._opened["data"] = resume.data_state(self._sources)
        return source.batches(skip)

    def _phase(self, name: str, source: Source, batches: Iterator[Any], saved: dict[str, Any] | None = None) -> None:
        self.training, self.nonfinite, self.stats = name == "training", None, {}
        self.batch_count, self.batch_index = source.length(), 0
        self.metrics.reset()
        if saved:
            self.metrics.load_state_dict(saved["metrics"], self.device)
            self.batch_index = self._at.batch
        try:
            self._level(name, self._train if self.training else self._validate, batches, saved, close=self._score)
        finally:
            self.training = False

    def _train(self, batches: Iterator[Any], saved: dict[str, Any] | None) -> None:
        training_mode(self.model, self.state)
        if saved:
            resume.set_random_state(saved["random"])
        for index, batch in enumerate(batches, self._at.batch):
            self.batch_index, self.step_index, self._done = index, self._at.step, False
            self._turn(batch, self._train_batch, self._finish)

    def _validate(self, batches: Iterator[Any], saved: None) -> None:
        with evaluation_mode(self.model), torch.no_grad():
            for index, batch in enumerate(batches):
                self.batch_index = index
                self._turn(batch, self._validate_batch, None)

    def _turn(self, batch: Any, body: Any, close: Any) -> None:
        """One batch. Nothing of it is left afterwards."""
        input, target = split(place(batch, self.device))
        self.step = Step(input, target, samples_of(target, input))
        try:
            self._level("batch", body, close=close)
        finally:
            self.step = Step()

    def _train_batch(self) -> None:
        step = self.step
        fit, args = fit_of(self.state, self.model), (step.input, step.target)
        who = trained(self.state, fit)
        value, step.grads = differentiate(self.training_step, self.model, args, fit.walked, fit.params, who, exact=True)
        step.loss, step.output = value if isinstance(value, tuple) else (value, None)
        step.number = number(step.loss)
        if not reads_at_once(step.loss):
            guard_of(self.state).note(step.loss.isfinite(), _LOSS)
        elif not math.isfinite(step.number):
            if self.nonfinite is None:
                where = f"batch {self.batch_index} of epoch {self.epoch_index}"
                self.nonfinite = f"{_LOSS} of {where} is {step.number}; that batch updated nothing"
            self.metrics.update(step)
            return
        self._fire("update_start")
        update(self.state, self.model, step.grads)
        self.metrics.update(step)

    def _validate_batch(self) -> None:
        step, self._predicted = self.step, False
        value = self.validation_step(self.model, step.input, step.target)
        step.loss, step.output = value if isinstance(value, tuple) else (value, step.output)
        step.number = number(step.loss)
        if not self._predicted:
            self.predicted(step.output)
        self.metrics.update(step)

    def _finish(self, cancel: Cancel | None) -> None:
        """A training batch is done or cancelled; the next one comes."""
        self._at.batch, self._at.step = self.batch_index + 1, self._at.step + 1
        self._done = True

    def _score(self, cancel: Cancel | None) -> None:
        """A phase is over: its numbers are final."""
        self.stats = self.running()
        if "epoch" not in self._levels or self._at.phase != self._levels[-1]:
            return  # a call of `validate`
        self._row["train" if self.training else "validation"] = self.stats
        if self.training:
            if cancel is None or cancel.level == "training":
                self._at.phase, self._opened = "validation", None
            if self.check() and not any(getattr(c, "stops_on_nonfinite", False) for c in self.callbacks + self._extra):
                warnings.warn(f"{self.nonfinite}; the fit goes on, the callback StopOnNaN would end it", stacklevel=2)

    def _record(self, cancel: Cancel | None) -> None:
        """An epoch is over: it goes into the history."""
        self.history.append({"epoch": self.epoch_index, "train": {}, "validation": {}} | self._row)
        if cancel is None or cancel.level == "epoch":
            self._at, self._opened = Position(self.epoch_index + 1, step=self._at.step), None

"""The Learner: epochs of training and validation, whose every turn callbacks can see and change."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..pytree import Frame
from ..state import Leaf, State, fit_of, setup
from ..train import place
from . import events, resume
from .callbacks import defaults
from .data import Source, call, evaluation_mode, kind, move, split
from .events import EVENTS, History
from .loop import Loop
from .measured import Metrics
from .resume import Position


class Learner(Loop):
    """Trains a model: `Learner(model, loss, rule_or_state, metrics=["accuracy"]).fit(train, valid, epochs=12)`.

    `loss(output, target)` gives the mean loss of a batch. A batch is `(input, target)`, or a dict with a `target`,
    `label` or `y`. For anything else override `training_step`. `device` is where the model and the batches go; by
    default where the model is. `callbacks` are run in their order, after the default ones: any callable
    `(learner, event)`, or a `Callback`. `metrics` are names, functions `(output, target) -> number` or objects as those
    of torchmetrics, in a list or a dict by name; the loss is always among them.

    For callbacks to read: `model`, `state` (the one tree), `step`, `epoch_index`, `batch_index` (from 0),
    `epoch_count`, `batch_count` (of this phase; None where the data has no length), `step_index` and `step_count`
    (training batches of the whole fit: those before the present one, and all, if known), `training`, `stats` (the
    numbers of a phase by name, final at its end event), `history`, `fitting`, `nonfinite` (what was not finite in this
    phase, or None), `error` (while an exception passes through), `metrics`, `callbacks`.

    >>> from fluxpy.learner import Learner
    >>> data = DataLoader((torch.randn(64, 2), torch.randn(64, 1)), batch_size=16)
    >>> learner = Learner(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, Adam(0.1), default_callbacks=False)
    >>> history = learner.fit(data, epochs=2)
    >>> len(history), sorted(history[0]["train"])
    (2, ['loss'])
    """

    def __init__(
        self,
        model: Any,
        loss: Callable[[Any, Any], Tensor],
        rule_or_state: Any,
        *,
        metrics: Any = (),
        callbacks: Iterable[Any] = (),
        device: torch.device | str | None = None,
        default_callbacks: bool = True,
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"the loss is a function (output, target) -> number, but got {type(loss).__name__}")
        held = isinstance(rule_or_state, State | Leaf)
        if device is not None:
            move(model, torch.device(device), held)
        self.model, self.loss = model, loss
        self.state = rule_or_state if held else setup(rule_or_state, model)
        devices = {x.device for x in fit_of(self.state, model).params}
        self.device = devices.pop() if len(devices) == 1 else None
        self.metrics = Metrics(metrics)
        self.callbacks = (defaults() if default_callbacks else []) + events.check(callbacks)

    # --- What users call ----------------------------------------------------------------------------------------------

    def fit(self, train: Any, valid: Any = None, *, epochs: int = 1, callbacks: Iterable[Any] = ()) -> History:
        """Train for some epochs, and after each look at the validation data. Returns the history.

        Data is an iterable of batches; or a list of such, one for each epoch; or a callable that gives one for an epoch
        (`make()` or `make(epoch)`). `callbacks` are for this fit only. After `load_state_dict`, or where a
        `Checkpoint` has saved a run, it goes on from there, up to `epochs` in all; otherwise it begins with epoch 0 and
        a new history.
        """
        if self._levels:
            raise RuntimeError("fit is running; a callback cannot start another one")
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"epochs={epochs!r} is not allowed; it must be a whole number above 0")
        extra = events.check(callbacks)
        resume.find(self, extra)
        source = Source(train, "the training data")
        sources = source, None if valid is None else Source(valid, "the validation data")
        at = Position(**self._saved["position"]) if self._saved else Position()
        for each in filter(None, sources):
            each.need(epochs, epochs - at.epoch)
        if self._saved:
            resume.restore_callbacks(extra, self._saved["callbacks"][len(self.callbacks) :])
        else:
            self.history = History()
        self.history.stop_reason = None
        self._at, self._sources, self._extra, self._row, self._opened = at, sources, extra, {}, None
        self.epoch_count, self.epoch_index = epochs, min(at.epoch, epochs - 1)
        self.batch_index, self.batch_count, self.stats = 0, source.length(self.epoch_index), {}
        self.step_index, self.step_count = at.step, source.total(epochs)
        self._listen([*self.callbacks, *extra])
        try:
            self._level("fit", self._epochs)
        finally:
            self._saved, self._extra = None, []
        return self.history

    def validate(self, data: Any) -> dict[str, float]:
        """The metrics on some data, by name. Fires the events of a validation phase."""
        if any(name not in ("fit", "epoch") for name in self._levels):
            raise RuntimeError(f"validate cannot run within the {self._levels[-1]} of a fit; call it at epoch_end")
        source = Source(data, "the validation data")
        source.make(0)
        if not self._levels:
            self._listen(self.callbacks)
        self._phase("validation", source, source.batches())
        return self.stats

    def predict(self, data: Any) -> Any:
        """The outputs for all of the data, on the CPU, in its order: of each batch only the input is used.

        Outputs that are tensors, or containers of tensors, are joined along their rows; others come as a list. No
        events are fired.
        """
        source = Source(data, "the data")
        source.make(0)
        outputs: list[Any] = []
        with evaluation_mode(self.model), torch.no_grad():
            for batch in source.batches():
                input, _ = split(place(batch, self.device))
                tensors, frame = Frame.split(call(self.model, input))
                outputs.append(([t.cpu() for t in tensors], frame))
        columns, alike = list(zip(*(tensors for tensors, _ in outputs), strict=False)), outputs[0][1]
        if all(frame == alike for _, frame in outputs) and all(t.ndim for column in columns for t in column):
            return alike.join(torch.cat(column) for column in columns)
        return [frame.join(tensors) for tensors, frame in outputs]

    def training_step(self, model: Any, input: Any, target: Any) -> Any:
        """The loss of a batch, or `(loss, output)`, which metrics need. Override it for what is not (input, target).

        `input` is the whole batch and `target` None where they cannot be told apart. Call `self.predicted(output)`
        between the output and the loss for the event `inference_prediction_end` to come at its place. Validation runs
        it too, without gradients, unless `validation_step` is overridden.

        >>> class Autoencoder(Learner):
        ...     def training_step(self, model, input, target):
        ...         return self.loss(model(input), input)
        """
        if target is None:
            raise ValueError(
                f"cannot tell input and target of a batch that is {kind(input)}; a batch is (input, target), or a dict "
                "with a 'target', 'label' or 'y'; for others override training_step(self, model, input, target)"
            )
        output = self.predicted(call(model, input))
        return self.loss(output, self.step.target), output

    def validation_step(self, model: Any, input: Any, target: Any) -> Any:
        """As `training_step`, for validation."""
        return self.training_step(model, input, target)

    def predicted(self, output: Any) -> Any:
        """Say, in a step, that the output is there. Gives it back, as callbacks may have changed it."""
        self.step.output = output
        if not self.training:
            self._predicted = True
            self._fire("inference_prediction_end")
        return self.step.output

    def explain(self, callbacks: Iterable[Any] = ()) -> str:
        """Which callbacks act at which event, in their order, as text."""
        chosen = events.in_order([*self.callbacks, *(events.check(callbacks) or self._extra)])
        lines = []
        for event in EVENTS:
            acting = [events.name_of(c) for c in chosen if events.listening(c, event) is not None]
            lines.append(f"{event:<26}{', '.join(acting) or '-'}")
        return "\n".join(lines)

    # --- Saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that exact resume needs, also in the middle of an epoch, as plain data for `torch.save` or `fluxpy.save`.

        Take it at any event but those of a training batch that is not done: `batch_end` is the first at which it is.
        Callbacks are saved as they are; those that come later in the list have not yet seen the present event.
        """
        return resume.save(self)

    def load_state_dict(self, d: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; the next `fit`, with the same data, goes on from there, bit for bit.

        ValueError where metrics, model or state do not fit; then nothing was loaded.
        """
        resume.load(self, d)

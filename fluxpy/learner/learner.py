"""The Learner: epochs of training and validation, whose every turn callbacks can see and change."""

import copy
import html
import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_any

from .. import averaged, setup, summary, trainables
from . import core, events, resume
from .callbacks.progress_bar import ProgressBar
from .collection import Metrics, on_host
from .data import Source, call, evaluation_mode, is_by_sample, kind, move, split
from .events import EVENTS, History
from .loop import LOSS, Loop
from .metrics import Accuracy
from .progress import Progress, Step
from .ranks import Ranks, ranks_of
from .window import option


class Learner:
    """Trains a model: `Learner(model, loss, rule_or_state, metrics=["accuracy"]).fit(train, valid, epochs=12)`.

    `loss(output, target)` gives the mean loss of a batch. A batch is `(input, target)`, or a dict with a `target`,
    `label` or `y`. For anything else override `training_step`; `loss` may be None then. A loss with parameters of its
    own must be a part of the model. `device` is where the model and
    the batches go; by default where the model is. `callbacks` are run in their order, after the default ones: any
    callable `(learner, event)`, or a `Callback`. `metrics` are names, functions `(output, target) -> number` or
    objects as those of torchmetrics, in a list or a dict by name; the loss is always among them.

    `autocast=torch.bfloat16` runs steps and predictions under `torch.autocast`. `accumulate=n` updates once every n
    batches (`update_start` comes with those updates), by the mean over their samples, as one batch of them all would:
    over the targets that are not ignored where these are classes; `step.weight` says otherwise. So does the last window
    of an epoch, which may have fewer batches.

    Where the rule has weights to evaluate with (`Averaged`), validation and `predict` run with these.

    What callbacks may read stands in `__init__` below; what they may change is said in `Step`.

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
        loss: Callable[[Any, Any], Tensor] | None,
        rule_or_state: core.Rules | core.State | core.Leaf,
        *,
        metrics: Any = (),
        callbacks: Iterable[Any] = (),
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        accumulate: int = 1,
        default_callbacks: bool = True,
    ) -> None:
        self.metrics = Metrics(metrics, loss)
        _check(self, (model, loss, rule_or_state), autocast, accumulate)
        has_state = isinstance(rule_or_state, core.State | core.Leaf)
        if device is not None:
            move(model, torch.device(device), has_state)
        self.model, self.loss, self.autocast, self.accumulate = model, cast(Any, loss), autocast, accumulate
        self.state: Any = rule_or_state if has_state else setup(rule_or_state, model)  # the one tree
        params = core.bind(self.state, model).params
        core.require_parts_of_model(loss, params)
        self.device = params[0].device if len({x.device for x in params}) == 1 else None  # where batches go
        self.callbacks = [*([ProgressBar()] if default_callbacks else []), *events.checked(callbacks)]
        self.ranks = ranks_of(self.state, model)  # the processes that run it
        # Of the fit:
        self.history = History()
        self.progress = Progress()  # what comes next, and whether the fit was resumed or is being cancelled
        self.has_validation = False  # whether there is validation data
        self.epoch_index = self.epoch_count = 0
        self.step_index = 0  # training batches before the present one
        self.step_count: int | None = None  # training batches in all, if known
        # Of the phase:
        self.phase: str | None = None  # "train" or "validation"; None in a call of `validate`
        self.training = False
        self.batch_index = 0
        self.batch_count: int | None = None  # if known
        self.stats: dict[str, float] = {}  # the metrics by name, final at its end event
        self.seconds = 0.0  # that it took, at its end event
        self.nonfinite: str | None = None  # what was not finite
        # Of the batch:
        self.step = Step()
        self._loop = Loop()  # of the last fit, or of one that was loaded

    @property
    def fitting(self) -> bool:
        """Whether a fit is running; it is not in `validate`."""
        return "fit" in self._loop.dispatcher.levels

    @property
    def error(self) -> BaseException | None:
        """The exception that passes through, while one does."""
        return self._loop.dispatcher.error

    # --- What users call ----------------------------------------------------------------------------------------------

    def fit(self, train: Any, valid: Any = None, *, epochs: int = 1, callbacks: Iterable[Any] = ()) -> History:
        """Train for some epochs, and after each look at the validation data. Returns the history.

        Data is an iterable of batches; or a list of such, one for each epoch; or a callable that gives one for an epoch
        (`make()` or `make(epoch)`). `callbacks` are for this fit only. After `load_state_dict`, or where a
        `Checkpoint` has saved a run, it goes on from there, up to `epochs` in all; otherwise it begins with epoch 0 and
        a new history.
        """
        if self._loop.dispatcher.levels:
            raise RuntimeError("fit is running; a callback cannot start another one")
        events.require_whole("epochs", epochs)
        extra = events.checked(callbacks, self.callbacks)
        try:
            with self._meet(trains=True):
                self._fit(train, valid, epochs, extra)
        except Exception as error:
            core.leave_to_the_user(error)
            raise
        return self.history

    def _fit(self, train: Any, valid: Any, epochs: int, extra: list[Any]) -> None:
        training = Source(train, "the training data")
        validation = None if valid is None else Source(valid, "the validation data")
        saved = self._find_saved(extra)
        progress = Progress() if saved is None else Progress(**saved["position"], resumed=True)
        for source in filter(None, (training, validation)):
            source.need(epochs, epochs - progress.epoch)
        self.history = History() if saved is None else resume.history_of(saved)
        if saved is not None:
            resume.compare(saved, epochs, validation is not None, self.ranks.warn)
            resume.load_callbacks([*self.callbacks, *extra], saved["callbacks"])
        self.history.stop_reason = None
        self.progress, self.has_validation = progress, validation is not None
        self.epoch_count, self.epoch_index = epochs, min(progress.epoch, epochs - 1)
        self._loop = Loop(training, validation, extra, saved)
        self._require_same_fit(extra)
        self.batch_index, self.stats = 0, {}
        self.batch_count = self.ranks.length("the length of the data", training.length(self.epoch_index))
        self.step_index, self.step_count = progress.step, self.ranks.length("the length of fit", training.total(epochs))
        with self._loop.of(self):
            self._loop.fit()

    def _find_saved(self, callbacks: list[Any]) -> dict[str, Any] | None:
        """The run to go on with: that loaded before, or one that a callback has."""
        for callback in (*self.callbacks, *callbacks):
            if self._loop.saved is not None or not isinstance(callback, events.Callback):
                continue
            if (saved := callback.saved_run()) is not None:
                try:
                    self.load_state_dict(saved)
                except ValueError as error:
                    directory = getattr(callback, "directory", None)
                    where = "" if directory is None else f" in {str(directory)!r}"
                    error.add_note(
                        f"the run that {events.name_of(callback)} saved{where} is of another model, rule or script: "
                        "give this one its own directory, or begin anew with resume=False"
                    )
                    raise
        return self._loop.saved

    def _require_same_fit(self, callbacks: list[Any]) -> None:
        """ValueError where the processes of a fit would do other things."""
        self.metrics.require_several(self.ranks.size)
        self.ranks.require_same(
            "fit",
            {
                "the list of callbacks": [events.name_of(callback) for callback in (*self.callbacks, *callbacks)],
                "the list of metrics": self.metrics.names,
                "whether there is validation data": self.has_validation,
                "epochs": self.epoch_count,
                "accumulate": self.accumulate,
                "where it begins": self.progress.position() if self.progress.resumed else "a new run",
            },
        )

    def _meet(self, *, trains: bool = False) -> Ranks:
        """The processes that run the model, looked up anew in each call but those within another."""
        if not self.ranks.calls:
            self.ranks = ranks_of(self.state, self.model, trains=trains)
        return self.ranks

    def validate(self, data: Any) -> dict[str, float]:
        """The metrics on some data, by name. Fires the events of a validation phase. On several processes all have to
        call it, each with its own part of the data, and get the numbers of all."""
        ranks = self._meet()
        self.metrics.require_several(ranks.size)
        inside = [level for level in self._loop.dispatcher.levels if level not in ("fit", "epoch")]
        if inside:
            raise RuntimeError(f"validate cannot run within the {inside[-1]} of a fit; call it at epoch_end")
        source = Source(data, "the validation data")
        with self._loop.of(self), ranks:
            source.make(0)
            self._loop.validation(source, source.batches(), None)
        return self.stats

    def predict(self, data: Any) -> Any:
        """The outputs for all of the data, on the CPU, in its order: of each batch only the input is used.

        Outputs that are tensors, or containers of tensors, are joined along their rows; where they do not fit together,
        or hold other things that differ, they come as a list with one for each batch. No events are fired. On several
        processes all have to call it, and each has the outputs of its own data.
        """
        ranks = self._meet()
        source = Source(data, "the data")
        outputs: list[list[Tensor]] = []
        others, joins = list[Any](), True
        with ranks, evaluation_mode(self.model), averaged(self.state, self.model), torch.no_grad(), self.casting():
            source.make(0)
            for batch, counts in ranks.together(source, source.batches(), trains=False):
                input, _ = split(core.place(batch, self.device))
                tensors, opened = core.open_data(output := call(self.model, input))
                joins = joins and not is_by_sample(output) and not tree_any(_is_packed, output, is_leaf=_is_packed)
                if counts:
                    outputs.append([t.cpu() for t in tensors])
                    others.append(opened)
        columns = list(zip(*outputs, strict=False))
        if joins and columns and all(map(others[0].is_like, others)) and all(map(_can_join, columns)):
            return others[0].combine(map(torch.cat, columns))
        return [opened.combine(tensors) for tensors, opened in zip(outputs, others, strict=True)]

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
        try:
            output = self.predicted(call(model, input))
            return self.loss(output, self.step.target), output
        except (TypeError, RuntimeError) as error:
            output, params = self.step.output, core.bind(self.state, self.model).params
            for note in core.why_it_failed(error, None, (output, target, input), params):
                error.add_note(note)
            raise

    def validation_step(self, model: Any, input: Any, target: Any) -> Any:
        """As `training_step`, for validation."""
        return self.training_step(model, input, target)

    def predicted(self, output: Any) -> Any:
        """Say, in a step, that the output is there. Gives it back, as callbacks may have changed it."""
        self.step.output = output
        if self._loop.dispatcher.levels and not self.training:
            self._loop.predicted = True
            self._loop.dispatcher.fire("inference_prediction_end")
        return self.step.output

    def casting(self) -> AbstractContextManager[Any]:
        """The autocast that was asked for, if one was."""
        if self.autocast is None:
            return nullcontext()
        kind = self.device or core.bind(self.state, self.model).params[0].device
        return torch.autocast(kind.type, self.autocast)

    def running(self) -> dict[str, float]:
        """The numbers of the present phase so far. Reads them from the device, so call it seldom; `metrics.peek()`
        keeps them unread, for `metrics.read` at a later time. On several processes they are those of all, and all have
        to ask alike; `metrics.here()` has those of this one."""
        if self.ranks.apart:  # an error passes, and the others may not listen
            return self.metrics.here()
        return self.metrics.read(self.metrics.total(self.ranks.gather("running()", on_host(self.metrics.peek()))))

    def check_finite(self) -> str | None:
        """Read from the device whether a loss was not finite: `nonfinite`. On the CPU that is known at once."""
        try:
            core.check_finite(self.state)
        except FloatingPointError as error:
            if not str(error).startswith(LOSS):
                raise
            self.nonfinite = str(error)
        return self.nonfinite

    def _repr_html_(self) -> str:
        about = [
            ("model", type(self.model).__name__),
            ("loss", events.name_of(self.loss)),
            ("metrics", ", ".join(self.metrics.names)),
            ("callbacks", ", ".join(map(events.name_of, self.callbacks)) or "none"),
            ("epochs done", self.progress.epoch),
        ]
        alone = isinstance(self.state, core.Leaf)
        state = f"<pre>{html.escape(summary(self.state))}</pre>" if alone else core.tree_as_html(self.state)
        past = events.history_as_html(self.history) if self.history else ""
        return core.html_table(["Learner", ""], about) + state + past

    def explain(self, callbacks: Iterable[Any] = ()) -> str:
        """Which callbacks act at which event, in their order, as text."""
        chosen = [*self.callbacks, *(events.checked(callbacks) or self._loop.callbacks)]
        acting = {e: [events.name_of(callback) for callback, _ in events.listeners(chosen, e)] for e in EVENTS}
        return "\n".join(f"{event:<26}{', '.join(names) or '-'}" for event, names in acting.items())

    # --- Saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that exact resume needs, also in the middle of an epoch, as plain data for `torch.save` or `fluxpy.save`.

        Take it at any event but those of a batch that is not done: `batch_end` is the first at which it is.
        Callbacks are saved as they are; those that come later in the list have not yet seen the present event.

        On several processes all have to take it alike, and callbacks are those of the first. Parameters that are spread
        over them are put together in what the first gets, and are left out of what the others get.
        """
        if self._meet().apart:
            raise RuntimeError("state_dict needs all processes, and cannot be taken while an error passes")
        within = self.phase is not None and "batch" in self._loop.dispatcher.levels
        if within and self.progress.batch <= self.batch_index:
            raise RuntimeError("state_dict cannot be taken within a batch; take it at batch_end")
        return resume.save(self, self._loop)

    def load_state_dict(self, d: dict[str, Any], *, hyperparameters: Literal["load", "keep"] | None = None) -> None:
        """Take over what `state_dict` gave; the next `fit`, with the same data, goes on from there, bit for bit.

        Rates and other hyperparameters are those that were saved; where this script has set up others, a warning says
        so. `hyperparameters="keep"` leaves those of this script (`d["hyperparameters"]` says it too, for a callback's
        `saved_run`). ValueError where metrics, model or state do not fit; then nothing was loaded.
        """
        if self._loop.dispatcher.levels:
            raise RuntimeError("load_state_dict cannot be called while a fit is running")
        self._meet()
        self._loop = Loop(saved=resume.load(self, d, hyperparameters, self._loop))

    def trial(self) -> "Learner":
        """A Learner to try things with: the same loss and steps, its own copy of model and state, neither callbacks nor
        metrics."""
        if ranks_of(self.state, self.model).spread:
            raise ValueError(
                "lr_find trains a copy of the model, and parameters that are spread over processes cannot be copied: "
                "find the rate with the model under DistributedDataParallel, or with a small one on one process"
            )
        other = copy.copy(self)
        copies: dict[int, Any] = {}
        other.model, other.state = copy.deepcopy((self.model, self.state), copies)
        if isinstance(getattr(self.loss, "__self__", self.loss), nn.Module):  # it may be a part of the model
            other.loss = copy.deepcopy(self.loss, copies)
        other.callbacks, other.metrics, other._loop = [], Metrics(), Loop()
        return other


def _is_packed(x: Any) -> bool:
    return isinstance(x, PackedSequence)


def _can_join(tensors: tuple[Tensor, ...]) -> bool:
    """Whether tensors have rows, alike ones."""
    first = tensors[0]
    return first.ndim > 0 and all(t.shape[1:] == first.shape[1:] and t.dtype == first.dtype for t in tensors)


def _check(learner: Learner, given: tuple[Any, Any, Any], autocast: Any, accumulate: Any) -> None:
    if autocast not in (None, torch.bfloat16):
        hint = "" if autocast != torch.float16 else ": float16 needs its loss scaled, or small gradients are lost"
        raise ValueError(f"autocast={autocast!r} is not allowed{hint}; it is torch.bfloat16 or None")
    events.require_whole("accumulate", accumulate)
    model, loss, _ = given
    own = type(learner).training_step is not Learner.training_step  # it needs no loss, or calls it in its own way
    rules = any(isinstance(x, core.Rule | core.State | core.Leaf | torch.optim.Optimizer) for x in (model, loss))
    modules = isinstance(model, nn.Module) and isinstance(loss, nn.Module)
    if rules or inspect.isroutine(model) or (modules and trainables(loss) and not trainables(model)):
        raise TypeError(
            "Learner(model, loss, rule) takes the model first, then loss(output, target), then a rule or a state, but "
            f"got {', '.join(map(events.name_of, given))}"
        )
    if isinstance(loss, type):
        raise TypeError(f"the loss is an object, not a class: write {loss.__name__}()")
    if not callable(loss) and not (own and loss is None):
        raise TypeError(f"the loss is a function (output, target) -> number, but got {type(loss).__name__}")
    if own:
        return
    if not core.takes(loss, None, None):
        raise TypeError(
            f"the loss is called as loss(output, target), as those of PyTorch are, but {loss!r} takes other arguments; "
            "loss(model, x, y) is for fluxpy.train, and what needs more is an overridden training_step"
        )
    if accumulate > 1 and option(loss, "reduction", "mean") == "sum":
        raise ValueError(f"accumulate={accumulate} needs a loss that is a mean, and this one has reduction='sum'")
    found = [metric.name for metric in learner.metrics.all if isinstance(metric, Accuracy)]
    if found and (isinstance(loss, nn.BCELoss) or loss is F.binary_cross_entropy):
        raise ValueError(
            f"{found[0]!r} takes scores, above 0 for yes, and this loss takes probabilities, which always are: take "
            "BCEWithLogitsLoss and no sigmoid, or a metric (output, target) -> number"
        )

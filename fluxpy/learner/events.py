"""What happens in a fit, and how to act on it: events, cancels, and the base class of callbacks.

    fit_start
      epoch_start
        training_start    (batch_start  update_start  batch_end)*                training_end
        validation_start  (batch_start  inference_prediction_end  batch_end)*    validation_end
      epoch_end
    fit_end

Every level that was entered fires its end event exactly once, whatever happens. An event reaches every callback; what
one of them cancels is cancelled after that.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, ClassVar, SupportsIndex, overload

from .core import html_table, near, takes

EVENTS = (
    "fit_start",
    "epoch_start",
    "training_start",
    "batch_start",
    "update_start",
    "inference_prediction_end",
    "batch_end",
    "training_end",
    "validation_start",
    "validation_end",
    "epoch_end",
    "fit_end",
)


class Event(str):
    """The event that a function gets: a string, but to compare it with a misspelt event is an error."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str) and other not in EVENTS and difflib.get_close_matches(other, EVENTS):
            raise ValueError(f"there is no event {other!r}; {near(other, EVENTS)}")
        return str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class Cancel(Exception):
    """Leave a level of the loop; raise one of the subclasses, from a callback or a step.

    Not an error: what surrounds the level goes on. Where the level is not running, it warns and does nothing. Of
    several cancels the one of the outermost level acts; of several of one level the first, whose reason is kept.
    """

    level: ClassVar[str] = ""
    agreed = False  # whether all processes of the run raise it

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class CancelBatch(Cancel):
    """Leave out the rest of this batch. Before `batch_end` that means that it is neither updated on nor scored."""

    level = "batch"


class CancelTraining(Cancel):
    """End the training phase of this epoch; validation comes next."""

    level = "training"


class CancelValidation(Cancel):
    """End the validation phase."""

    level = "validation"


class CancelEpoch(Cancel):
    """End this epoch; the next one comes."""

    level = "epoch"


class CancelFit(Cancel):
    """End the fit, which returns; `history.stop_reason` says why."""

    level = "fit"


CANCELS: dict[str, type[Cancel]] = {  # by level, the outermost first
    cls.level: cls for cls in (CancelFit, CancelEpoch, CancelTraining, CancelValidation, CancelBatch)
}


class Callback:
    """Base class of callbacks: a method `on_<event>(self, learner)` for each event that matters.

    What `state_dict` gives is saved with the Learner's and comes back by `load_state_dict`, before `fit_start`, so that
    a resumed run goes on as the old one would have: counters, best values, places in files.

    >>> class Every(Callback):
    ...     def on_epoch_end(self, learner):
    ...         print(learner.epoch_index, learner.stats)
    """

    acts_last: ClassVar[bool] = False  # at each event after all others: what saves has to see what they did
    cancels: ClassVar[bool] = True  # whether it may raise a Cancel; False spares several processes to agree on none

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, method in vars(cls).items():
            if name in EVENTS and inspect.isfunction(method):
                raise TypeError(f"{cls.__name__}: write def on_{name}(self, learner), or nothing calls it")
            if name.startswith("on_") and name[3:] not in EVENTS:
                known = [f"on_{event}" for event in EVENTS]
                raise TypeError(f"{cls.__name__}.{name}: no such event; {near(name, known)} All: {', '.join(known)}")
            if name.startswith("on_") and inspect.isfunction(method) and not takes(method, None, None):
                raise TypeError(f"{cls.__name__}: write def {name}(self, learner)")

    def __call__(self, learner: Any, event: str) -> None:
        """Run `on_<event>(learner)`, if there is one."""
        method = getattr(self, f"on_{event}", None)
        if method is not None:
            method(learner)

    def state_dict(self) -> dict[str, Any]:
        """What this callback needs to go on: plain data (numbers, strings, tensors, lists and dicts of them)."""
        return {}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""

    def saved_run(self) -> dict[str, Any] | None:
        """What a Learner's `state_dict` gave, for a fit to go on with. Asked for before `fit_start`."""
        return None


def listeners(callbacks: Iterable[Any], event: str) -> Iterator[tuple[Any, Callable[[Any], Any]]]:
    """The callbacks that do something at an event, in the order in which they act, each with what to call then."""
    name = Event(event)
    for callback in sorted(callbacks, key=lambda c: isinstance(c, Callback) and c.acts_last):
        if not isinstance(callback, Callback) or type(callback).__call__ is not Callback.__call__:
            yield callback, lambda learner, act=callback: act(learner, name)
        elif (method := getattr(callback, f"on_{event}", None)) is not None:
            yield callback, method


def name_of(callback: Any) -> str:
    """A callback's name in messages."""
    return getattr(callback, "__name__", type(callback).__name__)


def checked(callbacks: Any, beside: Sequence[Any] = ()) -> list[Any]:
    """The callbacks as a list; TypeError for what cannot be one, ValueError for one of those beside them."""
    if callable(callbacks) or isinstance(callbacks, str) or not isinstance(callbacks, Iterable):
        some = "" if callbacks is None else name_of(callbacks)
        raise TypeError(f"callbacks= takes a list of callbacks: callbacks=[{some}]")
    found = list(callbacks)
    for callback in found:
        if isinstance(callback, type):
            raise TypeError(f"a callback is an object, not a class: write {callback.__name__}(...)")
        if not callable(callback):
            raise TypeError(f"a callback is a callable (learner, event) or a Callback, but got {callback!r}")
        if any(callback is other for other in beside):
            raise ValueError(
                f"the callback {name_of(callback)} would act twice: it is one of Learner(callbacks=...), which act in "
                "every fit; fit(callbacks=...) are others, for that fit alone"
            )
    return found


def require_whole(name: str, value: Any, least: int = 1) -> None:
    """ValueError for what is no whole number, or too small."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r} is not allowed; it must be a whole number, {least} or more")


def require_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """ValueError for another value."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed; it must be {' or '.join(map(repr, allowed))}")


class History(list[dict[str, Any]]):
    """A dict for each epoch: `{"epoch": 0, "train": {"loss": ...}, "validation": {...}}`. By column too:
    `history["validation"]["loss"]` is a list with a number for each epoch, NaN where that has none.

    `seconds` says how long each epoch took. `stop_reason` says why the fit ended early; None where it ran to its end.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = (), seconds: Iterable[float] = ()) -> None:
        super().__init__(rows)
        self.seconds = list(seconds)
        self.stop_reason: str | None = None

    @overload
    def __getitem__(self, key: SupportsIndex, /) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: slice, /) -> list[dict[str, Any]]: ...
    @overload
    def __getitem__(self, key: str, /) -> Any: ...
    def __getitem__(self, key: Any, /) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        if key == "seconds":
            return list(self.seconds)
        if key == "epoch":
            return [row[key] for row in self]
        if key not in ("train", "validation"):
            raise KeyError(f"{key!r}: a history has 'epoch', 'seconds', 'train' and 'validation'")
        names = dict.fromkeys(name for row in self for name in row[key])
        return {name: [row[key].get(name, math.nan) for row in self] for name in names}

    def _repr_html_(self) -> str:
        return history_as_html(self)


def history_as_html(history: History) -> str:
    """A table with a row for each epoch, and a column for each metric of each phase."""
    columns = [(phase, name) for phase in ("train", "validation") for name in history[phase]]
    header = ["epoch", *(f"{phase} {name}" for phase, name in columns)]
    rows = [[row["epoch"], *(_cell(row[phase].get(name)) for phase, name in columns)] for row in history]
    return html_table(header, rows, "" if history.stop_reason is None else f"ended early: {history.stop_reason}")


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)

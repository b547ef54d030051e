"""Dispatcher: the one mechanism by which fit, epoch, phase and batch start, end, are cancelled and fail."""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .events import EVENTS, Cancel, acting_order, listener, name_of

if TYPE_CHECKING:
    from .learner import Learner


class Dispatcher:
    """Runs levels (fit, epoch, phase, batch), tells callbacks their events, and does what callbacks raise."""

    def __init__(self, learner: "Learner", callbacks: list[Any]) -> None:
        self.levels: list[str] = []  # those that run, outermost first
        self.error: BaseException | None = None  # while one passes through
        self.again = False  # whether start events come that a saved run had fired: it was not cancelled at them
        self._learner = learner
        # The listeners of each event are found once, so that an event without listeners costs nothing.
        self._ranks = learner.ranks
        self._agreed: set[str] = set()  # events after which several processes agree on a cancel
        self._listeners: dict[str, list[tuple[Callable[[Learner], Any], str]]] = {event: [] for event in EVENTS}
        for callback in acting_order(callbacks):
            for event, listeners in self._listeners.items():
                call = listener(callback, event)
                if call is not None:
                    listeners.append((call, name_of(callback)))
                    # What a class says holds for itself alone: one derived from it may cancel.
                    if not self._ranks.alone and vars(type(callback)).get("cancels", True):
                        self._agreed.add(event)

    def run(self, level: str, body: Callable[[], None], close: Callable[[bool], None] = lambda done: None) -> None:
        """The start event, the body, and, whatever happens, once the end event.

        `close(done)` comes before the end event. The level is not done where an error or the cancel of an outer level
        cut it short.
        """
        progress = self._learner.progress
        outcome: Cancel | None = None
        closed = False
        self.levels.append(level)
        try:
            try:
                self.fire(level + "_start")
                body()
            except Cancel as cancel:
                outcome = self._accepted(cancel, "raised in a step")
            close(outcome is None or outcome.level == level)
            closed = True
            try:
                self.fire(level + "_end")
            except Cancel as cancel:
                outcome = self._outer(outcome, cancel)
        except BaseException as error:
            self.error = error
            self._ranks.leave(level, error)
            if not closed:
                with contextlib.suppress(Exception):
                    close(False)
                self._tell(level + "_end", error)
            raise
        finally:
            self.levels.pop()
            if progress.cancelled == level:
                progress.cancelled = None
        if outcome is not None and outcome.level != level:
            raise outcome

    def fire(self, event: str) -> None:
        """Tell the listeners, in their order; then act on what they raised.

        An error passes through at once, but an end event still reaches the other listeners. Of several cancels the one
        of the outermost level acts, and of those of one level the first.
        """
        if self._listeners[event]:
            reason = self._learner.history.stop_reason
            error, cancel = self._tell(event, None)
            if event in self._agreed:
                cancel = self._agree(event, error, cancel, reason)
            if error is not None:
                raise error
            if cancel is not None:
                raise cancel

    def _agree(self, event: str, error: BaseException | None, own: Cancel | None, reason: str | None) -> Cancel | None:
        """The cancel of the outermost level that any process has. What another failed of is raised."""
        if own is not None and own.agreed:
            return own
        outcome = error or own
        try:
            if outcome is None or isinstance(outcome, Exception):
                self._ranks.numbers(event, outcome=outcome)
        except Cancel as cancel:
            if cancel is own:
                return own
            self._learner.history.stop_reason = reason
            return self._accepted(cancel, "on another process")
        return None

    def _tell(self, event: str, error: BaseException | None) -> tuple[BaseException | None, Cancel | None]:
        """Tell the listeners. After an error, what they raise is only noted on it."""
        outcome: Cancel | None = None
        for call, name in self._listeners[event]:
            try:
                call(self._learner)
            except Cancel as cancel:
                accepted = None if error is not None or self.again else self._accepted(cancel, f"by {name} at {event}")
                if accepted is not None:
                    outcome = self._outer(outcome, accepted)
            except BaseException as raised:
                where = f"in the callback {name} at the event {event!r}"
                if error is not None:
                    error.add_note(f"then, {where}: {raised!r}")
                    continue
                raised.add_note(where)
                if not event.endswith("_end"):
                    raise
                self.error = error = raised
        return error, outcome

    def _accepted(self, cancel: Cancel, where: str) -> Cancel | None:
        """The cancel, if its level runs; otherwise a warning."""
        if cancel.level not in self.levels:
            name = type(cancel).__name__
            self._ranks.warn(f"{name} {where}: no {cancel.level} is running, so it does nothing")
            return None
        learner = self._learner
        if cancel.level == "fit":
            cancel.reason = cancel.reason or f"CancelFit {where}"
            learner.history.stop_reason = learner.history.stop_reason or cancel.reason
        outermost = learner.progress.cancelled or cancel.level
        learner.progress.cancelled = min(outermost, cancel.level, key=self.levels.index)
        return cancel

    def _outer(self, first: Cancel | None, second: Cancel) -> Cancel:
        """The one of the outer level; of one level the first."""
        return min(first or second, second, key=lambda cancel: self.levels.index(cancel.level))

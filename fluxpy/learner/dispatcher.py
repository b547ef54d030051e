"""Dispatcher: the one mechanism by which fit, epoch, phase and batch start, end, are cancelled and fail."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from .events import EVENTS, Cancel, listeners, name_of


class Dispatcher:
    """Runs levels (fit, epoch, phase, batch), tells callbacks their events, and does what callbacks raise.

    Without a Learner, as between its calls, it does neither.
    """

    def __init__(self, learner: Any = None, callbacks: Sequence[Any] = ()) -> None:
        self.levels: list[str] = []  # those that run, outermost first
        self.error: BaseException | None = None  # while one passes through
        self.again = False  # whether start events come that a saved run had fired: it was not cancelled at them
        self._cancel: Cancel | None = None  # the one that acts: of the outermost level, and of one level the first
        self._learner = learner
        # The listeners of each event are found once, so that an event without listeners costs nothing.
        self._agreed: set[str] = set()  # events after which several processes agree on a cancel
        self._listeners: dict[str, list[tuple[Callable[[Any], Any], str]]] = {event: [] for event in EVENTS}
        for event in EVENTS:
            for callback, call in listeners(callbacks, event):
                self._listeners[event].append((call, name_of(callback)))
                # What a class says holds for itself alone: one derived from it may cancel.
                if not learner.ranks.alone and vars(type(callback)).get("cancels", True):
                    self._agreed.add(event)

    @contextmanager
    def level(self, level: str, close: Callable[[bool], None] = lambda done: None) -> Iterator[None]:
        """A level, whose body begins with its start event; after it, whatever happens, once the end event.

        `close(done)` comes before the end event. The level is not done where an error or the cancel of an outer level
        cut it short.
        """
        outer, self._cancel = self._cancel, None  # one that waits while a callback calls `validate`
        closed = False
        self.levels.append(level)
        try:
            try:
                yield
            except Cancel as cancel:
                self._accept(cancel, "raised in a step")
            close(self._cancel is None or self._cancel.level == level)
            closed = True
            self._announce(level + "_end")
        except BaseException as error:
            self.error = error
            self._learner.ranks.leave(level, error)
            if not closed:
                with suppress(Exception):
                    close(False)
                self._tell(level + "_end", error)
            raise
        finally:
            self.levels.pop()
            cancel, self._cancel = self._cancel, outer
            if self._learner.progress.cancelled == level:
                self._learner.progress.cancelled = None
        if cancel is not None and cancel.level != level:
            raise cancel

    def fire(self, event: str) -> None:
        """Tell the listeners, in their order; then act on what they raised.

        An error passes through at once, but an end event still reaches the other listeners. Of several cancels the one
        of the outermost level acts, and of those of one level the first.
        """
        before = self._cancel
        self._announce(event)
        if self._cancel is not None and self._cancel is not before:
            raise self._cancel

    def _announce(self, event: str) -> None:
        if self._listeners[event]:
            before, reason = self._cancel, self._learner.history.stop_reason
            error = self._tell(event, None)
            if event in self._agreed:
                self._agree(event, error, before, reason)
            if error is not None:
                raise error

    def _agree(self, event: str, error: BaseException | None, before: Cancel | None, reason: str | None) -> None:
        """Accept the cancel of the outermost level that any process has. What another failed of is raised."""
        own = None if self._cancel is before else self._cancel
        outcome = error or own
        if (own is not None and own.agreed) or not (outcome is None or isinstance(outcome, Exception)):
            return
        try:
            self._learner.ranks.numbers(event, outcome=outcome)
        except Cancel as cancel:
            if cancel is not own:
                self._cancel, self._learner.history.stop_reason = before, reason
                self._accept(cancel, "on another process")

    def _tell(self, event: str, error: BaseException | None) -> BaseException | None:
        """Tell the listeners. After an error, what they raise is only noted on it."""
        for call, name in self._listeners[event]:
            try:
                call(self._learner)
            except Cancel as cancel:
                if error is None and not self.again:
                    self._accept(cancel, f"by {name} at {event}")
            except BaseException as raised:
                where = f"in the callback {name} at the event {event!r}"
                if error is not None:
                    error.add_note(f"then, {where}: {raised!r}")
                    continue
                raised.add_note(where)
                if not event.endswith("_end"):
                    raise
                self.error = error = raised
        return error

    def _accept(self, cancel: Cancel, where: str) -> None:
        """Note a cancel, if its level runs; otherwise warn."""
        learner, depth = self._learner, self.levels.index
        if cancel.level not in self.levels:
            name = type(cancel).__name__
            learner.ranks.warn(f"{name} {where}: no {cancel.level} is running, so it does nothing")
            return
        if cancel.level == "fit":
            cancel.reason = cancel.reason or f"CancelFit {where}"
            learner.history.stop_reason = learner.history.stop_reason or cancel.reason
        if self._cancel is None or depth(cancel.level) < depth(self._cancel.level):
            self._cancel = cancel
        learner.progress.cancelled = min(learner.progress.cancelled or cancel.level, cancel.level, key=depth)

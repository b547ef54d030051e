"""Levels: the one mechanism by which fit, epoch, phase and batch start, end, are cancelled and fail."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

from .events import EVENTS, Cancel, CancelFit, History, in_order, listening, name_of


class Levels:
    """What a loop with events is made of."""

    def __init__(self) -> None:
        self.history = History()
        self.error: BaseException | None = None  # while one passes through
        self._levels: list[str] = []  # those that are running, outermost first
        self._cancelled = False  # a level that is running will end early
        self._listeners: dict[str, list[tuple[Any, Any]]] = {}

    def _listen(self, callbacks: list[Any]) -> None:
        """Work out once whom each event concerns, so that one that concerns nobody costs nothing."""
        self._listeners = {}
        for event in EVENTS:
            acting = [(call, c) for c in in_order(callbacks) if (call := listening(c, event)) is not None]
            if acting:
                self._listeners[event] = acting

    def _level(self, name: str, body: Callable[..., Any], *args: Any, close: Any = None) -> None:
        """The start event, what happens in between, and, whatever that is, once the end event.

        `close(cancel)` is run before the end event, with the cancel that ended the level, if one did.
        """
        self._levels.append(name)
        outcome, ended = None, False
        try:
            try:
                self._fire(name + "_start")
                body(*args)
            except Cancel as cancel:
                outcome = self._accept(cancel, "raised in a step") or _Over(name)
            if close is not None:
                close(outcome)
            ended = True
            try:
                self._fire(name + "_end")
            except Cancel as cancel:
                outcome = self._outer(outcome, cancel)
        except BaseException as error:
            self.error = error
            if not ended:
                if close is not None:
                    with contextlib.suppress(Exception):
                        close(_Over("fit"))
                self._fire(name + "_end", error)
            raise
        finally:
            self._levels.pop()
            if not self._levels:
                self.error, self._cancelled = None, False
        if outcome is not None and outcome.level != name:
            raise outcome
        self._cancelled = False

    def _fire(self, event: str, failed: BaseException | None = None) -> None:
        """Tell all whom it concerns; then raise the outermost of their cancels.

        An error passes through at once, but an end event still reaches the others. Where the level has `failed`
        already, what they raise is only noted.
        """
        outcome: Cancel | None = None
        first = failed
        for call, callback in self._listeners.get(event, ()):
            try:
                call(self)
            except Cancel as cancel:
                where = f"by {name_of(callback)} at {event}"
                if first is None and (accepted := self._accept(cancel, where)) is not None:
                    outcome = self._outer(outcome, accepted)
            except BaseException as error:
                where = f"in the callback {name_of(callback)} at the event {event!r}"
                if first is not None:
                    first.add_note(f"then, {where}: {error!r}")
                    continue
                error.add_note(where)
                if not event.endswith("_end"):
                    raise
                self.error = first = error
        if first is not None and failed is None:
            raise first
        if outcome is not None:
            raise outcome

    def _accept(self, cancel: Cancel, where: str) -> Cancel | None:
        """The cancel, if its level is running; otherwise a warning."""
        if cancel.level not in self._levels:
            warnings.warn(
                f"{type(cancel).__name__} {where}: no {cancel.level} is running, so it does nothing", stacklevel=2
            )
            return None
        if isinstance(cancel, CancelFit) and self.history.stop_reason is None:
            self.history.stop_reason = cancel.reason or f"CancelFit {where}"
        self._cancelled = True
        return cancel

    def _outer(self, a: Cancel | None, b: Cancel) -> Cancel:
        return b if a is None or self._levels.index(b.level) < self._levels.index(a.level) else a


class _Over(Cancel):
    """A level is over without having been gone through."""

    def __init__(self, level: str) -> None:
        super().__init__()
        self.level = level  # pyright: ignore[reportAttributeAccessIssue]

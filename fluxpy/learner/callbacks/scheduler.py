"""LearningRateScheduler: a learning rate that follows a schedule over the fit."""

from collections.abc import Callable
from operator import is_not
from typing import Any

from ...adjust import adjust, scale
from ...rule import hyperparameters, walk
from ...schedules import Schedule, scaled
from ...state import Leaf, leaves, select
from ..events import Callback


class LearningRateScheduler(Callback):
    """The learning rate of each update: `lr=schedule` for the rate itself, or `scale=schedule` for a factor on each
    leaf's own base rate, so that ratios between subtrees survive. Exactly one of the two.

    A schedule is any callable, count -> value; the count is `learner.step_index`, the training batches of this fit
    before the present one. `segments(...)` whose last part leaves out its steps fills up to the end of the fit, where
    the data tells how long that is.

    The base rate is what `setup` and `adjust` say; `adjust` during a fit sets it. At the end of the fit each leaf has
    it back, so that a second fit begins where the first did. `fluxpy.value(leaf, "lr")` tells the present rate.

    >>> from fluxpy.learner import Learner, LearningRateScheduler
    >>> from fluxpy.schedules import Segment, segments
    >>> warm = segments([Segment("linear", end=1.0, steps=2), Segment("linear", end=0.0)])
    >>> model = torch.nn.Linear(2, 1)
    >>> learner = Learner(model, torch.nn.functional.mse_loss, {"weight": Adam(0.1), "bias": Adam(0.3)},
    ...                   callbacks=[LearningRateScheduler(scale=warm)], default_callbacks=False)
    >>> def show(learner, event):
    ...     if event == "batch_end":
    ...         print([round(value(leaf, "lr"), 3) for _, leaf in leaves(learner.state)])
    >>> _ = learner.fit([(torch.ones(4, 2), torch.ones(4, 1))] * 4, callbacks=[show])
    [0.0, 0.0]
    [0.05, 0.15]
    [0.1, 0.3]
    [0.05, 0.15]
    """

    def __init__(self, *, lr: Callable[[int], Any] | None = None, scale: Callable[[int], Any] | None = None) -> None:
        if (lr is None) == (scale is None):
            raise TypeError("LearningRateScheduler takes either lr=schedule or scale=schedule")
        self.schedule, self.name = (scale, "scale") if lr is None else (lr, "lr")
        if not callable(self.schedule) or isinstance(self.schedule, type):
            came = f"{self.name}={self.schedule!r}"
            raise TypeError(f"a schedule is a callable, count -> value, as schedules.constant(0.1), but got {came}")
        self._learner: Any = None  # while a fit runs
        self._filled: Any = None  # the schedule with its total
        self._last: tuple[int, Any] = -1, None  # the present batch, and the schedule's value there
        self._leaves: list[Leaf] = []
        self._rules: list[Any] = []  # theirs, as they were made to follow

    def now(self) -> Any:
        """What the schedule gives at the present batch."""
        if self._last[0] != self._learner.step_index:
            self._last = self._learner.step_index, self._filled(self._learner.step_index)
        return self._last[1]

    def on_fit_start(self, learner: Any) -> None:
        if not any(_has_rate(leaf) for _, leaf in leaves(learner.state)):
            raise ValueError("LearningRateScheduler: no leaf has a rule with the hyperparameter 'lr'")
        self._learner = learner
        self._fill()
        self._follow()

    def on_training_start(self, learner: Any) -> None:
        if self._filled is self.schedule:  # a length that is known only now
            self._fill()
        self.now()  # an error of the schedule comes before the first batch

    def on_update_start(self, learner: Any) -> None:
        if any(map(is_not, [leaf._rule for leaf in self._leaves], self._rules)):
            self._follow()

    def on_fit_end(self, learner: Any) -> None:
        if self._learner is not None:
            self._adjust(_Restore())
        self._learner, self._leaves, self._rules = None, [], []

    def state_dict(self) -> dict[str, Any]:
        if self._learner is not None:  # what was adjusted since the last update is saved as a base
            self._follow()
        return {}

    def _fill(self) -> None:
        total, schedule = self._learner.step_count, self.schedule
        self._filled = schedule.with_total(total) if isinstance(schedule, Schedule) and total else schedule
        self._last = -1, None

    def _follow(self) -> None:
        """Have the rates of all leaves follow, those adjusted meanwhile from their new base."""
        self._adjust(_Follow(self))
        self._leaves = [leaf for _, leaf in leaves(self._learner.state)]
        self._rules = [leaf._rule for leaf in self._leaves]

    def _adjust(self, change: "scale") -> None:
        state: Any = self._learner.state
        view: Any = state if isinstance(state, Leaf) else select(state, lambda _, leaf: _has_rate(leaf))
        adjust(view, lr=change)


class _Rate(float):
    """A base rate that gives the scheduled one when it is called. Copied or saved it is the base alone."""

    by: LearningRateScheduler

    def __call__(self, count: int) -> Any:
        return float(self) * self.by.now() if self.by.name == "scale" else self.by.now()

    def __reduce__(self) -> Any:
        return float, (float(self),)


class _Follow(scale):
    """In `adjust`: the base rate made to follow, whatever was done to it. Equal ones are one object."""

    def __init__(self, by: LearningRateScheduler) -> None:
        self.by, self.made = by, dict[float, _Rate]()

    def of(self, value: Any) -> _Rate:
        base = _base(value)
        if base is None:
            raise ValueError(
                f"LearningRateScheduler: a leaf has lr={value!r} already; give it a number as its base rate, or leave "
                "the scheduler out"
            )
        rate = self.made.setdefault(base, _Rate(base))
        rate.by = self.by
        return rate


class _Restore(scale):
    """In `adjust`: the base rate alone."""

    def __init__(self) -> None:
        pass

    def of(self, value: Any) -> Any:
        base = _base(value)
        return value if base is None else base


def _base(value: Any) -> float | None:
    """The base rate below a scheduled one, also where `adjust` scaled that; None where there is none."""
    if isinstance(value, scaled):
        base = _base(value.schedule)
        return None if base is None else base * value.factor
    return float(value) if isinstance(value, int | float) else None


def _has_rate(leaf: Leaf) -> bool:
    return leaf.rule is not None and any("lr" in hyperparameters(rule) for rule in walk(leaf.rule))

"""LearningRateScheduler: a learning rate that follows a schedule over the fit."""

import functools
from collections.abc import Callable
from typing import Any

from ... import leaves
from ...schedules import Schedule, scaled
from ..core import Leaf, adjust_rates, rates
from ..events import Callback
from ..learner import Learner


class LearningRateScheduler(Callback):
    """The learning rate of each update: `lr=schedule` for the rate itself, or `scale=schedule` for a factor on each
    leaf's own base rate, so that ratios between subtrees survive. Exactly one of the two.

    A schedule is any callable, count -> value; the count is `learner.step_index`, the training batches of this fit
    before the present one. `segments(...)` whose last part leaves out its steps fills up to the end of the fit, where
    the data tells how long that is.

    In a chain with several rates that differ, as `OptimiserChain(RMSProp(1.0), Momentum(0.01))`, `member` says which
    follows: a rule class, or an index in the chain.

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

    cancels = False

    def __init__(
        self, *, lr: Callable[[int], Any] | None = None, scale: Callable[[int], Any] | None = None, member: Any = None
    ) -> None:
        if (lr is None) == (scale is None):
            raise TypeError("LearningRateScheduler takes either lr=schedule or scale=schedule")
        self.name, self.schedule = ("lr", lr) if scale is None else ("scale", scale)
        if not callable(self.schedule) or isinstance(self.schedule, type):
            came = f"{self.name}={self.schedule!r}"
            raise TypeError(f"a schedule is a callable, count -> value, as schedules.constant(0.1), but got {came}")
        self.member = member
        self._learner: Learner | None = None  # while a fit runs
        self._filled: Any = self.schedule  # with the length of the fit, once that is known; asked once a batch
        self._is_filled = False
        self._rules: list[tuple[Leaf, Any]] = []  # the rule of each leaf, as it was made to follow

    def __repr__(self) -> str:
        return f"LearningRateScheduler({self.name}={self.schedule!r})"

    def rate(self, base: float) -> Any:
        """The rate at the present batch of a leaf with this base rate; outside a fit the base rate."""
        if self._learner is None:
            return base
        now = self._filled(self._learner.step_index)
        return base * now if self.name == "scale" else now

    def on_fit_start(self, learner: Learner) -> None:
        found = {path: rates(leaf, self.member) for path, leaf in leaves(learner.state)}
        if not any(found.values()):
            what = "" if self.member is None else f" in its member {self.member!r}"
            raise ValueError(f"LearningRateScheduler: no leaf has a rule with the hyperparameter 'lr'{what}")
        if taken := [path for path, own in found.items() if any(isinstance(rate, ScheduledRate) for rate in own)]:
            raise ValueError(
                f"LearningRateScheduler: {taken[0]!r} follows another one already; put both schedules into one, as "
                "scale=lambda n: warm_up(n) * decay(n)"
            )
        self._fill(learner)
        self._follow(learner)
        self._learner = learner

    def on_training_start(self, learner: Learner) -> None:
        if not self._is_filled:  # by a length that is known only now
            self._fill(learner)
        self._filled(learner.step_index)  # an error of the schedule comes before the first batch

    def on_update_start(self, learner: Learner) -> None:
        if any(leaf.rule is not rule for leaf, rule in self._rules):
            self._follow(learner)

    def on_fit_end(self, learner: Learner) -> None:
        if self._learner is not None:
            adjust_rates(learner.state, lambda rate: rate if _base(rate) is None else _base(rate), self.member)
        self._learner, self._rules = None, []

    def state_dict(self) -> dict[str, Any]:
        if self._learner is not None:  # what was adjusted since the last update is saved as a base
            self._follow(self._learner)
        return {}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        self.state_dict()  # the rates were put back to their bases

    def _fill(self, learner: Learner) -> None:
        schedule: Any = self.schedule
        self._is_filled = False
        if isinstance(schedule, Schedule) and learner.step_count:
            schedule, self._is_filled = schedule.with_total(learner.step_count), True
        self._filled = functools.lru_cache(maxsize=1)(schedule)

    def _follow(self, learner: Learner) -> None:
        """Have the rates of all leaves follow, those adjusted meanwhile from their new base."""
        for path, leaf in leaves(learner.state):
            _check(path, leaf, self.member)
        of = functools.cache(lambda base: ScheduledRate(base, self))  # equal ones are the same object
        adjust_rates(learner.state, lambda rate: of(_base(rate)), self.member)
        self._rules = [(leaf, leaf.rule) for _, leaf in leaves(learner.state)]


class ScheduledRate(float):
    """A base rate in a rule that gives the scheduled rate when it is called.

    It equals a number as its base does, and another only under the same scheduler. Copied, pickled or saved it is the
    base alone.
    """

    scheduler: LearningRateScheduler

    def __new__(cls, base: float, scheduler: LearningRateScheduler) -> "ScheduledRate":
        rate = super().__new__(cls, base)
        rate.scheduler = scheduler
        return rate

    def __call__(self, count: int) -> Any:
        return self.scheduler.rate(float(self))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ScheduledRate) and other.scheduler is not self.scheduler:
            return False
        return float(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = float.__hash__

    def __repr__(self) -> str:
        return f"{float(self)!r} by {self.scheduler!r}"

    def __reduce__(self) -> Any:
        return float, (float(self),)


def _check(path: str, leaf: Leaf, member: Any) -> None:
    """ValueError where it cannot be told what the rate of this leaf follows from."""
    found = rates(leaf, member)
    if any(_base(rate) is None for rate in found):
        raise ValueError(f"LearningRateScheduler: {path!r} has lr={found[-1]!r} already, and needs a base rate")
    if any(rate != found[0] for rate in found):
        raise ValueError(
            f"LearningRateScheduler: {path!r} has several rates, {found}, whose product is its step; say which is to "
            "follow, by its class or its index in the chain: LearningRateScheduler(..., member=Momentum)"
        )


def _base(value: Any) -> float | None:
    """The base rate below a scheduled one, also where `adjust` scaled that; None where there is none."""
    if isinstance(value, scaled):
        base = _base(value.schedule)
        return None if base is None else base * value.factor
    return float(value) if isinstance(value, int | float) else None

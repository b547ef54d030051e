"""The indexing of every schedule, count by count, and what joins and segments do at their seams."""

import copy
import math
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxpy.schedules import (
    Schedule,
    Segment,
    constant,
    cosine,
    cosine_restarts,
    exponential,
    join,
    linear,
    one_cycle,
    polynomial,
    scaled,
    segments,
    shifted,
    step_decay,
    warmup_cosine,
)

HALF = math.sqrt(0.5)
TWO = [Segment("linear", end=1.0, steps=2), Segment("linear", end=0.0, steps=4)]
EXACT: list[tuple[Schedule, list[Any]]] = [  # a schedule and its values at 0, 1, 2, ...
    (constant(3), [3, 3]),
    (constant([0.9, 0.99]), [(0.9, 0.99)]),
    (linear(0.0, 1.0, 4), [0, 0.25, 0.5, 0.75, 1, 1, 1]),
    (linear(1.0, -1.0, 1), [1, -1, -1]),
    (cosine(1.0, 0.0, 4), [1, (1 + HALF) / 2, 0.5, (1 - HALF) / 2, 0, 0]),
    (polynomial(1.0, 0.0, 4), [1, 0.75, 0.5, 0.25, 0, 0]),
    (polynomial(5.0, 1.0, 2, power=2.0), [5, 2, 1, 1]),
    (exponential(8.0, 0.5), [8, 4, 2, 1]),
    (exponential(8.0, 0.25, 2), [8, 4, 2, 1]),
    (step_decay(8.0, 0.5, 2), [8, 8, 4, 4, 2, 2]),
    (warmup_cosine(2.0, 2, 6), [0, 1, 2, 1 + HALF, 1, 1 - HALF, 0, 0]),
    (warmup_cosine(2.0, 2, 4, end=1.0, start=1.0), [1, 1.5, 2, 1.5, 1, 1]),
    (warmup_cosine(2.0, 0, 2), [2, 1, 0, 0]),
    (
        one_cycle(50.0, 6, pct_start=1 / 3, final_div_factor=2),
        [2, 26, 50, 25.5 + 24.5 * HALF, 25.5, 25.5 - 24.5 * HALF, 1],
    ),
    (one_cycle(4.0, 2, pct_start=0, div_factor=2, final_div_factor=1), [4, 3, 2, 2]),
    (cosine_restarts(2.0, 0.0, 2), [2, 1, 2, 1, 2]),
    (cosine_restarts(8.0, 0.0, 2, grow=2, decay=0.5), [8, 4, 4, 2 + 2 * HALF, 2, 2 - 2 * HALF, 2]),
    (join([constant(7.0), linear(0.0, 1.0, 2), exponential(4.0, 0.5)], [2, 5]), [7, 7, 0, 0.5, 1, 4, 2]),
    (join([linear(0.0, 1.0, 2)], []), [0, 0.5, 1]),
    (shifted(linear(0.0, 1.0, 2), 3), [0, 0, 0, 0, 0.5, 1, 1]),
    (shifted(linear(0.0, 1.0, 2), -1), [0.5, 1]),
    (scaled(linear(0.0, 1.0, 2), 10), [0, 5, 10]),
    (scaled(constant((0.5, 0.25)), 0.5), [(0.25, 0.125)]),
    (segments(TWO), [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]),
    (segments([TWO[0], Segment("cosine", start=3.0, end=1.0)], total=4), [0, 0.5, 3, 2, 1, 1]),
    (segments([Segment(lambda t: 5 - t * t, start=2.0, end=6.0, steps=2)]), [2, 3, 6, 6]),
]


@pytest.mark.parametrize(
    ("schedule", "values"), EXACT, ids=[f"{type(s).__name__}-{i}" for i, (s, _) in enumerate(EXACT)]
)
def test_values(schedule: Schedule, values: list[Any]) -> None:
    assert [schedule(n) for n in range(len(values))] == [pytest.approx(v, abs=1e-12) for v in values]


@pytest.mark.parametrize("schedule", [s for s, _ in EXACT[:-1]], ids=lambda s: type(s).__name__)
def test_schedules_are_plain_data(schedule: Schedule) -> None:
    for same in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), eval(repr(schedule))):
        assert same == schedule and hash(same) == hash(schedule)
    assert schedule != constant(0.123)


def test_numpy_numbers_and_lists_become_plain() -> None:
    schedule = join([linear(np.float64(1.0), 0.0, np.int64(5)), constant(np.float32(0.5))], [np.int64(3)])
    assert type(constant(np.longdouble(0.5)).value) is float
    first = schedule.schedules[0]
    assert isinstance(first, linear) and type(first.start) is float and type(first.steps) is int
    assert schedule == join((linear(1.0, 0.0, 5), constant(0.5)), (3,)) and type(schedule.boundaries[0]) is int


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (
            cosine_restarts(0.1, 0.01, 5, grow=3),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 3, 0.01),
        ),
        (cosine(0.1, 0.01, 40), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40, 0.01)),
        (polynomial(0.1, 0.0, 40, 3.0), lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 40, 3.0)),
        (step_decay(0.1, 0.3, 7), lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.3)),
        (exponential(0.1, 0.9), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)),
    ],
    ids=["restarts", "cosine", "polynomial", "step", "exponential"],
)
def test_agrees_with_torch(schedule: Schedule, make: Any) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = make(optimizer)
    for n in range(40):
        assert schedule(n) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12), n
        optimizer.step()
        scheduler.step()


lengths = st.lists(st.integers(1, 20), min_size=1, max_size=6)
finite = st.floats(-1e3, 1e3)


@given(lengths=lengths, ends=st.lists(finite, min_size=6, max_size=6), start=finite, fill=st.booleans())
def test_segments_take_their_steps_and_share_none(
    lengths: list[int], ends: list[float], start: float, fill: bool
) -> None:
    steps = [*lengths[:-1], None if fill else lengths[-1]]
    starts = [start, *[None] * len(steps)]
    parts = [Segment("linear", end=e, steps=n, start=s) for e, n, s in zip(ends, steps, starts, strict=False)]
    schedule = segments(parts, total=sum(lengths) if fill else None)
    want: list[float] = []
    for n, (low, high) in zip(lengths, pairwise([start, *ends]), strict=False):
        want += [low + k / n * (high - low) for k in range(n)]
        assert schedule(len(want)) == high  # exactly: where a segment ends, the next begins
    assert [schedule(n) for n in range(len(want))] == [pytest.approx(v, abs=1e-9) for v in want]
    assert schedule(10 * len(want)) == ends[len(lengths) - 1]


@given(lengths=lengths)
def test_explicit_starts_mark_where_each_segment_begins(lengths: list[int]) -> None:
    parts = [Segment("cosine", start=10.0 * i, end=10.0 * i + 1, steps=n) for i, n in enumerate(lengths)]
    seen = [int(segments(parts)(n) // 10) for n in range(sum(lengths))]
    assert [seen.count(i) for i in range(len(lengths))] == lengths and seen == sorted(seen)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: scaled(s, 2.0)], ids=["bare", "scaled"])
def test_with_total_fills_the_last_segment(wrap: Any) -> None:
    parts = [TWO[0], Segment("linear", end=0.0)]
    schedule = wrap(segments(parts))
    for count in (0, 5):
        with pytest.raises(ValueError, match=r"the last segment has no steps.*total=10_000"):
            schedule(count)
    assert schedule.with_total(6) == wrap(segments(parts, total=6))
    assert schedule.with_total(6).with_total(9) == schedule.with_total(6)
    assert wrap(segments(TWO)).with_total(9) == wrap(segments(TWO))
    assert linear(0.0, 1.0, 2).with_total(9) == linear(0.0, 1.0, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(0.0, 1.0, 0), r"linear: steps=0 is not allowed; it must be a whole number above 0"),
        (lambda: linear(0.0, math.nan, 5), r"linear: end=nan .* finite number"),
        (lambda: linear("0", 1.0, 5), r"linear: start='0' .* finite number"),
        (lambda: cosine(1.0, 0.0, True), r"cosine: steps=True"),
        (lambda: cosine(1.0, 0.0, 2.5), r"cosine: steps=2.5"),
        (lambda: polynomial(1.0, 0.0, 5, 0.0), r"polynomial: power=0.0 .* above 0"),
        (lambda: exponential(1.0, -0.5), r"exponential: rate=-0.5 .* above 0"),
        (lambda: warmup_cosine(1.0, 10, 10), r"warmup_cosine: warmup=10 .* less than total=10"),
        (lambda: warmup_cosine(1.0, -1, 10), r"warmup_cosine: warmup=-1 .* 0 or more"),
        (lambda: one_cycle(1.0, 10, pct_start=1.0), r"one_cycle: pct_start=1.0 .* \[0, 1\)"),
        (lambda: join([constant(1.0), constant(2.0)], []), r"join: boundaries=\(\) .* 1 rising whole numbers"),
        (lambda: join([constant(1.0)] * 3, [5, 5]), r"join: boundaries=\(5, 5\) .* 2 rising"),
        (lambda: join([constant(1.0), 2.0], [5]), r"join: schedules=.* callables"),
        (lambda: shifted(0.1, 5), r"shifted: schedule=0.1 .* callable"),
        (lambda: Segment("wave", end=1.0), r"Segment: shape='wave' .* 'linear', 'cosine' or a function"),
        (lambda: Segment(lambda t: 1.0, end=1.0), r"Segment: shape=.* values at 0 and 1 differ"),
        (lambda: Segment("linear", end=1.0, steps=0), r"Segment: steps=0"),
        (lambda: segments([]), r"segments: parts=\(\)"),
        (
            lambda: segments([Segment("linear", end=1.0), *TWO]),
            r"segments: parts=.* all with steps but perhaps the last",
        ),
        (lambda: segments(TWO, total=9), r"segments: total=9 .* must be 6"),
        (lambda: segments([*TWO, Segment("linear", end=1.0)], total=6), r"segments: total=6 .* 6 .* or more"),
    ],
)
def test_what_is_wrong_is_said(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

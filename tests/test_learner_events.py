"""The Learner: several cancels at one event, and what a scheduled rate looks like while a fit runs."""

import copy
import itertools
import pickle

import pytest
from helpers import patch_everywhere
from test_learner import CANCELS, Learner, batches, flow, net
from torch.nn import functional as F

import fluxpy
from fluxpy import Adam, ClipNorm, OptimiserChain, leaves, value
from fluxpy.learner import EVENTS, CancelBatch, CancelEpoch, CancelFit, LearningRateScheduler
from fluxpy.schedules import Segment, linear, segments

OUTERMOST_FIRST = ["fit", "epoch", "training", "validation", "batch"]


def running_at(event):
    """The levels that run the first time an event comes."""
    phase = "validation" if event in ("inference_prediction_end", "validation_start", "validation_end") else "training"
    levels = ["fit"]
    if "fit" not in event:
        levels.append("epoch")
        if "epoch" not in event:
            levels.append(phase)
            if phase not in event:
                levels.append("batch")
    return levels


def raising(kind, event, heard):
    """A callback that cancels once."""
    done = []

    def cancel(learner, at):
        if at == event and not done:
            done.append(at)
            heard.append(kind)
            raise kind(kind.__name__)

    return cancel


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.filterwarnings("ignore:Cancel.*does nothing")
def test_of_several_cancels_at_one_event_the_outermost_acts(event):
    """In whatever order they come; and each callback hears of the event all the same."""
    orders = [*itertools.permutations(CANCELS, 2), tuple(CANCELS), tuple(reversed(CANCELS))]
    for kinds in orders:
        heard, seen = [], []
        calls = [raising(kind, event, heard) for kind in kinds]
        learner = Learner(net(), F.cross_entropy, Adam(), callbacks=[*calls, lambda _, at, seen=seen: seen.append(at)])
        history = learner.fit(batches(), batches(), epochs=2)
        acting = [kind for kind in kinds if kind.level in running_at(event)]
        outermost = min(acting, key=lambda kind: OUTERMOST_FIRST.index(kind.level), default=None)
        assert heard == list(kinds), (event, kinds)
        assert seen == (flow(outermost, event) if outermost else flow()), (event, kinds)
        assert history.stop_reason == ("CancelFit" if CancelFit in kinds else None), (event, kinds)


def test_of_several_reasons_to_stop_the_first_is_told():
    def saying(kind, reason):
        def cancel(learner, event):
            if event == "batch_end":
                raise kind(reason)

        return cancel

    calls = [saying(CancelBatch, "a"), saying(CancelFit, "b"), saying(CancelEpoch, "c"), saying(CancelFit, "d")]
    history = Learner(net(), F.cross_entropy, Adam(), callbacks=calls).fit(batches(), epochs=3)
    assert history.stop_reason == "b" and len(history) == 1


class Reads:
    """Looks at the state in every way that a user has, and halves the rate in the middle."""

    def __init__(self):
        self.texts = []

    def __call__(self, learner, event):
        state = learner.state
        for _, leaf in leaves(state):
            self.texts += [repr(leaf.rule), repr(leaf), repr(leaf.rule.lr)]
            assert value(leaf, "lr") >= 0
        self.texts += [repr(state), str(fluxpy.summary(state))]
        self.texts += [repr(copy.deepcopy(state)), repr(pickle.loads(pickle.dumps(state)))]
        fluxpy.state_dict(state)
        if event == "validation_end":
            fluxpy.adjust(state[0], fluxpy.scale(0.5))


RISE_AND_FALL = segments([Segment("linear", end=1.0, steps=2), Segment("cosine", end=0.0)])
SCHEDULES = {
    "lr": {"lr": linear(0.1, 0.02, 8)},
    "scale": {"scale": lambda count: 1 / (1 + count)},
    "segments": {"scale": RISE_AND_FALL},
}


@pytest.mark.parametrize("rule", [Adam(0.1), OptimiserChain(ClipNorm(1.0), Adam(0.1))])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_scheduled_rate_can_be_looked_at_at_any_time(rule, schedule, monkeypatch):
    """Also what the scheduler gives to `adjust`, as a debugger or a traceback shows it."""
    reads, adjust = Reads(), fluxpy.adjust

    def seen(state, *args, **values):
        reads.texts += [repr(args), repr(values)]
        return adjust(state, *args, **values)

    patch_everywhere(monkeypatch, "adjust", seen)
    learner = Learner(net(), F.cross_entropy, rule, callbacks=[reads, LearningRateScheduler(**schedule), reads])
    learner.fit(batches(), batches(), epochs=2)
    reads(learner, "after")
    assert all(isinstance(text, str) and text for text in reads.texts)
    assert repr(learner.state[3].weight.rule) == repr(rule)

"""The Learner: events, cancels, errors, data, resume."""

import functools
import io
import random
import re

import numpy as np
import pytest
import torch
from helpers import like_a_device
from learner_parts import Learner
from torch import nn
from torch.nn import functional as F

import fluxpy
from fluxpy import Adam, DataLoader, Descent, freeze, setup
from fluxpy.learner import (
    EVENTS,
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelTraining,
    CancelValidation,
    StopOnNaN,
)
from fluxpy.learner import Learner as _Learner
from fluxpy.learner.events import Event

CANCELS = [CancelBatch, CancelTraining, CancelValidation, CancelEpoch, CancelFit]
TRAIN, VALID = 2, 2  # batches of each phase


def net(p=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, 4))


def arrays(rows=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=g), torch.randint(0, 4, (rows,), generator=g)


def batches(n=2, size=4):
    return list(DataLoader(arrays(n * size), batch_size=size))


def flow(cancel=None, at=None, epochs=2):
    """The events of a fit, with one cancel the first time that event comes: the contract, written as a plain loop."""
    seen, fired = [], []

    class Out(Exception):
        pass

    levels = []

    def fire(event):
        seen.append(event)
        if event == at and not fired:
            fired.append(event)
            if cancel.level in levels:
                raise Out(cancel.level)

    def level(name, body):
        levels.append(name)
        out = None
        try:
            fire(f"{name}_start")
            body()
        except Out as o:
            out = o.args[0]
        try:
            fire(f"{name}_end")
        except Out as o:
            out = out if out and levels.index(out) < levels.index(o.args[0]) else o.args[0]
        levels.pop()
        if out not in (None, name):
            raise Out(out)

    def epoch():
        level("training", lambda: [level("batch", lambda: fire("update_start")) for _ in range(TRAIN)])
        level("validation", lambda: [level("batch", lambda: fire("inference_prediction_end")) for _ in range(VALID)])

    level("fit", lambda: [level("epoch", epoch) for _ in range(epochs)])
    return seen


def test_events_in_order():
    seen = []
    history = Learner(net(), F.cross_entropy, Adam(), callbacks=[lambda _, e: seen.append(e)]).fit(batches(), batches())
    batch = ["batch_start", "update_start", "batch_end"]
    look = ["batch_start", "inference_prediction_end", "batch_end"]
    inside = ["training_start", *batch * 2, "training_end", "validation_start", *look * 2, "validation_end"]
    assert seen == ["fit_start", "epoch_start", *inside, "epoch_end", "fit_end"] == flow(epochs=1)
    assert history.stop_reason is None and set(seen) == set(EVENTS)


@pytest.mark.parametrize("cancel", CANCELS)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.filterwarnings("ignore:Cancel.*does nothing")
def test_every_event_and_every_cancel(event, cancel):
    """Each level that was entered ends once, all callbacks see the same, nothing stale is scored, the fit returns."""
    first, last, raised, scored = [], [], [], []

    def canceller(learner, e):
        first.append(e)
        if e == event and not raised:
            raised.append(learner.step.output is not None)
            raise cancel("enough")

    def watch(learner, e):
        last.append(e)
        if e in ("training_end", "validation_end"):
            scored.append(learner.metrics.batches)
            assert learner.stats == learner.running()
        if e in ("training_start", "validation_start", "training_end", "validation_end"):
            assert learner.step.output is None and learner.step.loss is None

    model = net()
    learner = Learner(model, F.cross_entropy, Adam(), metrics=["accuracy"], callbacks=[canceller, watch])
    history = learner.fit(batches(TRAIN), batches(VALID), epochs=2)
    assert first == last == flow(cancel, event)
    for start in ("fit", "epoch", "training", "validation", "batch"):
        assert last.count(f"{start}_start") == last.count(f"{start}_end")
    # A batch was scored where it came to its end without a cancel before it.
    expected, count, cut, once = [], 0, False, False
    running = {"fit", "epoch", "training", "batch"} if "update" in event or "batch" in event else set()
    for e in last:
        if e in ("training_start", "validation_start"):
            count = 0
        cut = cut and e != "batch_start"
        if e == event and not once:
            once = True
            if e in ("batch_start", "update_start"):
                cut = cancel.level in running
            elif e == "inference_prediction_end":
                cut = cancel.level != "training"
        if e == "batch_end" and not cut:
            count += 1
        if e in ("training_end", "validation_end"):
            expected.append(count)
    assert scored == expected
    stopped = cancel is CancelFit
    assert history.stop_reason == ("enough" if stopped else None)
    assert history is learner.history and all(set(row) == {"epoch", "train", "validation"} for row in history)


def test_a_cancel_of_what_is_not_running_warns():
    def early(learner, event):
        if event == "epoch_start":
            raise CancelBatch

    learner = Learner(net(), F.cross_entropy, Adam(), callbacks=[early])
    with pytest.warns(UserWarning, match="CancelBatch by early at epoch_start: no batch is running"):
        learner.fit(batches())


def test_cancelled_batches_update_nothing_and_steps_may_cancel():
    class Own(_Learner):
        def training_step(self, model, input, target):
            raise CancelBatch

    model = net()
    before = [x.clone() for x in model.parameters()]
    history = Own(model, F.cross_entropy, Adam(), default_callbacks=False).fit(batches())
    assert all(map(torch.equal, before, model.parameters())) and history[0]["train"] == {}

    def stop(learner, event):
        if event == "batch_end":
            raise CancelFit

    history = Learner(net(), F.cross_entropy, Adam(), callbacks=[stop]).fit(batches(), epochs=3)
    assert history.stop_reason == "CancelFit by stop at batch_end" and len(history) == 1


@pytest.mark.parametrize("event", EVENTS)
def test_an_error_passes_through_and_every_end_still_comes(event):
    seen = []

    class Bad(Callback):
        def __call__(self, learner, e):
            if e == event:
                raise KeyError("mine")
            if learner.error is not None:
                raise OSError("second")

    learner = Learner(net(), F.cross_entropy, Adam(), callbacks=[Bad(), lambda _, e: seen.append(e)])
    with pytest.raises(KeyError, match="mine") as caught:
        learner.fit(batches(), batches())
    assert caught.value.__notes__[0] == f"in the callback Bad at the event {event!r}"
    for level in ("fit", "epoch", "training", "validation", "batch"):
        starts, ends = seen.count(f"{level}_start"), seen.count(f"{level}_end")
        assert starts == ends or (event == f"{level}_start" and ends == starts + 1)
    assert seen[-1] == "fit_end" and not learner.fitting and learner.error is None


def test_callbacks_change_gradients_input_and_the_model():
    def zero(learner, event):
        if event == "update_start":
            learner.step.grads = fluxpy.gradient(lambda m: 0 * sum(x.sum() for x in m.parameters()), learner.model)

    model = net()
    before = [x.clone() for x in model.parameters()]
    Learner(model, F.cross_entropy, Descent(1.0), callbacks=[zero]).fit(batches())
    assert all(map(torch.equal, before, model.parameters()))


def test_a_misspelt_event_is_refused():
    with pytest.raises(TypeError, match="on_epoch_stop: no such event.*on_epoch_"):
        type("C", (Callback,), {"on_epoch_stop": lambda self, learner: None})
    with pytest.raises(TypeError, match=r"write def on_epoch_end\(self, learner\), or nothing calls it"):
        type("C", (Callback,), {"epoch_end": lambda self, learner: None})


def test_explain():
    class Quiet(Callback):
        def on_batch_end(self, learner): ...

    def loud(learner, event): ...

    lines = Learner(net(), F.cross_entropy, Adam(), callbacks=[Quiet(), loud]).explain().split("\n")
    assert [line.split()[0] for line in lines] == list(EVENTS)
    assert [line for line in lines if "Quiet" in line] == [f"{'batch_end':<26}Quiet, loud"]


def test_the_learner_is_the_loop_one_writes():
    a, b = net(), net()
    state = setup(Adam(0.1), b)
    data = DataLoader(arrays(18), batch_size=4)
    history = Learner(a, F.cross_entropy, Adam(0.1)).fit(data, epochs=2)
    for epoch in range(2):
        total = 0.0
        for x, y in data:
            loss, grads = fluxpy.withgradient(lambda m, x=x, y=y: F.cross_entropy(m(x), y), b)
            fluxpy.update(state, b, grads)
            total += loss.item() * len(x)  # the last batch has 2 rows
        assert history[epoch]["train"]["loss"] == pytest.approx(total / 18, rel=1e-12)
    assert all(map(torch.equal, a.parameters(), b.parameters()))


def test_data_of_all_kinds():
    x, y = arrays(8)
    results, counts, whole = [], [], []

    def count(learner, event):
        if event == "training_start":
            counts.append(learner.batch_count)
            whole.append(learner.step_count)

    def generator():
        yield from batches()

    kinds = [
        batches(),
        tuple(batches()),
        DataLoader((x, y), batch_size=4),
        DataLoader({"input": x, "y": y}, batch_size=4),
        DataLoader({"input": x, "label": y}, batch_size=4),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4),
        generator,
        lambda epoch: batches() if epoch >= 0 else [],
        [batches(), batches()],
        [DataLoader((x, y), batch_size=4)] * 2,
    ]
    for data in kinds:
        learner = Learner(net(), F.cross_entropy, Adam(0.1), callbacks=[count])
        results.append(learner.fit(data, epochs=2)[1]["train"]["loss"])
    assert len(set(results)) == 1
    assert counts == [2, 2] * 6 + [None, None] + [2, 2] * 3 and whole == [4, 4] * 6 + [None, None] + [4, 4] * 3


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (arrays(), TypeError, "a pair of arrays.*DataLoader"),
        ({"x": 1}, TypeError, "DataLoader"),
        (iter(batches()), ValueError, "iterator"),
        ([], ValueError, "no batch"),
        ([batches()], ValueError, "of 1 epochs, but epochs=2"),
        ("data", TypeError, "iterable of batches"),
        (torch.utils.data.TensorDataset(*arrays()), TypeError, "single samples"),
        ([x for x, _ in batches()], ValueError, "override training_step"),
    ],
)
def test_data_that_cannot_be_trained_on(data, error, message):
    with pytest.raises(error, match=message):
        Learner(net(), F.cross_entropy, Adam()).fit(data, epochs=2)


@pytest.mark.parametrize(
    "empty",
    [[], (), [DataLoader(arrays(4), batch_size=4), []], torch.utils.data.DataLoader([], batch_size=4)],
)
def test_validation_data_without_a_batch_is_refused_before_any_batch_of_training(empty):
    learner = Learner(net(), F.cross_entropy, Adam())
    with pytest.raises(ValueError, match="the validation data has no batch"):
        learner.fit(batches(), empty, epochs=2)
    assert learner.state[0].weight.count == 0 and not learner.history


def test_what_makes_data_gets_the_epoch_only_for_what_can_be_one():
    seen = []

    def make(epoch=-1, rows=8):
        seen.append(epoch)
        return batches()

    def other(shuffle=True):
        seen.append(shuffle)
        return batches()

    Learner(net(), F.cross_entropy, Adam()).fit(make, other, epochs=2)
    Learner(net(), F.cross_entropy, Adam()).fit(lambda n: seen.append(n) or batches(), epochs=2)
    assert seen == [0, True, 1, True, 0, 1]
    Learner(net(), F.cross_entropy, Adam()).fit(functools.partial(DataLoader, arrays(8), batch_size=4), epochs=2)


def test_several_data_sets_are_not_taken_for_one_a_list_too_long_is_told():
    learner = Learner(net(), F.cross_entropy, Adam())
    with pytest.warns(UserWarning, match=r"the validation data is a list of 2, .* learner.validate\(data\)"):
        learner.fit(batches(), [batches(), batches()], epochs=1)


def test_a_step_of_ones_own_may_need_no_loss():
    class Own(_Learner):
        def training_step(self, model, input, target):
            return F.cross_entropy(model(input), target)

    learner = Own(net(), None, Adam(), accumulate=2, default_callbacks=False)
    assert learner.fit(batches())[0]["train"]["loss"] > 0 and "NoneType" in learner._repr_html_()
    with pytest.raises(TypeError, match="the loss is a function"):
        Learner(net(), None, Adam())


def test_own_steps_and_validation_and_prediction():
    class Auto(_Learner):
        def training_step(self, model, input, target):
            return self.loss(model(input), input)

    seen = []
    learner = Auto(
        nn.Linear(3, 3), F.mse_loss, Adam(), callbacks=[lambda _, e: seen.append(e)], default_callbacks=False
    )
    data = [x for x, _ in batches()]
    history = learner.fit(data, data)
    assert set(history[0]["validation"]) == {"loss"} and seen.count("inference_prediction_end") == 2
    seen.clear()
    stats = learner.validate(data)
    assert stats == history[0]["validation"] and not learner.fitting
    assert seen[0] == "validation_start" and seen[-1] == "validation_end" and len(seen) == 8
    model = net(0.5)
    learner = Learner(model, F.cross_entropy, Adam(), metrics=["accuracy"])
    model.train()
    outputs = learner.predict(DataLoader(arrays(10), batch_size=4))
    assert outputs.shape == (10, 4) and model.training
    assert torch.equal(outputs, model.eval()(arrays(10)[0]))
    assert learner.validate(batches())["loss"] > 0


def test_a_second_fit_begins_anew_and_frozen_parts_stay():
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "head": nn.Linear(4, 4)})
    model.forward = lambda x: model["head"](model["encoder"](x))
    model["encoder"].eval()
    modes = []
    learner = Learner(
        model, F.cross_entropy, Adam(), callbacks=[lambda self, e: modes.append((self.epoch_index, self.step_index))]
    )
    freeze(learner.state["encoder"])
    before = {name: t.clone() for name, t in model["encoder"].state_dict().items()}
    one = learner.fit(batches(), batches(), epochs=2)
    modes.clear()
    two = learner.fit(batches(), epochs=1)
    assert one is not two and len(one) == 2 and len(two) == 1 and modes[0] == (0, 0) and modes[-1] == (0, 1)
    assert all(torch.equal(t, before[name]) for name, t in model["encoder"].state_dict().items())
    assert not model["encoder"].training and model["head"].training


def test_a_loss_that_is_not_finite_updates_nothing_and_warns():
    data = batches(3)
    data[1][0][0, 0] = float("nan")
    learner = Learner(net(), F.cross_entropy, Adam())
    with pytest.warns(UserWarning, match="the loss of batch 1 of epoch 0 is nan; that batch updated nothing"):
        history = learner.fit(data)
    assert np.isfinite(history[0]["train"]["loss"]) and all(x.isfinite().all() for x in learner.model.parameters())
    assert learner.metrics.batches == 2
    assert next(leaf for _, leaf in fluxpy.leaves(learner.state)).count == 2


@pytest.mark.parametrize("saved_at", [1, 2])
@pytest.mark.parametrize("finite", [[2, 3], []])
def test_a_resumed_run_still_tells_of_a_loss_that_was_not_finite(saved_at, finite):
    data, saves = batches(4), []
    data = [(x if i in finite else x * float("nan"), y) for i, (x, y) in enumerate(data)]

    def save(learner, event):
        if event == "batch_end" and learner.batch_index == saved_at:
            saves.append(learner.state_dict())

    with pytest.warns(UserWarning, match="batch 0 of epoch 0"):
        whole = Learner(net(), F.cross_entropy, Adam(), callbacks=[save]).fit(data, data[2:] if finite else None)
    learner = Learner(net(), F.cross_entropy, Adam())
    learner.load_state_dict(saves[0])
    with pytest.warns(UserWarning, match="the loss of batch 0 of epoch 0 is nan") as warned:
        history = learner.fit(data, data[2:] if finite else None)
    assert str(history) == str(whole) and len(warned) == 1


def test_a_run_that_stopped_at_nan_goes_on_and_stops_at_the_next():
    data = [(x * float("nan") if i in (0, 2) else x, y) for i, (x, y) in enumerate(batches(4))]
    learner = Learner(net(), F.cross_entropy, Adam(), callbacks=[StopOnNaN()])
    assert "batch 0" in learner.fit(data).stop_reason
    learner.load_state_dict(learner.state_dict())
    assert "batch 2" in learner.fit(data).stop_reason and learner.state[0].weight.count == 1
    learner.load_state_dict(learner.state_dict())
    assert learner.fit(data).stop_reason is None and learner.state[0].weight.count == 2


def test_an_epoch_without_a_finite_loss_has_none():
    data = [(x * float("nan"), y) for x, y in batches()]
    with pytest.warns(UserWarning, match="updated nothing"):
        history = Learner(net(), F.cross_entropy, Adam(), metrics=["accuracy"]).fit(data)
    assert set(history[0]["train"]) == {"loss", "accuracy"} and np.isnan(list(history[0]["train"].values())).all()


def test_on_a_device_a_loss_that_is_not_finite_counts_for_nothing(monkeypatch):
    """The CPU made to behave like a device, which the host does not read."""
    like_a_device(monkeypatch)
    data = batches(3)
    data[2][0][0, 0] = float("nan")
    learner = Learner(net(), F.cross_entropy, Adam(), metrics=["perplexity"])
    with pytest.warns(UserWarning, match="the loss is not finite, in update 2; nothing was updated since"):
        history = learner.fit(data)
    whole = Learner(net(), F.cross_entropy, Adam(), metrics=["perplexity"]).fit(data[:2])
    assert history[0]["train"] == pytest.approx(whole[0]["train"]) and np.isfinite(history[0]["train"]["loss"])


@pytest.mark.parametrize("event", ["batch_start", "update_start", "batch_end", "training_end"])
@pytest.mark.parametrize("order", [1, -1])
def test_of_several_cancels_the_outermost_acts_and_of_equal_ones_the_first(event, order):
    def run(*cancels):
        seen, cancelled = [], []

        def raising(cancel):
            def act(learner, e):
                if e == event and learner.training and not cancelled:
                    raise cancel

            return act

        def watch(learner, e):
            seen.append(e)
            if e == event and learner.training:
                cancelled.append(learner.progress.cancelled)

        callbacks = [*map(raising, cancels[::order]), watch]
        history = Learner(net(), F.cross_entropy, Adam(), callbacks=callbacks).fit(batches(), batches(), epochs=2)
        return seen, cancelled[0], history.stop_reason

    assert run(CancelEpoch(), CancelTraining()) == (flow(CancelEpoch, event), "epoch", None)
    several = CancelEpoch("epoch"), CancelFit("first"), CancelTraining("training"), CancelFit("second")
    assert run(*several) == (flow(CancelFit, event), "fit", "first" if order == 1 else "second")


def test_a_cancel_at_the_end_event_replaces_only_an_inner_one():
    def act(learner, e):
        if e == "update_start":
            raise CancelEpoch("first")
        if e == "batch_end" and learner.training:
            raise CancelTraining("later, and inner")

    seen = []
    Learner(net(), F.cross_entropy, Adam(), callbacks=[act, lambda _, e: seen.append(e)]).fit(batches(), batches())
    assert "validation_start" not in seen


# --- Mistakes that teach ------------------------------------------------------------------------------------------


def test_a_loss_given_as_a_class_is_refused():
    with pytest.raises(TypeError, match=re.escape("the loss is an object, not a class: write CrossEntropyLoss()")):
        Learner(net(), nn.CrossEntropyLoss, Adam())


def test_a_misspelt_event_in_a_function_is_an_error_at_the_first_event():
    def wrong(learner, event):
        if event == "epoch_stop":
            raise AssertionError

    def matching(learner, event):
        match event:
            case "on_batch_end":
                raise AssertionError

    for callback, meant in ((wrong, "epoch_st.*epoch_end"), (matching, "batch_end")):
        with pytest.raises(ValueError, match=f"there is no event.*did you mean.*{meant}") as caught:
            Learner(net(), F.cross_entropy, Adam(), callbacks=[callback]).fit(batches())
        assert f"in the callback {callback.__name__} at the event 'fit_start'" in caught.value.__notes__
    event = Event("fit_start")
    assert event == "fit_start" and event != "fit_end" and event != "mine" and event is not None and event != 3
    assert {event: 1}["fit_start"] == 1 and event in ["fit_end", "fit_start"] and hash(event) == hash("fit_start")


def test_modules_are_put_into_their_modes_in_their_own_way():
    class Own(nn.Module):
        """Keeps its normalisation as it is evaluated, whatever mode it is put into."""

        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(3), nn.Linear(3, 4)
            self.calls = []

        def train(self, mode=True):
            self.calls.append(mode)
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x):
            return self.out(self.norm(x))

    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Dropout()), Own())
    learner = Learner(model, F.cross_entropy, Adam())
    freeze(learner.state[0])
    modes = []
    watch = lambda _, e: modes.append([m.training for m in model.modules()]) if e == "update_start" else None  # noqa: E731
    learner.fit(batches(1), callbacks=[watch])
    freeze(learner.state[1].out.bias)  # in part
    learner.fit(batches(1), callbacks=[watch])
    # The whole; the frozen part with its linear and its dropout; Own, its normalisation, its linear.
    assert modes == [[True, False, False, False, True, False, True]] * 2 and model[1].calls == [True, True]


# --- Resume -------------------------------------------------------------------------------------------------------


class Counter(Callback):
    """Has state of its own, and saves the run at one moment."""

    def __init__(self, when=None):
        self.n, self.when, self.saved = 0, when, None

    def on_batch_end(self, learner):
        self.n += 1

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, d):
        self.n = d["n"]


class Saver(Callback):
    def __init__(self, event=None, epoch=0, batch=None):
        self.where, self.saved = (event, epoch, batch), None

    def __call__(self, learner, event):
        at, epoch, batch = self.where
        at, _, phase = at.partition(" ")
        here = learner.phase == phase if phase else True
        if (
            (event, learner.epoch_index) == (at, epoch)
            and batch in (None, learner.batch_index)
            and not self.saved
            and here
        ):
            buffer = io.BytesIO()
            torch.save(learner.state_dict(), buffer)
            buffer.seek(0)
            self.saved = torch.load(buffer, weights_only=True)


def noisy(model):
    return lambda out, y: F.cross_entropy(out, y) * (1 + random.random() + np.random.rand())


def loaders(kind):
    x, y = arrays(22)
    if kind == "ours":
        return DataLoader((x, y), batch_size=4, shuffle=True)
    g = torch.Generator().manual_seed(7)
    if kind == "generator":
        return DataLoader((x, y), batch_size=4, shuffle=True, generator=g)
    set_ = torch.utils.data.TensorDataset(x, y)
    if kind == "torch":
        return torch.utils.data.DataLoader(set_, batch_size=4, shuffle=True, generator=g)
    return lambda: iter(torch.utils.data.DataLoader(set_, batch_size=4, shuffle=True))


MOMENTS = [("batch_end", 0, 0), ("batch_end", 1, 3), ("batch_end", 1, 5), ("training_start", 1, None)]
MOMENTS += [("training_end", 1, None), ("validation_end", 1, None), ("validation_start", 1, None)]
MOMENTS += [("batch_end validation", 1, 0), ("batch_end validation", 1, 1)]
MOMENTS += [("epoch_end", 0, None), ("fit_end", 2, None), ("epoch_start", 1, None), ("fit_start", 0, None)]


@pytest.mark.parametrize("kind", ["ours", "generator", "torch", "callable"])
@pytest.mark.filterwarnings("ignore:the run has done 3 epochs of 3")
@pytest.mark.parametrize("moment", MOMENTS)
def test_resume_is_exact(moment, kind):
    """Bit for bit, whatever was drawn: order of the data, dropout, NumPy's and Python's numbers."""

    def run(saved=None):
        model = net(0.3)
        random.seed(1), np.random.seed(1), torch.manual_seed(5 if saved is None else 6)
        saver = Saver(*moment)
        learner = Learner(model, noisy(model), Adam(0.05), metrics=["accuracy"], callbacks=[Counter(), saver])
        if saved is not None:
            learner.load_state_dict(saved)
        history = learner.fit(loaders(kind), batches(), epochs=3)
        return model, history, learner, saver.saved

    model, history, learner, saved = run()
    assert saved is not None
    again, resumed, other, _ = run(saved)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert list(history) == list(resumed)
    assert learner.step_index == other.step_index or moment[0] == "fit_end"
    assert learner.callbacks[0].n == other.callbacks[0].n


class Acts(Callback):
    """Changes the run at every event: rates, frozen leaves, weights, random numbers, and what it counts itself."""

    def __init__(self):
        self.seen = 0

    def __call__(self, learner, event):
        if event == "fit_end":  # of which a resumed run has another one
            return
        self.seen += 1
        fluxpy.adjust(learner.state, fluxpy.scale(1.01))
        leaf = list(fluxpy.leaves(learner.state))[self.seen % 3][1]  # one of the four always trains
        (fluxpy.thaw if leaf.frozen else freeze)(leaf)
        with torch.no_grad():
            for x in learner.model.parameters():
                x += 0.01 * random.random() * torch.randn_like(x)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, d):
        self.seen = d["seen"]


@pytest.mark.filterwarnings("ignore:the run has done 3 epochs of 3")
@pytest.mark.parametrize("moment", MOMENTS)
def test_on_resume_nothing_acts_twice(moment):
    """Start events come again, but what is changed at them is put back."""

    def run(saved=None):
        torch.manual_seed(1), random.seed(1)
        acts, saver = Acts(), Saver(*moment)
        learner = Learner(net(0.3), F.cross_entropy, Adam(0.01), metrics=["accuracy"], callbacks=[acts, saver])
        if saved is not None:
            torch.manual_seed(2), random.seed(2)
            learner.load_state_dict(saved)
        history = learner.fit(loaders("ours"), batches(), epochs=3)
        return learner, list(history), acts.seen, saver.saved

    whole, history, seen, saved = run()
    again, resumed, seen_again, _ = run(saved)
    assert resumed == history and seen_again == seen
    assert fluxpy.value(again.state[0].weight, "lr") == fluxpy.value(whole.state[0].weight, "lr")
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))


@pytest.mark.parametrize("event", ["epoch_start", "training_start", "validation_start"])
@pytest.mark.parametrize("moment", MOMENTS[:9])
def test_a_start_event_that_comes_again_cancels_nothing(moment, event):
    """It had not cancelled the saved run either, even where a callback counts how often it comes."""

    class Limit(Counter):
        def on_batch_end(self, learner):
            pass

        def __call__(self, learner, e):
            if e == event:
                self.n += 1
                if self.n == 3:
                    raise CancelFit("three were enough")

    def run(saved=None):
        saver = Saver(*moment)
        learner = Learner(net(0.3), F.cross_entropy, Adam(0.05), callbacks=[Limit(), saver])
        if saved is not None:
            learner.load_state_dict(saved)
        return learner.fit(loaders("ours"), batches(), epochs=4), saver.saved

    history, saved = run()
    again, _ = run(saved)
    assert list(again) == list(history) and again.stop_reason == history.stop_reason == "three were enough"


class Shuffled(torch.utils.data.Sampler):
    def __init__(self, n, **attributes):
        self.n = n
        vars(self).update(attributes)

    def __iter__(self):
        for rng in vars(self).values():
            if isinstance(rng, torch.Generator):
                return iter(torch.randperm(self.n, generator=rng).tolist())
            if isinstance(rng, np.random.Generator | np.random.RandomState):
                return iter(rng.permutation(self.n).tolist())
            if isinstance(rng, random.Random):
                return iter(rng.sample(range(self.n), self.n))
            if isinstance(rng, list):
                return iter(rng[0])
        raise AssertionError

    def __len__(self):
        return self.n


class Augmented(torch.utils.data.TensorDataset):
    rng = None

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + self.rng.normal(), y


def hidden(kind):
    """Loaders whose order or samples are drawn from a generator that is not at its usual place."""
    data, make = torch.utils.data.TensorDataset(*arrays(22)), torch.utils.data.DataLoader
    g = torch.Generator().manual_seed(7)
    if kind == "batch_sampler":
        inner = torch.utils.data.RandomSampler(data, generator=g)
        return make(data, batch_sampler=torch.utils.data.BatchSampler(inner, 4, False))
    if kind == "data set":
        data = Augmented(*arrays(22))
        data.rng = np.random.default_rng(7)
        return make(data, batch_size=4)
    bits = {
        "pcg64": np.random.PCG64,
        "mt19937": np.random.MT19937,
        "philox": np.random.Philox,
        "sfc64": np.random.SFC64,
    }
    rngs = {
        "torch": g,
        "legacy": np.random.RandomState(7),
        "python": random.Random(7),
        "list": [Shuffled(22, seed=g)],
        **{name: np.random.Generator(bit(7)) for name, bit in bits.items()},
    }
    return make(data, batch_size=4, sampler=Shuffled(22, own_rng=rngs[kind]))


@pytest.mark.parametrize(
    "kind",
    ["batch_sampler", "data set", "torch", "legacy", "python", "list", "pcg64", "mt19937", "philox", "sfc64"],
)
@pytest.mark.parametrize("moment", [("batch_end", 1, 3), ("training_end", 0, None), ("epoch_end", 0, None)])
def test_resume_is_exact_wherever_the_generator_is(moment, kind):
    def run(saved=None):
        saver = Saver(*moment)
        learner = Learner(net(), F.cross_entropy, Adam(0.05), callbacks=[saver])
        if saved is not None:
            learner.load_state_dict(saved)
        return learner.fit(hidden(kind), batches(), epochs=3), saver.saved

    history, saved = run()
    assert list(run(saved)[0]) == list(history)


def test_persistent_workers_are_said_to_resume_inexactly():
    class Pretends(list):
        persistent_workers = True

    part = Learner(net(), F.cross_entropy, Adam())
    part.fit(Pretends(batches()), epochs=1)
    again = Learner(net(), F.cross_entropy, Adam())
    again.load_state_dict(part.state_dict())
    with pytest.warns(UserWarning, match="persistent_workers=True, whose random numbers nobody can save"):
        again.fit(Pretends(batches()), epochs=2)


def test_a_batch_that_failed_is_not_counted_as_done():
    def fail(learner, event):
        if event == "update_start" and learner.batch_index == 1:
            raise OSError("disk")

    learner = Learner(net(), F.cross_entropy, Adam(), callbacks=[fail])
    with pytest.raises(OSError, match="disk"):
        learner.fit(batches())
    assert learner.progress.batch == learner.progress.step == 1


def test_resume_after_a_cancel_and_refusals():
    def run(stop, saved=None):
        def halt(learner, event):
            if event == "batch_end" and learner.training and stop == (learner.epoch_index, learner.batch_index):
                raise CancelFit("signal")

        learner = Learner(net(0.3), F.cross_entropy, Adam(0.05), callbacks=[halt])
        if saved:
            learner.load_state_dict(saved)
        torch.manual_seed(1)
        return learner, learner.fit(loaders("ours"), epochs=3)

    whole, history = run(None)
    part, short = run((1, 2))
    assert short.stop_reason == "signal" and len(short) == 2
    rest, long = run(None, part.state_dict())
    assert all(map(torch.equal, whole.model.parameters(), rest.model.parameters()))
    assert list(long) == list(history) and long.stop_reason is None

    def early(learner, event):
        if event == "update_start":
            learner.state_dict()

    with pytest.raises(RuntimeError, match="take it at batch_end"):
        Learner(net(), F.cross_entropy, Adam(), callbacks=[early]).fit(batches())
    with pytest.raises(ValueError, match="nothing was loaded"):
        Learner(nn.Linear(3, 4), F.cross_entropy, Adam()).load_state_dict(part.state_dict())
    with pytest.raises(ValueError, match=re.escape("takes what Learner.state_dict gave")):
        part.load_state_dict({})
    with pytest.raises(ValueError, match="saved in format 1"):
        part.load_state_dict(part.state_dict() | {"version": 1})

"""Checkpoint, EarlyStopping and StopOnNaN: runs that are killed at any moment end as if they had not been."""

import csv
import os
import random
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from scripts import started
from torch import nn

import fluxpy
from fluxpy import Adam, Descent
from fluxpy.learner import (
    Callback,
    CancelFit,
    CancelTraining,
    Checkpoint,
    CSVLogger,
    EarlyStopping,
    Learner,
    LearningRateScheduler,
    ReduceOnPlateau,
    StatisticsRecorder,
    StopOnNaN,
)

# A shell gives what runs in its background no interrupts, and whoever was started so is to leave them ignored.
NEEDS_INTERRUPTS = pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="interrupts are ignored here"
)

NIGHTLY = os.environ.get("FLUXPY_NIGHTLY") == "1"

SCRIPT = """
import os, random, sys, time
import numpy as np, torch, torch.nn.functional as F
from torch import nn
import fluxpy
from fluxpy.learner import CSVLogger, Callback, Checkpoint, EarlyStopping, Learner, StatisticsRecorder

torch.set_num_threads(1)
folder, pause, every = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
resumed = os.path.exists(folder + "/checkpoints/last.flux")
seed = 1 if not resumed else os.getpid()  # what is not loaded would show
random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.Linear(16, 3))
numbers = torch.Generator().manual_seed(0)
x, y = torch.randn(62, 8, generator=numbers), torch.randint(3, (62,), generator=numbers)

class Slow(Callback):
    seen = 0
    def on_fit_start(self, learner):
        print("started", flush=True)
    def on_batch_end(self, learner):
        self.seen += learner.training
        time.sleep(pause)
    def state_dict(self):
        return {"seen": self.seen}
    def load_state_dict(self, d):
        self.seen = d["seen"]

slow, recorder = Slow(), StatisticsRecorder()
checkpoint = Checkpoint(folder + "/checkpoints", every=every, keep=2)
callbacks = [CSVLogger(folder + "/log.csv", every=3), checkpoint, recorder, EarlyStopping(patience=50), slow]
noisy = lambda out, y: F.cross_entropy(out, y) * (1 + random.random() + np.random.rand())
learner = Learner(model, noisy, fluxpy.Adam(0.02), metrics=["accuracy"], callbacks=callbacks, default_callbacks=False)
data = fluxpy.DataLoader((x, y), batch_size=5, shuffle=True)
history = learner.fit(data, [(x[:31], y[:31]), (x[31:], y[31:])], epochs=6)
done = {"weights": dict(model.state_dict()), "history": list(history), "records": recorder.records, "seen": slow.seen}
fluxpy.save(folder + "/done.flux", **done, best=[p.name for _, p in checkpoint.best], reason=history.stop_reason)
"""


def start(folder, pause=0.0, every=4):
    folder.mkdir(exist_ok=True)
    return started(SCRIPT, folder, pause, every, piped=True)


def finish(process):
    assert process.wait() == 0, process.printed()


def run_whole(folder, **options):
    with start(folder, **options) as process:
        finish(process)


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.reader(file))


def assert_same(folder, whole):
    ours, theirs = fluxpy.load(folder / "done.flux"), fluxpy.load(whole / "done.flux")
    assert all(map(torch.equal, ours["weights"].values(), theirs["weights"].values()))
    assert [row["epoch"] for row in ours["history"]] == list(range(6))
    for part in ("history", "records", "best", "seen"):
        assert ours[part] == theirs[part], part
    assert rows(folder) == rows(whole)
    assert len(rows(folder)) == 1 + 6 * (13 + 2)
    files = {path.name for path in (folder / "checkpoints").iterdir()}
    assert files == {path.name for path in (whole / "checkpoints").iterdir()} == {"last.flux", *ours["best"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupts, and how long it takes once it has started."""
    folder = tmp_path_factory.mktemp("whole")
    run_whole(folder)
    return folder


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_at_random_moments(tmp_path, whole):
    """SIGKILL again and again, with each run resumed by the next: all ends as if it had never been killed."""
    times, chance, folder = 20 if NIGHTLY else 5, random.Random(0), tmp_path / "run"
    places, torn = [], 0
    for _ in range(times):
        with start(folder, pause=0.05, every=2) as process:
            assert process.stdout.readline() == "started\n", process.printed()
            time.sleep(chance.uniform(0.1, 7 / times))  # all together about as long as the 90 batches, some twice
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        torn += len(list((folder / "checkpoints").glob(".fluxpy-*.tmp")))
        for path in (folder / "checkpoints").glob("*.flux"):
            at = fluxpy.load(path)["run"]["position"]  # whole
            if path.name == "last.flux":
                places.append((at["epoch"], at["phase"], at["batch"]))
    run_whole(folder, every=2)
    assert max(places) < (6, "start", 0)
    print(f"tried: kills of a run with Checkpoint: {times} ({torn} within a save); resumed at {places}")
    assert_same(folder, whole)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=NEEDS_INTERRUPTS)])
def test_signals_end_the_fit_and_the_next_goes_on(tmp_path, whole, number):
    folder = tmp_path / "run"
    with start(folder, pause=0.02, every=1000) as process:
        assert process.stdout.readline() == "started\n"
        time.sleep(0.7)
        process.send_signal(number)
        finish(process)
    done = fluxpy.load(folder / "done.flux")
    assert done["reason"].startswith(signal.Signals(number).name + "; the run was saved to ")
    run_whole(folder, every=1000)
    assert fluxpy.load(folder / "done.flux")["reason"] is None
    assert_same(folder, whole)


# --- In one process -----------------------------------------------------------------------------------------------


def data(n=3):
    x = torch.randn(n * 4, 2, generator=torch.Generator().manual_seed(0))
    return [(a, a.sum(1, keepdim=True)) for a in x.split(4)]


def learner(*callbacks, rule=None, **kwargs):
    torch.manual_seed(0)
    made = nn.Linear(2, 1), F.mse_loss, rule or Descent(0.1)
    return Learner(*made, callbacks=callbacks, default_callbacks=False, **kwargs)


class Score(Callback):
    """Makes the loss of validation what is asked."""

    def __init__(self, *values):
        self.values = values

    def on_validation_end(self, learner):
        learner.stats["loss"] = self.values[learner.epoch_index]


def test_the_best_stay(tmp_path):
    checkpoint = Checkpoint(tmp_path, keep=2)
    score = Score(3.0, 1.0, float("nan"), 2.0, 5.0)
    run = learner(checkpoint, score)
    models = []

    def watch(learner, event):
        if event == "epoch_end":
            models.append(learner.model.weight.detach().clone())

    run.fit(data(), data(1), epochs=5, callbacks=[watch])
    assert [value for value, _ in checkpoint.best] == [1.0, 2.0]
    assert {p.name for p in tmp_path.iterdir()} == {"last.flux", "epoch_001_loss_1.flux", "epoch_003_loss_2.flux"}
    model = nn.Linear(2, 1)
    fluxpy.load(checkpoint.best[0][1], model=model)
    assert torch.equal(model.weight, models[1])
    fluxpy.load(checkpoint.last, model=model, state=fluxpy.setup(Descent(0.1), model))
    assert torch.equal(model.weight, models[4])


def test_the_best_by_a_metric_of_training_where_more_is_better(tmp_path):
    def score(output, target):
        return [1.0, 4.0, 2.0][run.epoch_index]

    checkpoint = Checkpoint(tmp_path, monitor="train.score", mode="max", keep=1)
    run = learner(checkpoint, metrics={"score": score})
    run.fit(data(), data(1), epochs=3)
    assert [(value, path.name) for value, path in checkpoint.best] == [(4.0, "epoch_001_score_4.flux")]


def test_it_acts_last_wherever_it_stands(tmp_path):
    late = StopOnNaN()
    assert learner(Checkpoint(tmp_path), late).explain().count("StopOnNaN, Checkpoint") == 1


def test_a_finished_run_goes_on_only_for_more_epochs(tmp_path):
    learner(Checkpoint(tmp_path)).fit(data(), epochs=2)
    again = learner(Checkpoint(tmp_path))
    with pytest.warns(UserWarning, match=r"has done 2 epochs of 2: nothing is left to do"):
        assert len(again.fit(data(), epochs=2)) == 2
    more, whole = learner(Checkpoint(tmp_path)), learner()
    assert len(more.fit(data(), epochs=4)) == 4
    whole.fit(data(), epochs=4)
    assert torch.equal(more.model.weight, whole.model.weight)
    assert len(learner(Checkpoint(tmp_path, resume=False)).fit(data(), epochs=1)) == 1


def test_a_second_fit_begins_anew_and_its_file_is_not_taken_for_the_first(tmp_path):
    run = learner(Checkpoint(tmp_path))
    run.fit(data(), epochs=3)
    assert [row["epoch"] for row in run.fit(data(), epochs=2)] == [0, 1]
    with pytest.raises(ValueError, match="is from fit 2 with one Checkpoint, but this is fit 1; give each its own"):
        learner(Checkpoint(tmp_path)).fit(data(), epochs=3)


def test_callbacks_go_on_beside_a_new_one(tmp_path):
    def run(epochs, *new):
        recorders = StatisticsRecorder(per="epoch"), StatisticsRecorder()
        log = CSVLogger(tmp_path / "log.csv", per="phase")
        learner(*new, recorders[0], log, Checkpoint(tmp_path), recorders[1]).fit(data(), epochs=epochs)
        return [len(recorder.records) for recorder in recorders]

    assert run(1) == [1, 3]
    with pytest.warns(UserWarning, match="the callback EarlyStopping was not saved; it starts afresh"):
        assert run(2, EarlyStopping()) == [2, 6]
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3


def test_a_fit_that_failed_is_gone_on_with(tmp_path):
    failing = [True]

    def fail(learner, event):
        if failing[0] and event == "batch_end" and (learner.epoch_index, learner.batch_index) == (1, 1):
            raise OSError("disk")

    run, whole = learner(Checkpoint(tmp_path, every=1), fail), learner()
    with pytest.raises(OSError, match="disk"):
        run.fit(data(), epochs=3)
    failing[0] = False
    whole.fit(data(), epochs=3)
    assert list(run.fit(data(), epochs=3)) == list(whole.history)
    assert torch.equal(run.model.weight, whole.model.weight)


def test_what_is_being_cancelled_is_not_saved_as_going_on(tmp_path):
    def two(learner, event):
        if event == "batch_end" and learner.training and learner.batch_index == 1:
            raise CancelTraining

    class Die(Callback):
        def on_epoch_end(self, learner):
            raise SystemExit

    whole = learner(two)
    whole.fit(data(4), data(1), epochs=2)
    with pytest.raises(SystemExit):
        learner(Checkpoint(tmp_path, every=1), two, Die()).fit(data(4), data(1), epochs=2)
    run = learner(Checkpoint(tmp_path, every=1), two)
    run.fit(data(4), data(1), epochs=2)
    assert torch.equal(run.model.weight, whole.model.weight)
    assert list(run.history) == list(whole.history)


@NEEDS_INTERRUPTS
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_handlers_are_put_back_and_a_second_interrupt_acts_at_once(tmp_path):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    during = []

    def interrupt(learner, event):
        during.append(signal.getsignal(signal.SIGTERM))
        if event == "update_start":
            signal.raise_signal(signal.SIGINT)
            if learner.epoch_count == 2:
                signal.raise_signal(signal.SIGINT)

    checkpoints = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b", monitor="train.loss", resume=False)
    history = learner(*checkpoints, interrupt).fit(data(), epochs=1)
    assert history.stop_reason.startswith("SIGINT")
    assert during[1] == checkpoints[0]._on_signal
    assert fluxpy.load(checkpoints[1].last)["run"]["position"]["batch"] == 1
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    with pytest.raises(KeyboardInterrupt):
        learner(Checkpoint(tmp_path / "c"), interrupt).fit(data(), epochs=2)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_in_another_thread_no_signal_is_touched(tmp_path):
    histories = []
    thread = threading.Thread(target=lambda: histories.append(learner(Checkpoint(tmp_path)).fit(data(), epochs=1)))
    thread.start()
    thread.join()
    assert len(histories[0]) == 1


def test_what_a_checkpoint_refuses(tmp_path):
    with pytest.raises(ValueError, match="what is best is not known; say mode='min' or mode='max'"):
        Checkpoint(tmp_path, monitor="score")
    with pytest.raises(ValueError, match="write 'loss' or 'validation.loss', .*'train.loss'"):
        Checkpoint(tmp_path, monitor="valid.loss")
    with pytest.raises(ValueError, match="no such metric"):
        learner(Checkpoint(tmp_path, monitor="accuracy")).fit(data())
    with pytest.raises(ValueError, match="the fit has no validation data"):
        learner(Checkpoint(tmp_path, monitor="validation.loss")).fit(data())
    for wrong in ({"every": 0}, {"keep": -1}):
        with pytest.raises(ValueError, match="is not allowed"):
            Checkpoint(tmp_path, **wrong)
    fluxpy.save(tmp_path / "last.flux", epoch=3)
    with pytest.raises(ValueError, match="was not saved by a Checkpoint"):
        learner(Checkpoint(tmp_path)).fit(data())


# --- Stopping -----------------------------------------------------------------------------------------------------


def test_early_stopping(tmp_path):
    values = 3.0, 2.0, 1.95, 2.5, float("nan"), 0.0
    stopping = EarlyStopping(patience=3, min_delta=0.1)
    run = learner(stopping, Checkpoint(tmp_path), Score(*values))
    history = run.fit(data(), data(1), epochs=6)
    assert len(history) == 5
    assert history.stop_reason == "loss was not better than 2 for 3 epochs"
    again = learner(EarlyStopping(patience=3, min_delta=0.1), Checkpoint(tmp_path), Score(*values))
    assert again.fit(data(), data(1), epochs=6).stop_reason == history.stop_reason
    assert list(map(str, again.history)) == list(map(str, history))  # NaN is not equal to itself
    with pytest.raises(ValueError, match="patience=0 is not allowed"):
        EarlyStopping(patience=0)


def test_early_stopping_begins_anew_with_each_fit():
    stopping = EarlyStopping("accuracy", patience=1)
    run = Learner(nn.Linear(2, 2), F.cross_entropy, Descent(0.0), metrics=["accuracy"], callbacks=[stopping])
    batches = [(torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))]
    assert len(run.fit(batches, epochs=5)) == 2
    assert len(run.fit(batches, epochs=5)) == 2


@pytest.mark.parametrize("end", ["stopped", "all epochs"])
def test_the_best_weights_come_back(tmp_path, end):
    values = (3.0, 1.0, 2.0, 2.5, 2.0, 2.0) if end == "stopped" else (3.0, 1.0, 2.0)
    seen = []

    def watch(run, event):
        if event == "epoch_end":
            seen.append(run.model.weight.detach().clone())

    def make():
        return learner(EarlyStopping(patience=2, restore_best=True), Checkpoint(tmp_path), Score(*values), watch)

    run = make()
    history = run.fit(data(), data(1), epochs=len(values))
    assert len(history) == min(len(values), 4) and (history.stop_reason is not None) == (end == "stopped")
    assert torch.equal(run.model.weight, seen[1]) and not torch.equal(seen[1], seen[-1])
    model = nn.Linear(2, 1)
    fluxpy.load(tmp_path / "last.flux", model=model)
    assert torch.equal(model.weight, seen[-1])  # with which the run would go on
    again = make()
    if end == "stopped":
        again.fit(data(), data(1), epochs=len(values))
    else:
        with pytest.warns(UserWarning, match="nothing is left to do"):
            again.fit(data(), data(1), epochs=len(values))
    assert torch.equal(again.model.weight, seen[1])


def test_weights_stay_where_something_else_stopped_the_fit(tmp_path):
    def halt(run, event):
        if event == "batch_end" and run.training and run.step_index == 7:
            raise CancelFit("signal")

    def make(*more):
        return learner(EarlyStopping(patience=9, restore_best=True), Checkpoint(tmp_path), Score(*range(9)), *more)

    make(halt).fit(data(), data(1), epochs=4)
    rest, whole = make(), learner()
    rest.fit(data(), data(1), epochs=4)
    whole.fit(data(), data(1), epochs=1)
    assert torch.equal(rest.model.weight, whole.model.weight)  # that of the best epoch, the first


def test_reduce_on_plateau(tmp_path):
    values = 3.0, 2.0, 2.0, 2.0, 1.0, 1.5, 1.5, 1.5, 1.5, 1.5
    rule, rates = {"weight": Descent(0.1), "bias": Descent(0.01)}, []

    def watch(run, event):
        if event == "epoch_end":
            rates.append([fluxpy.value(leaf, "lr") for _, leaf in fluxpy.leaves(run.state)])

    def make(*more):
        reduce = ReduceOnPlateau(factor=0.5, patience=2, min_lr=0.004)
        return learner(reduce, Checkpoint(tmp_path), Score(*values), *more, watch, rule=rule)

    def halt(run, event):
        if event == "epoch_end" and run.epoch_index == 2:
            raise CancelFit("killed here")

    make(halt).fit(data(), data(1), epochs=10)
    make().fit(data(), data(1), epochs=10)
    # The callback comes before the one that watches: rates are those of the next epoch.
    first, second, third, fourth = [0.1, 0.01], [0.05, 0.005], [0.025, 0.004], [0.0125, 0.004]
    assert rates == [first] * 3 + [second] * 3 + [third] * 2 + [fourth] * 2


def test_reduce_on_plateau_under_a_scheduler_and_of_a_schedule():
    rates = []

    def watch(run, event):
        if event == "update_start":
            rates.append(fluxpy.value(run.state.weight, "lr"))

    half = lambda n: 0.5  # noqa: E731
    for rule, more in ((Descent(0.1), [LearningRateScheduler(scale=half)]), (Descent(lambda n: 0.05), [])):
        rates.clear()
        run = learner(ReduceOnPlateau(patience=1), *more, Score(1.0, 1.0, 1.0), watch, rule=rule)
        run.fit(data(1), data(1), epochs=3)
        assert rates == pytest.approx([0.05, 0.05, 0.005])


def test_reduce_on_plateau_says_at_once_what_it_cannot_do():
    with pytest.raises(ValueError, match="cannot be adjusted"):
        learner(ReduceOnPlateau(), rule=fluxpy.Rprop(0.01)).fit(data())
    two = fluxpy.OptimiserChain(fluxpy.RMSProp(1.0), fluxpy.Momentum(0.01))
    with pytest.raises(ValueError, match="say which: member="):
        learner(ReduceOnPlateau(), rule=two).fit(data())
    with pytest.raises(ValueError, match="no leaf has a rule"):
        learner(ReduceOnPlateau(member=Adam), rule=two).fit(data())
    run = learner(ReduceOnPlateau(patience=1, member=fluxpy.Momentum), Score(1.0, 1.0), rule=two)
    run.fit(data(), data(1), epochs=2)
    assert run.state.weight.rule == fluxpy.OptimiserChain(fluxpy.RMSProp(1.0), fluxpy.Momentum(0.001))


@pytest.mark.parametrize("wrong", [{"factor": 1.0}, {"factor": 0.0}, {"patience": 0}, {"min_lr": -1.0}])
def test_reduce_on_plateau_refuses(wrong):
    with pytest.raises(ValueError, match="is not allowed"):
        ReduceOnPlateau(**wrong)


def test_stop_on_nan():
    batches = data()
    batches[1] = batches[1][0] * float("nan"), batches[1][1]
    run = learner(StopOnNaN(), rule=Adam(0.1))
    history = run.fit(batches, epochs=2)
    assert "batch 1 of epoch 0 is nan" in history.stop_reason
    assert len(history) == 1 and run.model.weight.isfinite().all()
    run = learner(StopOnNaN())
    assert run.fit(data(), batches, epochs=2).stop_reason == "the validation loss of epoch 0 is nan"


# --- One run at a time --------------------------------------------------------------------------------------------


RIVAL = """
import sys, torch, fluxpy
from fluxpy.learner import Checkpoint, Learner
def wait(learner, event):
    if event == "batch_end":
        print("in the fit", flush=True)
        sys.stdin.readline()
data = [(torch.ones(4, 2), torch.ones(4, 1))]
torch.manual_seed(0)
learner = Learner(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, fluxpy.Descent(0.1), default_callbacks=False,
                  callbacks=[Checkpoint(sys.argv[1]), wait])
learner.fit(data)
"""


@pytest.mark.skipif(os.name == "nt", reason="locks of POSIX")
def test_a_second_run_on_one_directory_is_refused(tmp_path):
    with started(RIVAL, tmp_path, piped=True) as first:
        assert first.stdout.readline() == "in the fit\n"
        writing = tmp_path / f".fluxpy-{first.pid}-{'0' * 16}.tmp"
        left = tmp_path / f".fluxpy-{2**22 + 1}-{'0' * 16}.tmp"  # of no process: numbers end below
        writing.touch(), left.touch()
        with pytest.raises(RuntimeError, match=rf"is in use by process {first.pid} on .* since 20.*; give each run"):
            learner(Checkpoint(tmp_path)).fit(data(), epochs=1)
        assert writing.exists() and left.exists()  # the directory is the other's
        first.stdin.write("\n"), first.stdin.flush()
        assert first.wait() == 0
    assert (tmp_path / "last.flux").exists() and not (tmp_path / ".lock").exists()
    with pytest.warns(UserWarning, match="nothing is left to do"):
        learner(Checkpoint(tmp_path)).fit(data(1), epochs=1)
    assert not left.exists() and not writing.exists()


@pytest.mark.skipif(os.name == "nt", reason="locks of POSIX")
def test_a_killed_run_leaves_no_lock(tmp_path):
    with started(RIVAL, tmp_path, piped=True) as first:
        assert first.stdout.readline() == "in the fit\n"
    assert (tmp_path / ".lock").exists()
    learner(Checkpoint(tmp_path)).fit(data(), epochs=1)
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".flux"} == set()


def test_a_second_fit_in_one_process_is_refused_too(tmp_path):
    inner = learner(Checkpoint(tmp_path))

    def nest(outer, event):
        if event == "epoch_start":
            inner.fit(data(), epochs=1)

    with pytest.raises(RuntimeError, match="is in use by another fit of this process"):
        learner(Checkpoint(tmp_path), nest).fit(data(), epochs=1)
    learner(Checkpoint(tmp_path)).fit(data(), epochs=1)

"""StatisticsRecorder, CSVLogger, ProgressBar: what a run leaves to read."""

import contextlib
import copy
import csv
import fcntl
import io
import itertools
import math
import os
import pty
import re
import select
import struct
import sys
import termios
import time

import pytest
import torch
from scripts import run_script, started
from torch import nn
from torch.nn import functional as F

from fluxpy import Adam, DataLoader
from fluxpy.learner import (
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelTraining,
    CancelValidation,
    CSVLogger,
    Learner,
    ProgressBar,
    StatisticsRecorder,
)
from fluxpy.learner.callbacks import progress_bar

METRICS = ["accuracy", "matthews_correlation_coefficient"]


def arrays(rows, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=g), torch.randint(0, 4, (rows,), generator=g)


TRAIN, VALID = (list(DataLoader(arrays(20, seed), batch_size=4)) for seed in (0, 1))


def learn(*callbacks, metrics=METRICS):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    return Learner(model, F.cross_entropy, Adam(0.01), metrics=metrics, callbacks=callbacks, default_callbacks=False)


class At(Callback):
    """Does something, once, at one event of one epoch and batch."""

    def __init__(self, event, act, epoch=0, batch=None):
        self.event, self.act, self.epoch, self.batch, self.done = event, act, epoch, batch, False

    def __call__(self, learner, event):
        here = event == self.event and learner.epoch_index == self.epoch and self.batch in (None, learner.batch_index)
        if here and not self.done:
            self.done = True
            self.act(learner)


def throw(error):
    def act(_):
        raise error

    return act


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, strict=True))


def coordinates(rows):
    return [(int(row["epoch"]), row["phase"], int(row["batch"])) for row in rows]


def expected(epochs=2, valid=True):
    phases = ("train", "validation") if valid else ("train",)
    return [(e, phase, b) for e in range(epochs) for phase in phases for b in range(5)]


def reference():
    """The running values, by a plain loop over the events."""
    rows = []

    def note(learner, event):
        if event == "batch_end":
            rows.append(learner.running())

    learn(note).fit(TRAIN, VALID, epochs=2)
    return rows


# --- Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 50])
def test_batches(tmp_path, every):
    recorder = StatisticsRecorder(every=every)
    logger = CSVLogger(tmp_path / "a" / "log.csv", every=every)
    learn(recorder, logger).fit(TRAIN, VALID, epochs=2)
    assert coordinates(recorder.records) == expected()
    named = [{k: v for k, v in row.items() if k in ["loss", *METRICS]} for row in recorder.records]
    assert named == reference()
    written = rows_of(logger.path)
    assert list(written[0]) == ["epoch", "batch", "phase", "loss", *METRICS]
    assert [{k: str(v) for k, v in row.items()} for row in recorder.records] == written
    assert recorder.values("loss", "validation") == [float(r["loss"]) for r in written if r["phase"] == "validation"]


def test_phases(tmp_path):
    recorder, logger = StatisticsRecorder(per="epoch"), CSVLogger(tmp_path / "log.csv", per="phase")
    history = learn(recorder, logger).fit(TRAIN, VALID, epochs=2)
    assert coordinates(recorder.records) == [(e, p, 4) for e in range(2) for p in ("train", "validation")]
    for row, written in zip(recorder.records, rows_of(logger.path), strict=True):
        assert {k: str(v) for k, v in row.items()} == written
        assert history[row["epoch"]][row["phase"]] == {name: row[name] for name in ["loss", *METRICS]}


def test_rfc_4180(tmp_path):
    metrics = {'a, "b"': lambda output, target: 1.0, "nan": lambda output, target: float("nan")}
    learn(CSVLogger(tmp_path / "log.csv"), metrics=metrics).fit(TRAIN)
    text = (tmp_path / "log.csv").read_bytes().decode()
    assert text.startswith('epoch,batch,phase,loss,"a, ""b""",nan\r\n')
    assert text.count("\r\n") == text.count("\n") == 6
    assert text.splitlines()[1].endswith(",1.0,nan")


def test_rows_come_every_few_batches(tmp_path):
    logger, sizes = CSVLogger(tmp_path / "log.csv", every=2), []

    def look(learner, event):
        if event == "batch_end":
            sizes.append(len(rows_of(logger.path)))

    learn(logger, look).fit(TRAIN)
    assert sizes == [0, 2, 2, 4, 4]
    assert len(rows_of(logger.path)) == 5


def test_second_fit(tmp_path):
    recorder, logger = StatisticsRecorder(), CSVLogger(tmp_path / "log.csv")
    logger.path.write_text("an older run")
    learner = learn(recorder, logger)
    learner.fit(TRAIN)
    learner.fit(TRAIN, epochs=2)
    assert coordinates(recorder.records) == expected(2, valid=False)
    assert coordinates(rows_of(logger.path)) == expected(1, valid=False) + expected(2, valid=False)


def test_validate_is_no_part_of_the_run(tmp_path):
    recorder, logger = StatisticsRecorder(), CSVLogger(tmp_path / "log.csv")
    learner = learn(lambda learner, event: event == "epoch_end" and learner.validate(VALID), recorder, logger)
    learner.fit(TRAIN, VALID, epochs=2)
    learner.validate(VALID)
    assert coordinates(recorder.records) == coordinates(rows_of(logger.path)) == expected()


CANCELS = [CancelBatch, CancelTraining, CancelValidation, CancelEpoch, CancelFit]


@pytest.mark.parametrize("event", ["batch_start", "update_start", "inference_prediction_end", "batch_end"])
@pytest.mark.parametrize("cancel", CANCELS)
@pytest.mark.filterwarnings("ignore:Cancel.* is running")
def test_cancels(tmp_path, event, cancel):
    recorder, logger = StatisticsRecorder(), CSVLogger(tmp_path / "log.csv")
    scored = []

    def note(learner, event):
        if event.endswith("_start"):
            note.before = learner.metrics.batches
        elif event == "batch_end" and learner.metrics.batches > note.before:
            scored.append((learner.epoch_index, "train" if learner.training else "validation", learner.batch_index))

    learn(note, At(event, throw(cancel()), batch=2), recorder, logger).fit(TRAIN, VALID, epochs=2)
    assert coordinates(recorder.records) == coordinates(rows_of(logger.path)) == scored
    assert logger._file is None


@pytest.mark.parametrize("event", ["fit_start", "training_start", "batch_start", "batch_end", "validation_end"])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("first", [True, False])
def test_errors_leave_whole_files(tmp_path, event, error, first):
    logger = CSVLogger(tmp_path / "log.csv")
    at = At(event, throw(error), batch=2 if event.startswith("batch") else None)
    with pytest.raises(type(error)):
        learn(*([at, logger] if first else [logger, at])).fit(TRAIN, VALID, epochs=2)
    if event == "fit_start" and first:
        assert not logger.path.exists()
        return
    scored = {"fit_start": 0, "training_start": 0, "batch_start": 2, "batch_end": 3, "validation_end": 10}[event]
    assert coordinates(rows_of(logger.path)) == expected()[:scored]
    assert logger.path.read_bytes().endswith(b"\r\n")
    assert logger._file is None


# --- Resume -----------------------------------------------------------------------------------------------------------

SAVES = [
    ("batch_end", 0, 0),
    ("batch_end", 1, 2),
    ("batch_end", 1, 4),
    ("training_start", 1, None),
    ("training_end", 1, None),
    ("validation_start", 1, None),
    ("validation_end", 1, None),
    ("epoch_end", 0, None),
    ("epoch_start", 1, None),
]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("per", ["batch", "phase"])
@pytest.mark.parametrize("event, epoch, batch", SAVES)
@pytest.mark.parametrize("killed", [True, False])
def test_resume_has_every_row_once(tmp_path, first, per, event, epoch, batch, killed):
    """From a run that was killed at once, or had gone on for a while, wherever the one that saves stands."""

    def made(name, at):
        recorder = StatisticsRecorder(per="batch" if per == "batch" else "epoch")
        both = [recorder, CSVLogger(tmp_path / name, per=per)]
        return recorder, learn(*([at, *both] if first else [*both, at]))

    saved = []

    def save(learner):
        saved.append(copy.deepcopy(learner.state_dict()))
        saved.append((tmp_path / "log.csv").read_bytes())

    recorder, whole = made("whole.csv", At("fit_end", lambda learner: None))
    whole.fit(TRAIN, VALID, epochs=3)
    _, learner = made("log.csv", At(event, save, epoch, batch))
    learner.fit(TRAIN, VALID, epochs=2)
    if killed:
        (tmp_path / "log.csv").write_bytes(saved[1] + b"1,3,tr")
    again, learner = made("log.csv", At("fit_end", lambda learner: None))
    learner.load_state_dict(saved[0])
    learner.fit(TRAIN, VALID, epochs=3)
    assert again.records == recorder.records
    assert (tmp_path / "log.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_records_are_saved_by_column():
    """As tensors, so that a file of very many is written at once; they come back as they were."""
    recorder, other = StatisticsRecorder(), StatisticsRecorder()
    learner = learn(recorder)
    learner.fit(TRAIN, VALID)
    kept = learner.state_dict()["callbacks"][0][1]
    assert all(isinstance(column, torch.Tensor) and column.numel() == len(recorder.records) for column in kept.values())
    other.load_state_dict(kept)
    assert repr(other.records) == repr(recorder.records) and {row["phase"] for row in other.records} == {
        "train",
        "validation",
    }
    other.load_state_dict(StatisticsRecorder().state_dict())
    assert other.records == []


def test_resume_of_a_second_fit(tmp_path):
    saved = []
    logger = CSVLogger(tmp_path / "log.csv")
    learner = learn(logger)
    learner.fit(TRAIN)
    learner.fit(TRAIN, callbacks=[At("batch_end", lambda learner: saved.append(learner.state_dict()), batch=2)])
    before = logger.path.read_bytes()
    learner = learn(CSVLogger(tmp_path / "log.csv"))
    learner.load_state_dict(saved[0])
    learner.fit(TRAIN)
    assert logger.path.read_bytes() == before


def test_resume_where_the_file_is_gone(tmp_path):
    learner = learn(CSVLogger(tmp_path / "log.csv"))
    learner.fit(TRAIN)
    state = learner.state_dict()
    learner = learn(CSVLogger(tmp_path / "other.csv"))
    learner.load_state_dict(state)
    learner.fit(TRAIN, epochs=2)
    assert coordinates(rows_of(tmp_path / "other.csv")) == expected(2, valid=False)[5:]


@pytest.mark.parametrize("make", [StatisticsRecorder, lambda **kw: CSVLogger("log.csv", **kw)])
def test_refused(make):
    with pytest.raises(ValueError, match="per='step' is not allowed; it must be 'batch' or"):
        make(per="step")
    with pytest.raises(ValueError, match="every=0"):
        make(every=0)


# --- The bar ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch, fluxpy, sys, time
from fluxpy.learner import Learner
data = [(torch.randn(4, 3), torch.randint(0, 4, (4,)))] * 12
class Slow(Learner):
    def training_step(self, *args):
        time.sleep(0.02)
        return super().training_step(*args)
learner = Slow(torch.nn.Linear(3, 4), torch.nn.functional.cross_entropy, fluxpy.Adam(), metrics=["accuracy"])
learner.fit(data, data, epochs=2)
learner.fit((x for x in data))
learner.validate(data)
"""
LINES = [*[rf"Epoch {e}/2 · {phase} 12/12 \[=+\]" for e in (1, 2) for phase in ("train", "validation")]]
LINES += [r"Epoch 1/1 · train 12", r"Validation 12/12 \[=+\]"]
LINES = [line + r" loss \d\.\d{4} accuracy \d\.\d{4}" for line in LINES]


def in_terminal(columns):
    """What a terminal so wide gets, as text."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with started(SCRIPT, terminal=os.ttyname(its)) as process:
        got = b""
        while True:
            last = not process.is_running()
            if select.select([mine], [], [], 0.02)[0]:
                got += os.read(mine, 1 << 16)
            elif last:
                break
        assert process.wait() == 0, got.decode()
    os.close(mine), os.close(its)
    return got.decode()


@pytest.mark.parametrize("columns", [120, 60, 0])
def test_in_a_terminal_a_line_a_phase_in_place(columns):
    text = in_terminal(columns)
    assert "\x1b" not in text
    lines = text.split("\r\n")
    assert lines.pop() == ""
    drawn = [line.split("\r")[1:] for line in lines]
    last = [line[-1].rstrip() for line in drawn]
    assert len(last) == len(LINES)
    for line, pattern in zip(last, LINES, strict=True):
        pattern += r" · \d\.\d s"
        assert re.fullmatch(pattern if columns != 60 else r"(Epoch|Validation) .*12.* loss \d.*", line), line
    assert all(len(each) < (columns or 80) for line in drawn for each in line)
    assert all(len(line) >= 3 for line in drawn), "not redrawn"
    if columns == 120:
        pace = r"Epoch 1/2 · train \d+/12 \[=+>\.*\] loss \S+ accuracy \S+ · \d\S* (batches/s|s/batch) · 00:0\d left *"
        assert any(re.fullmatch(pace, line) for line in drawn[0]), drawn[0]
    for line in drawn:  # each covers the one before
        assert all(len(b) >= len(a.rstrip()) for a, b in itertools.pairwise(line))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_in_a_pipe_plain_lines(encoding):
    env = os.environ | {"PYTHONIOENCODING": encoding}
    code, out, text = run_script(SCRIPT, env=env, encoding=encoding)
    assert code == 0 and out == "", text
    assert not [c for c in text if ord(c) < 32 and c != "\n"]
    lines = text.replace(" - ", " · ").splitlines()
    assert all(re.fullmatch(p, line) for line, p in zip(lines, LINES, strict=True)), lines


def test_default_and_file(capsys):
    Learner(nn.Linear(3, 4), F.cross_entropy, Adam(), metrics=["accuracy"]).fit(TRAIN)
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"Epoch 1/1 · train 5/5 \[====\] loss \S+ accuracy \S+\n", err)
    file = io.StringIO()
    learn(ProgressBar(file=file)).fit(TRAIN, VALID)
    assert file.getvalue().count("\n") == 2 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [CancelTraining(), RuntimeError("boom")])
def test_a_phase_cut_short_says_how_far_it_came(error):
    file = io.StringIO()
    with contextlib.suppress(RuntimeError):
        learn(ProgressBar(file=file), At("update_start", throw(error), batch=2), metrics=()).fit(TRAIN)
    assert re.fullmatch(r"Epoch 1/1 · train 3/5 \[==>\.\] loss \S+\n", file.getvalue())


def test_in_a_notebook_a_bar_of_tqdm(monkeypatch, capsys):
    from tqdm import tqdm

    made = []

    class Bar(tqdm):
        def __init__(self, **kwargs):
            made.append(self)
            super().__init__(**kwargs)

    monkeypatch.setattr(progress_bar, "tqdm", Bar)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    learn(ProgressBar()).fit(TRAIN, VALID)
    assert [(bar.n, bar.total, bar.desc) for bar in made] == [(5, 5, "Epoch 1/1 · validation")]
    assert all(re.match("loss 1.* accuracy 0.*", bar.postfix) and bar.disable for bar in made)  # disabled: closed
    assert "5/5" in capsys.readouterr().err
    learner = learn(ProgressBar())
    learner.fit(TRAIN, VALID, epochs=3)
    learner.validate(VALID)
    titles = [(bar.n, bar.total, bar.desc, bar.disable) for bar in made[1:]]
    assert titles == [(15, 15, "Epoch 3/3 · validation", True), (5, 5, "Validation", True)]


def test_numbers():
    numbers = {"a": 0.0, "b": 1.5, "c": 1.25e-6, "d": -123456.7, "e": float("nan"), "f": float("inf")}
    assert progress_bar._text(numbers) == "a 0.0000 b 1.5000 c 1.25e-06 d -1.235e+05 e nan f inf"


class Terminal(io.StringIO):
    """A screen: what a line shows is what was written to it last."""

    def isatty(self):
        return True

    def lines(self):
        shown = []
        for line in self.getvalue().split("\n"):
            cells = ""
            for piece in line.split("\r"):
                cells = piece + cells[len(piece) :]
            shown.append(cells.rstrip())
        return shown


@pytest.mark.parametrize("columns", [100, 79, 60, 45, 30, 24])
def test_no_number_is_lost_in_a_narrow_terminal(monkeypatch, columns):
    monkeypatch.setattr(progress_bar, "_columns", lambda out: columns + 1)
    out = Terminal()
    bar = ProgressBar(file=out, seconds=0.0)
    learner = learn(bar, metrics=["accuracy", "top5_accuracy"])
    numbers = {"loss": 0.1234, "accuracy": 0.5678, "matthews_correlation_coefficient": -0.9876}
    monkeypatch.setattr(learner, "running", lambda: numbers)
    monkeypatch.setattr(bar, "_started", 0.0)
    learner.fit([(torch.randn(4, 3), torch.randint(0, 4, (4,)))] * 30)
    drawn = [line.rstrip() for line in out.getvalue().split("\r")[1:]]
    assert all(len(line) <= columns for line in drawn)
    for line in drawn[:-2]:
        assert [float(x) for x in re.findall(r"-?\d\.\d{4}", line)] == [0.1234, 0.5678, -0.9876], line
        assert columns == 24 or "loss" in line or "l…" in line
    if columns >= 79:
        assert any(re.search(r"· \S+(/s| batches/s| s/batch) · 00:0\d left$", line) for line in drawn), drawn


@pytest.mark.parametrize("text", ["one", "two\nlines"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_what_is_printed_meanwhile_has_lines_of_its_own(monkeypatch, text, end):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out), monkeypatch.setattr(sys, "stderr", out)

    def talk(learner, event):
        if event == "batch_end" and learner.training and learner.batch_index == 2:
            print(text, end=end)

    learn(ProgressBar(seconds=0.0), talk, metrics=["accuracy"]).fit(TRAIN, VALID)
    lines = out.lines()
    assert sys.stdout is out and sys.stderr is out
    for part in text.split("\n"):
        assert part in lines, lines
    assert sum(line.startswith("Epoch 1/1 · train 5/5 [") for line in lines) == 1
    assert sum(line.startswith("Epoch 1/1 · validation 5/5 [") for line in lines) == 1
    assert len(lines) == 4 + text.count("\n") + 1, lines  # what was drawn of training before it stays


def test_how_long_it_took(tmp_path):
    def nap(learner, event):
        if event == "batch_end" and learner.training:
            time.sleep(0.01)

    log, saved = CSVLogger(tmp_path / "log.csv", per="phase", seconds=True), []

    def save(learner, event):
        if event == "batch_end" and learner.training and (learner.epoch_index, learner.batch_index) == (1, 3):
            saved.append(learner.state_dict())

    history = learn(log, nap, save).fit(TRAIN, VALID, epochs=2)
    assert len(history.seconds) == 2 and history["seconds"] == history.seconds
    assert all(0.05 <= seconds < 10 for seconds in history.seconds)
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][-1] == "seconds" and all(float(row[-1]) >= 0.05 for row in rows[1::2])
    again = learn(CSVLogger(tmp_path / "log.csv", per="phase", seconds=True), nap, save)
    again.load_state_dict(saved[0])
    resumed = again.fit(TRAIN, VALID, epochs=2)
    assert resumed.seconds[0] == history.seconds[0] and 0.05 <= resumed.seconds[1] < 10
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 5 and float(rows[3][-1]) >= 0.05
    with pytest.raises(ValueError, match="per="):
        CSVLogger(seconds=True)


def test_a_history_by_column():
    def cut(learner, event):
        if event == "validation_start" and learner.epoch_index == 1:
            raise CancelEpoch

    history = learn(cut, metrics=["accuracy"]).fit(TRAIN, VALID, epochs=3)
    assert history["epoch"] == [0, 1, 2] and set(history["validation"]) == {"loss", "accuracy"}
    assert history["train"]["loss"] == [row["train"]["loss"] for row in history]
    found = history["validation"]["accuracy"]
    assert [found[0], found[2]] == [history[0]["validation"]["accuracy"], history[-1]["validation"]["accuracy"]]
    assert math.isnan(found[1]) and history[:2][1] is history[1]
    with pytest.raises(KeyError, match="'train' and 'validation'"):
        history["valid"]


def test_the_bar_reads_the_metrics_seldom(monkeypatch):
    reads, count = [], 2000
    learner = learn(ProgressBar(file=Terminal()))
    monkeypatch.setattr(learner, "running", lambda: reads.append(1) or {})
    begun = time.monotonic()
    learner.fit(TRAIN[:1] * count)
    assert 1 <= len(reads) <= 4 + (time.monotonic() - begun) * 10


# --- A callback of one's own ------------------------------------------------------------------------------------------


def test_a_callback_takes_few_lines():
    losses = []

    class Losses(Callback):
        def on_batch_end(self, learner):
            losses.append(learner.step.loss.item())

    def stop(learner, event):
        if event == "validation_end" and learner.stats["loss"] < 10:
            raise CancelFit("good enough")

    history = learn(Losses(), stop).fit(TRAIN, VALID, epochs=9)
    assert len(losses) == 10 and history.stop_reason == "good enough"

"""Losses, metrics, batches, streams and files as users bring them: each of these went wrong without a word, or failed
in words of others."""

import contextlib
import errno
import functools
import io
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
from learner_parts import Learner, net
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fluxpy
from fluxpy import Adam, DataLoader, Descent, setup, train, trainstep
from fluxpy.learner import Checkpoint, CSVLogger, EarlyStopping, ReduceOnPlateau, StatisticsRecorder, lr_find
from fluxpy.learner import Learner as _Learner
from fluxpy.learner import lock as lock_file


def data(rows=16, size=4):
    g = torch.Generator().manual_seed(0)
    return DataLoader((torch.randn(rows, 3, generator=g), torch.randint(4, (rows,), generator=g)), batch_size=size)


def learner(*callbacks, model=None, loss=F.cross_entropy, rule=None, **options):
    return Learner(model or net(), loss, rule or Adam(0.01), callbacks=callbacks, **options)


# --- Modes --------------------------------------------------------------------------------------------------------


class Merging(nn.Module):
    """A low-rank adapter that adds itself to the weights to be evaluated, as loralib and PEFT do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(3, 4)
        self.a, self.b, self.merged = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 2)), False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.base.weight += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        return self.base(x) if self.merged else self.base(x) + x @ self.a.T @ self.b.T


def test_a_module_comes_back_from_evaluation_in_its_own_way():
    model = nn.ModuleDict({"inner": Merging(), "off": nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())})
    model.forward = lambda x: model["inner"](model["off"](x))
    run = learner(model=model, rule={"inner.base.*": None, "*": Adam()})
    model["off"].eval()
    before = model["inner"].base.weight.clone()
    flags = [m.training for m in model.modules()]
    run.predict(data())
    assert not model["inner"].merged and [m.training for m in model.modules()] == flags
    torch.testing.assert_close(model["inner"].base.weight, before)
    run.fit(data(), callbacks=[lambda run, event: run.predict(data()) if event == "batch_end" else None])
    assert run.state["inner"].a.count == 4


def test_a_loss_is_in_evaluation_mode_too_in_validation():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.kept = [], nn.Dropout().eval()

        def forward(self, output, target):
            self.seen.append((self.training, self.kept.training))
            return F.cross_entropy(output, target, label_smoothing=0.1 if self.training else 0.0)

    loss = Own()
    history = learner(loss=loss, rule=Descent(0.0)).fit(data(), data())
    assert loss.seen == [(True, False)] * 4 + [(False, False)] * 4 and loss.training
    plain = learner(rule=Descent(0.0)).fit(data(), data())
    assert history[0]["validation"] == plain[0]["validation"] != history[0]["train"]


# --- Batches ------------------------------------------------------------------------------------------------------


def packed(n=2):
    torch.manual_seed(1)
    return pack_sequence([torch.randn(3 - i, 2) for i in range(n)])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.GRU(2, 3)

    def forward(self, x):
        return self.cell(x)[0]


@pytest.mark.parametrize("batch", [(packed(),), {"x": packed()}, {"x": {"deep": (packed(), 1)}}])
def test_packed_sequences_are_batches(batch):
    def find(x):
        return x if isinstance(x, PackedSequence) else find(next(iter(x.values() if isinstance(x, dict) else x)))

    model, other = Recurrent(), Recurrent()
    state, by_hand = setup(Descent(0.1), model), setup(Descent(0.1), other)
    size = lambda output: output.data.square().mean()  # noqa: E731
    _, output = trainstep(lambda m, x: (size(out := m(find(x))), out), model, batch, state)
    grads = fluxpy.gradient(lambda m: size(m(packed())), other)
    fluxpy.update(by_hand, other, grads)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert isinstance(output, PackedSequence) and not output.data.requires_grad


def test_packed_sequences_go_through_a_learner_and_to_another_device():
    class Own(_Learner):
        def training_step(self, model, input, target):
            output = model(input)
            return output.data.square().mean(), output

    run = Own(Recurrent(), None, Adam(), default_callbacks=False)
    run.fit([(packed(), torch.ones(2))] * 2)
    outputs = run.predict([(packed(),), (packed(3),)])
    assert [out.batch_sizes.tolist() for out in outputs] == [[2, 2, 1], [3, 2, 1]]
    moved = fluxpy.train.__globals__["place"]({"x": (packed(), 1)}, torch.device("meta"))["x"][0]
    assert moved.data.is_meta and not moved.batch_sizes.is_meta


def test_what_is_no_container_moves_by_its_own_way():
    class Graph:
        """As the batches of PyTorch Geometric."""

        def __init__(self, x):
            self.x = x

        def to(self, device):
            return Graph(self.x.to(device))

    moved = fluxpy.train.__globals__["place"]((Graph(torch.ones(2)), {"g": Graph(torch.ones(2))}), torch.device("meta"))
    assert moved[0].x.is_meta and moved[1]["g"].x.is_meta


def test_samples_of_detection_are_its_images():
    class Own(_Learner):
        def training_step(self, model, input, target):
            return model(torch.stack(input)).mean() ** 2

    boxes = [torch.ones(n, 4) for n in (0, 5, 1, 2)]
    rows = [(torch.randn(3), {"boxes": b}) for b in boxes]
    loader = torch.utils.data.DataLoader(rows, 2, collate_fn=lambda samples: tuple(zip(*samples, strict=True)))
    seen = []
    watch = lambda run, event: seen.append(run.step.samples) if event == "batch_end" else None  # noqa: E731
    Own(net(), None, Adam(), callbacks=[watch], default_callbacks=False).fit(loader)
    assert seen == [2, 2]


def test_predictions_of_detection_stay_those_of_their_images():
    """Those of the first image of each batch were joined to one."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, images):
            return [{"boxes": self.scale * image.repeat(n + 1, 1)} for n, image in enumerate(images)]

    images = torch.randn(4, 3)
    first, second = Learner(Detector(), F.mse_loss, Adam()).predict([images[:2], images[2:]])
    found = [image["boxes"] for image in (*first, *second)]
    assert [len(boxes) for boxes in found] == [1, 2, 1, 2]
    assert all(torch.equal(boxes[0], image) for boxes, image in zip(found, images, strict=True))


def test_a_length_that_is_not_implemented_is_not_known():
    class Stream:
        def __iter__(self):
            return iter(data())

        def __len__(self):
            raise NotImplementedError

    run = learner()
    run.fit(Stream(), epochs=2)
    assert run.progress.step == 8 and run.step_count is None


@pytest.mark.parametrize("kind", [np.longdouble, np.clongdouble])
def test_numbers_that_torch_has_not_are_refused(kind):
    if np.dtype(kind).itemsize in (8, 16):
        pytest.skip("is an ordinary number here")
    with pytest.raises(TypeError, match=r"expected tensors or NumPy arrays of numbers with rows; 'x' is a \w+ array"):
        DataLoader({"x": np.ones(3, kind)})


# --- Losses and metrics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "module"),
    [
        (functools.partial(F.cross_entropy, ignore_index=0), nn.CrossEntropyLoss(ignore_index=0)),
        (functools.partial(nn.CrossEntropyLoss(ignore_index=0)), nn.CrossEntropyLoss(ignore_index=0)),
        (
            functools.partial(F.cross_entropy, weight=torch.tensor([1.0, 5, 2, 3])),
            nn.CrossEntropyLoss(torch.tensor([1.0, 5, 2, 3])),
        ),
    ],
)
def test_a_window_knows_what_a_partial_loss_was_made_with(function, module):
    models = net(), net(), net()
    x, y = torch.randn(12, 3), torch.tensor([0, 0, 0, 1, 0, 2, 1, 1, 3, 2, 2, 1])
    for model, loss, size in zip(models, (function, module, module), (4, 4, 12), strict=True):
        learner(model=model, loss=loss, rule=Descent(1.0), accumulate=12 // size).fit(DataLoader((x, y), size))
    for a, b, whole in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, whole)


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(ignore_index=0), functools.partial(F.cross_entropy, ignore_index=0)]
)
def test_metrics_by_name_leave_out_what_the_loss_ignores(loss):
    model, y = net(), torch.tensor([0, 0, 1, 2, 0, 3])
    x = torch.randn(6, 3)
    found = learner(model=model, loss=loss, metrics=["accuracy", "perplexity"]).validate(DataLoader((x, y), 4))
    met, rest = model(x).argmax(1) == y, y != 0
    assert found["accuracy"] == met[rest].double().mean()
    assert found["perplexity"] == pytest.approx(F.cross_entropy(model(x)[rest], y[rest]).exp().item(), rel=1e-6)


def test_a_loss_may_say_that_it_ignores_nothing():
    class Own(nn.Module):  # as the losses of segmentation_models_pytorch
        ignore_index = None

        def forward(self, output, target):
            return F.cross_entropy(output, target)

    learner(loss=Own(), accumulate=2, metrics=["accuracy"]).fit(data())


def test_a_window_refuses_sums():
    for loss in (nn.CrossEntropyLoss(reduction="sum"), functools.partial(F.cross_entropy, reduction="sum")):
        learner(loss=loss).fit(data())
        with pytest.raises(ValueError, match="accumulate=2 needs a loss that is a mean, .* reduction='sum'"):
            learner(loss=loss, accumulate=2)


@pytest.mark.parametrize("metric", ["accuracy", "matthews_correlation_coefficient"])
@pytest.mark.parametrize("loss", [nn.BCELoss(), F.binary_cross_entropy])
def test_scores_and_probabilities_are_not_mixed_up(loss, metric):
    with pytest.raises(ValueError, match=f"{metric}.*above 0 for yes.*BCEWithLogitsLoss"):
        learner(loss=loss, metrics=[metric])

    class Own(_Learner):
        def training_step(self, model, input, target):
            output = model(input)
            return self.loss(output.sigmoid(), target), output

    x = torch.randn(8, 3)
    run = Own(nn.Linear(3, 1), loss, Adam(), metrics=[metric], default_callbacks=False)
    run.fit(DataLoader((x, (x[:, :1] > 0).float()), 4))
    learner(loss=loss, metrics=["perplexity"]), learner(loss=nn.BCEWithLogitsLoss(), metrics=[metric])


def test_no_metrics_are_an_empty_list():
    with pytest.raises(TypeError, match=r"metrics= takes a list: metrics=\[\]"):
        learner(metrics=None)


@pytest.mark.parametrize("value", [np.ones(2), {"x": 1}, None])
def test_a_metric_that_gives_no_number_is_told_at_once(value):
    with pytest.raises(TypeError) as caught:
        learner(metrics={"odd": lambda output, target: value}).fit(data())
    assert "in the metric 'odd'" in caught.value.__notes__


def test_the_trial_of_lr_find_has_the_loss_of_its_own_model():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.norm, self.head = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

        def forward(self, x):
            return self.body(x)

        def loss(self, output, target):
            return F.cross_entropy(self.head(self.norm(output)), target)

    model = Own()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    lr_find(learner(model=model, loss=model.loss), data(64))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# --- Streams ------------------------------------------------------------------------------------------------------


class Tee:
    """As scripts write one, to have what is printed in a file too."""

    def __init__(self):
        self.text = io.StringIO()

    def write(self, text):
        self.text.write(text)

    def flush(self):
        pass


def test_a_stream_of_ones_own_is_no_terminal(monkeypatch):
    model, tee = net(), Tee()
    state = setup(Adam(), model)
    with contextlib.redirect_stderr(tee):
        assert len(train(lambda m, x, y: F.cross_entropy(m(x), y), model, data(), state)) == 4
        assert not tee.text.getvalue()
        _Learner(model, F.cross_entropy, Adam()).fit(data())
    assert "Epoch 1/1 · train 4/4" in tee.text.getvalue()
    monkeypatch.setattr(sys, "stderr", None)  # as where there is no console
    assert len(train(lambda m, x, y: F.cross_entropy(m(x), y), model, data(), state)) == 4


# --- Resume -------------------------------------------------------------------------------------------------------


def test_a_log_does_not_go_on_with_other_columns(tmp_path):
    def run(epochs, metrics, name="log.csv", **options):
        callbacks = CSVLogger(tmp_path / name, per="phase", **options), Checkpoint(tmp_path / "run")
        return learner(*callbacks, metrics=metrics).fit(data(), epochs=epochs)

    run(1, ["accuracy"])
    text = (tmp_path / "log.csv").read_text()
    for metrics, options in ((["accuracy", "perplexity"], {}), ([], {}), (["accuracy"], {"seconds": True})):
        with pytest.raises(ValueError, match="log.csv. has the columns epoch, batch, phase, loss, accuracy; for epoch"):
            run(2, metrics, **options)
        assert (tmp_path / "log.csv").read_text() == text
    run(2, ["accuracy"])
    assert (tmp_path / "log.csv").read_text().startswith(text) and len(run(3, [], "other.csv")) == 3
    log = CSVLogger(tmp_path / "third.csv")
    learner(log).fit(data())
    learner(log).fit(data())
    with pytest.raises(ValueError, match="give another file"):
        learner(log, metrics=["accuracy"]).fit(data())


def test_one_file_has_one_log(tmp_path):
    logs = CSVLogger(tmp_path / "log.csv"), CSVLogger(tmp_path / "." / "log.csv", per="phase")
    with pytest.raises(ValueError, match="log.csv' is written by another one: give each its own file"):
        learner(*logs).fit(data())
    learner(logs[0]).fit(data()), learner(logs[1]).fit(data())
    assert len((tmp_path / "log.csv").read_text().split()) == 2


def test_records_go_on_with_other_metrics(tmp_path):
    def run(epochs, *metrics):
        recorder = StatisticsRecorder(per="phase")
        learner(recorder, Checkpoint(tmp_path), metrics=metrics).fit(data(), epochs=epochs)
        return recorder

    run(1, "accuracy", "perplexity")
    run(2, "accuracy")
    recorder = run(3, "accuracy", "top5_accuracy")
    first, second, third = recorder.values("perplexity")
    assert first > 1 and math.isnan(second) and math.isnan(third)
    assert recorder.values("top5_accuracy")[2] == 1.0 and all(map(math.isfinite, recorder.values("accuracy")))


@pytest.mark.parametrize("name", ["val/f1", "f1.macro", 'a:b\\c"*'])
def test_a_metric_may_have_any_name(tmp_path, name):
    checkpoint = Checkpoint(tmp_path, monitor=f"train.{name}", mode="max")
    stop = EarlyStopping(name, mode="max")
    learner(checkpoint, stop, metrics={name: lambda output, target: 0.5}).fit(data())
    assert checkpoint.best[0][1].is_file() and checkpoint.best[0][1].parent == tmp_path and stop.best == 0.5


def test_bests_by_another_monitor_do_not_count(tmp_path):
    def run(epochs, *monitors):
        plateaus = [EarlyStopping(m, 9, restore_best=True) for m in monitors] + [ReduceOnPlateau(m) for m in monitors]
        checkpoint = Checkpoint(tmp_path, monitor=monitors[0])
        made = learner(*plateaus, checkpoint, metrics=["accuracy"])
        made.fit(data(), data(), epochs=epochs)
        return made.history, plateaus, checkpoint

    run(2, "accuracy", "loss")
    history, plateaus, checkpoint = run(3, "loss", "accuracy")
    last = history[2]["validation"]
    assert [plateau.best for plateau in plateaus] == [last["loss"], last["accuracy"]] * 2
    assert [value for value, _ in checkpoint.best] == [last["loss"]]
    _, plateaus, checkpoint = run(4, "loss", "accuracy")
    assert plateaus[0].best <= last["loss"] and checkpoint.best[0][0] <= last["loss"]


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_run_within_validation_needs_its_data(tmp_path):
    """Without it, the run never went on: cancels did nothing, and later files were the old one."""

    def stop(run, event):
        if event == "batch_end" and run.phase == "validation" and run.epoch_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    learner(stop, Checkpoint(tmp_path)).fit(data(), data(), epochs=3)
    with pytest.raises(ValueError, match="was in the middle of validation, and this fit has no validation data"):
        learner(Checkpoint(tmp_path)).fit(data(), epochs=3)
    history = learner(Checkpoint(tmp_path)).fit(data(), data(), epochs=3)
    assert len(history["validation"]["loss"]) == 3


def test_a_run_says_where_there_is_no_more_validation_or_nothing_to_do():
    first = learner()
    first.fit(data(), data(), epochs=2)
    second = learner()
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="the saved run had validation data, and this fit has none"):
        second.fit(data(), epochs=3)
    again = learner()
    again.load_state_dict(second.state_dict())
    with pytest.warns(UserWarning, match="the saved run had no validation data, and this fit has some"):
        again.fit(data(), data(), epochs=4)
    third = learner()
    third.load_state_dict(second.state_dict())
    with pytest.warns(UserWarning, match="the run has done 3 epochs of 3: nothing is left to do"):
        third.fit(data(), epochs=3)
    assert third.progress.step == 12


@pytest.mark.parametrize("event", ["fit_start", "epoch_start", "training_start"])
def test_a_resumed_fit_that_failed_before_it_went_on_can_be_tried_again(event):
    """It began anew, with the trained weights."""

    def fail(run, at):
        if at == event:
            raise OSError("cannot write")

    whole, first, second = learner(), learner(), learner()
    whole.fit(data(), epochs=2)
    saved = []
    keep = lambda run, at: saved.append(run.state_dict()) if at == "batch_end" and run.step_index == 5 else None  # noqa: E731
    first.fit(data(), epochs=2, callbacks=[keep])
    second.load_state_dict(saved[0])
    for _ in range(2):
        with pytest.raises(OSError, match="cannot write"):
            second.fit(data(), epochs=2, callbacks=[fail])
    history = second.fit(data(), epochs=2)
    assert list(history) == list(whole.history) and second.state[0].weight.count == 8
    assert all(map(torch.equal, whole.model.parameters(), second.model.parameters()))
    assert len(second.fit(data())) == 1  # and one that came to its end begins anew


def test_a_file_system_without_locks_locks_nothing(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock_file.fcntl, "lockf", refuse)
    learner(Checkpoint(tmp_path)).fit(data())
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == "last.flux" and not (tmp_path / ".lock").exists()


def test_the_run_in_a_file_is_not_what_a_learner_loads(tmp_path):
    learner(Checkpoint(tmp_path)).fit(data())
    with pytest.raises(ValueError, match="takes what Learner.state_dict gave"):
        learner().load_state_dict(fluxpy.load(tmp_path / "last.flux")["run"])

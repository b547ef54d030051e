"""TensorBoardLogger, read back by tensorboard's own reader."""

import io

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from fluxpy import Adam, AdamW
from fluxpy.learner import (
    CancelBatch,
    CancelFit,
    FreezeUntil,
    LearningRateScheduler,
    StatisticsRecorder,
    TensorBoardLogger,
)
from fluxpy.learner import Learner as _Learner
from fluxpy.schedules import linear


def Learner(logger, *callbacks, rule=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    callbacks = [*callbacks, logger]
    rule = rule or Adam(0.1)
    return _Learner(model, F.cross_entropy, rule, metrics=["accuracy"], callbacks=callbacks, default_callbacks=False)


def data(n=4, size=4):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, generator=g), torch.randint(0, 4, (size,), generator=g)) for _ in range(n)]


def read(directory):
    found = EventAccumulator(str(directory), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    return found


def close(rows, expected):
    return [row[0] for row in rows] == [row[0] for row in expected] and [row[1] for row in rows] == pytest.approx(
        [row[1] for row in expected]
    )


def scalars(directory, tag):
    return [(event.step, event.value) for event in read(directory).Scalars(tag)]


def test_train_and_validation_share_their_tags(tmp_path):
    logger, recorder = TensorBoardLogger(tmp_path / "stats", every=3), StatisticsRecorder()
    learner = Learner(logger, recorder)
    history = learner.fit(data(), data(2), epochs=3)
    assert logger.directory.parent == tmp_path / "stats"
    assert sorted(path.name for path in logger.directory.iterdir()) == ["train", "validation"]
    for phase in ("train", "validation"):
        for name in ("loss", "accuracy"):
            expected = [(epoch, row[phase][name]) for epoch, row in enumerate(history)]
            assert close(scalars(logger.directory / phase, f"epoch/{name}"), expected)
    assert read(logger.directory / "validation").Tags()["scalars"] == ["epoch/loss", "epoch/accuracy"]
    per_batch = scalars(logger.directory / "train", "batch/accuracy")
    assert close(per_batch, list(enumerate(recorder.values("accuracy"))))
    losses = [loss for _, loss in scalars(logger.directory / "train", "batch/loss")]
    assert sum(losses[:4]) / 4 == pytest.approx(history[0]["train"]["loss"])
    old = logger.directory
    learner.fit(data())
    assert logger.directory != old and len(scalars(logger.directory / "train", "batch/loss")) == 4


def test_what_comes_on_request(tmp_path):
    logger = TensorBoardLogger(tmp_path, norms=2, histograms=1, hyperparameters={"seed": 7}, config={"depth": 2})
    rule = {"0.*": Adam(0.1), "2.bias": Adam(0.3), "*": Adam(0.2)}
    schedule, norms = LearningRateScheduler(scale=linear(1.0, 0.0, 4)), []

    def watch(learner, event):
        if event == "update_start":
            norms.append(learner.step.grads[0].weight.square().sum() + learner.step.grads[0].bias.square().sum())

    Learner(logger, schedule, FreezeUntil("2.weight", 1), watch, rule=rule).fit(data(2), epochs=2)
    train = logger.directory / "train"
    assert close(scalars(train, "lr/0"), [(0, 0.1), (1, 0.075), (2, 0.05), (3, 0.025)])
    assert close(scalars(train, "lr/2.weight"), [(2, 0.1), (3, 0.05)])
    assert close(scalars(train, "lr/2"), [(0, 0.3), (1, 0.225)])  # while all that trains in it has one rate
    expected = [(step, norms[step].sqrt().item()) for step in (0, 2)]
    assert close(scalars(train, "gradient_norm/0"), expected)
    ratios = scalars(train, "update_ratio/0")
    assert [step for step, _ in ratios] == [0, 2] and all(0 < ratio < 1 for _, ratio in ratios)
    found = read(train)
    assert [event.step for event in found.Histograms("weights/0.weight")] == [0, 1]
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert '"depth": 2' in texts["config/text_summary"] and "Linear" in texts["model/text_summary"]
    start = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"seed" in start and b"Adam.lr" in start
    assert "_hparams_/session_end_info" in found._plugin_to_tag_to_content["hparams"]


def test_goes_on_in_its_directory_and_writes_each_batch_once(tmp_path):
    file, done = io.BytesIO(), []

    def save(learner, event):
        if event == "batch_end" and learner.training and learner.step_index == 4 and not done:
            torch.save(learner.state_dict(), file)
        if event == "batch_end" and learner.training and learner.step_index == 6 and not done:
            done.append(True)
            raise CancelFit("killed here")

    first = TensorBoardLogger(tmp_path, every=1)
    Learner(first, save).fit(data(3), data(1), epochs=4)
    file.seek(0)
    logger = TensorBoardLogger(tmp_path, every=2)
    resumed = Learner(logger, save)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    history = resumed.fit(data(3), data(1), epochs=4)
    assert logger.directory == first.directory and len(list(tmp_path.iterdir())) == 1
    assert [step for step, _ in scalars(logger.directory / "train", "batch/loss")] == list(range(12))
    for phase in ("train", "validation"):
        expected = [(epoch, row[phase]["loss"]) for epoch, row in enumerate(history)]
        assert close(sorted(set(scalars(logger.directory / phase, "epoch/loss"))), expected)


def test_cancelled_batches_and_validate_write_nothing(tmp_path):
    def cancel(learner, event):
        if event == "update_start" and learner.step_index == 1:
            raise CancelBatch

    logger = TensorBoardLogger(tmp_path)
    learner = Learner(logger, cancel, lambda learner, e: learner.validate(data(1)) if e == "epoch_end" else None)
    learner.fit(data(3))
    learner.validate(data(1))
    assert [step for step, _ in scalars(logger.directory / "train", "batch/loss")] == [0, 2]
    assert [path.name for path in logger.directory.iterdir()] == ["train"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)

    def forward(self, x):
        return self.norm(self.attention(x))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(3, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def hparams(directory):
    """The columns of the HPARAMS table."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = read(directory).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in started.hparams.items()}


@pytest.mark.parametrize(
    ("depth", "norms"), [(1, ["layers", "head"]), (2, ["layers.0", "layers.1", "layers.2", "head"])]
)
def test_one_chart_a_layer_and_columns_that_can_be_sorted(tmp_path, depth, norms):
    logger = TensorBoardLogger(tmp_path, norms=1, depth=depth)
    rule = {f"layers.{i}.*": AdamW(0.1 * 2**i) for i in range(3)} | {"head.bias": AdamW(0.1, weight_decay=0.0)}
    torch.manual_seed(0)
    learner = _Learner(
        Encoder(), F.cross_entropy, rule | {"*": AdamW(0.1)}, callbacks=[logger], default_callbacks=False
    )
    learner.fit(data())
    tags = read(logger.directory / "train").Tags()["scalars"]
    layers = ["layers.0", "layers.1", "layers.2", "head"]  # whose rates differ, so at any depth
    assert {tag.removeprefix("lr/") for tag in tags if tag.startswith("lr/")} == set(layers)
    assert {tag.removeprefix("gradient_norm/") for tag in tags if tag.startswith("gradient_norm/")} == set(norms)
    found = hparams(logger.directory / "train")
    assert [found[f"AdamW.lr/{name}"] for name in layers] == pytest.approx([0.1, 0.2, 0.4, 0.1])
    assert found["AdamW.weight_decay/layers"] == 0.01 and found["AdamW.weight_decay/head.bias"] == 0.0
    assert found["AdamW.eps"] == 1e-8


def test_with_fewer_parts_than_asked_for_a_chart_is_still_a_layer(tmp_path):
    logger = TensorBoardLogger(tmp_path, depth=3, norms=2)
    Learner(logger).fit(data())
    tags = read(logger.directory / "train").Tags()["scalars"]
    assert [tag for tag in tags if tag.startswith("gradient_norm/")] == ["gradient_norm/0", "gradient_norm/2"]
    assert [tag for tag in tags if tag.startswith("lr/")] == ["lr/0", "lr/2"]

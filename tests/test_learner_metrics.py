"""Metrics against scikit-learn, on batches of different sizes."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fluxpy import Adam
from fluxpy.learner import (
    Accuracy,
    Learner,
    MatthewsCorrelationCoefficient,
    Metric,
    Perplexity,
    Step,
    Top5Accuracy,
    collection,
)

SIZES = [7, 3, 5, 1, 16]


def over(asked, batches, loss=F.cross_entropy):
    """The numbers of a phase with these outputs and targets."""
    found = collection.Metrics(asked)
    for output, target in batches:
        step = Step(None, target, len(target))
        step.output, step.loss = output, loss(output, target)
        found.update(step)
    return found.read(found.peek())


def scores(*more, classes=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for n in SIZES:
        target = torch.randint(0, classes, (n, *more), generator=g)
        output = torch.randn(n, classes, *more, generator=g) + 2 * F.one_hot(target, classes).movedim(-1, 1)
        out.append((output, target))
    return out


def flat(batches):
    outputs = torch.cat([o.movedim(1, -1).flatten(0, -2) for o, _ in batches])
    return outputs, torch.cat([t.flatten() for _, t in batches])


@pytest.mark.parametrize("more", [(), (6,), (4, 5)])
def test_against_scikit_learn(more):
    sk = pytest.importorskip("sklearn.metrics")
    batches = scores(*more)
    names = ["accuracy", "top5_accuracy", "matthews_correlation_coefficient", "perplexity"]
    seen = over(names, batches)
    output, target = flat(batches)
    assert seen["accuracy"] == pytest.approx(sk.accuracy_score(target, output.argmax(1)))
    assert seen["top5_accuracy"] == pytest.approx(sk.top_k_accuracy_score(target, output, k=5, labels=range(7)))
    mcc = sk.matthews_corrcoef(target, output.argmax(1))
    assert seen["matthews_correlation_coefficient"] == pytest.approx(mcc)
    log_loss = sk.log_loss(target, output.double().softmax(1), labels=range(7))
    assert seen["loss"] == pytest.approx(log_loss, rel=1e-5)
    assert seen["perplexity"] == pytest.approx(math.exp(log_loss), rel=1e-5)


@pytest.mark.parametrize("shape", ["row", "column", "squeezed"])
def test_binary_against_scikit_learn(shape):
    sk = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(n, generator=g), torch.randint(0, 2, (n,), generator=g).float()) for n in SIZES]
    output, target = (torch.cat(x) for x in zip(*pairs, strict=True))
    shaped = {
        "row": pairs,
        "column": [(o[:, None], t[:, None]) for o, t in pairs],
        "squeezed": [(o[:, None], t) for o, t in pairs],
    }[shape]
    loss = lambda o, t: F.binary_cross_entropy_with_logits(o.flatten(), t.flatten())  # noqa: E731
    seen = over(["accuracy", "matthews_correlation_coefficient"], shaped, loss)
    assert seen["accuracy"] == pytest.approx(sk.accuracy_score(target, output > 0))
    assert seen["matthews_correlation_coefficient"] == pytest.approx(sk.matthews_corrcoef(target, output > 0))


def test_ignored_targets_do_not_count():
    sk = pytest.importorskip("sklearn.metrics")
    batches = scores(6)
    for _, target in batches:
        target[:, 4:] = -100
        target[0, 1] = -100
    seen = over(["accuracy", "top5_accuracy", "matthews_correlation_coefficient", "perplexity"], batches)
    output, target = flat(batches)
    output, target = output[target >= 0], target[target >= 0]
    assert seen["accuracy"] == pytest.approx(sk.accuracy_score(target, output.argmax(1)))
    assert seen["top5_accuracy"] == pytest.approx(sk.top_k_accuracy_score(target, output, k=5, labels=range(7)))
    mcc = sk.matthews_corrcoef(target, output.argmax(1))
    assert seen["matthews_correlation_coefficient"] == pytest.approx(mcc)
    assert seen["perplexity"] == pytest.approx(math.exp(F.cross_entropy(output, target)), rel=1e-5)


def test_a_correlation_where_nothing_changes_is_zero():
    outputs = [(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 1, 0, 1]))]
    assert over(["matthews_correlation_coefficient"], outputs)["matthews_correlation_coefficient"] == 0


def test_classes_in_the_last_dimension_and_where_two_fit():
    output, target = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    loss = lambda o, t: o.mean()  # noqa: E731
    expected = (output.argmax(-1) == target).float().mean().item()
    assert over(["accuracy"], [(output, target)], loss)["accuracy"] == pytest.approx(expected)
    output, target = torch.randn(3, 5, 5), torch.randint(0, 5, (3, 5))
    with pytest.raises(ValueError, match=r"dimension 1 or in the last.*Accuracy\(dim=-1\)"):
        over(["accuracy"], [(output, target)], loss)
    expected = (output.argmax(-1) == target).float().mean().item()
    assert over([Accuracy(dim=-1)], [(output, target)], loss)["accuracy"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="does not fit a target of shape"):
        over(["accuracy"], [(torch.randn(3, 2), torch.zeros(4))], loss)


class StandIn:
    """Has what torchmetrics has, and nothing of a tensor."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.hits = self.seen = 0

    def update(self, output, target):
        self.hits += (output.argmax(1) == target).sum().item()
        self.seen += len(target)

    def compute(self):
        return self.hits / self.seen

    def state_dict(self):
        return {"hits": self.hits, "seen": self.seen}

    def load_state_dict(self, d):
        self.hits, self.seen = d["hits"], d["seen"]


def error_rate(output, target):
    return (output.argmax(1) != target).float().mean()


def test_functions_objects_and_own_metrics():
    class Count(Metric):
        def measure(self, step):
            return step.samples, 1

    batches = scores()
    seen = over(["accuracy", error_rate, StandIn(), Count()], batches)
    assert list(seen) == ["loss", "accuracy", "error_rate", "StandIn", "Count"]
    assert seen["error_rate"] == pytest.approx(1 - seen["accuracy"]) and seen["StandIn"] == seen["accuracy"]
    assert seen["Count"] == np.mean(SIZES)
    named = over({"wrong": lambda o, t: error_rate(o, t).item()}, batches)
    assert named["wrong"] == pytest.approx(seen["error_rate"])


def test_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.F1Score(task="multiclass", num_classes=7, average="macro")
    batches = scores()
    seen = over({"f1": metric}, batches)
    output, target = flat(batches)
    assert seen["f1"] == pytest.approx(
        pytest.importorskip("sklearn.metrics").f1_score(target, output.argmax(1), average="macro")
    )


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (["acuracy"], ValueError, "did you mean 'accuracy'"),
        ("accuracy", TypeError, "takes a list"),
        ([Accuracy], TypeError, r"write Accuracy\(\.\.\.\)"),
        (["accuracy", "accuracy"], ValueError, "two metrics"),
        ({"loss": lambda output, target: 0.0}, ValueError, "two metrics are called 'loss'"),
        ({"phase": lambda output, target: 0.0}, ValueError, "'phase' is a column"),
        ([lambda o, t: 0], ValueError, "needs a name"),
        ([3], TypeError, "a metric is"),
    ],
)
def test_metrics_that_are_refused(asked, error, message):
    with pytest.raises(error, match=message):
        collection.Metrics(asked)


def test_sums_kept_unread_stay_and_go_through_plain_data():
    batches, found = scores(), collection.Metrics(["accuracy", "matthews_correlation_coefficient", StandIn()])
    peeks, reads = [], []
    for output, target in batches:
        step = Step(None, target, len(target))
        step.output, step.loss = output, F.cross_entropy(output, target)
        found.update(step)
        peeks.append(found.peek())
        reads.append(found.read(found.peek()))
    assert [found.read(p) for p in peeks] == reads and len({r["loss"] for r in reads}) == len(reads)
    other = collection.Metrics(["accuracy", "matthews_correlation_coefficient", StandIn()])
    other.load_state_dict(found.state_dict(), None)
    assert other.read(other.peek()) == reads[-1] and other.batches == len(SIZES)
    other.reset()
    assert other.read(other.peek()) == {}


def test_in_a_learner_they_are_over_the_whole_phase():
    model = nn.Linear(4, 7)
    data = [(torch.randn(n, 4), torch.randint(0, 7, (n,))) for n in SIZES]
    learner = Learner(model, F.cross_entropy, Adam(), metrics=["accuracy", StandIn()], default_callbacks=False)
    seen = learner.validate(data)
    x, y = (torch.cat(c) for c in zip(*data, strict=True))
    assert seen["accuracy"] == seen["StandIn"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    assert seen["loss"] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)


@pytest.mark.parametrize("ignore", [0, 3, 255])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_ignored_targets_count_for_nothing(ignore, dtype):
    """Also where the ignored index is one of the classes, and in a dtype that cannot hold a negative number."""
    sk = pytest.importorskip("sklearn.metrics")
    batches = [(o, torch.where(torch.rand(t.shape) < 0.4, ignore, t).to(dtype)) for o, t in scores(6)]
    metrics = {"a": Accuracy(ignore_index=ignore), "t": Top5Accuracy(ignore_index=ignore)}
    metrics |= {"m": MatthewsCorrelationCoefficient(ignore_index=ignore), "p": Perplexity(ignore_index=ignore)}
    seen = over(metrics, batches, lambda o, t: F.cross_entropy(o, t.long(), ignore_index=ignore))
    output, target = flat(batches)
    keep = target != ignore
    output, target = output[keep], target[keep].long()
    assert seen["a"] == pytest.approx(sk.accuracy_score(target, output.argmax(1)))
    assert seen["t"] == pytest.approx(sk.top_k_accuracy_score(target, output, k=5, labels=range(7)))
    assert seen["m"] == pytest.approx(sk.matthews_corrcoef(target, output.argmax(1)))
    assert seen["p"] == pytest.approx(F.cross_entropy(output, target).exp().item(), rel=1e-5)


def test_targets_in_a_narrow_dtype_are_not_taken_for_ignored_ones():
    target = torch.tensor([156, 1], dtype=torch.uint8)  # -100 modulo 256 is 156
    assert over(["accuracy"], [(F.one_hot(target.long(), 200).float(), target)])["accuracy"] == 1.0
    flags = torch.tensor([1.0, -1.0]), torch.tensor([True, False])
    assert over([Accuracy(ignore_index=0)], [flags], lambda o, t: o.sum())["accuracy"] == 1.0


@pytest.mark.parametrize("name", ["accuracy", "top5_accuracy", "matthews_correlation_coefficient"])
def test_targets_that_are_no_classes_are_refused(name):
    with pytest.raises(ValueError, match=r"float32 and not all 0 or 1, so they are no classes; give .*target.long\(\)"):
        over([name], [(torch.randn(4, 1), torch.randn(4, 1))], F.mse_loss)
    binary = torch.tensor([1.0, 0.0, 1.0])
    assert over(["accuracy"], [(binary - 0.5, binary)], F.mse_loss)["accuracy"] == 1.0

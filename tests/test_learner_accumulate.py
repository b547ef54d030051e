"""accumulate=n and autocast= of the Learner, beside one big batch and a loop by hand."""

import pytest
import torch
from helpers import like_a_device
from learner_parts import Learner
from torch import nn
from torch.nn import functional as F

import fluxpy
from fluxpy import Adam, DataLoader, Descent, setup
from fluxpy.learner import Callback, CancelBatch, CancelEpoch, CancelFit, CancelTraining, LearningRateScheduler
from fluxpy.learner import Learner as _Learner


def net(p=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 4)).to(dtype)


def arrays(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=g, dtype=torch.float64), torch.randint(0, 4, (rows,), generator=g)


def change(model):
    return torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), net().parameters(), strict=True)])


class Count(Callback):
    def __init__(self):
        self.at = []

    def on_update_start(self, learner):
        assert isinstance(learner.step.grads, fluxpy.Gradients)
        self.at.append((learner.epoch_index, learner.batch_index))


def unsized(data):
    return lambda: iter(data)


@pytest.mark.parametrize("wrap", [list, unsized], ids=["sized", "unsized"])
@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (4, 1, 3, 4, 2), (5, 2)])
def test_a_window_is_one_batch_of_all_its_samples(sizes, wrap):
    n = 2
    x, y = arrays(sum(sizes))
    small = list(zip(x.split(sizes), y.split(sizes), strict=True))
    windows = [sum(sizes[i : i + n]) for i in range(0, len(sizes), n)]
    big = list(zip(x.split(windows), y.split(windows), strict=True))
    count, one, many = Count(), net(), net()
    Learner(one, F.cross_entropy, Adam(0.05)).fit(big, epochs=3)
    learner = Learner(many, F.cross_entropy, Adam(0.05), accumulate=n, callbacks=[count])
    learner.fit(wrap(small), epochs=3)
    assert torch.allclose(change(many), change(one), rtol=1e-9, atol=1e-12)
    assert learner.state[0].weight.count == 3 * len(windows)
    last = len(sizes) - 1
    assert count.at == [(e, min(i + n - 1, last)) for e in range(3) for i in range(0, len(sizes), n)]


def test_tokens_count_and_those_that_are_ignored_do_not():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 5, 3, generator=g, dtype=torch.float64), torch.randint(0, 4, (6, 5), generator=g)
    y[0, 1:], y[4, 2:] = -100, -100
    for ignore in (-100, 2):
        loss = nn.CrossEntropyLoss(ignore_index=ignore)
        weights = []
        targets = torch.where(y == -100, ignore, y) if ignore != -100 else y
        for size, n in ((6, 1), (2, 3)):

            class Tokens(_Learner):
                def training_step(self, model, input, target):
                    out = model(input)
                    return self.loss(out.transpose(1, 2), target), out

            model = net()
            learner = Tokens(model, loss, Descent(0.5), accumulate=n, default_callbacks=False)
            learner.fit(DataLoader((x, targets), batch_size=size), epochs=2)
            weights.append(change(model))
        assert torch.allclose(weights[1], weights[0], rtol=1e-9, atol=1e-12)


def test_classes_have_their_weights():
    x, y = arrays(12)
    y[3] = -100
    loss = nn.CrossEntropyLoss(torch.tensor([0.1, 5.0, 1.0, 2.0], dtype=torch.float64), label_smoothing=0.1)
    one, many = net(), net()
    Learner(one, loss, Descent(0.5)).fit(DataLoader((x, y), batch_size=6), epochs=2)
    Learner(many, loss, Descent(0.5), accumulate=3).fit(DataLoader((x, y), batch_size=2), epochs=2)
    assert torch.allclose(change(many), change(one), rtol=1e-9, atol=1e-12)


def test_a_weight_of_ones_own():
    x, y = arrays(8)
    model, other = net(), net()

    class Weighted(_Learner):
        def training_step(self, model, input, target):
            self.step.weight = 3.0 if self.batch_index == 0 else 1.0
            return super().training_step(model, input, target)

    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    Weighted(model, F.cross_entropy, Descent(0.5), accumulate=2, default_callbacks=False).fit(data)
    state = setup(Descent(0.5), other)
    f = lambda m: (3 * F.cross_entropy(m(x[:4]), y[:4]) + F.cross_entropy(m(x[4:]), y[4:])) / 4  # noqa: E731
    fluxpy.update(state, other, fluxpy.gradient(f, other))
    assert torch.allclose(change(model), change(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("device", [False, True])
def test_a_window_in_which_nothing_counts_makes_no_change(device, monkeypatch):
    """As one of text that is padding alone, by a loss that is 0 there."""

    class Masked(_Learner):
        def training_step(self, model, input, target):
            counts = target != -100
            each = F.cross_entropy(model(input), target.clamp(min=0), reduction="none")
            return (each * counts).sum() / counts.sum().clamp(min=1)

    x, y = arrays(16)
    y[:8] = -100
    if device:
        like_a_device(monkeypatch)
    weights = []
    for rows in (slice(0, 16), slice(8, 16)):
        model = net()
        learner = Masked(model, F.cross_entropy, Descent(0.5), accumulate=2, default_callbacks=False)
        learner.fit(DataLoader((x[rows], y[rows]), batch_size=4))
        weights.append(change(model))
    assert torch.equal(*weights) and weights[0].any()


def test_low_precision_is_gathered_in_float32():
    x, y = arrays(64)
    seen = []

    def keep(learner, event):
        if event == "update_start":
            seen.append(learner.step.grads[0].weight)

    data = DataLoader((x.bfloat16(), y), batch_size=1)
    Learner(net(dtype=torch.bfloat16), F.cross_entropy, Descent(0.0), accumulate=64, callbacks=[keep]).fit(data)
    exact = fluxpy.gradient(lambda m: F.cross_entropy(m(x), y), net(dtype=torch.bfloat16).double())[0].weight
    assert seen[0].dtype == torch.bfloat16
    assert (seen[0].double() - exact).norm() < 0.01 * exact.norm()


def test_frozen_leaves_and_batches_that_do_not_count():
    x, y = arrays(16)
    data = list(DataLoader((x, y), batch_size=4))
    data[1] = data[1][0] * float("nan"), data[1][1]
    model, other = net(), net()
    learner = Learner(model, F.cross_entropy, Descent(0.5), accumulate=4)
    fluxpy.freeze(learner.state[0].weight)
    with pytest.warns(UserWarning, match="batch 1 of epoch 0 is nan"):
        learner.fit(data)
    keep = [0, 2, 3]
    x, y = torch.cat([data[i][0] for i in keep]), torch.cat([data[i][1] for i in keep])
    state = setup(Descent(0.5), other)
    fluxpy.freeze(state[0].weight)
    fluxpy.update(state, other, fluxpy.gradient(lambda m: F.cross_entropy(m(x), y), other))
    assert torch.allclose(change(model), change(other), rtol=1e-9, atol=1e-12)
    assert torch.equal(model[0].weight, net()[0].weight)


def raises(cancel, event, batch):
    def act(learner, e):
        if e == event and learner.training and learner.batch_index == batch and learner.epoch_index == 0:
            raise cancel

    return act


@pytest.mark.parametrize("cancel", [CancelTraining, CancelEpoch, CancelBatch])
def test_cancels(cancel):
    """A cancelled phase still makes its last update; a batch that is cancelled before its gradient is not in it."""
    x, y = arrays(20)
    data = list(DataLoader((x, y), batch_size=4))
    event = "batch_start" if cancel is CancelBatch else "batch_end"
    count, model, other = Count(), net(), net()
    act = raises(cancel, event, 2)
    Learner(model, F.cross_entropy, Descent(0.5), accumulate=2, callbacks=[act, count]).fit(data)
    rows = [slice(0, 8), slice(12, 20)] if cancel is CancelBatch else [slice(0, 8), slice(8, 12)]
    Learner(other, F.cross_entropy, Descent(0.5)).fit([(x[r], y[r]) for r in rows])
    assert torch.allclose(change(model), change(other), rtol=1e-9, atol=1e-12) and len(count.at) == 2


@pytest.mark.parametrize("batch", range(7))
def test_resume_within_a_window_is_exact(batch):
    """Also within the last window, whether the data says its length or not."""

    def run(wrap, stop=None, saved=None):
        callbacks = [LearningRateScheduler(lr=fluxpy.schedules.linear(0.1, 0.0, 14))]
        callbacks += [raises(CancelFit, "batch_end", batch)] if stop else []
        torch.manual_seed(1)
        learner = Learner(net(0.3), F.cross_entropy, Adam(0.05), accumulate=3, callbacks=callbacks)
        if saved:
            learner.load_state_dict(saved)
        learner.fit(wrap(DataLoader(arrays(26), batch_size=4)), epochs=2)
        return learner

    for wrap in (lambda data: data, unsized):
        whole, part = run(wrap), run(wrap, stop=True)
        rest = run(wrap, saved=part.state_dict())
        assert torch.equal(change(rest.model), change(whole.model)) and rest.state[0].weight.count == 6


def test_a_model_that_is_a_tree_of_tensors():
    class Tree(_Learner):
        def training_step(self, model, input, target):
            return (input @ model["w"] - target).square().mean()

    x, y = torch.randn(8, 3), torch.randn(8)
    weights = []
    for size, n in ((8, 1), (2, 4)):
        model = {"w": torch.zeros(3), "unused": torch.ones(2)}
        Tree(model, F.mse_loss, Descent(0.1), accumulate=n, default_callbacks=False).fit(DataLoader((x, y), size))
        weights.append(model["w"])
    assert torch.allclose(*weights, rtol=1e-5) and weights[0].any()


# --- Autocast -----------------------------------------------------------------------------------------------------


def test_autocast_is_around_the_steps_and_not_around_the_update():
    seen = []

    def watch(learner, event):
        if event in ("update_start", "inference_prediction_end"):
            seen.append((learner.step.output.dtype, torch.is_autocast_enabled("cpu")))

    x, y = arrays(8)
    data = [(x.float(), y)]
    model, other = net(dtype=torch.float32), net(dtype=torch.float32)
    learner = Learner(model, F.cross_entropy, Descent(0.5), autocast=torch.bfloat16, callbacks=[watch])
    learner.fit(data, data, epochs=3)
    assert seen == [(torch.bfloat16, False), (torch.bfloat16, True)] * 3
    assert learner.predict(data).dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")
    state = setup(Descent(0.5), other)

    def loss(m, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(m(x), y)

    fluxpy.train(loss, other, data * 3, state)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate=0 is not allowed"),
        ({"accumulate": True}, "accumulate=True is not allowed"),
        ({"autocast": torch.float16}, "float16 needs its loss scaled"),
        ({"autocast": "bfloat16"}, "it is torch.bfloat16 or None"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Learner(net(), F.cross_entropy, Adam(), **options)


def test_on_a_device_nothing_is_read_and_the_mean_is_the_same(monkeypatch):
    """There the number of targets stays a tensor, and a loss that is not finite holds back what comes after it."""
    x, y = arrays(22)
    data = DataLoader((x, y), batch_size=4)
    one, many = net(), net()
    Learner(one, F.cross_entropy, Adam(0.05), accumulate=3).fit(data)
    like_a_device(monkeypatch)
    learner = Learner(many, F.cross_entropy, Adam(0.05), accumulate=3)
    learner.fit(data)
    assert torch.allclose(change(many), change(one), rtol=1e-9, atol=1e-12)
    bad = list(data)
    bad[3] = bad[3][0] * float("nan"), bad[3][1]
    with pytest.warns(UserWarning, match="the loss is not finite"):
        learner.fit(bad)
    assert all(p.isfinite().all() for p in many.parameters())


@pytest.mark.parametrize("fewer", [1, 2])
def test_a_window_that_waits_is_ended_where_fewer_batches_make_one(fewer):
    """`accumulate` may be changed in mid-window, by a callback or by the script that goes on with a run."""
    x, y = arrays(12)
    seen = []

    def change_it(learner, event):
        if event == "batch_start" and learner.batch_index == 3:
            learner.accumulate = fewer
        elif event == "update_start":
            seen.append(learner.batch_index)

    learner = Learner(net(), F.cross_entropy, Adam(), accumulate=5, callbacks=[change_it])
    learner.fit(DataLoader((x, y), batch_size=1))
    assert seen == [3, *range(3 + fewer, 12, fewer)]


@pytest.mark.parametrize("cancels", [False, True])
def test_a_window_of_a_rule_ends_with_the_epoch_too(cancels):
    """As by `flush` in a loop by hand: no gradient waits for the next epoch, or for ever."""
    rule = fluxpy.OptimiserChain(fluxpy.AccumGrad(2), fluxpy.ClipGlobalNorm(0.1), Adam(0.05))
    batches = list(zip(*(t.split(4) for t in arrays(12)), strict=True))
    one, many = net(), net()
    state = setup(rule, one)
    for _ in range(2):
        for x, y in batches:
            fluxpy.trainstep(lambda m, x, y: F.cross_entropy(m(x), y), one, (x, y), state)
        fluxpy.flush(state, one)

    def end(learner, event):
        if cancels and event == "batch_start" and learner.batch_index == 3:
            raise CancelEpoch

    learner = Learner(many, F.cross_entropy, rule, callbacks=[end])
    learner.fit(batches + batches[:1] * cancels, epochs=2)
    assert torch.equal(change(many), change(one)) and learner.state[0].weight.count == 4

"""The Learner: learning rates over a fit, freezing and thawing, lr_find."""

import copy
import io
import pickle

import pytest
import torch
from learner_parts import Learner, net
from torch import nn
from torch.nn import functional as F

import fluxpy
from fluxpy import (
    Adam,
    ClipNorm,
    DataLoader,
    Descent,
    Momentum,
    OptimiserChain,
    RMSProp,
    adjust,
    leaves,
    scale,
    setup,
    value,
)
from fluxpy.learner import FreezeUntil, LearningRateScheduler, ThawFromTop, discriminative_rates, lr_find
from fluxpy.schedules import Segment, linear, segments


def data(n=4, size=4):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, generator=g), torch.randint(0, 4, (size,), generator=g)) for _ in range(n)]


class Rates:
    """The rates of each update, by path."""

    def __init__(self):
        self.seen = []

    def __call__(self, learner, event):
        if event == "update_start":
            self.seen.append({path: value(leaf, "lr") for path, leaf in leaves(learner.state)})

    def of(self, path="0.weight"):
        return [row[path] for row in self.seen]


def up_and_down():
    return segments([Segment("linear", end=1.0, steps=2), Segment("linear", end=0.0)])


def test_exactly_one_schedule():
    for wrong in ({}, {"lr": up_and_down(), "scale": up_and_down()}):
        with pytest.raises(TypeError, match="either"):
            LearningRateScheduler(**wrong)
    with pytest.raises(TypeError, match=r"schedules\.constant"):
        LearningRateScheduler(lr=0.1)


@pytest.mark.parametrize("rule", [Adam(0.1), OptimiserChain(ClipNorm(1.0), Adam(0.1))])
def test_rates_are_used_as_a_plain_loop_would(rule):
    model, batches, rate = net(), data(), linear(0.1, 0.02, 8)
    by_hand = copy.deepcopy(model)
    state = setup(rule, by_hand)
    for step in range(8):
        x, y = batches[step % 4]
        grads = fluxpy.gradient(lambda m, x=x, y=y: F.cross_entropy(m(x), y), by_hand)
        fluxpy.update(adjust(state, rate(step)), by_hand, grads)
    Learner(model, F.cross_entropy, rule, callbacks=[LearningRateScheduler(lr=rate)]).fit(batches, epochs=2)
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fills_to_the_end_and_begins_again_in_a_second_fit():
    rates = Rates()
    learner = Learner(net(), F.cross_entropy, Adam(0.5), callbacks=[LearningRateScheduler(scale=up_and_down())])
    learner.fit(data(3), epochs=2, callbacks=[rates])
    assert rates.of() == pytest.approx([0, 0.25, 0.5, 0.375, 0.25, 0.125])
    assert all(type(leaf.rule.lr) is float and leaf.rule.lr == 0.5 for _, leaf in leaves(learner.state))
    rates.seen.clear()
    learner.fit(data(4), epochs=1, callbacks=[rates])
    assert rates.of() == pytest.approx([0, 0.25, 0.5, 0.25])


def test_fills_where_a_callable_makes_the_data():
    rates = Rates()
    learner = Learner(net(), F.cross_entropy, Adam(0.5), callbacks=[LearningRateScheduler(lr=up_and_down()), rates])
    learner.fit(lambda: data(3), epochs=2)
    assert rates.of() == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])
    with pytest.raises(ValueError, match="total="):
        learner.fit(lambda: iter(data(3)), epochs=2)
    assert learner.state[0].weight.rule.lr == 0.5  # and an error leaves the base rate too


def test_ratios_between_subtrees_survive_and_adjust_sets_the_base():
    rates = Rates()

    def meanwhile(learner, event):
        if event == "batch_end" and learner.step_index == 1:
            adjust(learner.state[2], 0.8)
        if event == "epoch_end" and learner.epoch_index == 0:
            adjust(learner.state, scale(0.5))

    rule = {"0.*": Adam(0.1), "*": Adam(0.4)}
    halves = LearningRateScheduler(scale=lambda n: 1.0 if n < 4 else 0.5)
    learner = Learner(net(), F.cross_entropy, rule, callbacks=[halves, rates, meanwhile])
    learner.fit(data(3), epochs=2)
    assert rates.of("0.weight") == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.025, 0.025])
    assert rates.of("2.weight") == pytest.approx([0.4, 0.4, 0.8, 0.4, 0.2, 0.2])
    assert (learner.state[0].weight.rule.lr, learner.state[2].bias.rule.lr) == pytest.approx((0.05, 0.4))


def test_refuses_a_schedule_below_and_rules_without_a_rate():
    with pytest.raises(ValueError, match="base rate"):
        learner = Learner(net(), F.cross_entropy, Adam(linear(1, 0, 5)))
        learner.fit(data(), callbacks=[LearningRateScheduler(scale=up_and_down())])
    with pytest.raises(ValueError, match="'lr'"):
        learner = Learner(net(), F.cross_entropy, OptimiserChain(ClipNorm(1.0)))
        learner.fit(data(), callbacks=[LearningRateScheduler(scale=up_and_down())])


@pytest.mark.parametrize("at", [2, 3, 5])
@pytest.mark.parametrize("order", [1, -1])
def test_resumes_bit_for_bit_with_its_base_rates(at, order):
    def build():
        halve = lambda learner, event: (  # noqa: E731
            adjust(learner.state[0], scale(0.5)) if event == "batch_end" and learner.step_index == 2 else None
        )
        pair = [LearningRateScheduler(scale=up_and_down()), halve, FreezeUntil("2.*", 1)]
        return Learner(net(), F.cross_entropy, {"0.*": Adam(0.1), "*": Adam(0.2)}, callbacks=pair[::order])

    file = io.BytesIO()

    def save(learner, event):
        if event == "batch_end" and learner.step_index == at - 1:
            torch.save(learner.state_dict(), file)

    whole = build()
    whole.fit(data(3), epochs=3, callbacks=[save])
    file.seek(0)
    resumed = build()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.fit(data(3), epochs=3)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    rates = [[leaf.rule.lr for _, leaf in leaves(learner.state)] for learner in (whole, resumed)]
    assert rates[0] == rates[1] == [0.05, 0.05, 0.2, 0.2]


def test_equal_rates_stay_one_group_and_copies_are_plain():
    def look(learner, event):
        if event == "batch_end":
            assert len({id(leaf.rule.lr) for _, leaf in leaves(learner.state)}) == 1
            other = copy.deepcopy(learner.state)
            assert type(other[0].weight.rule.lr) is float

    learner = Learner(net(), F.cross_entropy, Adam(0.1), callbacks=[LearningRateScheduler(scale=up_and_down()), look])
    for part in learner.state:  # rules that are equal, but not one object
        adjust(part, 0.3) if part is not None and len(list(leaves(part))) else None
    learner.fit(data())


def test_a_scheduled_rate_prints_compares_and_pickles():
    shown = []

    def look(learner, event):
        if event == "batch_end" and learner.step_index == 1:
            one, two = learner.state[0].weight.rule, learner.state[2].bias.rule
            other = LearningRateScheduler(scale=up_and_down())
            assert one == two == Adam(0.1) and hash(one.lr) == hash(0.1) and one.lr != type(one.lr)(0.1, other)
            assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == Adam(0.1)
            shown.extend([repr(one), repr(learner.state), str(fluxpy.summary(learner.state))])
            rate = one.lr
            shown.append(rate(0))
            shown.append(rate)

    learner = Learner(
        net(), F.cross_entropy, Adam(0.1), callbacks=[LearningRateScheduler(scale=linear(1.0, 0.0, 4)), look]
    )
    learner.fit(data())
    assert shown[0].startswith("Adam(lr=0.1 by LearningRateScheduler(scale=linear(") and all(shown[1:3])
    assert shown[3] == pytest.approx(0.075) and shown[4](0) == 0.1  # after the fit the base rate


def test_a_chain_with_several_rates_is_refused():
    rule = OptimiserChain(RMSProp(1.0), Momentum(0.01))
    with pytest.raises(ValueError, match=r"'0.weight' has several rates, \[1.0, 0.01\].*member=Momentum"):
        Learner(net(), F.cross_entropy, rule).fit(data(), callbacks=[LearningRateScheduler(scale=up_and_down())])
    same = Learner(net(), F.cross_entropy, OptimiserChain(RMSProp(0.1), Momentum(0.1)))
    same.fit(data(), callbacks=[LearningRateScheduler(scale=up_and_down())])


def test_freeze_until_and_thaw_from_the_top():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)], nn.Linear(3, 4))
    frozen = []

    def look(learner, event):
        if event == "training_start":
            frozen.append([part.weight.frozen for part in learner.state])

    callbacks = [ThawFromTop("[1-3]", first=1), FreezeUntil("0.*", 4), look]
    rule = {"0.bias": None, "*": Adam()}
    learner = Learner(model, F.cross_entropy, rule, callbacks=callbacks)
    first = model[0].weight.detach().clone()
    learner.fit(data(), epochs=4)
    assert frozen == [
        [True, True, True, True, False],
        [True, True, True, False, False],
        [True, True, False, False, False],
        [True, False, False, False, False],
    ]
    assert torch.equal(model[0].weight, first)
    with pytest.raises(ValueError, match="no layer matches 'encoder"):
        Learner(model, F.cross_entropy, Adam(), callbacks=[ThawFromTop("encoder.*")]).fit(data())
    with pytest.raises(ValueError, match="epoch=0"):
        FreezeUntil("0.*", 0)


def test_discriminative_rates_of_one_layer_are_a_mistake():
    """The pattern names the whole, and nothing would become of it."""
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
    state = setup(Adam(0.8), model)
    for pattern in ("body", "body.0", "head"):
        with pytest.raises(ValueError, match=rf"'{pattern}' is one layer.* write '{pattern}\.\*'"):
            discriminative_rates(state, pattern, factor=0.5)
    assert value(state.body[0].weight, "lr") == 0.8


def test_discriminative_rates():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), "head": nn.Linear(3, 4)})
    state = discriminative_rates(setup({"body.2.bias": None, "*": Adam(0.8)}, model), "body.*", "head", factor=0.5)
    found = [leaf.rule and leaf.rule.lr for _, leaf in leaves(state)]
    assert found == [0.2, 0.2, 0.4, None, 0.8, 0.8]
    state = setup({"body.0.*": None, "*": Adam(0.8)}, model)  # a layer that is frozen for good
    discriminative_rates(state, "body.*", "head", factor=0.5)
    assert [leaf.rule and leaf.rule.lr for _, leaf in leaves(state)] == [None, None, 0.4, 0.4, 0.8, 0.8]


def test_lr_find_leaves_everything_as_it_was(tmp_path):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(256, 8, generator=g)
    y = x @ torch.randn(8, 1, generator=g) + 0.1 * torch.randn(256, 1, generator=g)
    loader = DataLoader((x, y), batch_size=16, shuffle=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    learner = Learner(model, F.mse_loss, {"0.*": Adam(1e-4), "*": Adam(1e-3)}, metrics=[])
    learner.fit(loader)
    before, history = learner.state_dict(), learner.history
    result = lr_find(learner, loader)
    after = learner.state_dict()
    for part in ("model", "state", "random", "position", "history"):
        assert _equal(before[part], after[part]), part
    assert learner.history is history and not learner.callbacks
    assert 1e-4 < result.suggestion < 1 and len(result.rates) == len(result.losses) > 20
    assert result.rates[0] == pytest.approx(1e-7)
    again = lr_find(learner, loader)
    assert again == result  # as nothing had changed
    picture = result.plot(tmp_path / "plots" / "lr.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    first = learner.validate([(x, y)])["loss"]
    adjust(learner.state, result.suggestion)
    learner.fit(loader, epochs=5)
    assert learner.validate([(x, y)])["loss"] < first / 5


def test_lr_find_says_what_is_wrong():
    learner = Learner(net(), F.cross_entropy, Descent(0.1))
    with pytest.raises(ValueError, match="start"):
        lr_find(learner, data(), start=1.0, end=0.1)
    with pytest.raises(ValueError, match="smaller start"):
        lr_find(learner, [(torch.full((4, 3), float("nan")), torch.zeros(4, dtype=torch.long))])


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return all(map(_equal, a, b)) if isinstance(a, list | tuple) else a == b

"""What users of the Learner write by mistake is answered by what to write instead; rates of one member of a chain."""

import copy
import traceback
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fluxpy
from fluxpy import Adam, DataLoader, Momentum, OptimiserChain, RMSProp, setup, value
from fluxpy.learner import Callback, Checkpoint, EarlyStopping, Learner, LearningRateScheduler, lr_find

SEEDED = torch.Generator().manual_seed(0)
X, Y = torch.randn(16, 4, generator=SEEDED), torch.randint(0, 2, (16,), generator=SEEDED)


def data():
    return DataLoader((X, Y), batch_size=4)


def learner(model=None, loss=cross_entropy, rule=None, **options):
    return Learner(model or nn.Linear(4, 2), loss, rule or Adam(), default_callbacks=False, **options)


class Tempered(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.log_t = nn.Parameter(torch.zeros(()))

    def forward(self, output, target):
        return cross_entropy(output * self.log_t.exp(), target)


class Body(nn.Module):
    def __init__(self, criterion):
        super().__init__()
        self.layer, self.criterion = nn.Linear(4, 2), criterion

    def forward(self, x):
        return self.layer(x)


class Output(nn.Module):
    """A model whose output is an object, as those of Hugging Face."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return SimpleNamespace(logits=self.layer(x))


def state_second(model):
    return Learner(model, setup(Adam(), model), cross_entropy)


def twice(callback):
    learner(callbacks=[callback]).fit(data(), callbacks=[callback])


ORDER = r"Learner\(model, loss, rule\) takes the model first.* but got "
MISTAKES = {
    "a loss of the model": (lambda: learner(loss=lambda m, x, y: m(x).sum()), r"loss\(output, target\).*fluxpy.train"),
    "a callback for the fit too": (lambda: twice(EarlyStopping()), r"EarlyStopping would act twice.*fit\(callbacks="),
    "no callbacks": (lambda: learner(callbacks=None), r"callbacks= takes a list of callbacks: callbacks=\[\]"),
    "an event without the Learner": (
        lambda: type("Own", (Callback,), {"on_epoch_end": lambda self: None}),
        r"Own: write def on_epoch_end\(self, learner\)",
    ),
    "data first": (lambda: lr_find(data(), learner()), r"lr_find\(learner, data\), but got DataLoader"),
    "the loss first": (lambda: Learner(cross_entropy, nn.Linear(4, 2), Adam()), ORDER + "cross_entropy, Linear, Adam"),
    "a loss module first": (lambda: Learner(nn.CrossEntropyLoss(), nn.Linear(4, 2), Adam()), ORDER + "Cross.*, Linear"),
    "the rule second": (lambda: Learner(nn.Linear(4, 2), Adam(), nn.CrossEntropyLoss), ORDER + "Linear, Adam, Cross"),
    "the rule first": (lambda: Learner(Adam(), nn.Linear(4, 2), cross_entropy), ORDER + "Adam, Linear, cross_entropy"),
    "a state second": (lambda: state_second(nn.Linear(4, 2)), ORDER + "Linear, State, cross_entropy"),
    "a function as model": (lambda: learner(lambda x: x), ORDER + "<lambda>"),
    "a loss that nobody trains": (lambda: learner(loss=Tempered()), r"Tempered.*log_t.*criterion = loss.*grad_\(F"),
    "the same in train": (
        lambda: fluxpy.train(Tempered(), model := nn.Linear(4, 2), data(), setup(Adam(), model)),
        "Tempered.*log_t.*model.criterion = loss",
    ),
    "val_loss": (lambda: learner(callbacks=[EarlyStopping("val_loss")]), "write 'loss'.*or 'validation.loss'"),
    "val_accuracy": (lambda: Checkpoint("run", monitor="val_accuracy"), "'validation.accuracy'"),
    "a patience in its place": (lambda: EarlyStopping(3), "monitor is the name of a metric, but got 3.*patience=3"),
    "train_loss": (lambda: EarlyStopping("train_loss"), "write 'train.loss'"),
    "torch's optimiser": (lambda: learner(rule=torch.optim.Adam([torch.zeros(1)])), r"torch's Adam; write fluxpy.Adam"),
    "an object in a metric": (
        lambda: learner(Output(), lambda o, y: cross_entropy(o.logits, y), metrics=["accuracy"]).fit(data()),
        r"SimpleNamespace.*return \(loss, output.logits\)",
    ),
    "an object in another": (
        lambda: learner(Output(), lambda o, y: cross_entropy(o.logits, y), metrics=["top5_accuracy"]).fit(data()),
        r"output.logits",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("write", "answer"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_answered(write, answer):
    with pytest.raises((TypeError, ValueError), match=answer):
        write()


@pytest.mark.parametrize("call", ["fit", "validate"])
@pytest.mark.parametrize(
    ("gives", "answer"),
    [
        (lambda loss, output: (loss, output, output), "a tuple of 3"),
        (lambda loss, output: 3.0, "float"),
        (lambda loss, output: None, "NoneType"),
        (lambda loss, output: output, r"a tensor of shape \(4, 2\)"),
        (lambda loss, output: (output, loss), r"a tensor of shape \(4, 2\)"),
    ],
)
def test_what_a_step_returns_is_told(gives, answer, call):
    class Own(Learner):
        def training_step(self, model, input, target):
            output = model(input)
            return gives(self.loss(output, target), output)

    with pytest.raises(ValueError, match=rf"a step returns the loss.*\(loss, output\), but this gave {answer}"):
        getattr(Own(nn.Linear(4, 2), cross_entropy, Adam(), default_callbacks=False), call)(data())


def test_what_may_look_like_a_mistake_is_taken():
    class Adversarial(nn.Module):  # the other network, which its own state trains meanwhile
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(2, 1)

        def forward(self, model, x, y):
            return self.other(model(x)).mean()

    model = nn.Linear(4, 2)
    fluxpy.trainstep(Adversarial(), model, (X, Y), setup(Adam(), model))
    with pytest.warns(UserWarning, match="no parameters"):
        baseline = learner(nn.Identity(), nn.CrossEntropyLoss(), Adam())
    assert baseline.validate([(X[:, :2], Y)])["loss"] == pytest.approx(float(cross_entropy(X[:, :2], Y)))
    learner(loss=Tempered().requires_grad_(False)).fit(data())


def test_a_loss_that_is_a_part_of_the_model_trains():
    """As in a loop by hand; a copy of the Learner trains a copy of it."""
    torch.manual_seed(0)
    model = Body(Tempered()).double()
    other = copy.deepcopy(model)
    batches = [(x.double(), y) for x, y in data()] * 5
    run = learner(model, model.criterion, Adam(0.1))
    trial = run.trial()
    assert trial.loss is trial.model.criterion is not model.criterion
    run.fit(batches)
    adam = torch.optim.Adam(other.parameters(), 0.1)
    for x, y in batches:
        adam.zero_grad()
        other.criterion(other(x), y).backward()
        adam.step()
    torch.testing.assert_close(model.criterion.log_t, other.criterion.log_t, rtol=1e-10, atol=0)
    assert abs(model.criterion.log_t) > 0.1


def test_an_error_in_a_metric_names_it():
    with pytest.raises(TypeError) as raised:
        learner(metrics={"nothing": lambda output, target: None}).fit(data())
    assert "in the metric 'nothing'" in raised.value.__notes__


def test_a_loss_for_a_step_of_ones_own_may_take_more():
    class Own(Learner):
        def training_step(self, model, input, target):
            return self.loss(model(input), target, 2.0)

    own = Own(nn.Linear(4, 2), lambda output, target, factor: factor * cross_entropy(output, target), Adam())
    assert own.loss is not None
    learner(loss=nn.CrossEntropyLoss()), learner(loss=torch.nn.functional.cross_entropy)


@pytest.mark.parametrize(
    ("batch", "note"), [((X.numpy(), Y.numpy()), "DataLoader.*gives tensors"), ((X.double(), Y), "X.astype")]
)
def test_batches_of_arrays_and_doubles(batch, note):
    with pytest.raises((TypeError, RuntimeError)) as raised:
        learner().fit([batch])
    with pytest.raises(AssertionError, match=note):
        raise AssertionError(raised.value.__notes__[0])


@pytest.mark.parametrize(
    ("model", "batch", "note"),
    [
        (
            Output(),
            (X, Y),
            r"the output as it is, of type SimpleNamespace: lambda.*cross_entropy\(output.logits, target",
        ),
        (nn.Linear(4, 2), (X, Y, X), "of a batch of 3 the last is the target, and the model gets the others"),
    ],
)
def test_an_error_says_what_model_and_loss_get(model, batch, note):
    with pytest.raises(TypeError) as raised:
        learner(model).fit([batch])
    assert len(raised.value.__notes__) == 1
    with pytest.raises(AssertionError, match=note):
        raise AssertionError(raised.value.__notes__[0])


def test_a_traceback_ends_in_the_users_code_and_leaves_ours_out():
    def loss(output, target):
        return cross_entropy(output, target.foo)

    with pytest.raises(AttributeError) as raised:
        learner(loss=loss).fit(data())
    frames = traceback.extract_tb(raised.value.__traceback__)
    assert [frame.name for frame in frames] == ["test_a_traceback_ends_in_the_users_code_and_leaves_ours_out", "loss"]


def test_a_traceback_that_ends_with_us_is_whole(monkeypatch):
    """Here in an operation of PyTorch's that our own code calls."""
    monkeypatch.setattr(fluxpy.learner.loop, "number", torch.linalg.inv)
    with pytest.raises(RuntimeError) as raised:
        learner().fit(data())
    assert len(traceback.extract_tb(raised.value.__traceback__)) > 3


def test_a_checkpoint_of_another_model(tmp_path):
    def fit(model, **options):
        return learner(model, callbacks=[Checkpoint(tmp_path, **options)]).fit(data(), epochs=2)

    fit(nn.Linear(4, 2))
    with pytest.raises(ValueError) as raised:
        fit(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    said = " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert str(tmp_path) in said and "resume=False" in said
    assert len(fit(nn.Linear(4, 2), resume=False)) == 2


# --- One member of a chain ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", [Momentum, 1])
@pytest.mark.parametrize(("how", "expected"), [("lr", [0.1, 0.2, 0.3, 0.4]), ("scale", [0.001, 0.002, 0.003, 0.004])])
def test_a_schedule_for_one_member(member, how, expected):
    """The model moves as with the schedule in the rule itself; the other member stays; at the end so does this one."""
    torch.manual_seed(0)
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    other.load_state_dict(model.state_dict())
    seen = []

    def watch(learner, event):
        if event == "update_start":
            leaf = learner.state.weight
            seen.append((value(leaf, "lr", member=0), value(leaf, "lr", member=1)))

    def schedule(n):
        return 0.1 * (n + 1)

    run = learner(model, rule=OptimiserChain(RMSProp(1.0), Momentum(0.01)), callbacks=[
        LearningRateScheduler(**{how: schedule}, member=member), watch,
    ])  # fmt: skip
    run.fit(data())
    assert [one for one, _ in seen] == [1.0] * 4 and [two for _, two in seen] == pytest.approx(expected)
    assert [rule.lr for rule in run.state.weight.rule.rules] == [1.0, 0.01]
    plain = OptimiserChain(RMSProp(1.0), Momentum(lambda n: expected[min(n, 3)]))
    learner(other, rule=plain).fit(data())
    torch.testing.assert_close(model.weight, other.weight)


def test_two_rates_are_refused_and_nothing_follows():
    run = learner(
        rule=OptimiserChain(RMSProp(1.0), Momentum(0.01)), callbacks=[LearningRateScheduler(lr=lambda n: 0.1)]
    )
    with pytest.raises(ValueError, match="member=Momentum") as raised:
        run.fit(data())
    assert len(raised.value.__notes__) == 1 and run.state.weight.rule.rules[1].lr == 0.01
    with pytest.raises(ValueError, match="no leaf has.*member 7"):
        learner(callbacks=[LearningRateScheduler(lr=lambda n: 0.1, member=7)]).fit(data())


def test_lr_find_of_one_member():
    run = learner(rule=OptimiserChain(RMSProp(1.0), Momentum(0.01)))
    with pytest.raises(ValueError, match="member=Momentum"):
        lr_find(run, data(), steps=8)
    batches = DataLoader((X, (X[:, 0] > 0).long()), batch_size=4)
    found = lr_find(run, batches, steps=8, start=1e-3, end=0.1, member=Momentum)
    assert found.rates[0] == pytest.approx(1e-3) and found.suggestion in found.rates
    assert [rule.lr for rule in run.state.weight.rule.rules] == [1.0, 0.01]
    fluxpy.adjust(run.state, found.suggestion, member=Momentum)


def test_another_state_has_another_member():
    """Leaves whose rule has no such member are passed by."""
    model = nn.Linear(4, 2)
    state = setup({"weight": OptimiserChain(RMSProp(1.0), Momentum(0.01)), "bias": Adam(0.5)}, model)
    learner(model, rule=state, callbacks=[LearningRateScheduler(scale=lambda n: 0.0, member=Momentum)]).fit(data())
    assert state.bias.rule.lr == 0.5 and state.bias.count == 4

"""What was wrong without a word, or failed late: each of these was."""

import copy
import dataclasses
import math
from collections import OrderedDict, UserDict

import pytest
import torch
import torch.utils._pytree as torch_pytree
from learner_parts import Learner, net
from torch import nn
from torch.nn import functional as F

import fluxpy
from fluxpy import (
    Adam,
    DataLoader,
    Descent,
    Momentum,
    OptimiserChain,
    RMSProp,
    setup,
    train,
    update,
    withgradient,
)
from fluxpy.learner import (
    CancelFit,
    Checkpoint,
    CSVLogger,
    EarlyStopping,
    LearningRateScheduler,
    StatisticsRecorder,
    StopOnNaN,
    TensorBoardLogger,
)
from fluxpy.learner import Learner as _Learner


def arrays(rows=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=g), torch.randint(0, 4, (rows,), generator=g)


# --- Outputs and batches of other libraries ---------------------------------------------------------------------------


class ModelOutput(OrderedDict):
    """As those of Hugging Face: an OrderedDict by class, which only PyTorch's registry knows."""


torch_pytree.register_pytree_node(
    ModelOutput,
    lambda x: (list(x.values()), list(x)),
    lambda values, names: ModelOutput(zip(names, values, strict=True)),
)


class Encoding(UserDict):
    """As a tokeniser's."""


@dataclasses.dataclass(frozen=True)
class Output:
    logits: torch.Tensor
    name: str = "same"


KINDS = {
    "model_output": lambda y: ModelOutput(logits=y, hidden=(y + 1, y + 2)),
    "user_dict": lambda y: Encoding({"logits": y}),
    "dataclass": Output,
    "nested": lambda y: {"out": [Output(y), None]},
}


class Gives(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.linear, self.make = nn.Linear(3, 4), make

    def forward(self, x):
        return self.make(self.linear(x))


def tensors_of(x):
    if isinstance(x, torch.Tensor):
        return [x]
    if dataclasses.is_dataclass(x):
        x = vars(x)
    inside = x.values() if hasattr(x, "values") else x if isinstance(x, list | tuple) else ()
    return [t for part in inside for t in tensors_of(part)]


@pytest.mark.parametrize("kind", KINDS)
def test_predict_joins_whatever_holds_tensors(kind):
    x, y = arrays()
    model = Gives(KINDS[kind])
    out = Learner(model, F.cross_entropy, Adam()).predict(DataLoader((x, y), batch_size=6))
    whole = model(x)
    assert type(out) is type(whole)
    for a, b in zip(tensors_of(out), tensors_of(whole), strict=True):
        assert torch.allclose(a, b) and not a.requires_grad


def test_predict_gives_a_list_where_outputs_cannot_be_joined():
    x, y = arrays(6)
    counter = iter(range(100))
    for make, expected in [
        (lambda out: f"batch {next(counter)}", ["batch 0", "batch 1", "batch 2"]),
        (lambda out: {"n": next(counter)}, [{"n": 3}, {"n": 4}, {"n": 5}]),
        (lambda out: ["a"] * len(out), [["a", "a"]] * 3),
    ]:
        out = Learner(Gives(make), F.cross_entropy, Adam()).predict(DataLoader((x, y), batch_size=2))
        assert out == expected
    sizes = iter([1, 2, 3])
    ragged = Learner(Gives(lambda out: out[:, : next(sizes)]), F.cross_entropy, Adam())
    assert [tuple(t.shape) for t in ragged.predict(DataLoader((x, y), batch_size=2))] == [(2, 1), (2, 2), (2, 3)]
    named = Learner(Gives(lambda out: Output(out, f"{next(counter)}")), F.cross_entropy, Adam())
    assert [out.name for out in named.predict(DataLoader((x, y), batch_size=2))] == ["6", "7", "8"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_withgradient_gives_has_no_history(kind):
    model = Gives(KINDS[kind])

    def loss(m, x):
        out = m(x)
        return tensors_of(out)[0].square().mean(), out

    (_, out), _ = withgradient(loss, model, torch.ones(2, 3))
    assert type(out) is type(model(torch.ones(2, 3)))
    assert tensors_of(out) and not any(t.requires_grad for t in tensors_of(out))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "nested"])
def test_batches_of_other_libraries_are_moved(kind):
    from fluxpy.train import place

    batch = KINDS[kind](torch.ones(2, 3))
    moved = place((batch, torch.ones(2)), torch.device("meta"))
    assert all(t.device.type == "meta" for t in tensors_of(moved)) and type(moved[0]) is type(batch)
    assert all(t.device.type == "cpu" for t in tensors_of(batch))
    assert place(batch, torch.device("cpu")) is batch


@dataclasses.dataclass
class Node:
    value: torch.Tensor
    other: "Node | None" = None


def test_containers_that_hold_themselves_are_handed_on():
    node = Node(torch.ones(2, 3))
    node.other = node
    seen = []

    class Reads(_Learner):
        def training_step(self, model, input, target):
            seen.append(input)
            return self.loss(model(input.value), target)

    Reads(nn.Linear(3, 4), F.cross_entropy, Adam(), default_callbacks=False).fit([(node, torch.tensor([0, 1]))])
    assert seen == [node]


def test_a_dict_batch_with_one_key_is_passed_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, other=None, pixel_values=None):
            assert other is None
            return self.linear(pixel_values)

    x, y = arrays()
    data = DataLoader({"pixel_values": x, "label": y}, batch_size=5)
    assert len(Learner(Named(), F.cross_entropy, Adam()).fit(data)) == 1
    with pytest.raises(TypeError, match="keyword") as caught:
        Learner(nn.Linear(3, 4), F.cross_entropy, Adam()).fit(data)
    assert any("of a batch that is a dict the model gets keywords: pixel_values" in n for n in caught.value.__notes__)


class Rows:
    """A map-style data set that says so by its methods alone."""

    def __getitem__(self, i):
        if i >= 8:
            raise IndexError(i)
        return torch.ones(3), torch.tensor(1)

    def __len__(self):
        return 8


@pytest.mark.parametrize("data", [torch.utils.data.TensorDataset(*arrays()), Rows()])
def test_a_data_set_of_samples_is_refused(data):
    with pytest.raises(TypeError, match="gives single samples.*DataLoader"):
        Learner(net(), F.cross_entropy, Adam()).fit(data)
    with pytest.raises(TypeError, match="gives single samples.*DataLoader"):
        train(lambda m, x, y: F.cross_entropy(m(x), y), net(), data, setup(Adam(), net()))


# --- Autocast ---------------------------------------------------------------------------------------------------------


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def test_autocast_around_a_loop_is_autocast_inside_the_loss():
    x, y = arrays(8)
    loss = lambda m, x, y: F.cross_entropy(m(x), y)  # noqa: E731

    def inside(m, x, y):
        with autocast():
            return loss(m, x, y)

    weights = []
    for how in ("inside", "train", "loop", "fit"):
        model = net()
        state = setup(Descent(0.5), model)
        if how == "inside":
            train(inside, model, [(x, y)] * 6, state)
        with autocast():
            if how == "train":
                train(loss, model, [(x, y)] * 6, state)
            elif how == "fit":
                Learner(model, F.cross_entropy, state).fit([(x, y)] * 6)
            elif how == "loop":
                for _ in range(6):
                    _, grads = withgradient(loss, model, x, y)
                    update(state, model, grads)
        weights.append(model[0].weight.detach())
    first = net()[0].weight
    for other in weights[1:]:
        assert torch.allclose(other - first, weights[0] - first, rtol=0.05, atol=1e-3)


def test_weights_that_are_loaded_under_an_autocast_are_cast_anew():
    x, y = arrays(8)
    learner = Learner(net(), F.cross_entropy, Descent(0.5))
    saved = learner.state_dict()
    with autocast():
        learner.fit([(x, y)] * 3)
        trained = learner.model(x)
        learner.load_state_dict(saved)
        back = learner.model(x)
    with autocast():
        assert torch.equal(learner.model(x), back) and not torch.equal(trained, back)


# --- What the script says and what the file says ----------------------------------------------------------------------


def fresh(rule):
    model = net()
    return model, setup(rule, model)


CHANGES = {
    "rate": (Adam(0.1), Adam(0.02), "lr was 0.1, is now 0.02"),
    "betas": (Adam(0.1), Adam(0.1, betas=(0.8, 0.999)), r"betas was \(0.9, 0.999\), is now \(0.8, 0.999\)"),
    "schedule": (
        Adam(fluxpy.schedules.linear(1.0, 0.0, 10)),
        Adam(fluxpy.schedules.linear(1.0, 0.0, 20)),
        "lr.steps was 10, is now 20",
    ),
    "to a schedule": (Adam(0.1), Adam(fluxpy.schedules.linear(1.0, 0.0, 20)), r"lr was 0.1, is now linear\(.*steps=20"),
    "chain": (
        fluxpy.OptimiserChain(fluxpy.ClipNorm(1.0), Adam(0.1)),
        fluxpy.OptimiserChain(fluxpy.ClipNorm(2.0), Adam(0.3)),
        r"\[0\].max_norm was 1.0, is now 2.0; \[1\].lr was 0.1, is now 0.3",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("suffix", [".flux", ".safetensors"])
def test_load_says_where_the_script_has_other_rules(tmp_path, kind, suffix):
    before, now, message = CHANGES[kind]
    model, state = fresh(before)
    fluxpy.adjust(state[0], **{"lr": 0.7} if kind != "chain" else {"max_norm": 0.7})  # later, and no other script
    path = tmp_path / f"run{suffix}"
    fluxpy.save(path, model=model, state=state)
    fluxpy.load(path, model=model, state=fresh(before)[1])  # without a word
    other, state = fresh(now)
    with pytest.warns(UserWarning, match=message) as caught:
        fluxpy.load(path, model=other, state=state)
    text = str(caught[0].message)
    assert len(caught) == 1 and "those of the file count" in text and 'hyperparameters="keep"' in text
    assert "'0.weight', '0.bias', '2.weight', '2.bias'" in text
    assert repr(state[2].weight.rule) == repr(before)
    again = tmp_path / f"again{suffix}"
    fluxpy.save(again, model=other, state=state)  # what was set up is still that of the first run
    with pytest.warns(UserWarning, match=message):
        fluxpy.load(again, model=other, state=fresh(now)[1])
    kept = fresh(now)[1]
    fluxpy.load(path, model=other, state=kept, hyperparameters="keep")  # without a word
    assert repr(kept[2].weight.rule) == repr(now) and kept[2].weight.count == state[2].weight.count
    fluxpy.save(again, model=other, state=kept)
    fluxpy.load(again, model=other, state=fresh(now)[1])


def test_functions_are_the_same_in_another_process():
    _, state = fresh(Adam(lambda n: 0.1))
    d = fluxpy.state_dict(state)
    d["leaves"]["0.weight"]["setup"]["lr"]["callable"] = repr(state[0].weight.rule.lr).replace("0x", "0xf")
    assert not fluxpy.load_state_dict(state, d).changed


def test_of_two_functions_the_one_of_the_script_counts(tmp_path):
    """No file holds one, so the warning must not say that the file's counts."""

    def slow(count):
        return 0.1

    def fast(count):
        return 0.3

    model, state = fresh(Adam(slow))
    fluxpy.save(tmp_path / "run.flux", model=model, state=state)
    other, state = fresh(Adam(fast))
    with pytest.warns(
        UserWarning, match=r"lr was <function .*slow>, is now <function .*fast>: functions are"
    ) as caught:
        fluxpy.load(tmp_path / "run.flux", model=other, state=state)
    assert len(caught) == 1 and "this script's" in str(caught[0].message)
    assert state[0].weight.rule.lr is fast


def stop_after(n):
    def stop(learner, event):
        if event == "batch_end" and learner.training and learner.step_index == n:
            raise CancelFit("enough")

    return stop


def interrupted(folder, rule=None, data=None, n=3, **options):
    """A fit with a Checkpoint that ends after `n` batches, or goes on."""
    checkpoint = Checkpoint(folder, **options)
    learner = Learner(net(), F.cross_entropy, rule or Adam(0.1), callbacks=[checkpoint, stop_after(n)])
    learner.fit(data or DataLoader(arrays(), batch_size=2), epochs=2)
    return learner


def test_a_checkpoint_says_where_the_script_has_other_rules(tmp_path):
    interrupted(tmp_path)
    interrupted(tmp_path, n=5)  # without a word
    with pytest.warns(UserWarning, match=r"lr was 0.1, is now 0.02") as caught:
        learner = interrupted(tmp_path, rule=Adam(0.02), n=7)
    assert len(caught) == 1 and 'hyperparameters="keep" (of Checkpoint' in str(caught[0].message)
    assert fluxpy.value(learner.state[0].weight, "lr") == 0.1 and learner.state[0].weight.count == 8
    learner = interrupted(tmp_path, rule=Adam(0.02), n=9, hyperparameters="keep")
    assert fluxpy.value(learner.state[0].weight, "lr") == 0.02 and learner.state[0].weight.count == 10
    interrupted(tmp_path, rule=Adam(0.02), n=11)  # which is now what the run was set up with
    with pytest.raises(ValueError, match="hyperparameters='new' is not allowed"):
        Checkpoint(tmp_path, hyperparameters="new")


def test_warnings_of_a_fit_tell_the_line_of_the_script(tmp_path):
    learner = Learner(net(), lambda output, target: output.sum() * float("nan"), Adam(0.1))
    with pytest.warns(UserWarning, match="is nan; that batch updated nothing") as caught:
        learner.fit(DataLoader(arrays(), batch_size=2))
    assert {warning.filename for warning in caught} == {__file__}
    interrupted(tmp_path)
    with pytest.warns(UserWarning) as caught:
        interrupted(tmp_path, Adam(0.02), [*DataLoader(arrays(), batch_size=2)] * 2, n=5)
    assert len(caught) >= 2 and {warning.filename for warning in caught} == {__file__}


def test_rates_adjusted_before_a_fit_are_those_of_the_script(tmp_path):
    def run(rate, n):
        learner = Learner(net(), F.cross_entropy, Adam(0.1), callbacks=[Checkpoint(tmp_path), stop_after(n)])
        fluxpy.adjust(learner.state[0], rate)
        learner.fit(DataLoader(arrays(), batch_size=2), epochs=2)
        return learner

    run(0.01, 2), run(0.01, 4)
    with pytest.warns(UserWarning, match="'0.weight', '0.bias': lr was 0.01, is now 0.05"):
        run(0.05, 6)


def test_a_checkpoint_says_where_the_data_has_another_length(tmp_path):
    interrupted(tmp_path)
    with pytest.warns(UserWarning, match="has 5 batches, but in the saved run it had 10"):
        interrupted(tmp_path, data=DataLoader(arrays(), batch_size=4), n=5)


# --- requires_grad after setup ----------------------------------------------------------------------------------------


def flags_by(how, model, state, data):
    if how == "train":
        train(lambda m, x, y: F.cross_entropy(m(x), y), model, data, state)
    elif how == "fit":
        Learner(model, F.cross_entropy, state).fit(data)
    else:
        for x, y in data:
            _, grads = withgradient(lambda m, x=x, y=y: F.cross_entropy(m(x), y), model)
            update(state, model, grads)


@pytest.mark.parametrize("how", ["train", "fit", "loop"])
def test_a_parameter_that_is_made_to_train_by_its_flag_is_told(how):
    model = net()
    model[0].requires_grad_(False)
    state, data = setup(Adam(), model), list(DataLoader(arrays(), batch_size=5))
    flags_by(how, model, state, data)  # without a word
    model[0].weight.requires_grad_()
    with pytest.warns(UserWarning, match=r"requires_grad of '0.weight' was changed after setup.*thaw") as caught:
        flags_by(how, model, state, data)
    assert len(caught) == 1 and state[0].weight.count == 0
    fluxpy.thaw(state[0].weight)
    flags_by(how, model, state, data)
    assert state[0].weight.count == 4


@pytest.mark.parametrize("how", ["train", "fit"])
def test_a_parameter_that_is_held_by_its_flag_is_told(how):
    model = net()
    state, data = setup(Adam(), model), list(DataLoader(arrays(), batch_size=5))
    fluxpy.freeze(state[2])  # by the verb, whatever the flags say
    flags_by(how, model, state, data)
    model[0].bias.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"requires_grad of '0.bias' was changed after setup.*freeze") as caught:
        flags_by(how, model, state, data)
    assert len(caught) == 1 and state[0].bias.count == 8
    fluxpy.freeze(state[0].bias)
    flags_by(how, model, state, data)


# --- Not finite -------------------------------------------------------------------------------------------------------


def test_a_finite_loss_with_a_gradient_that_is_not_has_a_cure():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return (x * self.w).sum(1).sqrt()

    data = [(torch.ones(2, 3), torch.ones(2)), (torch.zeros(2, 3), torch.ones(2)), (torch.ones(2, 3), torch.ones(2))]
    learner = Learner(Root(), F.mse_loss, Adam(), callbacks=[StopOnNaN()])
    reason = learner.fit(data).stop_reason
    assert "batch 2 of epoch 0 is nan" in reason and 'ClipGlobalNorm(math.inf, nonfinite="skip")' in reason
    rule = fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(math.inf, nonfinite="skip"), Adam())
    learner = Learner(Root(), F.mse_loss, rule, callbacks=[StopOnNaN()])
    assert learner.fit(data).stop_reason is None and learner.state.w.count == 2
    data[1] = data[1][0] * math.nan, data[1][1]
    assert "ClipGlobalNorm" not in Learner(Root(), F.mse_loss, Adam(), callbacks=[StopOnNaN()]).fit(data).stop_reason


def test_a_misspelt_event_without_an_underscore_is_an_error_too():
    def wrong(learner, event):
        return event in ("epochend",)

    with pytest.raises(ValueError, match="there is no event 'epochend'; did you mean 'epoch_end'"):
        Learner(net(), F.cross_entropy, Adam(), callbacks=[wrong]).fit([arrays()])


def test_a_file_of_a_learner_still_says_what_setup_was_given(tmp_path):
    learner = Learner(net(), F.cross_entropy, Adam(0.1), callbacks=[Checkpoint(tmp_path)])
    fluxpy.adjust(learner.state[0], 0.01)
    learner.fit(DataLoader(arrays(), batch_size=4))
    model, state = fresh(Adam(0.1))
    fluxpy.load(tmp_path / "last.flux", model=model, state=state)  # without a word
    assert fluxpy.value(state[0].weight, "lr") == 0.01


class Says:
    """Batches that say how many they are."""

    def __init__(self, batches, says):
        self.batches, self.says = batches, says

    def __len__(self):
        return self.says

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("phase", ["training", "validation"])
@pytest.mark.parametrize("says", [2, 7, 5])
def test_data_that_has_not_as_many_batches_as_it_says_is_told(phase, says):
    batches = list(DataLoader(arrays(), batch_size=4))
    other = Says(batches, says)
    learner = Learner(net(), F.cross_entropy, Adam())
    data = (other, batches) if phase == "training" else (batches, other)
    if says == 5:
        learner.fit(*data)
        return
    with pytest.warns(UserWarning, match=f"the {phase} data says that it has {says} batches, and gave 5") as warned:
        history = learner.fit(*data)
    assert len(warned) == 1 and learner.state[0].weight.count == 5
    whole = Learner(net(), F.cross_entropy, Adam()).fit(batches, batches)
    assert history == whole

    def stop(learner, event):
        if event == "batch_end" and learner.batch_index == 1:
            raise CancelFit

    learner.fit(*data, callbacks=[stop])  # one that was cut short is no other


@pytest.mark.parametrize("fitted", [True, False])
def test_a_learner_with_its_callbacks_can_be_copied_after_a_fit(tmp_path, fitted):
    """Those of the box hold no file and no stream then."""
    callbacks = [CSVLogger(tmp_path / "log.csv"), StatisticsRecorder(), TensorBoardLogger(tmp_path), StopOnNaN()]
    callbacks += [Checkpoint(tmp_path), EarlyStopping(restore_best=True), LearningRateScheduler(scale=lambda n: 1.0)]
    learner = _Learner(net(), F.cross_entropy, Adam(), callbacks=callbacks)
    data = DataLoader(arrays(), batch_size=4)
    if fitted:
        learner.fit(data)
    other = copy.deepcopy(learner)
    learner.fit(data, epochs=2)
    assert other.state[0].weight.count == 5 * fitted and other.callbacks[0] is not learner.callbacks[0]


def test_two_schedulers_of_one_rate_are_refused():
    """The last one counted, without a word."""
    both = [LearningRateScheduler(scale=lambda n: 0.5), LearningRateScheduler(scale=lambda n: 0.1)]
    learner = Learner(net(), F.cross_entropy, Adam(0.1), callbacks=both[:1])
    data = DataLoader(arrays(), batch_size=4)
    with pytest.raises(ValueError, match="'0.weight' follows another one already; put both schedules into one"):
        learner.fit(data, callbacks=both[1:])
    assert learner.state[0].weight.rule.lr == 0.1
    learner.fit(data)
    rule = OptimiserChain(RMSProp(1.0), Momentum(0.01))
    both = [LearningRateScheduler(scale=lambda n: 0.5, member=member) for member in (RMSProp, Momentum)]
    Learner(net(), F.cross_entropy, rule, callbacks=both).fit(data)


def test_a_checkpoint_says_where_the_script_freezes_other_leaves(tmp_path):
    def run(n, *frozen):
        checkpoint = Checkpoint(tmp_path)
        learner = Learner(net(), F.cross_entropy, Adam(0.1), callbacks=[checkpoint, stop_after(n)])
        for i in frozen:
            fluxpy.freeze(learner.state[i])
        learner.fit(DataLoader(arrays(), batch_size=2), epochs=2)
        return learner

    learner = run(3, 0)
    saved = learner.state_dict()
    fluxpy.thaw(learner.state)
    learner.load_state_dict(saved)  # without a word: what its own callbacks thawed meanwhile is no other script
    run(5, 0)
    with pytest.warns(UserWarning, match="other frozen leaves") as caught:
        learner = run(7, 2)
    text = str(caught[0].message)
    assert len(caught) == 1
    assert "frozen now, not then: '2.bias', '2.weight'" in text and "frozen then, not now: '0.bias', '0.weight'" in text
    assert [learner.state[i].weight.frozen for i in (0, 2)] == [True, False]
    fresh = Learner(net(), F.cross_entropy, Adam(0.1))
    with pytest.warns(UserWarning, match="frozen then, not now: '0.bias', '0.weight'"):
        fresh.load_state_dict(saved)
    fluxpy.thaw(fresh.state)  # as the message says
    before = fresh.model[0].weight.clone()
    fresh.fit(DataLoader(arrays(), batch_size=2), epochs=2)
    assert not torch.equal(before, fresh.model[0].weight)
    del saved["frozen"]  # as in older files
    fresh.load_state_dict(saved)
    fresh.fit(DataLoader(arrays(), batch_size=2), epochs=2)
    fresh.load_state_dict(fresh.state_dict())


@pytest.mark.parametrize("n", [3, 10, 14])  # within the first epoch, at its end, within the second
def test_what_is_changed_after_loading_counts(n):
    def begun():
        return Learner(net(), F.cross_entropy, Adam(0.1))

    first = begun()
    first.fit(DataLoader(arrays(), batch_size=2), epochs=2, callbacks=[stop_after(n - 1)])
    saved = first.state_dict()
    learner = begun()
    learner.load_state_dict(saved)
    fluxpy.adjust(learner.state, 0.01)
    fluxpy.freeze(learner.state[2])
    with torch.no_grad():
        learner.model[0].bias.zero_()
    again = begun()
    again.load_state_dict(learner.state_dict())  # of what was changed, too
    for run in (learner, again):
        still = run.model[2].weight.clone()
        run.fit(DataLoader(arrays(), batch_size=2), epochs=3)
        assert fluxpy.value(run.state[0].weight, "lr") == 0.01 and run.state[0].weight.count == 30
        assert run.state[2].weight.frozen and torch.equal(run.model[2].weight, still)
    assert torch.equal(learner.model[0].weight, again.model[0].weight)

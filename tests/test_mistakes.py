"""What users write by mistake is answered by what to write instead. (Mistakes in values and shapes are tested beside
what they are values of.)"""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fluxpy
from fluxpy import (
    Adam,
    DataLoader,
    Momentum,
    OptimiserChain,
    RMSProp,
    adjust,
    freeze,
    gradient,
    reset,
    save,
    scale,
    select,
    setup,
    thaw,
    train,
    trainstep,
    update,
    value,
    withgradient,
)
from fluxpy.binding import Binding


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.encoder(x))


class Plain:
    def __init__(self):
        self.w = torch.zeros(3)


class Undeclared(fluxpy.Rule):
    def __init__(self, rate=0.1):
        self.rate = rate


class Assigns(fluxpy.Rule):
    def apply(self, state, x, dx):
        return state, fluxpy.rules.Assign(x - dx)


def loss(m, x, y):
    return cross_entropy(m(x), y)


X, Y = torch.randn(8, 4), torch.randint(0, 2, (8,))
OPTIMIZER = torch.optim.SGD([torch.zeros(1)])
SCHEDULER = torch.optim.lr_scheduler.StepLR(OPTIMIZER, 3)


class Here:
    """What the mistakes are made with."""

    def __init__(self):
        self.model = Net()
        self.state = setup(Adam(), self.model)
        self.leaf = self.state.head.weight
        self.grads = gradient(loss, self.model, X, Y)
        self.two = setup(OptimiserChain(RMSProp(1.0), Momentum(0.01)), self.model)


MISTAKES = {
    # The wrong order.
    "train(model, loss)": (lambda h: train(h.model, loss, [(X, Y)], h.state), TypeError, r"comes first.*train\(loss"),
    "trainstep(model, loss)": (lambda h: trainstep(h.model, loss, (X, Y), h.state), TypeError, "loss comes first"),
    "withgradient(model, f)": (lambda h: withgradient(h.model, loss, X, Y), TypeError, "function comes first"),
    "gradient(model, f)": (lambda h: gradient(h.model, lambda m: m(X).sum()), TypeError, "function comes first"),
    "trainstep, state first": (lambda h: trainstep(loss, h.model, h.state, (X, Y)), TypeError, "got tuple"),
    "setup(keep=a dict)": (
        lambda h: setup(Adam(), h.model, keep=fluxpy.state_dict(h.state)), TypeError, "but got dict"
    ),
    "a loss's class": (lambda h: train(nn.MSELoss, h.model, [(X, Y)], h.state), TypeError, "the class MSELoss"),
    "sharpened, no radius": (lambda h: fluxpy.sharpened(loss, h.model, X, Y), TypeError, r"sharpened\(f, model, rho,"),
    # What is no state.
    **{
        f"{name} of no state": (write, TypeError, "takes the state tree that setup returns .*, but got the model")
        for name, write in {
            "update": lambda h: update(h.model, h.state, h.grads),
            "flush": lambda h: fluxpy.flush(h.model, h.state),
            "follow": lambda h: fluxpy.follow(h.model, h.state),
            "averaged": lambda h: fluxpy.averaged(h.model, h.state).__enter__(),
            "check_finite": lambda h: fluxpy.check_finite(h.model),
            "gradient": lambda h: gradient(loss, h.model, X, Y, state=h.model),
            "train": lambda h: train(loss, h.model, [(X, Y)], h.model),
            "trainstep": lambda h: trainstep(loss, h.model, (X, Y), h.model),
            "save": lambda h: save("x.flux", model=h.model, state=h.model),
        }.items()
    },
    "save a state dict": (lambda h: save("x.flux", model=h.model, state=h.model.state_dict()), TypeError, "state tr"),
    "update by a rule": (lambda h: update(Adam(), h.model, h.grads), TypeError, r"a rule; call state = setup\(rule"),
    # What is no model.
    "parameters()": (lambda h: setup(Adam(), h.model.parameters()), TypeError, "pass the model itself"),
    "named_parameters()": (lambda h: setup(Adam(), h.model.named_parameters()), TypeError, "pass the model itself"),
    "a plain class": (lambda h: setup(Adam(), Plain()), TypeError, "class Plain.*nn.Module"),
    "a plain class's gradient": (lambda h: gradient(lambda m: m.w.sum(), Plain()), TypeError, "class Plain.*nn.Module"),
    "the class of a module": (lambda h: setup(Adam(), Net), TypeError, r"pass an instance, Net\("),
    **{
        f"{name} of no model": (write, TypeError, "pass the model")
        for name, write in {
            "roles": lambda h: fluxpy.roles(h.state),
            "depths": lambda h: fluxpy.depths(h.grads),
            "module_paths": lambda h: fluxpy.module_paths(h.state, nn.LayerNorm),
            "flatten_parameters": lambda h: fluxpy.flatten_parameters(h.model.parameters()),
            "trainables": lambda h: fluxpy.trainables(h.model.named_parameters()),
            "destructure": lambda h: fluxpy.destructure(h.model.parameters()),
            "snapshot": lambda h: fluxpy.testing.snapshot(h.state),
        }.items()
    },
    # What is no rule, and no schedule.
    "torch's optimiser": (lambda h: setup(OPTIMIZER, h.model), TypeError, "torch's SGD; write fluxpy.Descent"),
    "torch's class": (lambda h: setup(torch.optim.Adam, h.model), TypeError, r"torch's Adam; write fluxpy.Adam\("),
    "in a chain": (lambda h: OptimiserChain(OPTIMIZER), TypeError, "number 0 is torch's SGD; write"),
    "a number": (lambda h: setup(1e-3, h.model), TypeError, r"write fluxpy.Adam\(0.001\)"),
    "torch's scheduler": (lambda h: Adam(SCHEDULER), TypeError, "lr takes.*torch's StepLR.*fluxpy.schedules"),
    "a scheduler's class": (lambda h: Adam(type(SCHEDULER)), TypeError, "torch's StepLR"),
    "check_rule": (lambda h: fluxpy.testing.check_rule("Adam"), TypeError, "takes a rule, but got 'Adam'"),
    "adjust to a scheduler": (lambda h: adjust(h.state, SCHEDULER), TypeError, "torch's StepLR"),
    "a rule's field": (lambda h: setattr(h.leaf.rule, "lr", 0.1), AttributeError, r"adjust\(state, lr=\.\.\.\)"),
    "a field that is not declared": (lambda h: Undeclared(), AttributeError, "no place for 'rate'.* rate: float = "),
    "an assigning rule before others": (
        lambda h: update(setup(OptimiserChain(Assigns(), Adam()), h.model), h.model, h.grads),
        TypeError,
        r"Assigns.*must be last in its chain",
    ),
    # Patterns and numbers by position.
    "freeze by pattern": (lambda h: freeze(h.state, "encoder.*"), TypeError, r"select\(state, 'encoder.\*'\)\)"),
    "thaw by pattern": (lambda h: thaw(h.state, "encoder.*"), TypeError, r"thaw\(select\("),
    "reset by pattern": (lambda h: reset(h.state, "encoder.*"), TypeError, r"reset\(select\("),
    "adjust by pattern": (lambda h: adjust(h.state, "encoder.*", lr=0.1), TypeError, r"adjust\(select\(.*, \.\.\.\)"),
    "adjust by pattern and place": (lambda h: adjust(h.state, "head.*", 0.1), TypeError, r"adjust\(select\("),
    "scale by a word": (lambda h: adjust(h.state, scale("0.1")), TypeError, "scale takes a number, but got '0.1'"),
    "scale by a schedule": (lambda h: adjust(h.state, scale(len)), TypeError, "scale takes a number"),
    "rules in place of rules": (
        lambda h: adjust(setup(OptimiserChain(), h.model), rules=(Adam(),)), ValueError, "has no hyperparameter 'rules'"
    ),
    "another rule": (lambda h: adjust(h.state, Momentum(0.1)), TypeError, r"setup\(rule, model, keep="),
    "another rule by name": (lambda h: adjust(h.state, rule=Momentum(0.1)), TypeError, r"setup\(rule, model, keep="),
    "a branch as a pattern": (
        lambda h: setup({"encoder": Adam(), "head": Adam()}, h.model), ValueError, r"'encoder' .*write 'encoder\.\*'"
    ),
    "select a branch": (lambda h: select(h.state, "head"), ValueError, r"write 'head\.\*'"),
    "select branches": (lambda h: select(h.state, "*coder.0"), ValueError, r"write '\*coder\.0\.\*'"),
    "assert_hyper of a branch": (
        lambda h: fluxpy.testing.assert_hyper(h.state, "head", lr=1e-3), AssertionError, r"write 'head\.\*'"
    ),
    "assert_only_changed by a branch": (
        lambda h: fluxpy.testing.assert_only_changed(fluxpy.testing.snapshot(h.model), h.model, "head"),
        AssertionError,
        r"write 'head\.\*'",
    ),
    "two numbers": (lambda h: adjust(h.state, 0.1, 0.9), TypeError, "one number by position, lr"),
    "thaw to a count": (lambda h: thaw(h.state, 3), TypeError, "one state"),
    "select a list": (lambda h: select(h.state, ["*bias", "head.*"]), TypeError, r"write select\(state, \*patterns\)"),
    "select a class": (lambda h: select(h.state, nn.Linear), TypeError, r"module_paths\(model"),
    "a class as a pattern": (lambda h: setup({nn.Linear: Adam()}, h.model), TypeError, "is a string.*module_paths"),
    "select nothing": (lambda h: select(h.state), TypeError, "needs a pattern"),
    "one of several": (lambda h: select(h.state, "*bias", "haed.*"), ValueError, "'haed.*' matches no leaf"),
    "index by a tuple": (lambda h: h.state["encoder", "head"], TypeError, r"fluxpy.select\(state, \*patterns\)"),
    # Options of torch.optim that are something else here.
    "Adam's penalty": (lambda h: Adam(weight_decay=0.1), TypeError, r"OptimiserChain\(WeightDecay\(...\), ...\)"),
    "adjust a penalty": (lambda h: adjust(h.state, weight_decay=0.1), ValueError, r"OptimiserChain\(WeightDecay"),
    "a penalty by another word": (lambda h: Adam(wd=0.1), TypeError, r"OptimiserChain\(WeightDecay"),
    "amsgrad": (lambda h: Adam(amsgrad=True), TypeError, "AMSGrad"),
    "nesterov": (lambda h: Momentum(0.1, nesterov=True), TypeError, "Nesterov"),
    "fused": (lambda h: Adam(fused=True), TypeError, "by itself"),
    "maximize": (lambda h: Adam(maximize=True), TypeError, "negative loss"),
    "a clip": (lambda h: adjust(h.state, max_norm=1.0), ValueError, r"OptimiserChain\(ClipGlobalNorm"),
    "frozen, adjusted": (lambda h: adjust(h.state, frozen=True), ValueError, r"fluxpy.freeze"),
    "count, adjusted": (lambda h: adjust(h.state, count=0), ValueError, r"thaw\(state, count="),
    # Names that others have.
    "a branch's rate": (lambda h: h.state.encoder.lr, AttributeError, r"'lr' here.*adjust\(branch, lr=.*value\(leaf"),
    "another word for it": (lambda h: h.state.encoder.learning_rate, AttributeError, r"adjust\(branch, lr=\.\.\.\)"),
    "a branch's flag": (lambda h: h.state.encoder.frozen, AttributeError, r"Leaves have it"),
    "step": (lambda h: h.state.step(), AttributeError, r"fluxpy.update\(state, model, grads\)"),
    "zero_grad": (lambda h: h.state.zero_grad(), AttributeError, "nothing to zero"),
    "param_groups": (lambda h: h.state.param_groups, AttributeError, "fluxpy.leaves"),
    "to a device": (lambda h: h.state.to("cpu"), AttributeError, r"fluxpy.follow\(state, model\)"),
    "double": (lambda h: h.state.double(), AttributeError, r"fluxpy.follow\(state, model\)"),
    "a method": (lambda h: h.state.encoder.freeze(), AttributeError, r"fluxpy.freeze\(state\)"),
    "a leaf's rate": (lambda h: h.leaf.lr, AttributeError, r"leaf.rule.lr, or fluxpy.value\(leaf, 'lr'\)"),
    "a leaf's eta": (lambda h: h.leaf.eta, AttributeError, "leaf.rule.lr"),
    "a leaf's method": (lambda h: h.leaf.freeze(), AttributeError, "fluxpy.freeze"),
    "a leaf's what": (lambda h: h.leaf.weight, AttributeError, "rule, state, frozen, count, shape and dtype"),
    "grads.items()": (lambda h: h.grads.items(), AttributeError, r"dict\(grads\)"),
    "SGD": (lambda h: fluxpy.SGD, AttributeError, r"fluxpy.Descent\(lr\), fluxpy.Momentum"),
    "Adagrad": (lambda h: fluxpy.Adagrad, AttributeError, "fluxpy.AdaGrad"),
    "RMSprop": (lambda h: fluxpy.RMSprop, AttributeError, "fluxpy.RMSProp"),
    "clip_grad_norm_": (lambda h: fluxpy.clip_grad_norm_, AttributeError, "ClipGlobalNorm"),
    "unfreeze": (lambda h: fluxpy.unfreeze, AttributeError, "fluxpy.thaw"),
    "StepLR": (lambda h: fluxpy.StepLR, AttributeError, "fluxpy.schedules"),
    "Callback": (lambda h: fluxpy.Callback, AttributeError, r"it is fluxpy\.learner\.Callback"),
    "warmup_cosine": (lambda h: fluxpy.warmup_cosine, AttributeError, r"it is fluxpy\.schedules\.warmup_cosine"),
    "hyper": (lambda h: fluxpy.hyper, AttributeError, r"it is fluxpy\.rules\.hyper"),
    "check_rule from the top": (lambda h: fluxpy.check_rule, AttributeError, r"it is fluxpy\.testing\.check_rule"),
    "TorchOptimizer": (lambda h: fluxpy.TorchOptimizer, AttributeError, r"it is fluxpy\.interop\.TorchOptimizer"),
    "assign a gradient": (lambda h: setattr(h.grads.head, "weight", 0), AttributeError, r"tree_map\(f, grads\)"),
    "assign a rate": (lambda h: setattr(h.state.encoder, "lr", 0.1), AttributeError, r"adjust\(branch, lr=\.\.\.\)"),
    "assign a leaf": (lambda h: setattr(h.state.head, "weight", 0), AttributeError, "nothing is assigned"),
    # Two members with one name.
    "two rates": (lambda h: adjust(h.two, 0.005), ValueError, r"1.0, 0.01.*member=RMSProp or member=Momentum.*'head"),
    "scale two": (lambda h: adjust(h.two, scale(0.1)), ValueError, "member="),
    "read two": (lambda h: value(h.two.head.weight, "lr"), ValueError, "member=Momentum"),
    "no such member": (lambda h: adjust(h.two, 0.1, member=Adam), ValueError, "has no member Adam"),
    "no such index": (lambda h: adjust(h.two, 0.1, member=2), ValueError, "has no member 2"),
    "a member without it": (
        lambda h: adjust(setup(OptimiserChain(fluxpy.WeightDecay(), Adam()), h.model), 0.1, member=0),
        ValueError,
        "^WeightDecay has no hyperparameter 'lr'; there is: 'weight_decay'",
    ),
    "a member by name": (lambda h: adjust(h.two, 0.1, member="Momentum"), TypeError, "rule class"),
    # Data and files.
    "DataLoader(x, y)": (lambda h: DataLoader(X, Y), TypeError, r"DataLoader\(\(x, y\), batch_size=32\)"),
    "DataLoader(x, y, n)": (lambda h: DataLoader(X, Y, batch_size=4), TypeError, r"DataLoader\(\(x, y\)"),
    "workers": (lambda h: DataLoader((X, Y), num_workers=2), TypeError, "'num_workers'.*torch.utils.data.DataLoader"),
    "a data set": (lambda h: DataLoader(torch.utils.data.TensorDataset(X)), TypeError, "torch.utils.data.DataL"),
    "save by position": (lambda h: save("x.flux", h.model), TypeError, r"save\(path, model=model, state=state\)"),
    "save, model first": (lambda h: save(h.model, "x.flux"), TypeError, r"save\(path, model=model"),
    "load by position": (lambda h: fluxpy.load("x.flux", h.model), TypeError, r"load\(path, model=model"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "error", "answer"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_answered(write, error, answer):
    with pytest.raises(error, match=answer) as raised:
        write(Here())
    assert len(str(raised.value)) < 600


def test_functions_numbers_and_empty_containers_are_models_without_parameters():
    for model in (None, 3, "text", len, lambda x: x, [], {"n": torch.arange(3)}, nn.ReLU()):
        with pytest.warns(UserWarning, match="no parameters"):
            setup(Adam(), model)


BATCHES = {
    "NumPy": (loss, (X.numpy(), Y.numpy()), "DataLoader.*gives tensors"),
    "float64": (loss, (X.double(), Y), "X.astype"),
    "another signature": (lambda m, batch: loss(m, *batch), (X, Y), r"called as loss\(model, \*batch\)"),
    "the Learner's, as an object": (nn.CrossEntropyLoss(), (X, Y), r"called as loss\(model, \*batch\)"),
    "the Learner's mse_loss": (nn.functional.mse_loss, (X, Y), r"called as loss\(model, \*batch\)"),
    "the Learner's": (cross_entropy, (X, Y), r"called as loss\(model, \*batch\)"),
}


@pytest.mark.parametrize(("loss", "batch", "note"), BATCHES.values(), ids=BATCHES.keys())
def test_a_loss_that_fails_on_its_batch(loss, batch, note):
    model = Net()
    with pytest.raises((TypeError, RuntimeError, AttributeError)) as raised:
        train(loss, model, [batch], setup(Adam(), model))
    assert len(raised.value.__notes__) == 1
    with pytest.raises(AssertionError, match=note):
        raise AssertionError(raised.value.__notes__[0])


def test_an_error_of_the_user_has_no_note():
    """What went wrong is in the user's own line."""
    model = Net()
    with pytest.raises(TypeError) as raised:
        train(lambda m, x, y: m(x) + "text", model, [(X, Y)], setup(Adam(), model))
    assert not hasattr(raised.value, "__notes__")


# --- Flags that are changed behind the state's back ---------------------------------------------------------------


def trained(model, state, how):
    if how == "trainstep":
        trainstep(loss, model, (X, Y), state)
    elif how == "withgradient":
        update(state, model, gradient(loss, model, X, Y, state=state))
    else:
        update(state, model, gradient(loss, model, X, Y))


@pytest.mark.parametrize("how", ["trainstep", "withgradient", "update"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["at once", "later"])
def test_flags_that_are_changed_after_setup_are_told_once(how, before, first):
    model = Net()
    model.encoder.requires_grad_(before)
    state = setup(Adam(), model)
    if not first:
        trained(model, state, how)
    model.encoder.requires_grad_(not before)
    with pytest.warns(UserWarning, match="requires_grad of 'encoder.0.weight', 'encoder.0.bias' was changed") as caught:
        trained(model, state, how)
    assert len(caught) == 1 and (caught[0].filename == __file__ or how != "update" or before)
    assert state.encoder[0].weight.frozen is not before
    for flag in (before, not before):
        model.encoder.requires_grad_(flag)
        trained(model, state, how)  # no second warning


def test_flags_are_looked_at_once_and_cost_nothing_after(monkeypatch):
    """Also where there is nothing to say: what was set up frozen by its flag, and thaws in both ways."""
    looks = []
    warn_of_flags = Binding.warn_of_flags
    monkeypatch.setattr(Binding, "warn_of_flags", lambda *args, **how: looks.append(1) or warn_of_flags(*args, **how))
    model = Net()
    model.encoder.requires_grad_(False)
    state = setup(Adam(), model)
    trained(model, state, "update")
    model.encoder[0].weight.requires_grad_(True)
    thaw(state.encoder[0].weight)
    trained(model, state, "update")
    del looks[:]
    for _ in range(3):
        trained(model, state, "update")
    assert looks == []
    model.encoder[0].bias.requires_grad_(True)  # and this is told of, still
    with pytest.warns(UserWarning, match=r"requires_grad of 'encoder\.0\.bias' was changed") as caught:
        trained(model, state, "update")
    assert len(caught) == 1
    del looks[:]
    trained(model, state, "update")
    assert looks == []


def test_flags_that_agree_are_nobodys_business():
    """Freezing in both ways, thawing what was set up frozen, switching gradients off for a while: nothing to say."""
    model = Net()
    model.head.requires_grad_(False)
    state = setup(Adam(), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model, state, "trainstep")
        freeze(state.encoder), thaw(state.head)
        trained(model, state, "trainstep")
        model.encoder.requires_grad_(False), model.head.requires_grad_(True)
        trained(model, state, "trainstep")
        model.requires_grad_(False)
        model(X)
        model.encoder.requires_grad_(False), model.head.requires_grad_(True)
        trained(model, state, "withgradient")
        pure, other = update(state, model, gradient(loss, model, X, Y, state=state), inplace=False)
        trained(other, pure, "trainstep")


# --- What is taken over -------------------------------------------------------------------------------------------


def test_a_new_head_of_the_old_shape_is_told_of():
    model = Net()
    state = setup(Adam(), model)
    trainstep(loss, model, (X, Y), state)
    model.head = nn.Linear(8, 2)
    with pytest.warns(UserWarning, match="'head.weight', 'head.bias' are new tensors.*fluxpy.reset"):
        new = setup(Adam(), model, keep=state)
    assert new.head.weight.count == 1
    reset(new.head)
    trainstep(loss, model, (X, Y), new)
    assert new.head.weight.count == 1 and new.encoder[0].weight.count == 2


def test_the_same_model_and_another_one_are_kept_in_silence():
    model = Net()
    state = setup(Adam(), model)
    trainstep(loss, model, (X, Y), state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setup(Adam(), model, keep=state)
        setup(Adam(), Net(), keep=state)
        model.head = nn.Linear(8, 3)
        setup(Adam(), model, keep=select(state, "encoder.*"))


def test_arrays_are_taken_as_they_come():
    """The note on NumPy does not stand in the way of what works."""
    model = Net()
    batches = DataLoader((X.numpy(), np.asarray(Y)), batch_size=4)
    assert len(train(loss, model, batches, setup(Adam(), model))) == 2


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.jagged])
def test_parameters_that_are_no_dense_tensors_are_refused(layout, train):
    held = torch.eye(3).to_sparse(layout=layout) if layout != torch.jagged else None
    if held is None:
        held = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    model = nn.Linear(3, 2)
    model.graph = nn.Parameter(held, requires_grad=train)
    for x in (model, {"head": nn.Linear(3, 2), "graph": held}):
        with pytest.raises(ValueError, match=r"'graph' is no dense tensor \([\w.]+\).*register_buffer"):
            setup(Adam(), x)
    del model.graph
    model.register_buffer("graph", held)
    state = setup(Adam(), model)
    for inplace in (True, False):
        _, new = update(state, model, {"weight": torch.ones(2, 3)}, inplace=inplace)
    assert type(new.graph) is type(held)

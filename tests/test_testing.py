"""What fluxpy.testing says of states, of steps, and of rules that break a promise."""

import copy
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fluxpy
from fluxpy import Adam, AdamW, Descent, Momentum, OptimiserChain, Prodigy, Rule, WeightDecay, schedules
from fluxpy.rules import Assign, hyper
from fluxpy.testing import assert_frozen, assert_hyper, assert_only_changed, check_rule, diff, snapshot


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.head = nn.Linear(2, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(3, 2), nn.Linear(2, 3)
        self.head.weight = self.embed.weight


def ones(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(p) for name, p in model.named_parameters()}


# --- Leaves -------------------------------------------------------------------------------------------------------


def test_assert_hyper_lists_each_leaf_that_differs() -> None:
    state = fluxpy.setup(OptimiserChain(WeightDecay(0.1), AdamW(schedules.linear(1.0, 0.0, 4))), Net())
    assert_hyper(state, "head.*", lr=1.0, betas=[0.9, 0.999])
    fluxpy.adjust(fluxpy.adjust(state.encoder[0], 3e-3), fluxpy.scale(0.1))
    assert_hyper(state, "encoder.0.*", lr=3e-4)  # 3e-3 * 0.1 differs from it in the last bit
    assert_hyper(state.encoder[0], "weight", lr=3e-4)
    assert_hyper(state.head.bias, lr=torch.tensor(1.0))
    with pytest.raises(AssertionError) as caught:
        assert_hyper(state, "*", lr=1.0, eps=1e-8, eta=1)
    text = str(caught.value)
    assert "6 of 6 leaves that match '*'" in text and "'encoder.0.bias' has lr=0.0003" in text
    assert "'head.bias' OptimiserChain(WeightDecay, AdamW) has no hyperparameter 'eta'; here it is called 'lr'" in text
    with pytest.raises(AssertionError, match="'weight_decay' stands more than once"):
        assert_hyper(state, weight_decay=0.1)


def test_schedules_are_read_at_the_count_of_the_next_update() -> None:
    model = nn.Linear(2, 2)
    state = fluxpy.setup(Descent(schedules.linear(1.0, 0.0, 4)), model)
    fluxpy.update(state, model, {"bias": torch.ones(2)})
    assert_hyper(state, "bias", lr=0.75)
    assert_hyper(state, "weight", lr=1.0)


def test_assert_frozen_and_its_opposite() -> None:
    model = Net()
    state = fluxpy.setup({"head.bias": None, "*": Adam()}, model)
    fluxpy.freeze(state.encoder)
    assert_frozen(state, "encoder.*")
    assert_frozen(state, "head.weight", frozen=False)
    with pytest.raises(AssertionError, match=r"1 of 2 .*'head.\*'.*\n  'head.weight' is not frozen$"):
        assert_frozen(state, "head.*")
    with pytest.raises(AssertionError, match=r"(?s)5 of 6 .*'encoder.1.bias' is frozen\n  'head.bias' is frozen$"):
        assert_frozen(state, frozen=False)
    with pytest.raises(AssertionError, match="'head.bias' this leaf was set up with no rule"):
        assert_hyper(state, "head.bias", lr=1e-3)


def test_what_matches_nothing_fails_and_what_is_asked_wrongly_is_no_failure() -> None:
    state = fluxpy.setup(Adam(), Net())
    for attempt in (lambda: assert_hyper(state, "encodr.*", lr=1e-3), lambda: assert_frozen(state, "haed.weight")):
        with pytest.raises(AssertionError, match="matches no leaf; (did you mean|there is)"):
            attempt()
    with pytest.raises(TypeError, match="needs a hyperparameter"):
        assert_hyper(state, "encoder.*")
    model: Any = Net()
    with pytest.raises(TypeError, match="takes the state tree"):
        assert_frozen(model)
    tied = fluxpy.setup(Adam(), Tied())
    fluxpy.freeze(tied.embed)
    assert_frozen(tied, "head.weight")  # by its other name


# --- Snapshots ----------------------------------------------------------------------------------------------------


def test_a_snapshot_is_independent_and_a_diff_readable() -> None:
    model = Net()
    state = fluxpy.setup(OptimiserChain(WeightDecay(0.1), AdamW(1e-3, weight_decay=0.2)), model)
    fluxpy.freeze(state.encoder[1])
    before = snapshot(model, state)
    assert not diff(before, snapshot(model, state)) and str(diff(before, before)) == "no difference"
    fluxpy.update(state, model, ones(model) | {"head.bias": None})
    model.encoder(torch.ones(4, 2))
    fluxpy.thaw(fluxpy.adjust(state.encoder[1], 3e-3)), fluxpy.adjust(state.encoder[1], fluxpy.scale(0.1))
    for member in (0, 1):
        fluxpy.adjust(state.head.bias, weight_decay=0.3, member=member)
    found = diff(before, snapshot(model, state))
    assert "head.bias: weight_decay (0.1, 0.2) -> (0.3, 0.3)" in str(found)
    assert found["encoder.1.weight"] == {"frozen": "True -> False", "lr": "0.001 -> 0.0003"}
    assert found["encoder.1.num_batches_tracked"] == {"buffer": "by at most 1"}
    assert found["head.weight"]["parameter"].startswith("by at most 0.00")
    assert found["head.weight"]["count"] == found["head.weight"]["state[1].t"] == "0 -> 1"
    assert found["head.weight"]["state[1].m"].startswith("by at most 0.1")
    assert before["head.weight"]["count"] == 0 and before["head.weight"]["state[1].t"] == 0
    assert set(found) == {
        "encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias", "encoder.1.num_batches_tracked",
        "encoder.1.running_mean", "encoder.1.running_var", "head.weight", "head.bias",
    }  # fmt: skip


def test_what_was_added_removed_retyped_or_untied() -> None:
    model = Tied()
    before = snapshot(model)
    assert before["embed.weight"]["names"] == ("embed.weight", "head.weight") and "head.weight" not in before
    model.head = nn.Linear(2, 3).bfloat16()
    model.tail = nn.Linear(1, 1, bias=False)
    del model.head.bias
    model.register_buffer("steps", torch.zeros(2))
    assert diff(before, model) == {
        "embed.weight": {"names": "removed"},
        "head.bias": {"parameter": "removed"},
        "head.weight": {"parameter": "added"},
        "tail.weight": {"parameter": "added"},
        "steps": {"buffer": "added"},
    }
    later = copy.deepcopy(model)
    later.head = nn.Linear(2, 4).bfloat16()
    later.steps = None
    assert str(diff(model, later)).splitlines() == [
        "head.weight: parameter bfloat16[3, 2] -> bfloat16[4, 2]", "steps: buffer removed", "head.bias: parameter added"
    ]  # fmt: skip


def test_a_snapshot_of_any_model_also_sees_momenta_come_and_rules_change() -> None:
    model = {"w": torch.ones(2), "layers": [nn.BatchNorm1d(1), torch.zeros(())], "ids": torch.arange(3)}
    state = fluxpy.reset(fluxpy.freeze(fluxpy.setup(Momentum(torch.tensor(0.1)), model)))
    before = snapshot(model, state)
    assert set(before) == {"w", "ids", "layers.1", *(f"layers.0.{name}" for name in nn.BatchNorm1d(1).state_dict())}
    fluxpy.thaw(state["w"])
    fluxpy.update(state, model, {"w": torch.ones(2)})
    model["ids"][0] = 5
    assert diff(before, snapshot(model, state)) == {
        "w": {"state": "added", "parameter": "by at most 0.1", "frozen": "True -> False", "count": "0 -> 1"},
        "ids": {"buffer": "by at most 5"},
    }
    other = snapshot(model, fluxpy.setup({"w": None, "*": Adam(0.1)}, model))
    assert diff(snapshot(model, state), other)["w"] | {"state": ""} == {
        "rule": "Momentum -> None", "frozen": "False -> True", "count": "1 -> 0", "lr": "removed",
        "momentum": "removed", "state": "",
    }  # fmt: skip
    with pytest.raises(ValueError, match="does not fit the state"):
        snapshot(model["layers"], state)
    assert str(diff(torch.zeros(1), torch.ones(1))) == "(top): parameter by at most 1"


@pytest.mark.parametrize("kind", ["snapshot", "copy", "tensors"])
def test_assert_only_changed(kind: str) -> None:
    model = Net()
    take = {"snapshot": snapshot, "copy": copy.deepcopy, "tensors": lambda m: copy.deepcopy(m.state_dict())}[kind]
    state, before = fluxpy.setup(Descent(), model), take(model)
    assert_only_changed(before, take(model))
    fluxpy.update(state, model, {"head.weight": torch.ones(2, 2), "encoder.0.bias": torch.ones(2)})
    assert_only_changed(before, model, "head.weight", "encoder.0.b*")
    with pytest.raises(AssertionError) as caught:
        assert_only_changed(before, take(model), "head.*")
    assert "only 'head.*' was to change, but" in str(caught.value)
    assert "'head.bias' did not change" in str(caught.value)
    assert "'encoder.0.bias' changed by at most 0.1" in str(caught.value)
    with pytest.raises(AssertionError, match=r"nothing was to change, but\n  .*\n  '.*' changed"):
        assert_only_changed(before, model)
    with pytest.raises(AssertionError, match=r"pattern 'haed.weight' matches no parameter; did you mean 'head.weight'"):
        assert_only_changed(before, model, "haed.weight", "head.weight", "encoder.0.bias")


def test_assert_only_changed_sees_every_bit_and_ties_and_refuses_what_is_no_copy() -> None:
    model = Tied()
    before = snapshot(model)
    with torch.no_grad():
        model.embed.weight[0, 0] = torch.nextafter(model.embed.weight[0, 0], torch.tensor(10.0))
    assert_only_changed(before, model, "head.weight")
    assert_only_changed(before, model.state_dict(), "embed.*")
    for shared in (model, model.state_dict(), dict(model.named_parameters())):
        with pytest.raises(TypeError, match="shares memory"):
            assert_only_changed(shared, model, "embed.*")
    norm = nn.BatchNorm1d(1)
    before = copy.deepcopy(norm.state_dict())
    norm(torch.ones(3, 1))
    assert_only_changed(before, norm)  # the statistics are no parameters
    assert_only_changed(before, norm.state_dict(), "running_*", "num_*")
    assert_only_changed({"a": torch.tensor(0.0)}, {"a": torch.tensor(-0.0)}, "a")
    assert_only_changed({"a": torch.tensor([torch.nan]), "b": torch.zeros(0)}, {"a": torch.tensor([torch.nan]), "b": torch.zeros(0)})  # fmt: skip  # noqa: E501
    with pytest.raises(AssertionError, match=r"'b' is gone\n  'c' is new\n  'a' changed float32\[1\] -> float32\[2\]"):
        assert_only_changed({"a": torch.zeros(1), "b": torch.ones(1)}, {"a": torch.zeros(2), "c": torch.ones(1)})


# --- Rules that break a promise -----------------------------------------------------------------------------------


class Sgd(Rule):
    """Keeps them all; each of those below breaks one."""

    lr: float = hyper(default=0.1, allowed="[0, inf)")

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
        return state, self.lr * dx


class Assigns(Sgd):
    elementwise = True

    def apply(self, state, x, dx):
        return state, Assign(x - self.lr * dx)


class OnlyMatrices(Sgd):
    def apply(self, state, x, dx):
        return state, self.lr * dx / (x.shape[0] + x.shape[1])


class DividesByZero(Sgd):
    def apply(self, state, x, dx):
        return state, self.lr * dx / dx.abs()


class GivesTheChangeAlone(Sgd):
    def apply(self, state, x, dx):
        return self.lr * dx


class RemembersInItself(Sgd):
    def apply(self, state, x, dx):
        self.last = dx
        return state, self.lr * dx


class OtherShape(Sgd):
    def apply(self, state, x, dx):
        return state, self.lr * dx.sum()


class WritesToTheGradient(Sgd):
    def apply(self, state, x, dx):
        return state, dx.mul_(self.lr)


class WritesTheSameToTheParameter(Sgd):
    def apply(self, state, x, dx):
        x.mul_(1.0)  # not a bit changes, only `_version`
        return state, self.lr * dx


class WritesBehindAutograd(Sgd):
    def apply(self, state, x, dx):
        dx.data.clamp_(-1, 1)
        return state, self.lr * dx


class WritesToItsState(Momentum):
    def apply(self, state, x, dx):
        v = state.mul_(self.momentum).add_(dx)
        return v, self.lr * v


class CountsInADict(Sgd):
    def init(self, x):
        return {"t": 0}

    def apply(self, state, x, dx):
        state["t"] += 1
        return state, self.lr * dx / state["t"]


class ChangesTheDtype(Sgd):
    def apply(self, state, x, dx):
        return state, self.lr * dx.double() if not dx.is_complex() else self.lr * dx


class ChangesTheDtypeOfItsState(Momentum):
    def apply(self, state, x, dx):
        v = self.momentum * state.double() + dx.double() if not dx.is_complex() else dx
        return v, (self.lr * v).to(dx.dtype)


class GrowsItsState(Sgd):
    def init(self, x):
        return torch.zeros_like(x)[None]

    def apply(self, state, x, dx):
        state = torch.cat([state, dx[None]])
        return state, self.lr * state.sum(0)


class NumberBecomesTensor(Sgd):
    def init(self, x):
        return 0.0

    def apply(self, state, x, dx):
        return state + dx.abs().sum(), self.lr * dx


class KeepsTheGradient(Sgd):
    def init(self, x):
        return torch.zeros_like(x)

    def apply(self, state, x, dx):
        return dx.detach(), self.lr * (dx - state)


class KeepsTheParameter(Sgd):
    def init(self, x):
        return torch.zeros_like(x)

    def apply(self, state, x, dx):
        return x.view_as(x), self.lr * dx


class Noisy(Sgd):
    def apply(self, state, x, dx):
        return state, self.lr * (dx + torch.randn_like(dx))


class StateInTheRule(Sgd):
    def apply(self, state, x, dx):
        self.__dict__["turn"] = turn = self.__dict__.get("turn", 0) + 1
        return state, self.lr * dx / turn


class ReadsOnTheHost(Sgd):
    def apply(self, state, x, dx):
        return state, self.lr * dx if dx.abs().sum() > 0 else dx


class ReadsAnItem(Sgd):
    def apply(self, state, x, dx):
        return state, self.lr * dx / (1 + dx.abs().sum().item())


class SaysElementwise(Sgd):
    elementwise = True

    def apply(self, state, x, dx):
        return state, self.lr * dx / (1 + dx.square().sum().sqrt())


class DependsOnThePlace(Sgd):
    elementwise = True

    def apply(self, state, x, dx):
        return state, self.lr * dx * torch.ones_like(dx).cumsum(-1)


class DependsOnTheLength(Sgd):
    elementwise = True

    def apply(self, state, x, dx):
        return state, self.lr * (dx if x.numel() > 4 else dx * 1.001)


class EvaluatesToANumber(Sgd):
    def evaluation(self, state, x):
        return x.abs().sum()


class EvaluatesInPlace(Sgd):
    def init(self, x):
        return torch.zeros_like(x)

    def evaluation(self, state, x):
        return state.add_(x)


class SharesItsBuffers(Sgd):
    def init(self, x):
        return [torch.zeros_like(x)] * 2

    def apply(self, state, x, dx):
        return [state[0] + dx, state[1] + dx * dx], self.lr * state[0]


class IgnoresARate(Sgd):
    bias: float = 0.5


class ReadsInInitOnly(Sgd):
    first: float = hyper(default=1.0, allowed="[0, inf)")

    def init(self, x):
        return torch.full_like(x, self.first)

    def apply(self, state, x, dx):
        return state, self.lr * state * dx


class HoldsAnObject(Sgd):
    def init(self, x):
        return {"by": object()}


def hidden() -> Any:
    class Hidden(NamedTuple):
        m: Tensor

    return Hidden


class CannotBePickled(Sgd):
    def init(self, x):
        return hidden()(torch.zeros_like(x))


class CannotBeSaved(Sgd):
    phase: complex = 1j


BROKEN = {
    EvaluatesToANumber: r"the evaluation is \[\('float64', \[\]\)\]",
    EvaluatesInPlace: "the evaluation wrote to the state",
    OnlyMatrices: r"takes parameters of all .* shapes.*float64 parameter of shape \(\): IndexError",
    DividesByZero: "finite change .*NaN or Inf",
    GivesTheChangeAlone: r"must return \(state, change\), but gave",
    RemembersInItself: r"has no place for 'last'.*its state",
    OtherShape: r"a finite change of that shape.*shape \(3, 4\): the change is \(\)",
    WritesToTheGradient: "writes to nothing it is given.*the gradient was written to",
    WritesTheSameToTheParameter: "writes to nothing it is given.*the parameter was written to",
    WritesBehindAutograd: "writes to nothing it is given.*the gradient was written to",
    WritesToItsState: "writes to nothing it is given.*the state was written to",
    CountsInADict: "writes to nothing it is given.*the state was written to",
    ChangesTheDtype: "the change has the dtype .*float32 became float64",
    ChangesTheDtypeOfItsState: r"keeps its structure, shapes and dtypes.*'float32', .* became .*'float64', ",
    GrowsItsState: r"keeps its structure, shapes.*\[1, 3, 4\].* became .*\[2, 3, 4\]",
    NumberBecomesTensor: "keeps its structure.*became",
    KeepsTheGradient: "holds no memory of .* the gradient.*the state keeps a view of the gradient",
    KeepsTheParameter: "holds no memory of the parameter .*the state keeps a view of the parameter",
    Noisy: "from the same inputs, apply gives the same.*two calls differ",
    StateInTheRule: "from the same inputs, apply gives the same.*two calls differ",
    ReadsOnTheHost: "reads no tensor on the host.*RuntimeError",
    ReadsAnItem: r"reads no tensor on the host.*RuntimeError: Tensor.item\(\)",
    SaysElementwise: "elementwise = True.*update 0 differs",
    DependsOnThePlace: "elementwise = True.*update 0 differs",
    DependsOnTheLength: "gives the same as in place.*on float64, after update 0",
    IgnoresARate: r"adjust of a hyperparameter takes effect.*bias=0.5 became 0.25, .*nothing else changed",
    ReadsInInitOnly: r"adjust of a hyperparameter takes effect.*fixed=True.*first=1.0 became 0.5",
    HoldsAnObject: "the state is a pytree of tensors and plain numbers.*<object",
    CannotBePickled: "goes on from a pickle.*Hidden",
    CannotBeSaved: "goes on from a saved state_dict.*ValueError",
}


def test_rules_that_keep_all_promises_pass() -> None:
    check_rule(Sgd)
    check_rule(Sgd(schedules.linear(0.1, 0.01, 20)))
    check_rule(OptimiserChain(Sgd(0.5), Adam()))
    check_rule(Assigns)
    check_rule(SharesItsBuffers)  # the engine parts them
    check_rule(Prodigy())  # whose averages cancel, in float32

    class Local(Sgd):
        """Not to be found by pickle."""

    check_rule(Local)


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_a_broken_promise_is_named(rule: type[Rule]) -> None:
    with pytest.raises(AssertionError) as caught:
        check_rule(rule)
    assert re.match(f"{rule.__name__} breaks a promise: .*{BROKEN[rule]}", str(caught.value), re.DOTALL)


@pytest.mark.parametrize(
    ("name", "promise"),
    [
        ("freeze", "a frozen leaf keeps every bit.*parameter by at most nan"),
        ("adjust", r"takes effect.*after adjust\(state, lr=0.05\) it is 0.1"),
        ("load_state_dict", "saved state_dict.*count 10 -> 8"),
    ],
)
def test_a_verb_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str, promise: str) -> None:
    monkeypatch.setattr(fluxpy.testing.tree_promises, name, lambda *args, **kwargs: None)
    with pytest.raises(AssertionError, match=f"(?s){promise}"):
        check_rule(Momentum(0.1))


def test_values_to_try_can_be_given() -> None:
    class Late(Sgd):
        warm: float = hyper(default=1000.0, allowed="[5, inf)")

        def init(self, x):
            return 0

        def apply(self, state, x, dx):
            return state + 1, self.lr * dx * (0.5 if state < self.warm else 1.0)

    with pytest.raises(AssertionError, match=r"adjust.*warm=1000.0 became 500.0, 2000.0 and nothing else changed"):
        check_rule(Late)
    check_rule(Late, adjusted={"warm": 9.0})
    with pytest.raises(TypeError, match=r"AccumGrad\(\) does not work .*give check_rule an instance"):
        check_rule(fluxpy.AccumGrad)


def test_a_rule_is_checked_whatever_the_default_device() -> None:
    with torch.device("meta"):
        check_rule(AdamW())

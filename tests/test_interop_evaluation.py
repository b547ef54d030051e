"""`eval` and `train` of TorchOptimizer, which clients of schedulefree call, and what users do around them."""

import copy
import dataclasses
import gc
import io
import pickle
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fluxpy
from fluxpy import (
    AccumGrad,
    Adam,
    Averaged,
    Descent,
    Lookahead,
    MixedPrecision,
    OptimiserChain,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
    averaged,
)  # fmt: skip
from fluxpy.interop import TorchOptimizer

DATA = torch.Generator().manual_seed(7)
X = torch.randn(16, 3, generator=DATA, dtype=torch.float64)
Y = torch.randn(16, 2, generator=DATA, dtype=torch.float64)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def turn(optimizer: Any, model: nn.Module) -> None:
    optimizer.zero_grad()
    out = model(X.to(next(model.parameters()).dtype))
    mse_loss(out, Y.to(out.dtype)).backward()
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], room: float = 0.0) -> bool:
    return all((x - other[name]).abs().max() <= room for name, x in one.items())


def trained(rule: Any, steps: int = 5, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, TorchOptimizer]:
    model = net(dtype)
    optimizer = TorchOptimizer(rule, model)
    for _ in range(steps):
        turn(optimizer, model)
    return model, optimizer


RULES: dict[str, Any] = {
    "Averaged": Averaged(Adam(0.05), decay=0.5),
    "ScheduleFree": OptimiserChain(fluxpy.ClipGlobalNorm(1.0), ScheduleFreeAdamW(0.05)),
    "Lookahead": Lookahead(Descent(0.1), k=3),
    "master": MixedPrecision(Averaged(Adam(0.05), decay=0.5)),
    "gathers": OptimiserChain(AccumGrad(2), Averaged(Adam(0.05), decay=0.5)),
    "parts": {"0.*": Averaged(Adam(0.05), decay=0.5), "*": Adam(0.05)},
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@pytest.mark.parametrize(
    "rule, name",
    [(ScheduleFreeAdamW(0.05, warmup_steps=3), "AdamWScheduleFree"), (ScheduleFreeSGD(0.3, 0.8), "SGDScheduleFree")],
)
def test_a_loop_for_schedulefree_has_the_numbers_of_its_package(rule: Any, name: str) -> None:
    ours, theirs = net(), net()
    one = TorchOptimizer(rule, ours)
    other = getattr(schedulefree, name)(theirs.parameters(), **dataclasses.asdict(rule))
    before = weights(ours)
    for _ in range(6):
        for optimizer, model in ((one, ours), (other, theirs)):
            optimizer.train()
            optimizer.train()  # as the Trainer of Hugging Face, before each step
            turn(optimizer, model)
        assert same(weights(ours), weights(theirs), 1e-12)
        before = weights(ours)
        for optimizer in (one, other):
            optimizer.eval()
            optimizer.eval()
        assert same(weights(ours), weights(theirs), 1e-12)
    assert not same(weights(ours), before, 1e-3)


@every_rule
def test_evaluation_in_between_is_not_noticed(rule: Any) -> None:
    """They are the weights of `averaged`; the training weights come back bit for bit, and training goes on."""
    dtype = torch.bfloat16 if isinstance(rule, MixedPrecision) else torch.float64
    (model, optimizer), (alone, other) = trained(rule, dtype=dtype), trained(rule, dtype=dtype)
    apart = []
    for _ in range(4):
        before = weights(model)
        with averaged(optimizer.tree, model) as paths:
            inside = weights(model)
        optimizer.eval()
        assert paths and same(weights(model), inside)
        apart.append(not same(inside, before))
        with averaged(optimizer.tree, model) as none:
            assert none == [] and same(weights(model), inside)
        assert same(weights(model), inside)
        optimizer.train()
        assert same(weights(model), before)
        turn(optimizer, model)
        turn(other, alone)
        assert same(weights(model), weights(alone))
    assert any(apart)


def test_rules_without_weights_to_evaluate_with_are_not_concerned() -> None:
    """A client that calls eval() and never train() may go on stepping."""
    model, optimizer = trained(Adam(0.05))
    before = weights(model)
    optimizer.eval()
    assert same(weights(model), before) and "training_weights" not in optimizer.state_dict()
    turn(optimizer, model)
    assert not same(weights(model), before)


def test_before_the_first_step_and_of_frozen_leaves_nothing_changes() -> None:
    model, optimizer = trained(RULES["Averaged"], steps=0)
    before = weights(model)
    optimizer.eval()
    assert same(weights(model), before)
    with pytest.raises(RuntimeError, match="step is refused"):
        turn(optimizer, model)
    optimizer.train()
    turn(optimizer, model)
    turn(optimizer, model)
    fluxpy.freeze(optimizer.tree[0])
    before = weights(model)
    optimizer.eval()
    assert [name for name, x in weights(model).items() if not torch.equal(x, before[name])] == ["2.weight", "2.bias"]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_mode_may_change_where_nothing_is_recorded(mode: Any) -> None:
    (model, optimizer), (alone, other) = trained(RULES["Averaged"]), trained(RULES["Averaged"])
    with mode():
        optimizer.eval()
        saved = through_a_file(optimizer.state_dict())
    optimizer.train()
    turn(optimizer, model), turn(other, alone)
    optimizer.eval()
    with mode():
        optimizer.train()
    turn(optimizer, model), turn(other, alone)
    assert same(weights(model), weights(alone)) and saved["training_weights"].keys() == weights(model).keys()


def test_what_is_refused_and_what_to_write() -> None:
    model, optimizer = trained(RULES["Averaged"])
    saved, own = optimizer.state_dict(), weights(model)
    optimizer.eval()
    inside = weights(model)
    called = []
    with pytest.raises(RuntimeError, match=r"step is refused after optimizer.eval\(\); call optimizer.train\(\) first"):
        optimizer.step(lambda: called.append(1))
    assert not called
    with pytest.raises(RuntimeError, match="load_state_dict is refused"):
        optimizer.load_state_dict(saved)
    grads = {name: torch.ones_like(x) for name, x in inside.items()}
    with pytest.raises(RuntimeError, match=r"update is refused .*between eval\(\) and train\(\) of a TorchOptimizer"):
        fluxpy.update(optimizer.tree, model, grads)
    with pytest.raises(RuntimeError, match="is refused"):
        TorchOptimizer(optimizer.tree, model).eval()  # another one of the same tree
    assert same(weights(model), inside)
    optimizer.train()
    assert same(weights(model), own)
    with averaged(optimizer.tree, model):
        with pytest.raises(RuntimeError, match=r"eval\(\) of a TorchOptimizer is refused within fluxpy.averaged"):
            optimizer.eval()
        optimizer.train()  # it is in training mode
        assert same(weights(model), inside)
    turn(optimizer, model)


def test_an_evaluation_that_fails_changes_nothing() -> None:
    class Faulty(fluxpy.Rule):
        lr: float = 0.1

        def init(self, x: Tensor) -> Any:
            return 0

        def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
            return state + 1, self.lr * dx

        def evaluation(self, state: Any, x: Tensor) -> Tensor:
            if x.ndim == 1:
                raise ZeroDivisionError
            return x + 1

    model, optimizer = trained(Faulty())
    before = weights(model)
    with pytest.raises(ZeroDivisionError):
        optimizer.eval()
    assert same(weights(model), before)
    turn(optimizer, model)


def test_what_is_written_meanwhile_is_lost_with_a_warning() -> None:
    model, optimizer = trained(RULES["Averaged"])
    own = weights(model)
    optimizer.eval()
    model.load_state_dict({name: x + 1 for name, x in own.items()})  # the best weights of a trainer, perhaps
    optimizer.eval()
    assert same(weights(model), {name: x + 1 for name, x in own.items()})
    with pytest.warns(UserWarning, match=r"between eval\(\) and train\(\) .* is lost.*do not call train") as found:
        optimizer.train()
    assert same(weights(model), own) and found[0].filename == __file__


def test_two_branches_of_one_tree_are_apart() -> None:
    model = net()
    state = fluxpy.setup(RULES["Averaged"], model)
    first, last = TorchOptimizer(state[0], model[0]), TorchOptimizer(state[2], model[2])
    for _ in range(4):
        turn(first, model)
        last.step()
    before = weights(model)
    first.eval()
    turn(last, model)
    last.eval()
    first.train()
    last.train()
    assert torch.equal(model[0].weight, before["0.weight"]) and not torch.equal(model[2].weight, before["2.weight"])


# --- Files and copies ---------------------------------------------------------------------------------------------


def through_a_file(d: Any) -> Any:
    torch.save(d, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_rule
@pytest.mark.parametrize("model_first", [True, False])
def test_a_run_saved_in_evaluation_mode_goes_on_exactly(rule: Any, model_first: bool) -> None:
    """A trainer saves after it has evaluated: the model's file has the weights to evaluate with."""
    dtype = torch.bfloat16 if isinstance(rule, MixedPrecision) else torch.float64
    model, optimizer = trained(rule, dtype=dtype)
    optimizer.eval()
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    inside = weights(model)
    other, again = trained(rule, steps=2, dtype=dtype)
    loads = [lambda: other.load_state_dict(saved["model"]), lambda: again.load_state_dict(saved["optimizer"])]
    for load in loads if model_first else reversed(loads):
        load()
    assert same(weights(other), inside)
    with pytest.raises(RuntimeError, match="step is refused"):
        again.step()
    again.train()
    optimizer.train()
    for _ in range(3):
        assert same(weights(other), weights(model))
        turn(optimizer, model)
        turn(again, other)
    optimizer.eval()
    again.eval()
    assert same(weights(other), weights(model))


def test_training_weights_that_fit_nothing_change_nothing() -> None:
    model, optimizer = trained(RULES["Averaged"])
    optimizer.eval()
    d = optimizer.state_dict()
    optimizer.train()
    turn(optimizer, model)
    before, counts = weights(model), [leaf.count for _, leaf in fluxpy.leaves(optimizer.tree)]
    odd = {"2.bias": torch.zeros(3, dtype=torch.float64)}
    for wrong in ({**d["training_weights"], **odd}, {"nowhere": torch.zeros(1)}, {"2.bias": None}, [1]):
        with pytest.raises(ValueError, match="load_state_dict: .*training.weights"):
            optimizer.load_state_dict({**d, "training_weights": wrong})
    assert [leaf.count for _, leaf in fluxpy.leaves(optimizer.tree)] == counts
    turn(optimizer, model)
    assert not same(weights(model), before)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_are_in_evaluation_mode_too(how: Any) -> None:
    model, optimizer = trained(RULES["Averaged"])
    own = weights(model)
    optimizer.eval()
    inside = weights(model)
    other, copied = how((model, optimizer))
    optimizer.train()
    turn(optimizer, model)
    assert same(weights(other), inside)
    with pytest.raises(RuntimeError, match="step is refused"):
        turn(copied, other)
    copied.train()
    assert same(weights(other), own)
    turn(copied, other)
    assert same(weights(other), weights(model))


def test_an_optimiser_that_goes_in_evaluation_mode_leaves_the_weights() -> None:
    """As one trains, evaluates, and keeps the model alone."""
    model, optimizer = trained(RULES["Averaged"])
    optimizer.eval()
    inside = weights(model)
    del optimizer
    gc.collect()
    assert same(weights(model), inside)

"""TorchOptimizer is what loops, schedulers and scalers written for torch.optim expect, and its tree stays the truth."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import needs_compiler
from rule_table import ROWS
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

import fluxpy
from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    ClipGlobalNorm,
    Descent,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    RMSProp,
    Rprop,
    WeightDecay,
)  # fmt: skip
from fluxpy.interop import TorchOptimizer

DATA = torch.Generator().manual_seed(7)
X, Y = torch.randn(16, 3, generator=DATA), torch.randn(16, 2, generator=DATA)


class Net(nn.Module):
    """An encoder and two heads."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        self.left, self.right = nn.Linear(4, 1), nn.Linear(4, 1)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(x.to(self.left.weight.dtype)).tanh()
        return torch.cat([self.left(hidden), self.right(hidden)], 1)


def loss_of(model: nn.Module) -> torch.Tensor:
    out = model(X)
    return mse_loss(out, Y.to(out.dtype))


def turn(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def twins(rule: Any, twin: Callable[[Any], torch.optim.Optimizer]) -> tuple[Net, TorchOptimizer, Net, Any]:
    ours, theirs = Net(), Net()
    return ours, TorchOptimizer(rule, ours), theirs, twin(theirs)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (path, x), y in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=0, atol=1e-12), path


# --- Param groups -------------------------------------------------------------------------------------------------

PARTS = {"encoder.*": Adam(1e-3), "*bias": Adam(1e-2), "*": Adam(1e-3)}


def test_a_group_for_each_set_of_equal_hyperparameters_in_the_order_of_the_model() -> None:
    model = Net()
    optimizer = TorchOptimizer(PARTS, model)
    first, second = optimizer.param_groups
    assert first["names"] == [*(f"encoder.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")), "left.weight",
                              "right.weight"]  # fmt: skip
    assert second["names"] == ["left.bias", "right.bias"]
    assert second["params"][1] is model.right.bias
    assert (first["lr"], second["lr"], first["betas"], second["eps"]) == (1e-3, 1e-2, (0.9, 0.999), 1e-8)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults["lr"] == 1e-3
    assert "momentum" not in optimizer.defaults and "betas" in optimizer.defaults


def test_the_order_is_the_models_where_names_are_not() -> None:
    """Keys of a plain dict are sorted by pytree libraries; those of a module are not."""
    model = nn.ModuleDict({"z": nn.Linear(1, 1), "a": nn.Linear(1, 1)})
    optimizer = TorchOptimizer(Adam(), model)
    assert optimizer.param_groups[0]["names"] == [name for name, _ in model.named_parameters()]


def test_what_is_written_counts_at_once_and_what_adjust_does_shows() -> None:
    optimizer = TorchOptimizer(PARTS, Net())
    group = optimizer.param_groups[1]
    group["lr"] = 0.5
    group.update(betas=[0.5, 0.6], eps=1e-3)
    assert optimizer.tree.left.bias.rule == Adam(0.5, (0.5, 0.6), eps=1e-3)
    assert optimizer.tree.left.weight.rule == Adam(1e-3)
    fluxpy.adjust(fluxpy.select(optimizer.tree, "*.bias"), 0.7)
    assert group["lr"] == 0.7, "a group that was kept is not stale"


def test_adjust_splits_a_group_and_never_joins_two() -> None:
    optimizer = TorchOptimizer(Adam(0.1), Net())
    fluxpy.adjust(optimizer.tree.right, 0.2)
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"]) == (0.1, 0.2)
    assert second["names"] == ["right.weight", "right.bias"] and "right.bias" not in first["names"]
    fluxpy.adjust(optimizer.tree, 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    first["lr"] = 0.3
    assert (optimizer.tree.left.bias.rule.lr, optimizer.tree.right.bias.rule.lr) == (0.3, 0.0)


def test_a_split_under_a_scheduler_warns() -> None:
    model = Net()
    optimizer = TorchOptimizer(Adam(0.1), model)
    lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
    fluxpy.adjust(optimizer.tree.right, 0.2)
    with pytest.warns(UserWarning, match="'right.weight', 'right.bias' got other hyperparameters than their group"):
        groups = optimizer.param_groups
    assert "initial_lr" in groups[0] and "initial_lr" not in groups[1]
    turn(optimizer, model)
    again = lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
    turn(optimizer, model)
    again.step()
    assert fluxpy.value(optimizer.tree.right.bias, "lr") == 0.1


def test_groups_are_dicts_to_everyone() -> None:
    optimizer = TorchOptimizer(OptimiserChain(ClipGlobalNorm(2.0), Adam(0.1)), Net())
    group = optimizer.param_groups[0]
    assert isinstance(group, dict)
    names = ["params", "names", "max_norm", "norm_type", "nonfinite", "lr", "betas", "eps"]
    assert list(group) == list({**group}) == list(dict(group)) == list(group.copy()) == list(group | {}) == names
    assert group.get("lr") == 0.1 and group.get("momentum") is None and "lr" in group and "momentum" not in group
    assert group.setdefault("initial_lr", 3.0) == 3.0 and group.pop("initial_lr") == 3.0
    assert len(group) == len(names) and bool(group)
    group |= {"mark": 1}
    assert group["mark"] == 1 and next(reversed(group)) == "mark"
    assert {**group}["lr"] == copy.deepcopy(group)["lr"] == pickle.loads(pickle.dumps(group))["lr"] == 0.1
    assert "'lr': 0.1" in repr(group)
    assert group == dict(group)
    for change in (lambda: group.pop("lr"), lambda: group.__setitem__("params", []), lambda: group.pop("names")):
        with pytest.raises(TypeError, match="param_groups"):
            change()


def test_a_value_that_is_not_allowed_changes_nothing() -> None:
    optimizer = TorchOptimizer(Adam(0.1), Net())
    with pytest.raises(ValueError, match="lr=-1.0 is not allowed"):
        optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="only to make its state"):
        TorchOptimizer(Rprop(0.1), Net()).param_groups[0]["lr"] = 0.2
    assert optimizer.tree.left.bias.rule == Adam(0.1)


def test_a_hyperparameter_that_the_rule_does_not_have_is_refused_and_marks_of_others_are_kept():
    optimizer = TorchOptimizer(Adam(0.1), torch.nn.Linear(2, 1))
    [group] = optimizer.param_groups
    for name in ("weight_decay", "momentum", "dampening"):
        with pytest.raises(ValueError, match=f"Adam has no hyperparameter '{name}'"):
            group[name] = 0.1
        group[name] = 0.0  # which changes nothing
    group.update(initial_lr=0.1, foreach=True, stage="head")
    assert [group[name] for name in ("initial_lr", "foreach", "stage", "weight_decay")] == [0.1, True, "head", 0.0]


def test_a_name_with_several_values_is_no_one_value() -> None:
    optimizer = TorchOptimizer(OptimiserChain(RMSProp(1.0), Momentum(0.01)), Net())
    group = optimizer.param_groups[0]
    assert "lr" not in group and group["momentum"] == 0.9
    with pytest.raises(KeyError, match="have 'lr' with different values"):
        group["lr"]
    with pytest.raises(ValueError, match="have 'lr' with different values"):
        group["lr"] = 0.1
    with pytest.raises(KeyError, match="have 'lr' with different values"):
        lr_scheduler.StepLR(optimizer, 1)
    equal = TorchOptimizer(OptimiserChain(RMSProp(0.1), Momentum(0.1)), Net())
    equal.param_groups[0]["lr"] = 0.2
    assert equal.tree.left.bias.rule == OptimiserChain(RMSProp(0.2), Momentum(0.2))


def test_parts_without_a_rule_are_in_no_group() -> None:
    model = Net()
    optimizer = TorchOptimizer({"encoder.*": None, "*": Adam()}, model)
    assert len(optimizer.param_groups[0]["params"]) == 4
    before = copy.deepcopy(model.encoder)
    turn(optimizer, model)
    assert_same(before, model.encoder)
    with pytest.raises(ValueError, match="no parameter that a rule trains"):
        TorchOptimizer({"*": None}, model)


# --- Options and arguments ----------------------------------------------------------------------------------------


def test_options_of_torch_are_taken_or_refused() -> None:
    TorchOptimizer(Adam(), Net(), foreach=True, fused=None, capturable=False)
    for name in ("maximize", "capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"TorchOptimizer: {name}=True is not available"):
            TorchOptimizer(Adam(), Net(), **{name: True})
        with pytest.raises(ValueError, match=f"{name}=True is not available"):
            TorchOptimizer(Adam(), Net()).param_groups[0][name] = True
    with pytest.raises(TypeError, match="'lr': hyperparameters belong to the rule"):
        TorchOptimizer(Adam(), Net(), lr=0.1)


def test_wrong_arguments() -> None:
    model = Net()
    with pytest.raises(TypeError, match="takes the model, not an iterator over its parameters"):
        TorchOptimizer(Adam(), model.parameters())
    with pytest.raises(TypeError, match="not param groups.*equal rules"):
        TorchOptimizer(Adam(), [{"params": list(model.encoder.parameters()), "lr": 0.3}])
    with pytest.raises(TypeError, match="the rule comes first"):
        TorchOptimizer(model, Adam())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="does not fit the state"):
        TorchOptimizer(fluxpy.setup(Adam(), model), model.encoder)
    with pytest.raises(ValueError, match="non-leaf"):
        TorchOptimizer(Adam(), {"w": torch.ones(2, requires_grad=True) * 2})


def test_groups_cannot_be_added_or_set() -> None:
    model = Net()
    optimizer = TorchOptimizer(Adam(), model)
    way = r"setup\(rule, model, keep=optimizer.tree\)"
    with pytest.raises(TypeError, match=way):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(TypeError, match=way):
        optimizer.param_groups = []
    optimizer.param_groups.clear()
    assert len(optimizer.param_groups) == 1
    turn(optimizer, model)
    model.third = nn.Linear(4, 1).double()
    bigger = TorchOptimizer(fluxpy.setup(Adam(), model, keep=optimizer.tree), model)
    assert bigger.tree.left.bias.count == 1 and bigger.tree.third.bias.count == 0


def test_a_state_that_there_is() -> None:
    model = Net()
    state = fluxpy.setup(Adam(0.1), model)
    optimizer = TorchOptimizer(state, model)
    assert optimizer.tree is state
    turn(optimizer, model)
    assert state.left.bias.count == 1


@pytest.mark.parametrize("model", [
    {"b": nn.Parameter(torch.ones(2)), "a": [nn.Parameter(torch.ones(3)), None]},
    nn.Parameter(torch.ones(3)),
    [torch.ones(2, requires_grad=True)],
    (nn.Linear(2, 2), {"x": torch.ones(1, requires_grad=True), 1: torch.ones(1, requires_grad=True)}),
])  # fmt: skip
def test_any_pytree_is_a_model(model: Any) -> None:
    optimizer = TorchOptimizer(Descent(0.5), model)
    params = fluxpy.trainables(model)
    before = [x.detach().clone() for x in params]
    for x in params:
        x.grad = torch.ones_like(x)
    optimizer.step()
    for x, old in zip(params, before, strict=True):
        assert torch.equal(x, old - 0.5)
    optimizer.zero_grad()
    assert all(x.grad is None for x in params)
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


# --- Steps --------------------------------------------------------------------------------------------------------


def test_numbers_of_torch_through_clip_decay_and_parts() -> None:
    ours, optimizer, theirs, twin = twins(
        {"encoder.*": OptimiserChain(WeightDecay(0.1), Adam(0.01)), "*": OptimiserChain(WeightDecay(0.1), Adam(0.1))},
        lambda m: torch.optim.Adam([{"params": m.encoder.parameters(), "lr": 0.01},
                                    {"params": [*m.left.parameters(), *m.right.parameters()]}], 0.1, weight_decay=0.1),
    )  # fmt: skip
    for _ in range(12):
        turn(optimizer, ours)
        turn(twin, theirs)
    assert_same(ours, theirs)


def test_no_gradient_anywhere_is_no_step() -> None:
    model = Net()
    optimizer = TorchOptimizer(Adam(), model)
    optimizer.step()
    assert optimizer.tree.left.bias.count == 0
    model.left(torch.ones(1, 4).double()).sum().backward()
    optimizer.step()
    assert (optimizer.tree.left.bias.count, optimizer.tree.right.bias.count) == (1, 0)


def test_a_closure_runs_once_with_gradients_and_gives_the_loss() -> None:
    model = Net()
    optimizer = TorchOptimizer(Adam(), model)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with torch.no_grad():
        expected = loss_of(model)
        loss = optimizer.step(closure)
    assert torch.equal(loss.detach(), expected) and calls == [True]
    assert optimizer.tree.left.bias.count == 1


def test_hooks() -> None:
    model = Net()
    optimizer = TorchOptimizer(Adam(), model)
    seen: list[Any] = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(o is optimizer)),
        optimizer.register_state_dict_pre_hook(lambda o: seen.append("save")),
        optimizer.register_state_dict_post_hook(lambda o, d: {**d, "more": 1}),
        optimizer.register_load_state_dict_pre_hook(lambda o, d: {k: v for k, v in d.items() if k != "more"}),
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded")),
    ]
    anywhere = register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("any"))
    turn(optimizer, model)
    anywhere.remove()
    saved = optimizer.state_dict()
    assert saved["more"] == 1
    optimizer.load_state_dict(saved)
    assert seen == ["before", True, "any", "save", "loaded"] and "more" in saved
    for handle in handles:
        handle.remove()
    turn(optimizer, model)
    assert "more" not in optimizer.state_dict() and len(seen) == 5


def test_zero_grad_to_zero() -> None:
    model = Net()
    optimizer = TorchOptimizer(Adam(), model)
    turn(optimizer, model)
    optimizer.zero_grad(set_to_none=False)
    assert all(x.grad is not None and not x.grad.any() for x in model.parameters())
    optimizer.zero_grad()
    assert all(x.grad is None for x in model.parameters())


def test_freeze_and_thaw_in_mid_run() -> None:
    model = Net()
    optimizer = TorchOptimizer(AdamW(0.1), model)
    turn(optimizer, model)
    fluxpy.freeze(optimizer.tree.encoder)
    before, head = copy.deepcopy(model.encoder), model.left.weight.detach().clone()
    for _ in range(3):
        turn(optimizer, model)
    assert_same(before, model.encoder)
    assert not torch.equal(head, model.left.weight)
    fluxpy.thaw(optimizer.tree.encoder)
    turn(optimizer, model)
    assert optimizer.tree.encoder[0].weight.count == 2
    assert not torch.equal(before[0].weight, model.encoder[0].weight)


def test_accumulation_inside_the_rule() -> None:
    ours, optimizer, theirs, twin = twins(
        OptimiserChain(AccumGrad(2), Adam(0.1)), lambda m: torch.optim.Adam(m.parameters(), 0.1)
    )
    for i in range(6):
        turn(optimizer, ours)
        if i % 2:
            turn(twin, theirs)
    assert_same(ours, theirs)


@needs_compiler
def test_a_compiled_model_and_a_compiled_rule() -> None:
    model = Net()
    wrapped = torch.compile(model, backend="eager")
    optimizer = TorchOptimizer(fluxpy.setup(Adam(0.1), wrapped, compile=True), wrapped)
    assert optimizer.param_groups[0]["names"][0] == "encoder.0.weight"
    theirs = Net()
    twin = torch.optim.Adam(theirs.parameters(), 0.1)
    for _ in range(3):
        turn(optimizer, wrapped)  # pyright: ignore[reportArgumentType]
        turn(twin, theirs)
    assert_same(model, theirs)


def test_sparse_gradients_are_refused_and_nothing_changes() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = TorchOptimizer(Adam(), model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="'weight' is sparse"):
        optimizer.step()
    assert optimizer.tree.weight.count == 0


def test_momenta_follow_their_parameters() -> None:
    """As torch's do, which are made at the first step; and what is loaded goes where the parameter is."""
    here, elsewhere = Net(), Net().to("meta")
    for x in elsewhere.parameters():
        x.grad = torch.ones_like(x)
    optimizer = TorchOptimizer(fluxpy.setup(Adam(), here), elsewhere)
    optimizer.step()
    assert optimizer.tree.left.bias.state.m.is_meta and optimizer.tree.left.bias.count == 1
    for d in (TorchOptimizer(Adam(), here).state_dict(), torch.optim.Adam(here.parameters()).state_dict()):
        other = TorchOptimizer(fluxpy.setup(Adam(), here), elsewhere)
        other.load_state_dict(d)
        assert all(leaf.state is None or leaf.state.m.is_meta for _, leaf in fluxpy.leaves(other.tree))


@pytest.mark.cuda
def test_momenta_follow_their_model_to_a_device() -> None:
    model = Net()
    optimizer = TorchOptimizer(AdamW(0.1), model)
    model.cuda()
    model(X.cuda()).sum().backward()
    optimizer.step()
    assert optimizer.tree.left.bias.state.m.is_cuda
    optimizer.load_state_dict(torch.load(io.BytesIO(_saved(optimizer)), map_location="cpu", weights_only=True))
    assert optimizer.tree.left.bias.state.m.is_cuda


# --- Schedulers ---------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 0.9**n, lambda n: 1 / (1 + n)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=14),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.7)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.02, anneal_epochs=4),
}
MOMENTUM = {"encoder.*": Momentum(0.05, 0.8), "*": Momentum(0.1, 0.8)}


def parted(kind: Any, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """An optimiser of torch in two groups, those of `MOMENTUM` and `ADAM`."""

    def make(model: Any) -> torch.optim.Optimizer:
        heads = [*model.left.parameters(), *model.right.parameters()]
        return kind([{"params": model.encoder.parameters(), "lr": 0.05}, {"params": heads}], lr=0.1, **options)

    return make


def advance(scheduler: Any, i: int) -> None:
    scheduler.step(float(i)) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()


def test_every_scheduler_is_tried() -> None:
    kinds = [x for x in vars(lr_scheduler).values() if isinstance(x, type)]
    given = {kind.__name__ for kind in kinds if issubclass(kind, lr_scheduler.LRScheduler)}
    assert given - {"LRScheduler", "_LRScheduler"} <= SCHEDULERS.keys() and len(SCHEDULERS) == 16


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rule", ["Momentum", "Adam"])
def test_schedulers_drive_it_as_they_drive_torch(name: str, rule: str) -> None:
    """Also resumed in the middle, scheduler and optimiser, by another pair."""
    if rule == "Momentum":
        rules, twin_of = MOMENTUM, parted(torch.optim.SGD, momentum=0.8)
    else:
        rules, twin_of = {"encoder.*": Adam(0.05), "*": Adam(0.1)}, parted(torch.optim.Adam)
    ours, optimizer, theirs, twin = twins(rules, twin_of)
    scheduler, other = SCHEDULERS[name](optimizer), SCHEDULERS[name](twin)
    for i in range(12):
        for key in ("lr", "betas" if rule == "Adam" else "momentum"):
            assert [g[key] for g in optimizer.param_groups] == [g[key] for g in twin.param_groups]
        assert fluxpy.value(optimizer.tree.left.bias, "lr") == twin.param_groups[1]["lr"]
        turn(optimizer, ours)
        turn(twin, theirs)
        advance(scheduler, i)
        advance(other, i)
        assert scheduler.get_last_lr() == other.get_last_lr()
        if i == 5:
            saved, state = optimizer.state_dict(), scheduler.state_dict()
            ours = copy.deepcopy(ours)
            optimizer = TorchOptimizer(rules, ours)
            scheduler = SCHEDULERS[name](optimizer)
            scheduler.load_state_dict(state)
            optimizer.load_state_dict(saved)
    assert_same(ours, theirs)


def test_a_scheduler_before_the_first_step_warns_as_ever() -> None:
    scheduler = lr_scheduler.StepLR(TorchOptimizer(Adam(), Net()), 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_a_rate_that_is_a_tensor_is_filled_in_place() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64)
    ours, optimizer, theirs, twin = twins(Adam(lr), lambda m: torch.optim.Adam(m.parameters(), 0.1))
    schedulers = [lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, twin)]
    for _ in range(5):
        turn(optimizer, ours)
        turn(twin, theirs)
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr and lr == 0.1 * 0.5**5
    assert_same(ours, theirs)
    optimizer.param_groups[0]["lr"] = 0.25
    assert optimizer.tree.left.bias.rule.lr == 0.25 and lr == 0.1 * 0.5**5
    other = torch.tensor(0.25)
    optimizer.param_groups[0]["lr"] = other
    assert optimizer.tree.left.bias.rule.lr is other


def test_a_schedule_in_the_rule_shows_and_is_replaced_with_a_warning() -> None:
    model = Net()
    cosine = fluxpy.schedules.cosine(0.1, 0.0, 10)
    optimizer = TorchOptimizer(Adam(cosine), model)
    idle = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    for i in range(3):
        assert optimizer.param_groups[0]["lr"] == cosine(i)
        turn(optimizer, model)
        idle.step()
    assert idle.get_last_lr() == [cosine(3)] and optimizer.tree.left.bias.rule.lr is cosine
    optimizer.param_groups[0]["lr"] = cosine(3)
    assert optimizer.tree.left.bias.rule.lr is cosine, "what it shows is no other value"
    with pytest.warns(UserWarning, match=r"lr=0.5 replaces cosine\(.*\) of 'encoder.0.weight' and 7 more"):
        optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.tree.left.bias.rule.lr == 0.5
    fluxpy.freeze(optimizer.tree.encoder[0])
    fluxpy.adjust(optimizer.tree, cosine)
    turn(optimizer, model)
    assert optimizer.param_groups[0]["lr"] == cosine(4), "by a leaf that trains"


# --- State --------------------------------------------------------------------------------------------------------


def test_state_is_a_live_view() -> None:
    model = Net()
    optimizer = TorchOptimizer(OptimiserChain(WeightDecay(0.0), Adam(0.1)), model)
    kept = optimizer.state[model.left.weight]
    assert isinstance(optimizer.state, dict) and isinstance(kept, dict) and list(kept) == ["[1].m", "[1].v", "[1].t"]
    for _ in range(3):
        turn(optimizer, model)
    leaf = optimizer.tree.left.weight
    assert kept["[1].m"] is leaf.state[1].m and kept["[1].t"] == 3 and kept["[1].m"].any()
    kept["[1].m"].zero_()
    assert not leaf.state[1].m.any()
    kept["[1].v"] = torch.full((1, 4), 0.5, dtype=torch.float64)
    assert leaf.state[1].v.mean() == 0.5 and leaf.state[1].t == 3 and leaf.count == 3
    turn(optimizer, model)
    assert set(optimizer.state) == set(model.parameters()) and len(optimizer.state) == 8
    assert model.left.bias in optimizer.state and torch.ones(1) not in optimizer.state


def test_what_is_written_into_a_state_must_fit() -> None:
    model = Net()
    optimizer = TorchOptimizer(Adam(0.1), model)
    momenta = optimizer.state[model.left.weight]
    same = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in momenta.items()}
    optimizer.state[model.left.weight] = {**same, "t": 7}
    assert optimizer.tree.left.weight.state.t == 7
    for values, message in (
        ({"m": torch.ones(3)}, "'m' is a tensor float64.1, 4., but got a tensor float32.3."),
        ({"exp_avg": torch.ones(3)}, "no 'exp_avg' here; there is 'm', 'v', 't'"),
        ({"t": torch.ones(3)}, "'t' is a int, but got a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            momenta.update(values)
    with pytest.raises(ValueError, match="'t', 'v' missing"):
        optimizer.state[model.left.weight] = {"m": same["m"]}
    with pytest.raises(TypeError, match="cannot be deleted"):
        del momenta["m"]


def test_to_empty_a_state_is_a_reset() -> None:
    model = Net()
    optimizer = TorchOptimizer(Adam(0.1), model)
    turn(optimizer, model)
    del optimizer.state[model.left.bias]
    assert optimizer.tree.left.bias.count == 0 and model.left.bias not in optimizer.state
    assert dict(optimizer.state[model.left.bias]) == {}
    optimizer.state = {}
    assert len(optimizer.state) == 0 and optimizer.tree.right.bias.count == 0
    turn(optimizer, model)
    assert optimizer.tree.right.bias.count == 1
    optimizer.state.clear()
    assert len(optimizer.state) == 0


def test_copies_and_pickles() -> None:
    model = Net()
    optimizer = TorchOptimizer(PARTS, model)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    turn(optimizer, model)
    scheduler.step()
    fluxpy.freeze(optimizer.tree.right)
    copied, pickled = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    turn(optimizer, model)
    for other, same in (copied, pickled):
        assert same.param_groups[0]["params"][0] is other.encoder[0].weight
        assert same.param_groups[0]["initial_lr"] == 1e-3 and same.param_groups[0]["lr"] == 0.9 * 1e-3
        assert same.tree.right.bias.frozen
        turn(same, other)
        assert_same(model, other)
    fluxpy.adjust(optimizer.tree, 0.5)
    assert copied[1].param_groups[0]["lr"] == 0.9 * 1e-3


def test_a_tree_does_not_keep_the_parameters_of_an_optimiser_that_is_gone() -> None:
    model = Net()
    optimizer = TorchOptimizer(Adam(), model)
    turn(optimizer, model)
    tree, x = optimizer.tree, weakref.ref(model.left.weight)
    del optimizer, model
    gc.collect()
    assert x() is None and tree.left.weight.count == 1


def test_it_holds_no_module() -> None:
    """A pickle of an optimiser has parameters in it and no one's code, as those of torch."""
    model = Net()
    model.local = lambda: None  # pyright: ignore[reportArgumentType]
    optimizer = TorchOptimizer(Adam(), model)
    pickle.dumps(optimizer)


# --- Saving -------------------------------------------------------------------------------------------------------


def _saved(optimizer: TorchOptimizer) -> bytes:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file.getvalue()


def test_a_state_dict_is_plain_and_by_name() -> None:
    model = Net()
    optimizer = TorchOptimizer(PARTS, model)
    turn(optimizer, model)
    d = torch.load(io.BytesIO(_saved(optimizer)), weights_only=True)
    assert [group["params"] for group in d["param_groups"]] == [g["names"] for g in optimizer.param_groups]
    assert torch.equal(d["state"]["left.bias"]["state"]["m"], optimizer.tree.left.bias.state.m)
    turned = nn.ModuleDict(dict(reversed(list(model.named_children()))))
    other = TorchOptimizer({"*": Adam(0.3)}, copy.deepcopy(turned))
    other.load_state_dict(d)
    assert other.tree.left.weight.rule == Adam(1e-3) and other.tree.left.bias.rule == Adam(1e-2)
    assert torch.equal(other.tree.left.bias.state.m, optimizer.tree.left.bias.state.m)
    assert [group["names"] for group in other.param_groups] == [group["names"] for group in optimizer.param_groups]


def test_frozen_and_split_parts_are_saved() -> None:
    model = Net()
    optimizer = TorchOptimizer(Adam(), model)
    turn(optimizer, model)
    fluxpy.adjust(fluxpy.freeze(optimizer.tree.right), 0.5)
    other = TorchOptimizer(Adam(), copy.deepcopy(model))
    other.load_state_dict(optimizer.state_dict())
    assert other.tree.right.bias.frozen and [group["lr"] for group in other.param_groups] == [1e-3, 0.5]


def test_groups_of_different_rules_are_saved() -> None:
    model = Net()
    rules = {"encoder.*": Momentum(0.1), "*": Adam(0.2)}
    optimizer = TorchOptimizer(rules, model)
    optimizer.param_groups[1]["mark"] = "head"
    other = TorchOptimizer(rules, model)
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[1]["betas"] = (0.1, 0.2)
    assert other.param_groups[1]["betas"] == (0.1, 0.2) == other.tree.left.bias.rule.betas
    assert "mark" not in other.param_groups[0] and other.param_groups[1]["mark"] == "head"


def test_optimisers_of_two_branches_of_one_tree() -> None:
    """As a generator and a critic, or two heads."""
    model, twin = Net(), Net()
    state = fluxpy.setup(Adam(0.1), model)
    parts = [TorchOptimizer(state[name], getattr(model, name)) for name in ("left", "right")]
    others = [torch.optim.Adam(getattr(twin, name).parameters(), 0.1) for name in ("left", "right")]
    schedulers = [lr_scheduler.ExponentialLR(o, 0.9) for o in (parts[0], others[0])]
    for i in range(6):
        turn(parts[i % 2], model)
        turn(others[i % 2], twin)
        if i % 2 == 0:
            for scheduler in schedulers:
                scheduler.step()
        model.zero_grad()
        twin.zero_grad()
    assert_same(model, twin)
    assert parts[0].param_groups[0]["names"] == ["weight", "bias"]
    assert (state.left.bias.rule.lr, state.right.bias.rule.lr) == (0.1 * 0.9 * 0.9 * 0.9, 0.1)
    again = pickle.loads(pickle.dumps(parts[1]))
    assert again.tree.bias.count == 3 and len(fluxpy.state_dict(again.tree)["leaves"]) == 2


def test_masters_keep_their_dtype() -> None:
    """torch would cast them to the dtype of the parameters."""
    model = Net(torch.bfloat16)
    optimizer = TorchOptimizer(MixedPrecision(AdamW(1e-3)), model)
    for _ in range(3):
        turn(optimizer, model)
    other = TorchOptimizer(MixedPrecision(AdamW(1e-3)), copy.deepcopy(model))
    other.load_state_dict(torch.load(io.BytesIO(_saved(optimizer)), weights_only=True))
    leaf = other.tree.left.weight
    assert leaf.state.x.dtype == leaf.state.state.m.dtype == torch.float32
    assert torch.equal(leaf.state.x, optimizer.tree.left.weight.state.x)


def test_what_does_not_fit_changes_nothing() -> None:
    optimizer = TorchOptimizer(Adam(), Net())
    before = _saved(optimizer)
    good = optimizer.state_dict()
    lost = {**good, "state": {key: x for key, x in good["state"].items() if key != "left.bias"}}
    less = {**good, "param_groups": [{**good["param_groups"][0], "params": good["param_groups"][0]["params"][1:]}]}
    for d, message in (
        (lost, "missing: 'left.bias'"),
        (less, "not in both, or twice: 'encoder.0.weight'"),
        (TorchOptimizer(Descent(), Net()).state_dict(), "expected Adam"),
        (TorchOptimizer(Adam(), Net().encoder).state_dict(), "not in both"),
        ({}, "takes what state_dict\\(\\) of an optimiser returns"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(d)
        assert _saved(optimizer) == before


def trained(kind: Any, named: bool, **options: Any) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    optimizer = kind(model.named_parameters() if named else model.parameters(), **options)
    for _ in range(4):
        turn(optimizer, model)
    return model, optimizer


@pytest.mark.parametrize("named", [True, False])
def test_a_state_dict_of_torch_into_a_chain(named: bool) -> None:
    """By name, else by order; and what torch has not, as the clip, stays as it is."""
    theirs, twin = trained(torch.optim.AdamW, named, lr=0.02, weight_decay=0.3)
    ours = copy.deepcopy(theirs)
    optimizer = TorchOptimizer(OptimiserChain(ClipGlobalNorm(1e6), AdamW(1e-3)), ours)
    optimizer.load_state_dict(twin.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.02 and optimizer.tree.left.bias.count == 4
    assert optimizer.tree.left.bias.rule == OptimiserChain(ClipGlobalNorm(1e6), AdamW(0.02, weight_decay=0.3))
    for _ in range(4):
        turn(optimizer, ours)
        turn(twin, theirs)
    assert_same(ours, theirs)


def test_what_a_tool_that_looks_for_numbers_made_of_names_is_refused():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = torch.nn.Linear(2, 1)
    optimizer = TorchOptimizer(Adam(), model)
    with pytest.raises(ValueError, match=r"fluxpy.state_dict\(optimizer.tree\)"):
        set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))


def test_a_state_dict_of_torch_without_names_goes_by_the_order_of_the_model() -> None:
    """Where it has one group; whatever the groups are here."""
    model, twin = trained(torch.optim.Adam, False, lr=0.02)
    optimizer = TorchOptimizer({"*bias": Adam(0.1), "*": Adam(0.2)}, model)
    optimizer.load_state_dict(twin.state_dict())
    for x in model.parameters():
        assert torch.equal(optimizer.state[x]["v"], twin.state[x]["exp_avg_sq"])
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]


def test_a_state_dict_of_torch_in_another_order_goes_by_name() -> None:
    model = Net()
    named = list(model.named_parameters())
    twin = torch.optim.Adam([{"params": named[4:], "lr": 0.5}, {"params": named[:4][::-1]}], lr=0.1)
    turn(twin, model)
    optimizer = TorchOptimizer(Adam(), model)
    optimizer.load_state_dict(twin.state_dict())
    assert torch.equal(optimizer.tree.encoder[2].bias.state.m, twin.state[model.encoder[2].bias]["exp_avg"])
    assert (optimizer.tree.left.bias.rule.lr, optimizer.tree.encoder[0].bias.rule.lr) == (0.5, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_a_penalty_that_torch_does_not_have_is_none() -> None:
    """One in front of the step; one beside it (decoupled) is not torch's to say."""
    model, twin = trained(torch.optim.Adam, True, lr=0.02)
    optimizer = TorchOptimizer(OptimiserChain(WeightDecay(0.1), Adam(), WeightDecay(1e-3)), model)
    optimizer.load_state_dict(twin.state_dict())
    assert optimizer.tree.left.bias.rule == OptimiserChain(WeightDecay(0.0), Adam(0.02), WeightDecay(1e-3))


def test_a_state_dict_of_torch_with_names_in_place_of_numbers_and_a_schedulers_marks() -> None:
    """As tools for checkpoints write them."""
    model, twin = trained(torch.optim.Adam, False, lr=0.02)
    scheduler = lr_scheduler.ExponentialLR(twin, 0.5)
    turn(twin, model)
    scheduler.step()
    d = twin.state_dict()
    names = [name for name, _ in model.named_parameters()]
    d["state"] = {names[number]: saved for number, saved in d["state"].items()}
    d["param_groups"][0]["params"] = [f"module.{name}" for name in names]
    d["state"] = {f"module.{name}": saved for name, saved in d["state"].items()}
    optimizer = TorchOptimizer(Adam(), model)
    optimizer.load_state_dict(d)
    assert torch.equal(optimizer.tree.left.bias.state.m, twin.state[model.left.bias]["exp_avg"])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["initial_lr"], "capturable" in group) == (0.01, 0.02, False)
    lr_scheduler.ExponentialLR(optimizer, 0.5, last_epoch=1)


def test_a_state_dict_of_torch_into_masters_and_beside_schedules() -> None:
    model, twin = trained(torch.optim.Adam, False, lr=0.02)
    model.to(torch.bfloat16)
    cosine = fluxpy.schedules.cosine(0.1, 0.0, 10)
    rule = OptimiserChain(WeightDecay(0.1), Adam(cosine))
    optimizer = TorchOptimizer(MixedPrecision(rule, dtype=torch.float64), model)
    optimizer.load_state_dict(twin.state_dict())
    leaf = optimizer.tree.left.bias
    assert leaf.state.state[1].m.dtype == torch.float64 and leaf.state.x.dtype == torch.float64
    assert torch.equal(leaf.state.state[1].m, twin.state[model.left.bias]["exp_avg"])
    assert leaf.rule.lr is cosine and leaf.rule.weight_decay == 0.0 and leaf.count == 4


OTHERS: list[tuple[Any, dict[str, Any], Any, str]] = [
    (torch.optim.SGD, {"momentum": 0.9}, Adam(), "torch.optim.Adam: the param group lacks 'betas', 'eps'"),
    (torch.optim.Adam, {"amsgrad": True}, Adam(), "the dict is of AMSGrad, but the rule here is Adam"),
    (torch.optim.Adam, {"weight_decay": 0.1}, Adam(), "the dict is of OptimiserChain.WeightDecay"),
    (torch.optim.Adam, {"weight_decay": 0.1}, OptimiserChain(Adam(), WeightDecay()), "the dict is of OptimiserChain"),
    (torch.optim.AdamW, {}, Adam(), "the dict is of AdamW, but the rule here is Adam"),
    (torch.optim.Adam, {"maximize": True}, Adam(), "maximize=True is not available"),
    (torch.optim.Adam, {}, fluxpy.Lion(), "has 0 that torch has too"),
    (torch.optim.Adam, {}, OptimiserChain(RMSProp(), Momentum()), "has 2 that torch has too"),
]


@pytest.mark.parametrize(("kind", "options", "rule", "message"), OTHERS)
def test_a_state_dict_of_another_algorithm(kind: Any, options: Any, rule: Any, message: str) -> None:
    _, twin = trained(kind, False, **options)
    optimizer = TorchOptimizer(rule, Net())
    before = _saved(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(twin.state_dict())
    assert _saved(optimizer) == before


def test_a_state_dict_of_torch_that_fits_no_leaf() -> None:
    model, twin = trained(torch.optim.Adam, False)
    optimizer = TorchOptimizer({"encoder.*": Adam(0.1), "*": Adam(0.2)}, model)
    two = torch.optim.Adam([{"params": model.encoder[0].parameters()}, {"params": model.left.parameters()}])
    with pytest.raises(ValueError, match="has no names, and its groups are not of the number and sizes"):
        optimizer.load_state_dict(two.state_dict())
    with pytest.raises(ValueError, match="has 4 parameters, but 8 are here"):
        optimizer.load_state_dict(torch.optim.Adam(model.encoder.parameters()).state_dict())
    named = torch.optim.Adam(model.encoder.named_parameters())
    with pytest.raises(ValueError, match="names that are not in both: '0.bias'"):
        optimizer.load_state_dict(named.state_dict())
    d = copy.deepcopy(twin.state_dict())
    d["state"][3]["exp_avg"] = torch.ones(9)
    with pytest.raises(ValueError, match=r"'exp_avg' of 'encoder.2.bias' has shape \[9\], but \[4\] is needed"):
        optimizer.load_state_dict(d)
    del d["state"][3]["exp_avg"]
    with pytest.raises(ValueError, match="the state of 'encoder.2.bias' has no 'exp_avg', which Adam needs"):
        optimizer.load_state_dict(d)
    assert optimizer.tree.left.bias.count == 0


class Matrices(nn.Module):
    """For rules that take nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.double()).tanh())


@pytest.mark.parametrize("name", ROWS)
def test_every_rule(name: str) -> None:
    """The numbers of `update`, also resumed from a file and unpickled; and whatever a group shows can be written."""
    rule = ROWS[name].rule
    ours, twin = Matrices(), Matrices()
    optimizer, state = TorchOptimizer(rule, ours), fluxpy.setup(rule, twin)
    for i in range(6):
        turn(optimizer, ours)
        loss_of(twin).backward()
        fluxpy.update(state, twin)
        twin.zero_grad()
        if i == 2:
            saved = _saved(optimizer)
            optimizer = TorchOptimizer(rule, ours)
            optimizer.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
        if i == 4:
            ours, optimizer = pickle.loads(pickle.dumps((ours, optimizer)))
    for x, y in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(x, y)
    group = optimizer.param_groups[0]
    before = group["names"], optimizer.tree.first.weight.rule
    for key, shown in list(group.items()):
        if key not in ("params", "names"):
            group[key] = shown
    assert before[1] == optimizer.tree.first.weight.rule
    for key, other in ROWS[name].adjusted.items():
        if key in group:
            group[key] = other
            assert group[key] == other and fluxpy.value(optimizer.tree.first.weight, key) == other
    assert len(optimizer.param_groups) == 1


# --- GradScaler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale: bool) -> None:
    """Scaled gradients give the numbers of plain ones; an update with an overflow does not happen at all."""
    ours, optimizer, theirs, twin = twins(Adam(0.1), lambda m: torch.optim.Adam(m.parameters(), 0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 1.0)
    for i in range(8):
        optimizer.zero_grad()
        scaler.scale(loss_of(ours)).backward()
        if i in (2, 5):
            ours.left.bias.grad[0] = float("inf")  # pyright: ignore[reportOptionalSubscript]
        else:
            turn(twin, theirs)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        assert_same(ours, theirs)
    assert optimizer.tree.left.bias.count == 6 and scaler.get_scale() == 2.0**8


def test_averaged_models_and_clipping_of_torch() -> None:
    """Other parts of torch that take an optimiser or its parameters."""
    ours, optimizer, theirs, twin = twins(Adam(0.1), lambda m: torch.optim.Adam(m.parameters(), 0.1))
    for o, model in ((optimizer, ours), (twin, theirs)):
        averaged = torch.optim.swa_utils.AveragedModel(model)
        for _ in range(4):
            o.zero_grad()
            loss_of(model).backward()
            nn.utils.clip_grad_norm_([x for group in o.param_groups for x in group["params"]], 0.1)
            o.step()
            averaged.update_parameters(model)
    assert_same(ours, theirs)


def test_no_warnings_on_the_main_road() -> None:
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = TorchOptimizer(Adam(0.1), model)
        assert "TorchOptimizer of\nState of 8 parameters" in repr(optimizer)
        turn(optimizer, model)

"""What processes of a world do together; each compares itself with one process that has the whole batch."""

import copy
import os
import pickle
import re
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from helpers import CHAINS, like_a_device
from rule_table import ROWS
from torch import Tensor, nn
from torch.distributed._composable import replicate as hidden_replicas
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import fluxpy
import fluxpy.testing
from fluxpy import (
    AccumGrad,
    Adam,
    AdamW,
    ClipGlobalNorm,
    ClipNorm,
    Descent,
    Lowered,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    StochasticRounding,
    schedules,
)  # fmt: skip
from fluxpy.interop import TorchOptimizer, from_torch
from fluxpy.rule import Reduce, ReducingRule

ROOM = 1e-12


class Net(nn.Module):
    """Uneven in two and in four: 5 rows, 3 rows, a scale; two places of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.inside = nn.Linear(4, 5, dtype=torch.float64)
        self.norm = nn.LayerNorm(5, dtype=torch.float64)
        self.middle = nn.Linear(5, 5, bias=False, dtype=torch.float64)
        self.again = nn.Linear(5, 5, bias=True, dtype=torch.float64)
        self.again.weight = self.middle.weight
        self.head = nn.Linear(5, 3, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.middle(self.norm(self.inside(x).tanh())).tanh()).tanh())


def batch(turn: int, size: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + turn)
    return torch.randn(size, 4, generator=g, dtype=torch.float64), torch.randn(
        size, 3, generator=g, dtype=torch.float64
    )


def mine(turn: int) -> tuple[Tensor, Tensor]:
    """This process's part of a batch."""
    x, y = batch(turn)
    size, rank = len(x) // dist.get_world_size(), dist.get_rank()
    return x[rank * size :][:size], y[rank * size :][:size]


def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def whole(t: Any) -> Any:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def named(state: Any) -> dict[str, Any]:
    """All that a state shows, put together."""
    found: dict[str, Any] = {}
    for path, leaf in fluxpy.leaves(state):
        found[path] = leaf.count, leaf.frozen, tuple(leaf.shape), leaf.state is None
        for i, t in enumerate(fluxpy_tensors(leaf.state)):
            found[f"{path} {i}"] = whole(t).detach().clone() if isinstance(t, Tensor) else t
    return found


def fluxpy_tensors(tree: Any) -> list[Any]:
    return optree.tree_leaves(tree, none_is_leaf=True, namespace="fluxpy")


def assert_same(model: Any, state: Any, other: Any, alone: Any, what: str = "", room: float = ROOM) -> None:
    """A run of several processes is where one process is."""
    pairs = zip(fluxpy.trainables(model, path=True), fluxpy.trainables(other, path=True), strict=True)
    for (path, x), (same_path, y) in pairs:
        assert path == same_path
        torch.testing.assert_close(
            whole(x.detach()), y.detach(), rtol=room, atol=room, msg=lambda m, p=path: f"{what} {p}: {m}"
        )
    one, two = named(state), named(alone)
    assert one.keys() == two.keys(), what
    for key, a in one.items():
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, two[key], rtol=room, atol=room, msg=lambda m, k=key: f"{what} {k}: {m}")
        else:
            assert a == two[key], (what, key, a, two[key])


class Both:
    """The same training on all processes together, and on one with the whole batch."""

    def __init__(self, rule: Any, spread: Any, net: Any = Net, before: Any = lambda model: None) -> None:
        self.alone = net()
        before(self.alone)
        self.model = spread(copy.deepcopy(self.alone))
        self.state = fluxpy.setup(rule, self.model)
        self.state_alone = fluxpy.setup(rule, self.alone)
        self.what = repr(rule)
        self.turn = 0

    def step(self, times: int = 1) -> "Both":
        for _ in range(times):
            _, grads = fluxpy.withgradient(loss, self.model, *mine(self.turn), state=self.state)
            _, others = fluxpy.withgradient(loss, self.alone, *batch(self.turn), state=self.state_alone)
            fluxpy.update(self.state, self.model, grads)
            fluxpy.update(self.state_alone, self.alone, others)
            self.turn += 1
        return self

    def parallel(self) -> bool:
        """Whether the model is given parts of batches."""
        return any(isinstance(x, DTensor) for x in self.model.parameters())

    def both(self, verb: Any) -> "Both":
        verb(self.state)
        verb(self.state_alone)
        return self

    def check(self, room: float = ROOM) -> "Both":
        assert_same(self.model, self.state, self.alone, self.state_alone, self.what, room)
        return self


# --- DDP ----------------------------------------------------------------------------------------------------------


def ddp_averages() -> None:
    Both(Momentum(0.1), DistributedDataParallel).step(3).check()


def ddp_trains_by_train_and_trainstep() -> None:
    run = Both(Adam(0.05), DistributedDataParallel)
    kept = torch.ones_like(run.model.module.head.bias)
    run.model.module.head.bias.grad = kept
    losses = fluxpy.train(loss, run.model, [mine(i) for i in range(4)], run.state)
    others = fluxpy.train(loss, run.alone, [batch(i) for i in range(4)], run.state_alone)
    torch.testing.assert_close(losses, others, rtol=ROOM, atol=ROOM)
    assert run.model.module.head.bias.grad is kept
    assert run.model.module.head.weight.grad is None
    with pytest.raises(ValueError, match="the processes have from 1 to 2 batches"):
        fluxpy.train(loss, run.model, [mine(i) for i in range(1 + (dist.get_rank() == 0))], run.state)
    fluxpy.trainstep(loss, run.model, mine(4), run.state)
    fluxpy.trainstep(loss, run.alone, batch(4), run.state_alone)
    run.check()


def ddp_finds_frozen_leaves() -> None:
    run = Both(Adam(0.05), lambda m: DistributedDataParallel(m, find_unused_parameters=True))
    run.step(2).both(lambda state: fluxpy.freeze(state.inside)).step(2).both(fluxpy.thaw).step(2).check()
    run = Both(Adam(0.05), DistributedDataParallel)
    fluxpy.freeze(run.state.inside)
    with pytest.raises(
        ValueError, match=r"wait for the gradients of 'inside.weight'.*find_unused_parameters.*replicate"
    ):
        fluxpy.withgradient(loss, run.model, *mine(0), state=run.state)
    fluxpy.thaw(run.state)
    run.step(1).check()


def ddp_refuses_what_thawed_late() -> None:
    run = Both(Adam(0.05), DistributedDataParallel, before=lambda m: m.inside.requires_grad_(False))
    run.step(2).check()
    fluxpy.thaw(run.state)
    with pytest.raises(ValueError, match=r"does not average the gradients of 'inside.weight'.*replicate"):
        fluxpy.trainstep(loss, run.model, mine(0), run.state)
    run.model.module.inside.requires_grad_(True)
    with pytest.raises(ValueError, match="does not average"):
        fluxpy.gradient(loss, run.model, *mine(0))


def ddp_refuses_a_way_around_it() -> None:
    run = Both(Adam(0.05), DistributedDataParallel)
    with pytest.raises(ValueError, match=r"call model\(x\), not model.module\(x\)"):
        fluxpy.gradient(lambda m: loss(m.module, *mine(0)), run.model)
    with run.model.no_sync(), pytest.raises(ValueError, match="AccumGrad"):
        fluxpy.gradient(loss, run.model, *mine(0))
    with pytest.raises(ValueError, match="create_graph"):
        fluxpy.gradient(loss, run.model, *mine(0), create_graph=True)
    run.step(1).check()


def ddp_gives_gradients_that_stay() -> None:
    run = Both(Descent(0.1), lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True))
    grads = fluxpy.gradient(loss, run.model, *mine(0))
    before = grads.head.weight.clone()
    fluxpy.gradient(loss, run.model, *mine(1))
    assert torch.equal(before, grads.head.weight)
    run.step(2).check()


# --- Parameters that are spread over the processes ------------------------------------------------------------------


def shard(model: nn.Module) -> nn.Module:
    """FSDP2 on a mesh of one dimension, the head by itself."""
    fully_shard(model.head)
    return fully_shard(model)


def hybrid(model: nn.Module) -> nn.Module:
    """FSDP2 in two replicas."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards"))
    return fully_shard(model, mesh=mesh)


def copies(model: nn.Module) -> nn.Module:
    return replicate(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("replicate",)))


class Power(ReducingRule):
    over = "array"
    splittable = True

    def part(self, value: Any) -> Any:
        return value.square().sum()


class Tamed(ReducingRule):
    """A user's rule with a number of each array, which all its parts share."""

    lr: float = 0.05
    elementwise = splittable = True

    def init(self, x: Any) -> Any:
        return torch.zeros_like(x), x.new_ones(())

    def steps(self, state: Any, x: Any, dx: Any) -> Any:
        power = 0.9 * state[1] + 0.1 * (yield Reduce(Power(), dx))
        m = 0.8 * state[0] + dx
        return (m, power), self.lr * m / (1 + power.sqrt())


def every_rule_when_sharded() -> None:
    rules: dict[str, Any] = {name: row.rule for name, row in ROWS.items()} | CHAINS
    rules |= {"a number of each array": Tamed(), "a number in front": OptimiserChain(Tamed(1.0), Adam(0.05))}
    for name, rule in rules.items():
        if name.startswith(("Clip", "WeightDecay", "SignDecay")):  # which would make steps of the gradient's size
            rule = OptimiserChain(rule, Descent(0.05))
        if name in ROWS and ROWS[name].matrices:
            matrices = [path for path, x in Net().named_parameters() if x.ndim == 2]
            rule = {**dict.fromkeys(matrices, rule), "*": Descent(0.05)}
        run = Both(rule, shard)
        run.what = name
        run.step(8).check()


def rounding_of_shards() -> None:
    """The bits of one process, whatever the shards: those of an element hang on that alone."""
    for rule in (Momentum(2.0**-10, 0.5), OptimiserChain(AccumGrad(2), Lowered(Momentum(2.0**-10, 0.5)))):
        run = Both(StochasticRounding(rule), lambda model: shard(model.bfloat16()), before=lambda m: m.bfloat16())
        g = torch.Generator().manual_seed(3)
        for _ in range(8):
            whole_ones = {
                path: torch.randn(x.shape, generator=g).bfloat16()
                for path, x in fluxpy.trainables(run.alone, path=True)
            }
            fluxpy.update(run.state_alone, run.alone, whole_ones)
            grads = {
                path: distribute_tensor(whole_ones[path], x.device_mesh, x.placements)
                for path, x in fluxpy.trainables(run.model, path=True)
            }
            fluxpy.update(run.state, run.model, grads)
        run.check(room=0.0)
        assert run.state.head.weight.state.t == 8 // (1 + rule.accumulates)


def norms_over_shards() -> None:
    for p in (1.0, 2.0, 3.0, float("inf")):
        for each in (ClipNorm, ClipGlobalNorm):
            Both(OptimiserChain(each(0.05, norm_type=p), Adam(0.05)), shard).step(3).check()
    two = {
        "head.*": OptimiserChain(ClipGlobalNorm(0.05), Adam(0.02)),
        "*": OptimiserChain(ClipGlobalNorm(0.1), Momentum(0.02)),
    }
    Both(two, shard).step(3).check()
    mixed = {
        "head.*": OptimiserChain(ClipNorm(0.05), ClipGlobalNorm(0.1), Adam(0.02)),
        "norm.*": OptimiserChain(ClipGlobalNorm(0.1), ClipNorm(0.05), Momentum(0.02)),
        "*": OptimiserChain(ClipGlobalNorm(0.1), CHAINS["whole"]),
    }
    Both(mixed, shard).step(3).check()


def verbs_in_mid_run() -> None:
    rule = OptimiserChain(ClipGlobalNorm(0.3), Adam(schedules.warmup_cosine(0.05, 2, 12)))
    run = Both(rule, shard, before=lambda m: m.norm.requires_grad_(False)).step(2)
    run.both(lambda s: fluxpy.freeze(s.inside)).step(2).check()
    run.both(lambda s: fluxpy.adjust(s.head, fluxpy.scale(0.5))).both(fluxpy.thaw).step(2).check()
    run.both(lambda s: fluxpy.reset(s.head)).step(1).both(lambda s: fluxpy.adjust(s, betas=(0.7, 0.9))).step(2).check()
    run.both(lambda s: fluxpy.adjust(fluxpy.select(s, "*bias"), 0.01)).step(2).check()
    assert fluxpy.summary(run.state) == fluxpy.summary(run.state_alone)
    assert str(run.state) == str(run.state_alone)
    assert fluxpy.value(run.state.inside.weight, "lr") == fluxpy.value(run.state_alone.inside.weight, "lr")


def accumulated() -> None:
    run = Both(OptimiserChain(AccumGrad(3), ClipGlobalNorm(0.3), Adam(0.05)), shard).step(4)
    run.both(lambda s: fluxpy.freeze(s.head)).step(4).both(fluxpy.thaw).step(5).check()


def missing_gradients() -> None:
    for rule in (OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05)), OptimiserChain(AccumGrad(2), Momentum(0.1))):
        run = Both(rule, shard).step(1)
        for turn in range(3):
            names = ["inside.bias", "head.weight"][: turn % 3]
            grads = fluxpy.gradient(loss, run.model, *mine(turn), state=run.state)
            others = fluxpy.gradient(loss, run.alone, *batch(turn), state=run.state_alone)
            for model, state, found in ((run.model, run.state, grads), (run.alone, run.state_alone, others)):
                held = {path: found[path] for path, _ in fluxpy.leaves(state) if path not in names}
                fluxpy.update(state, model, held)
        run.check()


def by_backward_and_grad() -> None:
    run = Both(OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05)), shard)
    for turn in range(3):
        for model, state, data in ((run.model, run.state, mine(turn)), (run.alone, run.state_alone, batch(turn))):
            loss(model, *data).backward()
            fluxpy.update(state, model)
            model.zero_grad()
    run.check()


def grad_stays_as_it_was() -> None:
    run = Both(Adam(0.05), shard)
    kept = run.model.head.bias.grad = torch.ones_like(run.model.head.bias)
    grads = fluxpy.gradient(loss, run.model, *mine(0))
    assert run.model.head.bias.grad is kept and run.model.head.weight.grad is None
    assert isinstance(grads.head.weight, DTensor)
    losses = fluxpy.train(loss, run.model, [mine(i) for i in range(3)], run.state)
    others = fluxpy.train(loss, run.alone, [batch(i) for i in range(3)], run.state_alone)
    torch.testing.assert_close(losses, others, rtol=ROOM, atol=ROOM)
    run.check()


def set_up_before_sharding() -> None:
    for rule in (Adam(0.05), CHAINS["whole"], CHAINS["master"]):
        alone = Net()
        model = copy.deepcopy(alone)
        run = Both(rule, shard)
        state = fluxpy.setup(rule, model)
        fluxpy.update(state, model, fluxpy.gradient(loss, model, *batch(0)))
        run.state, run.model = state, shard(model)
        fluxpy.update(run.state_alone, run.alone, fluxpy.gradient(loss, run.alone, *batch(0)))
        run.turn = 1
        run.step(2).check()
        assert isinstance(fluxpy_tensors(run.state.head.weight.state)[0], DTensor)


def after_an_evaluation() -> None:
    """FSDP2 leaves the root's parameters put together after a forward pass without a backward one."""
    run = Both(Adam(0.05), fully_shard).step(1)
    with torch.no_grad():
        run.model(batch(0)[0])
    state = fluxpy.setup(Adam(0.05), run.model)
    assert isinstance(state.head.weight.state.m, DTensor)
    with torch.no_grad():
        run.model(batch(0)[0])
    assert dict(fluxpy.trainables(run.model, path=True))["head.weight"].device_mesh
    run.step(2).check()
    with torch.no_grad():
        run.model(batch(0)[0])
    run.both(lambda s: fluxpy.freeze(s.inside)).step(2).check()


def the_state_shows_dtensors() -> None:
    run = Both(Adam(0.05), shard).step(1)
    for path, x in fluxpy.trainables(run.model, path=True):
        m = run.state[path].state.m
        assert m.placements == x.placements and m.device_mesh == x.device_mesh and m.shape == x.shape
    assert run.state.head.weight.shape == (3, 5)
    leaf = fluxpy.state_dict(run.state)["leaves"]["head.weight"]
    assert leaf["state"]["m"].placements == run.model.head.weight.placements
    other = copy.deepcopy(run.state)
    run.step(1)
    fluxpy.load_state_dict(run.state, fluxpy.state_dict(other))
    named_other, named_run = named(other), named(run.state)
    assert all(
        torch.equal(a, named_run[key]) if isinstance(a, Tensor) else a == named_run[key]
        for key, a in named_other.items()
    )


def not_finite_on_one() -> None:
    """All raise with the same path, and nothing is changed anywhere."""
    for rule in (OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05)), OptimiserChain(ClipNorm(0.3), Momentum(0.05))):
        for skip in (False, True, "late"):
            run = Both(rule, shard).step(1)
            if skip:
                run.both(lambda s: fluxpy.adjust(s, nonfinite="skip"))
            grads = fluxpy.gradient(loss, run.model, *mine(0))
            if dist.get_rank() == 1:  # of four, the last has an empty part
                grads.middle.weight._local_tensor[..., :1] = torch.nan
                grads.again.bias._local_tensor[:1] = torch.inf
            before = named(run.state), [x.detach()._local_tensor.clone() for x in fluxpy.trainables(run.model)]
            if skip:
                with pytest.MonkeyPatch.context() as patch:
                    like_a_device(patch) if skip == "late" else None
                    fluxpy.update(run.state, run.model, grads)
            else:
                with pytest.raises(FloatingPointError) as caught:
                    fluxpy.update(run.state, run.model, grads)
                said: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(said, str(caught.value))
                assert len(set(said)) == 1, said
            after = named(run.state), [x.detach()._local_tensor.clone() for x in fluxpy.trainables(run.model)]
            for a, b in zip([*before[0].values(), *before[1]], [*after[0].values(), *after[1]], strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
            run.step(1)


def losses_are_agreed_on() -> None:
    for spread in (shard, DistributedDataParallel):
        run = Both(Adam(0.05), spread)
        data = [mine(i) for i in range(3)]
        if dist.get_rank() == 1:
            data[1] = (data[1][0] * torch.nan, data[1][1])
        with pytest.raises(FloatingPointError, match="item 1"):
            fluxpy.train(loss, run.model, data, run.state)
        fluxpy.train(loss, run.alone, [batch(0)], run.state_alone)
        run.check()


def few_collectives() -> None:
    def count(rule: Any, net: Any = shard) -> int:
        run = Both(rule, net).step(2)
        grads = fluxpy.gradient(loss, run.model, *mine(0))
        with CommDebugMode() as comm:
            fluxpy.update(run.state, run.model, grads)
        return comm.get_total_counts()

    assert count(Adam(0.05)) == 0
    assert count(OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05))) == 1
    assert count(OptimiserChain(ClipNorm(0.3), Adam(0.05))) == 1
    assert count(OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05)), copies) == 0
    if dist.get_world_size() == 4:
        assert count(OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05)), hybrid) == 1


def other_ways_to_spread() -> None:
    rules = [
        OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05)),
        OptimiserChain(ClipNorm(0.3), Momentum(0.05)),
        CHAINS["whole"],
    ]
    for rule in rules:
        Both(rule, copies).step(3).check()
        if dist.get_world_size() == 4:
            Both(rule, hybrid).step(3).check()


class Wide(nn.Module):
    """For tensor parallel plans."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.norm = nn.LayerNorm(4, dtype=torch.float64)
        self.up = nn.Linear(4, 8, dtype=torch.float64)
        self.down = nn.Linear(8, 3, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).tanh())


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tensor_parallel() -> None:
    rules = [
        OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05)),
        OptimiserChain(ClipNorm(0.3), Momentum(0.05)),
        CHAINS["whole"],
    ]
    size = dist.get_world_size()
    for rule in rules:
        run = Both(rule, lambda m: parallelize_module(m, init_device_mesh("cpu", (size,)), PLAN), net=Wide)
        for turn in range(3):  # each process has the whole batch
            for model, state in ((run.model, run.state), (run.alone, run.state_alone)):
                fluxpy.trainstep(loss, model, batch(turn), state)
        run.check()
        if size == 4:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

            def both(model: nn.Module, mesh: DeviceMesh = mesh) -> nn.Module:
                return fully_shard(parallelize_module(model, mesh["tensor"], PLAN), mesh=mesh["data"])

            run = Both(rule, both, net=Wide)
            part = mesh.get_local_rank("data")
            for turn in range(3):
                x, y = batch(turn)
                fluxpy.trainstep(loss, run.model, (x[part * 6 :][:6], y[part * 6 :][:6]), run.state)
                fluxpy.trainstep(loss, run.alone, (x, y), run.state_alone)
            run.check()


# --- Saving -------------------------------------------------------------------------------------------------------


def rules_to_save() -> dict[str, Any]:
    chain = OptimiserChain(AccumGrad(2), ClipGlobalNorm(0.3), Adam(schedules.warmup_cosine(0.05, 2, 12)))
    return {"head.*": MixedPrecision(AdamW(0.02), dtype=torch.float64), "middle*": CHAINS["whole"], "*": chain}


def before_saving(run: Both) -> None:
    """A branch that never trained, one that did and is frozen now."""
    run.step(2).both(lambda s: fluxpy.freeze(s.again.bias)).step(1)


def run_to_save(spread: Any) -> Both:
    return Both(rules_to_save(), spread, before=lambda m: m.norm.requires_grad_(False))


def save_in(folder: str) -> None:
    run = run_to_save(shard)
    before_saving(run)
    dcp.save({"model": run.model.state_dict(), "state": fluxpy.state_dict(run.state)}, checkpoint_id=folder)
    with pytest.raises(ValueError, match="torch.distributed.checkpoint"):
        fluxpy.save(folder + "/no.flux", model=run.model)
    with pytest.raises(ValueError, match="torch.distributed.checkpoint"):
        fluxpy.save(folder + "/no.flux", state=run.state)
    assert not os.path.exists(folder + "/no.flux")
    run.step(1).check()


def load_from(folder: str) -> None:
    for spread in (shard, copies, lambda model: model):
        run = run_to_save(spread)
        model, state = run.model, run.state
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        fluxpy.adjust(state["middle.weight"], 0.5)
        d = {"model": model.state_dict(), "state": fluxpy.state_dict(state)}
        dcp.load(d, checkpoint_id=folder)
        model.load_state_dict(d["model"])
        fluxpy.load_state_dict(state, d["state"])
        before_saving(other := Both(rules_to_save(), lambda m: m, before=lambda m: m.norm.requires_grad_(False)))
        run.alone, run.state_alone, run.turn = other.alone, other.state_alone, 3
        run.check()
        if run.parallel():
            run.both(fluxpy.thaw).step(3).check()


def a_state_of_one_process_is_loaded() -> None:
    """The momenta of a state that was never spread, into one that is; and back."""
    run = Both(rules_to_save(), shard)
    before_saving(run)
    other = Both(rules_to_save(), shard)
    fluxpy.load_state_dict(other.state, fluxpy.state_dict(run.state_alone))
    a, b = named(other.state), named(run.state)
    for key, value in a.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, b[key], rtol=ROOM, atol=ROOM)
        else:
            assert value == b[key]
    fluxpy.load_state_dict(other.state_alone, fluxpy.state_dict(run.state))
    assert_same(run.model, run.state, run.alone, other.state_alone)
    kept = fluxpy.setup(Adam(), run.model, keep=run.state)
    assert_same(run.model, kept, run.alone, run.state_alone)


# --- What goes wrong elsewhere --------------------------------------------------------------------------------------


def verbs_on_one_process_alone_are_found() -> None:
    for spread in (shard, DistributedDataParallel):
        rule = OptimiserChain(ClipNorm(1.0), Adam(schedules.linear(0.1, 0.0, 20)))
        run = Both(rule, spread).step(1)
        with CommDebugMode() as comm:
            fluxpy.assert_same_on_all_ranks(run.state)
        assert comm.get_total_counts() == 1
        if dist.get_rank() == 1:
            fluxpy.adjust(run.state.head, 0.3)
        with pytest.raises(AssertionError, match=r"'head.weight': rule is .*linear.* on rank 0, .*0\.3.* on rank 1"):
            fluxpy.assert_same_on_all_ranks(run.state)
        if dist.get_rank() == 0:
            fluxpy.freeze(run.state.inside)
        with pytest.raises(AssertionError, match="'inside.bias': frozen is True on rank 0, False on rank 1"):
            fluxpy.assert_same_on_all_ranks(run.state)


def refused_in_words() -> None:
    run = Both(Adam(0.05), shard).step(1)
    grads = fluxpy.gradient(loss, run.model, *mine(0))
    before = fluxpy.testing.snapshot(run.model, run.state)
    with pytest.raises(ValueError, match="inplace=False.*for one process"):
        fluxpy.update(run.state, run.model, grads, inplace=False)
    with pytest.raises(ValueError, match="flatten_parameters is for one process"):
        fluxpy.flatten_parameters(run.model)
    with pytest.raises(ValueError, match="destructure is for one process"):
        fluxpy.destructure(run.model)
    with pytest.raises(TypeError, match="torch.distributed.checkpoint"):
        pickle.dumps(run.state)
    with pytest.raises(ValueError, match=r"the gradient of 'head.weight' must have the shape \(3, 5\)"):
        fluxpy.update(run.state, run.model, {"head.weight": torch.zeros(1, 5, dtype=torch.float64)})
    with pytest.raises(ValueError, match="gradients at 'head.weight' must be a tensor"):
        fluxpy.update(run.state, run.model, {"head.weight": 3.0})
    with pytest.raises(ValueError, match="create_graph"):
        fluxpy.gradient(loss, run.model, *mine(0), create_graph=True)
    with pytest.raises(ValueError, match="replicate_with_fsdp"):
        fluxpy.gradient(loss, hidden_replicas(Net()), *mine(0))
    assert not fluxpy.testing.diff(before, fluxpy.testing.snapshot(run.model, run.state))
    run.step(1).check()


class Worst(ReducingRule):
    """A user's rule, whose part no empty tensor has."""

    elementwise = splittable = True

    def part(self, value: Tensor) -> Tensor:
        return value.abs().min()

    def combine(self, parts: Tensor) -> Tensor:
        return parts.min(0).values

    def steps(self, state: Any, x: Tensor, dx: Any) -> Any:
        least = yield Reduce(self, dx)
        return state, (dx - least) * 0.1


class AboutMean(ReducingRule):
    """A user's rule, to which pieces of an array do not give what the array gives."""

    lr: float = 0.1
    elementwise = True
    over = "array"

    def part(self, value: Tensor) -> Tensor:
        return value.mean()

    def steps(self, state: Any, x: Tensor, dx: Any) -> Any:
        mean = yield Reduce(self, dx)
        return state, (dx - mean) * self.lr


class OfMeans(AboutMean):
    over = "tree"


class Fails(fluxpy.Rule):
    """Fails once on long tensors, so that these go another way on some processes only."""

    elementwise = True

    def apply(self, state: Any, x: Tensor, dx: Tensor) -> Any:
        if x.ndim == 1 and x.numel() > 6:
            raise RuntimeError("only leaf by leaf")
        return state, 0.1 * dx


def rules_of_ones_own() -> None:
    for rule in (Worst(), AboutMean(), OfMeans(), OptimiserChain(ClipGlobalNorm(0.1), AboutMean(), OfMeans())):
        Both(rule, shard).step(3).check()
    Both(OptimiserChain(ClipGlobalNorm(0.1), Worst(), Fails()), shard).step(3).check()
    Both(OptimiserChain(ClipNorm(0.1), CHAINS["whole"], Worst()), shard).step(3).check()


def order_hangs_on_leaves_alone() -> None:
    """An empty part makes a process go another way through the engine, and meet the others in the same order."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rules = {
        "a": OptimiserChain(ClipGlobalNorm(0.1), Descent(0.5)),
        "b": OptimiserChain(ClipGlobalNorm(0.2), Descent(0.5)),
        "c": OptimiserChain(ClipNorm(0.2), ClipGlobalNorm(0.3), Descent(0.5)),
        "d": OptimiserChain(ClipGlobalNorm(0.2), Worst(), Momentum(0.5)),
    }
    g = torch.Generator().manual_seed(3)
    whole_ones = {
        k: torch.randn(n, 3, generator=g, dtype=torch.float64) for k, n in zip("abcd", (3, 8, 1, 5), strict=True)
    }
    model = {k: distribute_tensor(x, mesh, [Shard(0)]) for k, x in whole_ones.items()}
    state, alone = fluxpy.setup(rules, model), fluxpy.setup(rules, whole_ones)
    for _ in range(3):
        grads = {k: torch.randn(x.shape, generator=g, dtype=x.dtype) for k, x in whole_ones.items()}
        fluxpy.update(state, model, {k: distribute_tensor(dx, mesh, [Shard(0)]) for k, dx in grads.items()})
        fluxpy.update(alone, whole_ones, grads)
    assert_same(model, state, whole_ones, alone)


def wrappers_are_no_part_of_a_path() -> None:
    for wrapped in (compiled_data_parallel, checkpointed_shards):
        run = Both(Adam(0.05), wrapped)
        assert [path for path, _ in fluxpy.leaves(run.state)] == [path for path, _ in fluxpy.leaves(run.state_alone)]
        run.step(2).check()


def compiled_data_parallel(model: nn.Module) -> Any:
    return torch.compile(DistributedDataParallel(model), backend="eager")


def checkpointed_shards(model: nn.Module) -> nn.Module:
    model.inside = checkpoint_wrapper(model.inside)
    return shard(model)


def trees_of_shards() -> None:
    """What is mapped over the state are DTensors, and they may be put back."""
    run = Both(OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05)), shard).step(2)
    state: Any = optree.tree_map(lambda t: t * 1.0, run.state, namespace="fluxpy")
    assert all(isinstance(t, DTensor) for t in optree.tree_leaves(run.state, namespace="fluxpy"))
    run.state = state
    run.step(2).check()


def sharpness_is_over_all_shards() -> None:
    for spread in (shard, copies, DistributedDataParallel):
        run = Both(Momentum(0.05), spread)
        for turn in range(2):
            for model, state, data in ((run.model, run.state, mine(turn)), (run.alone, run.state_alone, batch(turn))):
                fluxpy.update(state, model, fluxpy.sharpened(loss, model, 0.1, *data, state=state)[1])
        run.check(1e-11)


def bytes_on_each_process() -> None:
    """What the page on scaling works out, against what tensors hold: of each rule, however the model is spread."""
    size = dist.get_world_size()
    page = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text("utf-8")
    said: dict[str, Any] = {"torch": torch, "fluxpy": fluxpy}
    [code] = re.findall(r"```python\n(import optree\n.*?\n)adam, ", page, re.DOTALL)
    exec(code, said)
    ways = [(lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True), 1), (copies, 1), (fully_shard, size)]
    rules = [(row.rule, torch.float32) for row in ROWS.values()]
    rules.append((MixedPrecision(AdamW(0.01)), torch.bfloat16))
    rules.append((StochasticRounding(Lowered(AdamW(0.01))), torch.bfloat16))
    for rule, dtype in rules:
        for spread, share in ways:
            layers = nn.Linear(256, 64 * size, bias=False), nn.Linear(64 * size, 128 * size, bias=False)
            model = spread(nn.Sequential(*layers).to(dtype))
            state = fluxpy.setup(rule, model)
            for _ in range(2):
                model.zero_grad()
                model(torch.ones(2, 256, dtype=dtype)).sum().backward()
                fluxpy.update(state, model)
            params = fluxpy.trainables(model)
            numbers = sum(x.numel() for x in params)
            held = stored([*params, *[x.grad for x in params], *fluxpy_tensors(state)])
            assert held == pytest.approx(said["bytes_each"](rule, dtype) * numbers / share, rel=0.02), (rule, share)


def stored(tensors: list[Any]) -> int:
    """The bytes of memory that tensors hold on this process, each once."""
    local = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
    return sum(storages.values())


def sequence_parallel() -> None:
    """Gradients that are still to be summed over processes, and parameters that are copies."""
    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(),
    }
    size = dist.get_world_size()
    inputs = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0), use_local_output=True)
    for rule in (OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05)), OptimiserChain(ClipNorm(0.3), Momentum(0.05))):

        def spread(model: nn.Module) -> nn.Module:
            mesh = init_device_mesh("cpu", (size,))
            parallelize_module(model.norm, mesh, inputs)
            return parallelize_module(model, mesh, plan)

        run = Both(rule, spread, net=Wide)
        for turn in range(3):  # each process has the whole batch
            for model, state in ((run.model, run.state), (run.alone, run.state_alone)):
                fluxpy.trainstep(loss, model, batch(turn), state)
        run.check()


def as_an_optimizer_of_torch() -> None:
    for spread in (shard, DistributedDataParallel):
        run = Both(OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05)), spread)
        pairs = []
        for model, state, data in ((run.model, run.state, mine), (run.alone, run.state_alone, batch)):
            optimizer = TorchOptimizer(state, model)
            pairs.append((optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), model, data))
        for turn in range(3):
            for optimizer, scheduler, model, data in pairs:
                optimizer.zero_grad()
                loss(model, *data(turn)).backward()
                optimizer.step()
                scheduler.step()
        run.check()


def momenta_of_torch_go_on() -> None:
    run = Both(Adam(0.05), shard)
    theirs = torch.optim.Adam(run.model.parameters(), 0.05)
    other = torch.optim.Adam(run.alone.parameters(), 0.05)
    for turn in range(2):
        for optimizer, model, data in ((theirs, run.model, mine), (other, run.alone, batch)):
            optimizer.zero_grad()
            loss(model, *data(turn)).backward()
            optimizer.step()
    run.model.zero_grad()
    run.alone.zero_grad()
    run.state, run.state_alone = from_torch(theirs, run.model), from_torch(other, run.alone)
    run.step(2).check()


def windows_end_and_averages_are_used() -> None:
    for inner in (OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05)), OptimiserChain(ClipNorm(0.3), CHAINS["whole"])):
        run = Both(OptimiserChain(AccumGrad(3), inner), shard).step(4)
        fluxpy.flush(run.state, run.model)
        fluxpy.flush(run.state_alone, run.alone)
        run.check().step(2).check()
    run = Both(fluxpy.Averaged(Adam(0.05), decay=0.5), shard).step(3)
    with fluxpy.averaged(run.state, run.model), fluxpy.averaged(run.state_alone, run.alone):
        torch.testing.assert_close(run.model(batch(0)[0]), run.alone(batch(0)[0]), rtol=ROOM, atol=ROOM)
    run.step(2).check()


SPREAD = [
    every_rule_when_sharded,
    norms_over_shards,
    rounding_of_shards,
    verbs_in_mid_run,
    accumulated,
    missing_gradients,
    by_backward_and_grad,
    grad_stays_as_it_was,
    set_up_before_sharding,
    after_an_evaluation,
    the_state_shows_dtensors,
    not_finite_on_one,
    losses_are_agreed_on,
    few_collectives,
    other_ways_to_spread,
    tensor_parallel,
    a_state_of_one_process_is_loaded,
    verbs_on_one_process_alone_are_found,
    refused_in_words,
    rules_of_ones_own,
    order_hangs_on_leaves_alone,
    wrappers_are_no_part_of_a_path,
    trees_of_shards,
    sharpness_is_over_all_shards,
    sequence_parallel,
    as_an_optimizer_of_torch,
    momenta_of_torch_go_on,
    windows_end_and_averages_are_used,
]


DDP = [
    ddp_averages,
    ddp_trains_by_train_and_trainstep,
    ddp_finds_frozen_leaves,
    ddp_refuses_what_thawed_late,
    ddp_refuses_a_way_around_it,
    ddp_gives_gradients_that_stay,
]
# Those that find most, for every day.
FEW = [
    every_rule_when_sharded,
    norms_over_shards,
    rounding_of_shards,
    verbs_in_mid_run,
    not_finite_on_one,
    losses_are_agreed_on,
    few_collectives,
    refused_in_words,
    verbs_on_one_process_alone_are_found,
]
FEW_IN_FOUR = [norms_over_shards, other_ways_to_spread, tensor_parallel, rules_of_ones_own, order_hangs_on_leaves_alone]

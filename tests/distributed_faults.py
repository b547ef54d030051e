"""What processes of a world do with a state that moves between plain and spread models, and what they are refused."""

import copy
import weakref
from typing import Any, ClassVar

import distributed_cases as cases
import pytest
import torch
import torch.distributed as dist
from distributed_cases import Both, Net, batch, loss, mine, shard, whole
from helpers import CHAINS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import fluxpy
from fluxpy import (
    AccumGrad,
    Adafactor,
    Adam,
    ClipGlobalNorm,
    ClipNorm,
    Descent,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    surgery,
)
from fluxpy.distributed.sharding import Sharding

CLIPPED = OptimiserChain(ClipGlobalNorm(0.3), ClipNorm(0.2), Adam(0.05))


def to_plain_and_back() -> None:
    """A state that was used on a spread model is used on a plain one: then it is of one process again."""
    for rule in (CLIPPED, CHAINS["whole"], MixedPrecision(Adam(0.05))):
        run = Both(rule, shard).step(2)
        plain = Net()
        with torch.no_grad():
            for x, own in zip(run.model.parameters(), plain.parameters(), strict=True):
                own.copy_(whole(x))
        spread, run.model = run.model, plain
        grads = fluxpy.gradient(loss, plain, *batch(2))
        fluxpy.update(run.state, plain, grads)
        fluxpy.update(run.state_alone, run.alone, fluxpy.gradient(loss, run.alone, *batch(2)))
        run.check()
        assert not isinstance(cases.fluxpy_tensors(run.state.head.weight.state)[0], DTensor)
        fluxpy.update(run.state, plain, grads, inplace=False)
        if rule is CLIPPED:
            fluxpy.state_dict(run.state)
            copied, other = copy.deepcopy((run.state, plain))
            surgery.take(copied.head, other.head, [0, 2])
            assert other.head.weight.shape == (2, 5) and copied.head.weight.state[2].m.shape == (2, 5)
        with torch.no_grad():
            for x, own in zip(spread.parameters(), plain.parameters(), strict=True):
                x.copy_(distribute_tensor(own.detach(), x.device_mesh, x.placements))
        run.model, run.turn = spread, 3
        run.step(2).check()


def views_see_that_the_tree_moved() -> None:
    """What a branch was used with before the model was spread is not used again."""
    for rule in (ClipNorm(0.2), ClipGlobalNorm(0.2)):
        chain = OptimiserChain(rule, Adam(0.05))
        alone, model = Net(), Net()
        one, two = fluxpy.setup(chain, alone), fluxpy.setup(chain, model)
        for turn in range(4):
            if turn == 2:
                fully_shard(model.head)
            for net, state in ((alone, one), (model, two)):
                for branch in ("inside", "head"):
                    x = getattr(net, branch)
                    grads = {k: torch.full(p.shape, 2.0 + turn, dtype=p.dtype) for k, p in x.named_parameters()}
                    fluxpy.update(state[branch], x, grads)
                grads = {k: torch.full(p.shape, 1.0 + turn, dtype=p.dtype) for k, p in net.named_parameters()}
                fluxpy.update(state, net, grads)
            cases.assert_same(model, two, alone, one)


def parts_by_hand_are_refused() -> None:
    """`to_local()` by hand: a norm would be that of the part."""
    run = Both(CLIPPED, shard).step(1)
    parts = {path: x.to_local().detach().clone() for path, x in fluxpy.trainables(run.model, path=True)}
    by_hand = _as_model(run.model, parts)
    for _ in range(2):  # it is not known the second time either
        with pytest.raises(ValueError, match=r"not to_local\(\) of it"):
            fluxpy.update(run.state, by_hand, parts)
    with pytest.raises(ValueError, match="must have the shape"):
        fluxpy.update(run.state, run.model, parts)
    run.step(1).check()


def _as_model(model: nn.Module, tensors: dict[str, Any]) -> nn.Module:
    """A plain model with these tensors as parameters."""
    other = Net()
    for path, x in tensors.items():
        name, _, last = path.rpartition(".")
        setattr(other.get_submodule(name), last, nn.Parameter(x))
    other.again.weight = other.middle.weight
    return other


def follows_to_another_dtype() -> None:
    """Rules of whole arrays too. (FSDP2 itself takes no other dtype once it has run, so here it never runs.)"""
    rules: dict[str, Any] = {"Adafactor": Adafactor(0.01), "whole": CHAINS["whole"], "clipped": CLIPPED}
    rules["master"] = MixedPrecision(Adam(0.05), dtype=torch.float64)
    for name, rule in rules.items():
        run = Both(rule, shard)
        run.what = name
        pairs = (run.model, run.state), (run.alone, run.state_alone)
        for turn, dtype in enumerate((torch.float64, torch.float64, torch.float32, torch.float32)):
            for model, state in pairs:
                model.to(dtype)
                if turn == 2:
                    with pytest.raises(ValueError, match="fluxpy.follow"):
                        fluxpy.update(state, model, gradients(model, turn))
                fluxpy.follow(state, model)
                fluxpy.update(state, model, gradients(model, turn))
            run.check(1e-5 if dtype is torch.float32 else cases.ROOM)
        dtypes = [
            [getattr(t, "dtype", None) for _, leaf in fluxpy.leaves(state) for t in cases.fluxpy_tensors(leaf.state)]
            for _, state in pairs
        ]
        assert dtypes[0] == dtypes[1]


def gradients(model: nn.Module, turn: int) -> dict[str, torch.Tensor]:
    """Whole ones, the same however the model is spread."""
    g = torch.Generator().manual_seed(turn)
    every = fluxpy.trainables(model, path=True)
    return {path: torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for path, x in every}


def made_on_meta() -> None:
    """The usual way to a model that no process could hold: shard it before it has numbers."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    fully_shard(model[0])
    fully_shard(model)
    state = fluxpy.setup(CLIPPED, model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for x in model.parameters():
            x.fill_(0.5)
    fluxpy.follow(state, model)
    alone = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    with torch.no_grad():
        for x in alone.parameters():
            x.fill_(0.5)
    other = fluxpy.setup(CLIPPED, alone)
    for turn in range(2):
        fluxpy.trainstep(loss, model, [t.float() for t in mine(turn)], state)
        fluxpy.trainstep(loss, alone, [t.float() for t in batch(turn)], other)
    cases.assert_same(model, state, alone, other, room=1e-6)


def writes_are_seen_by_autograd() -> None:
    """A graph from before a write to local tensors raises instead of using the new numbers."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = {"w": distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])}
    model["w"] = nn.Parameter(model["w"])

    def writes(rule: Any, write: Any) -> None:
        state = fluxpy.setup(rule, model)
        for _ in range(2):
            fluxpy.update(state, model, {"w": torch.ones(4, 2)})
        kept = model["w"].square().sum()
        write(state)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward()

    writes(Descent(0.1), lambda state: fluxpy.update(state, model, {"w": torch.ones(4, 2)}))
    writes(OptimiserChain(AccumGrad(4), Descent(0.1)), lambda state: fluxpy.flush(state, model))

    def evaluate(state: Any) -> None:
        with fluxpy.averaged(state, model):
            pass

    writes(fluxpy.Averaged(Descent(0.1)), evaluate)


def transforms_are_refused() -> None:
    """Inside `torch.func` and `torch.compile`; and nothing is half done."""
    run = Both(CLIPPED, shard).step(1)
    grads = fluxpy.gradient(loss, run.model, *mine(0))
    before = fluxpy.testing.snapshot(run.model, run.state)

    def under_vmap(scale: Any) -> Any:
        fluxpy.update(run.state, run.model, grads)
        return scale

    with pytest.raises(ValueError, match=r"outside of torch.func, torch.compile and inference_mode"):
        torch.func.vmap(under_vmap)(torch.ones(2))
    compiled = torch.compile(lambda: fluxpy.update(run.state, run.model, grads), backend="eager")
    with pytest.raises(ValueError, match=r"outside of torch.func, torch.compile and inference_mode"):
        compiled()
    assert not fluxpy.testing.diff(before, fluxpy.testing.snapshot(run.model, run.state))
    run.step(1).check()


def offloaded() -> None:
    """Parameters, gradients and momenta on the CPU, where FSDP2 puts them."""

    def spread(model: nn.Module) -> nn.Module:
        policy = CPUOffloadPolicy(pin_memory=False)
        fully_shard(model.head, offload_policy=policy)
        return fully_shard(model, offload_policy=policy)

    for rule in (CLIPPED, CHAINS["whole"], OptimiserChain(AccumGrad(2), Momentum(0.05))):
        run = Both(rule, spread).step(2).both(lambda s: fluxpy.freeze(s.inside)).step(2).both(fluxpy.thaw)
        run.step(2).check()
        assert all(t.device.type == "cpu" for t in cases.fluxpy_tensors(run.state) if isinstance(t, torch.Tensor))


def offloaded_from_other_devices() -> None:
    """As where the mesh is of GPUs and the parts are on the CPU, but for the moving: DTensors are put together without
    `from_local`, which would move them."""
    known = Sharding.__init__

    def marked(self: Sharding, x: Any) -> None:
        known(self, x)
        self.offloaded = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sharding, "__init__", marked)
        for rule in (CLIPPED, CHAINS["whole"], MixedPrecision(Adam(0.05)), Adafactor(0.01)):
            run = Both(rule, shard).step(2).both(lambda s: fluxpy.freeze(s.inside)).step(1).both(fluxpy.thaw)
            saved, grads = fluxpy.state_dict(run.state), fluxpy.gradient(loss, run.model, *mine(0))
            found, wanted = saved["leaves"]["head.weight"]["state"], run.model.head.weight
            for t in found.values():
                if isinstance(t, DTensor):
                    assert (t.shape, t.stride(), t.placements) == (wanted.shape, wanted.stride(), wanted.placements)
            run.step(1)
            fluxpy.load_state_dict(run.state, saved)
            fluxpy.load_state_dict(run.state_alone, saved)
            others = {path: whole(grads[path]) for path, _ in fluxpy.leaves(run.state)}
            with torch.no_grad():
                for x, y in zip(run.model.parameters(), run.alone.parameters(), strict=True):
                    y.copy_(whole(x))
            fluxpy.update(run.state, run.model, grads)
            fluxpy.update(run.state_alone, run.alone, others)
            run.check()


def ddp_refuses_grads_that_it_did_not_average() -> None:
    """By `.grad` too: one that thawed after the wrapping, whether it got a gradient or waits for one for ever."""
    run = Both(Adam(0.05), DistributedDataParallel, before=lambda m: m.inside.requires_grad_(False)).step(1)
    for flag in (False, True):
        fluxpy.thaw(run.state)
        run.model.module.inside.requires_grad_(flag)
        run.model.zero_grad()
        loss(run.model, *mine(0)).backward()
        before = fluxpy.testing.snapshot(run.model, run.state)
        with pytest.raises(ValueError, match=r"does not average the gradients of 'inside.weight'.*freeze them"):
            fluxpy.update(run.state, run.model)
        assert not fluxpy.testing.diff(before, fluxpy.testing.snapshot(run.model, run.state))
        fluxpy.freeze(run.state.inside)
        run.model.module.inside.requires_grad_(False)
        fluxpy.update(run.state, run.model)
        fluxpy.update(run.state_alone, run.alone, fluxpy.gradient(loss, run.alone, *batch(0)))
        run.check()


class Alone(fluxpy.Rule):
    """A rule of whole arrays, which sees that no other array is whole."""

    seen: ClassVar[list[weakref.ref[torch.Tensor]] | None] = None

    def apply(self, state: Any, x: torch.Tensor, dx: torch.Tensor) -> Any:
        if self.seen is not None:
            assert all(ref() is None for ref in self.seen)
            self.seen.extend([weakref.ref(x), weakref.ref(dx)])
        return state, 0.1 * dx / dx.norm()


def one_array_at_a_time() -> None:
    """Rules of whole arrays need the memory of one, also where a total over the tree comes first."""
    for rule in (Alone(), OptimiserChain(ClipGlobalNorm(0.3), Alone()), OptimiserChain(Alone(), ClipGlobalNorm(0.3))):
        run = Both(rule, shard)
        for turn in range(2):
            grads = fluxpy.gradient(loss, run.model, *mine(turn))
            others = fluxpy.gradient(loss, run.alone, *batch(turn))
            Alone.seen = []
            fluxpy.update(run.state, run.model, grads)
            assert Alone.seen
            Alone.seen = None
            fluxpy.update(run.state_alone, run.alone, others)
        run.check()


def started_over_on_one_process() -> None:
    """Where only some processes make another attempt, no leaf is put together again."""
    rules = {
        "middle*": OptimiserChain(ClipGlobalNorm(0.1), CHAINS["whole"]),
        "again*": OptimiserChain(ClipGlobalNorm(0.1), CHAINS["whole"], ClipGlobalNorm(0.2)),
        "*": OptimiserChain(ClipGlobalNorm(0.1), cases.Worst(), cases.Fails()),
    }
    run = Both(rules, shard)
    for turn in range(3):
        grads = fluxpy.gradient(loss, run.model, *mine(turn), state=run.state)
        others = fluxpy.gradient(loss, run.alone, *batch(turn), state=run.state_alone)
        with CommDebugMode() as comm:
            fluxpy.update(run.state, run.model, grads)
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, comm.get_total_counts())
        assert len(set(counts)) == 1, counts
        fluxpy.update(run.state_alone, run.alone, others)
    run.check()


FAULTS = [
    to_plain_and_back,
    views_see_that_the_tree_moved,
    parts_by_hand_are_refused,
    follows_to_another_dtype,
    made_on_meta,
    writes_are_seen_by_autograd,
    transforms_are_refused,
    offloaded,
    offloaded_from_other_devices,
    one_array_at_a_time,
    started_over_on_one_process,
    ddp_refuses_grads_that_it_did_not_average,
]
# Those that find most, for every day.
FEW = [to_plain_and_back, views_see_that_the_tree_moved, writes_are_seen_by_autograd]
FEW += [ddp_refuses_grads_that_it_did_not_average]

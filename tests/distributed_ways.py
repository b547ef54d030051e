"""What processes of a world do on models that are spread in the many ways that PyTorch's own tests of DTensors and of
FSDP2 try: by hand, on several meshes, along other dimensions, frozen here and there, and with `state_dict`."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import distributed_cases as cases
import torch
import torch.distributed as dist
from distributed_cases import PLAN, Both, Net, Wide, batch, loss, mine, shard, whole
from helpers import CHAINS
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

import fluxpy
from fluxpy import (
    AdaDelta,
    AdaGrad,
    Adam,
    AdaMax,
    AdamW,
    AMSGrad,
    ClipGlobalNorm,
    ClipNorm,
    Momentum,
    NAdam,
    Nesterov,
    OptimiserChain,
    RAdam,
    RMSProp,
    WeightDecay,
)  # fmt: skip

CLIPPED = OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05))
NORMS = (1.0, 2.0, 3.0, float("inf"))


# --- DTensors by hand -----------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers, for meshes of their own."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.one = nn.Linear(4, 6, dtype=torch.float64)
        self.two = nn.Linear(6, 3, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


def by_hand(module: nn.Module, mesh: DeviceMesh, placements: list[Any]) -> nn.Module:
    """Parameters become DTensors; what goes in and comes out are plain tensors, alike on all processes."""

    def cut(name: str, inner: nn.Module, mesh: DeviceMesh) -> None:
        for key, x in list(inner.named_parameters(recurse=False)):
            new = nn.Parameter(distribute_tensor(x.detach(), mesh, placements))
            new.register_hook(lambda grad: grad.redistribute(placements=placements))
            inner.register_parameter(key, new)

    everywhere = [Replicate()] * mesh.ndim
    return distribute_module(
        module,
        mesh,
        cut,
        lambda inner, inputs, mesh: DTensor.from_local(inputs[0], mesh, everywhere, run_check=False),
        lambda inner, output, mesh: output.redistribute(placements=everywhere).to_local(),
    )


def step_alike(run: Both, times: int = 2) -> Both:
    """Steps in which each process has the whole batch."""
    for turn in range(times):
        for model, state in ((run.model, run.state), (run.alone, run.state_alone)):
            fluxpy.trainstep(loss, model, batch(turn), state)
    return run


def distributed_by_hand() -> None:
    """Every algorithm that `torch.optim` has too, with decay in its gradient and hyperparameters as tensors."""
    decay = WeightDecay(0.05)
    rules = [
        *(OptimiserChain(decay, rule(0.05)) for rule in (Adam, AMSGrad, NAdam, RAdam, AdaMax, AdaGrad, RMSProp)),
        *(OptimiserChain(decay, rule) for rule in (Momentum(0.05), Nesterov(0.05), AdaDelta(0.1, rho=0.88, eps=1e-5))),
        AdamW(0.05, betas=(0.6, 0.66), eps=1e-6, weight_decay=0.05),
        Adam(torch.tensor(0.05, dtype=torch.float64)),  # pyright: ignore[reportArgumentType]
        RMSProp(0.05, centered=True),
        CLIPPED,
        CHAINS["whole"],
    ]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for rule in rules:
        step_alike(Both(rule, lambda m: by_hand(m, mesh, [Shard(0)]), net=Two)).check()


def require_clipped(run: Both, clip: Any, p: float, limit: float) -> None:
    """That a comparison of clips is not one of nothing."""
    grads = torch.utils._pytree.tree_leaves(fluxpy.gradient(loss, run.alone, *batch(0)))
    norms = torch.stack([torch.linalg.vector_norm(g, ord=p) for g in grads])
    assert (norms > limit).sum() > 1 if clip is ClipNorm else torch.linalg.vector_norm(norms, ord=p) > limit


def two_meshes_in_one_model() -> None:
    """One layer over all processes, the other in replicas: a norm over both counts each number once."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("x", "y"))
    flat = mesh["x", "y"]._flatten("all")

    def spread(model: nn.Module) -> nn.Module:
        by_hand(model.one, flat, [Shard(0)])
        by_hand(model.two, mesh, [Replicate(), Shard(0)])
        return model

    for p in NORMS:
        for clip in (ClipGlobalNorm, ClipNorm):
            run = step_alike(Both(OptimiserChain(clip(0.01, norm_type=p), AdamW(0.05)), spread, net=Two)).check()
            require_clipped(run, clip, p, 0.01)


def norms_over_two_meshes() -> None:
    """Tensor parallelism under FSDP2, where some parameters are cut along both dimensions and others along one."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
    part = mesh.get_local_rank("data")

    def spread(model: nn.Module) -> nn.Module:
        return fully_shard(parallelize_module(model, mesh["tensor"], PLAN), mesh=mesh["data"])

    for p in NORMS:
        for clip in (ClipGlobalNorm, ClipNorm):
            run = Both(OptimiserChain(clip(0.01, norm_type=p), Adam(0.05)), spread, net=Wide)
            require_clipped(run, clip, p, 0.01)
            for turn in range(3):
                x, y = batch(turn)
                fluxpy.trainstep(loss, run.model, (x[part * 6 :][:6], y[part * 6 :][:6]), run.state)
                fluxpy.trainstep(loss, run.alone, (x, y), run.state_alone)
            run.check()
        grads = fluxpy.gradient(loss, run.model, *batch(0))
        with CommDebugMode() as comm:
            fluxpy.update(run.state, run.model, grads)
        kinds = 3 if size > 2 else 1  # those cut along both dimensions need one for each, the others one
        assert comm.get_total_counts() == kinds, comm.get_total_counts()


def along_other_dimensions() -> None:
    """`shard_placement_fn`: columns instead of rows."""

    def spread(model: nn.Module) -> nn.Module:
        size = dist.get_world_size()

        def largest(x: nn.Parameter) -> Shard:
            sizes = [n if n % size == 0 else 0 for n in x.shape]  # FSDP2 cuts along others than the first but evenly
            return Shard(sizes.index(max(sizes)))

        return fully_shard(model, shard_placement_fn=largest)

    for rule in (CLIPPED, OptimiserChain(ClipNorm(0.1), Momentum(0.05)), CHAINS["whole"], CHAINS["master"]):
        run = Both(rule, spread, net=Wide).step(3).check()
        assert {x.placements for x in fluxpy.trainables(run.model)} >= {(Shard(1),), (Shard(0),)}
        other = Both(rule, spread, net=Wide)
        fluxpy.load_state_dict(other.state, fluxpy.state_dict(run.state))
        run.state = other.state
        run.step(1).check()


# --- Frozen parameters ----------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Blocks of two layers, each a group of FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.blocks = nn.Sequential(*[self._block() for _ in range(3)])
        self.head = nn.Linear(4, 3, dtype=torch.float64)

    def _block(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 8, dtype=torch.float64), nn.Tanh(), nn.Linear(8, 4, dtype=torch.float64), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def in_groups(reshard: Any, checkpointing: bool = False) -> Any:
    def spread(model: nn.Module) -> nn.Module:
        for i, block in enumerate(model.blocks):
            if checkpointing:
                model.blocks[i] = block = checkpoint_wrapper(block)
            fully_shard(block, reshard_after_forward=reshard)
        return fully_shard(model, reshard_after_forward=reshard)

    return spread


def ways_to_reshard() -> list[Any]:
    return [False, True, *([2] if dist.get_world_size() == 4 else [])]


@contextmanager
def reduced() -> Iterator[list[int]]:
    """How many numbers each reduction of gradients leaves to this process."""
    sizes: list[int] = []
    original = dist.reduce_scatter_tensor

    def counting(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(output.numel())
        return original(output, *args, **kwargs)

    dist.reduce_scatter_tensor = counting
    try:
        yield sizes
    finally:
        dist.reduce_scatter_tensor = original


def biases_alone() -> None:
    """Frozen parameters beside others in one group: their gradients are not even sent."""
    for way in ways_to_reshard():
        for checkpointing in (False, True):
            for by_flags in (False, True):

                def before(model: nn.Module, by_flags: bool = by_flags) -> None:
                    for path, x in model.named_parameters():
                        x.requires_grad_("bias" in path or not by_flags)

                run = Both(CLIPPED, in_groups(way, checkpointing), net=Blocks, before=before)
                if not by_flags:
                    run.both(lambda s: fluxpy.freeze(fluxpy.select(s, "*weight")))
                with reduced() as sizes:
                    run.step(3).check()
                inside = {path: x for path, x in fluxpy.trainables(run.model, path=True) if "bias" in path}
                first = sum(x.to_local().numel() for path, x in inside.items() if path.startswith("blocks.0."))
                size = dist.get_world_size()
                assert set(sizes) <= {first, -(-3 // size)} and first * size == 12, sizes
                assert all(leaf.state is None for path, leaf in fluxpy.leaves(run.state) if "weight" in path)


def groups_freeze_and_thaw() -> None:
    """Frozen groups between others, with an evaluation in between, and thawed in the end."""
    for way in ways_to_reshard():
        run = Both(CLIPPED, in_groups(way), net=Blocks)
        run.both(lambda s: fluxpy.freeze(s.blocks[::2])).step(1)
        with torch.no_grad():
            run.model(mine(0)[0])
        run.step(1).check()
        run.both(fluxpy.thaw).step(2).check()


class Again(nn.Module):
    """Layers that run several times in one pass, with and without gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Linear(4, 5, dtype=torch.float64)
        self.fixed = nn.Linear(5, 5, dtype=torch.float64)
        self.trained = nn.Linear(5, 5, dtype=torch.float64)
        self.last = nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.fixed(self.trained(x).tanh())
            with torch.no_grad():
                y = self.trained(x).tanh()
            x = x + y
        return self.last(x)


def layers_that_run_again() -> None:
    for way in ways_to_reshard():

        def spread(model: nn.Module, way: Any = way) -> nn.Module:
            for layer in model.children():
                fully_shard(layer, reshard_after_forward=way)
            return fully_shard(model, reshard_after_forward=way)

        run = Both(CLIPPED, spread, net=Again, before=lambda m: m.fixed.requires_grad_(False))
        run.step(4).check().both(fluxpy.thaw).step(2).check()


# --- state_dict -----------------------------------------------------------------------------------------------------


def dicts_of_the_model() -> None:
    """A dict of the model that was made once stays that of the model; loading writes where the parameters are."""
    for net, spread in ((Net, shard), (Net, cases.hybrid), (Blocks, in_groups(False))):
        if spread is cases.hybrid and dist.get_world_size() < 4:
            continue
        run = Both(CLIPPED, spread, net=net).step(1)
        kept = run.model.state_dict()
        with torch.no_grad():
            run.model(mine(0)[0])  # after which whole parameters may stand in the model
        run.step(2)
        for key, x in run.model.state_dict().items():
            assert kept[key]._local_tensor.data_ptr() == x._local_tensor.data_ptr()
            assert torch.equal(kept[key]._local_tensor, x._local_tensor)
        saved = copy.deepcopy(kept), fluxpy.state_dict(run.state)
        later = cases.named(run.state), [whole(x).clone() for x in run.model.parameters()]
        run.step(2).check()
        run.model.load_state_dict(saved[0])
        fluxpy.load_state_dict(run.state, saved[1])
        assert all(torch.equal(whole(x), y) for x, y in zip(run.model.parameters(), later[1], strict=True))
        for key, a in cases.named(run.state).items():
            assert torch.equal(a, later[0][key]) if isinstance(a, Tensor) else a == later[0][key]


def assigned_parameters() -> None:
    """A model that was sharded on `meta` is given its parameters by `load_state_dict(assign=True)`, piece by piece."""
    for policy in (OffloadPolicy(), CPUOffloadPolicy(pin_memory=False)):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
        for layer in model:
            fully_shard(layer, offload_policy=policy)
        fully_shard(model, offload_policy=policy)
        state = fluxpy.setup(CLIPPED, model)
        alone = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
        other = fluxpy.setup(CLIPPED, alone)
        for key, x in alone.state_dict().items():
            place = model.state_dict()[key]
            model.load_state_dict(
                {key: distribute_tensor(x, place.device_mesh, place.placements)}, assign=True, strict=False
            )
        fluxpy.follow(state, model)
        for turn in range(2):
            fluxpy.trainstep(loss, model, mine(turn), state)
            fluxpy.trainstep(loss, alone, batch(turn), other)
        again = {key: x.clone() for key, x in model.state_dict().items()}
        model.load_state_dict(again, assign=True)  # in mid-run: other tensors of the same numbers
        fluxpy.trainstep(loss, model, mine(2), state)
        fluxpy.trainstep(loss, alone, batch(2), other)
        cases.assert_same(model, state, alone, other)


def dicts_on_meshes_of_several_dimensions() -> None:
    """Saved whole, and into a state on another mesh."""
    size = dist.get_world_size()
    names = ("replicas", "shards", "tensor")
    shapes = [(1, 2, 1), (1, 1, 2), (2, 1, 1)] if size == 2 else [(2, 2, 1), (1, 2, 2), (2, 1, 2)]
    found = []
    for shape in shapes:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)

        def spread(model: nn.Module, mesh: DeviceMesh = mesh) -> nn.Module:
            return fully_shard(parallelize_module(model, mesh["tensor"], PLAN), mesh=mesh["replicas", "shards"])

        run = Both(CLIPPED, spread, net=Wide)
        parts, part = shape[0] * shape[1], mesh.get_local_rank("replicas") * shape[1] + mesh.get_local_rank("shards")
        for turn in range(3):
            x, y = batch(turn)
            rows = 12 // parts
            fluxpy.trainstep(loss, run.model, (x[part * rows :][:rows], y[part * rows :][:rows]), run.state)
            fluxpy.trainstep(loss, run.alone, (x, y), run.state_alone)
        run.check()
        found.append(fluxpy.state_dict(run.state))
        one = fluxpy.setup(CLIPPED, run.alone)
        fluxpy.load_state_dict(one, found[-1])
        cases.assert_same(run.model, run.state, run.alone, one)
        everything = {
            (path, name): whole(t)
            for path, entry in found[-1]["leaves"].items()
            for name, t in entry["state"].items()
            if isinstance(t, Tensor)
        }
        own = fluxpy.state_dict(run.state_alone)["leaves"]
        for (path, name), t in everything.items():
            assert not isinstance(t, DTensor) and t.shape == own[path]["state"][name].shape
            torch.testing.assert_close(t, own[path]["state"][name], rtol=cases.ROOM, atol=cases.ROOM)


WAYS = [
    distributed_by_hand,
    two_meshes_in_one_model,
    norms_over_two_meshes,
    along_other_dimensions,
    biases_alone,
    groups_freeze_and_thaw,
    layers_that_run_again,
    dicts_of_the_model,
    assigned_parameters,
    dicts_on_meshes_of_several_dimensions,
]
FEW_IN_FOUR = [norms_over_two_meshes]

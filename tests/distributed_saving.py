"""What processes of a world do with checkpoints: killed while they save, saved while they go on, loaded elsewhere."""

import io
import os
import threading
from pathlib import Path
from typing import Any

import distributed_cases as cases
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import Both, named, shard
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.nn.parallel import DistributedDataParallel

import fluxpy
from fluxpy import Adam, ClipGlobalNorm, Descent, OptimiserChain

PATIENCE = 60  # seconds
CLIPPED = OptimiserChain(ClipGlobalNorm(0.3), Adam(0.05))


def both_dicts(model: Any, state: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "state": fluxpy.state_dict(state)}


def load_both(model: Any, state: Any, folder: Any, **options: Any) -> None:
    d = both_dicts(model, state)
    dcp.load(d, checkpoint_id=folder, **options)
    model.load_state_dict(d["model"])
    fluxpy.load_state_dict(state, d["state"])


def newest(folder: Path) -> Path | None:
    """The last checkpoint that is whole, as docs/scaling.md has it."""
    whole = [path.parent for path in folder.glob("*/.metadata")]
    return max(whole, key=lambda path: int(path.name), default=None)


def last_finished(folder: Path) -> int:
    """The last checkpoint after whose saving a process went on."""
    done = folder / "done"
    return int(done.read_text() or 0) if done.exists() else 0


# --- Killed -------------------------------------------------------------------------------------------------------


def to_kill() -> tuple[nn.Module, Any]:
    """Large enough for the writing to take a while."""
    model = nn.Sequential(nn.Linear(300, 200, dtype=torch.float64), nn.Linear(200, 3, dtype=torch.float64))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    return model, {"0.*": Adam(0.1), "*": CLIPPED}


def step_to(model: Any, state: Any, turn: int) -> None:
    """The update of this turn, the same however the model is spread."""
    grads = {
        path: torch.full(x.shape, 1.0 + turn % 7, dtype=x.dtype) for path, x in fluxpy.trainables(model, path=True)
    }
    fluxpy.update(state, model, grads)


def train_and_save(folder: str) -> None:
    """From the last whole checkpoint on, one for each update, until this process is killed."""
    model, rule = to_kill()
    shard_all(model)
    state = fluxpy.setup(rule, model)
    last = newest(Path(folder))
    if last is not None:
        load_both(model, state, last)
    turn = 0 if last is None else int(last.name)
    while True:
        step_to(model, state, turn)
        turn += 1
        writer = FileSystemWriter(f"{folder}/{turn}", overwrite=False)
        dcp.save(both_dicts(model, state), storage_writer=writer)
        if dist.get_rank() == 0:
            (Path(folder) / "writing").write_text(str(turn))
            os.replace(Path(folder) / "writing", Path(folder) / "done")


def shard_all(model: nn.Module) -> nn.Module:
    for layer in model.children():
        cases.fully_shard(layer)
    return cases.fully_shard(model)


# --- Saved while the run goes on ------------------------------------------------------------------------------------


class Waits(FileSystemWriter):
    """Writes when it is told to."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.go = threading.Event()

    def write_data(self, plan: Any, planner: Any) -> Any:
        assert self.go.wait(PATIENCE)
        return super().write_data(plan, planner)


def saved_while_updates_go_on(folder: str) -> None:
    """What is saved is what was there at the call. The dict of the state is a copy by itself; that of the model is not,
    and DCP copies it before it returns."""
    run = Both(cases.rules_to_save(), shard, before=lambda m: m.norm.requires_grad_(False)).step(3)
    group = dist.new_group()  # collective operations of the thread that saves must not meet those of the run
    then, parameters = named(run.state), [x.full_tensor().clone() for x in run.model.parameters()]
    d = both_dicts(run.model, run.state)
    writer = Waits(folder)
    future: Any = dcp.async_save(d, storage_writer=writer, process_group=group)
    run.step(3).both(lambda s: fluxpy.adjust(s["middle.weight"], 0.5))
    assert not future.done()
    writer.go.set()
    future.result()

    other = Both(cases.rules_to_save(), shard, before=lambda m: m.norm.requires_grad_(False))
    fluxpy.load_state_dict(other.state, d["state"])
    assert_equal(named(other.state), then)
    assert not torch.equal(d["model"]["head.weight"].full_tensor(), parameters[-2])
    fluxpy.reset(other.state)
    fluxpy.thaw(other.state.norm)
    fluxpy.freeze(other.state.norm)
    load_both(other.model, other.state, folder)
    assert_equal(named(other.state), then)
    for x, before in zip(other.model.parameters(), parameters, strict=True):
        assert torch.equal(x.full_tensor(), before)
    run.check()


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for key, a in found.items():
        assert torch.equal(a, wanted[key]) if isinstance(a, Tensor) else a == wanted[key], key


# --- Traps --------------------------------------------------------------------------------------------------------


def frozen_where_the_file_has_momenta(folder: str) -> None:
    """A leaf that thawed before saving, and is still frozen where the file is loaded: its momenta must not get lost."""
    for rule in (Adam(0.05), Descent(0.05)):
        place = f"{folder}/{type(rule).__name__}"
        run = Both(rule, shard, before=lambda m: m.inside.requires_grad_(False)).step(1).both(fluxpy.thaw).step(2)
        dcp.save(both_dicts(run.model, run.state), checkpoint_id=place)
        other = Both(rule, shard, before=lambda m: m.inside.requires_grad_(False))
        d = both_dicts(other.model, other.state)
        dcp.load(d, checkpoint_id=place)
        before = fluxpy.testing.snapshot(other.model, other.state)  # DCP writes parameters where they are
        with pytest.raises(ValueError, match=r"leaves\['inside.weight'\]: the checkpoint has momenta.*thaw it"):
            fluxpy.load_state_dict(other.state, d["state"])
        assert not fluxpy.testing.diff(before, fluxpy.testing.snapshot(other.model, other.state))
        fluxpy.thaw(other.state)
        load_both(other.model, other.state, place)
        run.model, run.state = other.model, other.state
        run.check().step(2).check()


def parts_of_another_process() -> None:
    """What rank 0 wrote by `torch.save` has its parts alone."""
    run = Both(Adam(0.05), shard).step(2)
    buffer = io.BytesIO()
    torch.save(fluxpy.state_dict(run.state), buffer)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, buffer.getvalue())
    from_first = torch.load(io.BytesIO(every[0]), weights_only=False)
    before = fluxpy.testing.snapshot(run.model, run.state)
    if dist.get_rank() == 0:
        fluxpy.load_state_dict(run.state, from_first)
    else:
        with pytest.raises(ValueError, match=r"a part of another process.*torch.distributed.checkpoint"):
            fluxpy.load_state_dict(run.state, from_first)
    assert not fluxpy.testing.diff(before, fluxpy.testing.snapshot(run.model, run.state))
    run.step(1).check()


def one_saves_for_all(folder: str) -> None:
    """Under DDP each process has everything."""
    path = folder + "/run.flux"
    run = Both(CLIPPED, DistributedDataParallel).step(2)
    if dist.get_rank() == 0:
        fluxpy.save(path, model=run.model, state=run.state)
    dist.barrier()
    other = Both(CLIPPED, DistributedDataParallel)
    fluxpy.load(path, model=other.model, state=other.state)
    run.model, run.state = other.model, other.state
    run.check().step(2).check()

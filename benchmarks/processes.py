"""`update` on DTensors, which two processes share, beside torch's fused AdamW on the same."""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fluxpy

from .harness import Column, Meter, figure, ratios

TITLE = "DTensors"
NOTE = """148 matrices, each cut in two by rows, on two processes of one thread each that talk by gloo: AdamW, as ratios
to `torch.optim.AdamW(fused=True)` on the same DTensors, with clipping to that and `clip_grad_norm_`; and the collective
operations of one step. Median steps: on two cores some wait for milliseconds until the other process gets its turn."""
COLUMNS = {"2 processes": ("two", 1)}
TARGETS = {32: (0.10, 0.15), 256: (0.75, 0.85)}
PATIENCE = 600  # seconds


def measure(column: str, meter: Meter) -> Column:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_work, args=(rank, folder, meter, results)) for rank in range(2)]
        for process in processes:
            process.start()
        found = results.get(timeout=PATIENCE)
        for process in processes:
            process.join()
    return found


def _work(rank: int, folder: str, meter: Meter, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: Column = {}
    for side, targets in TARGETS.items():
        for clip, target in zip((False, True), targets, strict=True):
            name = f"148 of {side}×{side}" + (", with clipping" if clip else "")
            if meter.wants(name):
                found |= _compare(name, side, clip, target, meter.quick)
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def _compare(name: str, side: int, clip: bool, target: float, quick: bool) -> Column:
    steps = {"torch": _torch(side, clip), "fluxpy": _fluxpy(side, clip)}
    times: dict[str, list[float]] = {who: [] for who in steps}
    for step in steps.values():
        step()
        step()
    for _ in range(3 if quick else 11):
        for who, step in steps.items():
            times[who].append(_seconds(step, 3 if quick else 15))
    row = {f"{name}: torch": figure(times["torch"], "s")}
    row[f"{name}: fluxpy"] = figure(ratios(times["fluxpy"], times["torch"]), target=target)
    for who, step in steps.items():
        with CommDebugMode() as counted:
            step()
        row[f"{name}: collectives of {who}"] = figure([counted.get_total_counts()] * 2)
    return row


def _seconds(step: Callable[[], object], times: int) -> float:
    """Seconds of the median step: now and then one waits for milliseconds until the other process, or a thread of
    gloo's, gets a core. All processes take as many steps, or they would wait for each other for ever."""
    dist.barrier()
    taken: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _model(side: int) -> nn.ParameterList:
    mesh = init_device_mesh("cpu", (2,))
    g = torch.Generator().manual_seed(0)
    xs = [nn.Parameter(distribute_tensor(torch.randn(side, side, generator=g), mesh, [Shard(0)])) for _ in range(148)]
    for x in xs:
        x.grad = distribute_tensor(torch.randn(side, side, generator=g), mesh, [Shard(0)])
    return nn.ParameterList(xs)


def _torch(side: int, clip: bool) -> Callable[[], object]:
    model = _model(side)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()

    return step


def _fluxpy(side: int, clip: bool) -> Callable[[], object]:
    model = _model(side)
    rule = fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(1e6), fluxpy.AdamW()) if clip else fluxpy.AdamW()
    state = fluxpy.setup(rule, model)
    return lambda: fluxpy.update(state, model)

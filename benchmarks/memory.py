"""Memory that one update takes for itself, each measured in a process of its own."""

import multiprocessing
import os
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import fluxpy

from . import sides
from .harness import Column, Contender, Figure, Meter
from .sets import Problem, many

TITLE = "Peak memory"
NOTE = """The first update of AdamW (its state is made here) on 50 leaves of a million numbers: what the process's peak
rises by, less the state's bytes, in sizes of the parameters. Plain may hold one copy (parameters and state) until it
commits, the other paths no temporary of the parameters' size."""
COLUMNS = {"50M parameters, 2 threads": ("50M", 2)}
SMALL = 0.1  # not of the parameters' size, but not nothing: the allocator, pieces


class Plain(fluxpy.AdamW):
    """AdamW as a rule of which the engine may assume nothing."""

    elementwise = False


ROWS: dict[str, tuple[dict[str, bool], float | None]] = {
    "torch, fused": ({}, None),
    "torch, default": ({}, None),
    "fluxpy": ({}, SMALL),
    "fluxpy, clipping": ({"clip": True}, SMALL),
    "fluxpy, laid out flat": ({"flat": True}, SMALL),
    "fluxpy, clipping, laid out flat": ({"clip": True, "flat": True}, SMALL),
    "fluxpy, compiled": ({"compile": True}, SMALL),
    "fluxpy, plain": ({}, 3 + SMALL),
}


def _contender(row: str, problem: Problem) -> Contender | None:
    if row.startswith("torch"):
        return sides.of_torch(problem, sides.fused if "fused" in row else torch.optim.AdamW, check=False)
    rule = Plain(1e-3) if "plain" in row else None
    return sides.of_fluxpy(problem, rule, check=False, **ROWS[row][0])


def rise(row: str, width: int, threads: int, device: str) -> float | None:
    """The temporaries of a first update, in sizes of the parameters."""
    torch.set_num_threads(threads)
    # Imports, thread pools, compiled kernels: those of leaves that are each a chunk alone, as below.
    warm = _contender(row, Problem(lambda: many(4, (400, 400)), device))
    if warm is None:
        return None
    warm.run(2)
    problem = Problem(lambda: many(50, (1000, width)), device)
    size = problem.numel * 4
    before = _now(device)
    contender = _contender(row, problem)
    assert contender
    contender.prepare()
    contender.step()
    # The contender's own: parameters, gradients and two moments.
    return (_peak(device) - before) / size - 4


def _now(device: str) -> int:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(column: str, meter: Meter) -> Column:
    width, threads = 100 if meter.quick else 1000, COLUMNS[column][1]
    found: Column = {}
    context = multiprocessing.get_context("spawn")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)  # what is freed goes back at once, and does not count twice
    for row, (options, target) in ROWS.items():
        slow = options.get("clip") or options.get("compile") or "default" in row
        if not meter.wants(row) or (meter.quick and slow):
            continue
        with ProcessPoolExecutor(1, context) as pool:
            value = pool.submit(rise, row, width, threads, meter.device).result()
        if value is not None:
            value = abs(round(value, 2))
            found[row] = Figure(value, value, value, target=None if meter.quick else target)
    return found

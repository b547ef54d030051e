"""Processes on this machine that talk to each other, as `torchrun` starts them: a world runs many cases in turn."""

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 60  # seconds that a process waits for the others

PRELOADED = ["torch", "torch._dynamo", *(f"torch.distributed.{name}" for name in ("checkpoint", "fsdp", "tensor"))]
PRELOADED += ["fluxpy", *(f"fluxpy.{name}" for name in ("interop", "learner", "surgery", "testing")), "pytest"]

Case = Callable[[], None]


def run_world(size: int, cases: Sequence[Case], patience: int = 300) -> None:
    """Run functions of a module, one after another, in each of some processes; AssertionError says which failed."""
    context = forking()
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = _started(context, size, folder, list(cases), results)
        failures: list[str] = []
        answers, end = 0, time.monotonic() + patience
        while answers < size:
            try:
                failures += results.get(timeout=1)
                answers += 1
            except queue.Empty:
                dead = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
                if dead or time.monotonic() > end:
                    failures.append(f"{size - answers} processes did not answer; exit codes {dead}")
                    break
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    assert not failures, "\n\n".join(failures)


def run_and_kill(size: int, case: Case, rank: int, moment: Callable[[], object]) -> None:
    """Run a function in each of some processes, kill one of them when `moment` returns, and wait until all are gone."""
    context = forking()
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        processes = _started(context, size, folder, [case], results)
        try:
            moment()
            alive = processes[rank].is_alive()
            processes[rank].kill()
            for process in processes:
                process.join(5)
        finally:
            for process in processes:
                process.kill()
                process.join()
    assert alive, "the process ended before it was killed"


def _started(context: Any, size: int, folder: str, cases: list[Case], results: Any) -> list[Any]:
    found = [
        context.Process(target=_main, args=(rank, size, folder, cases, results), daemon=True) for rank in range(size)
    ]
    for process in found:
        process.start()
    return found


def forking() -> Any:
    """Processes are forked by a server that has imported most of what they need; it does not find modules of tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _main(rank: int, size: int, folder: str, cases: list[Case], results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE)
    )
    os.environ["FLUXPY_TEST_FOLDER"] = folder
    failures = []
    for case in cases:
        name = getattr(case, "__name__", None) or repr(case)
        torch.manual_seed(0)
        try:
            case()
            dist.barrier()
        except BaseException:
            failures.append(f"{name}, process {rank} of {size}:\n{traceback.format_exc()}")
            break  # the others may be anywhere by now
    results.put(failures)
    results.close()
    results.join_thread()
    os._exit(0)  # without waiting for processes that failed

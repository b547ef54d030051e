"""The whole step of a large network on few samples, where page faults cost more than the optimiser."""

import statistics
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fluxpy

from .harness import Column, Contender, Figure, Meter, figure, ratios

TITLE = "The whole step"
NOTE = """22 million parameters (21 layers `Linear(1024, 1024)` with ReLU), batch of 4, AdamW: gradient and update,
ratios to a hand-written loop with `torch.optim.AdamW(fused=True)`. "Memory kept": glibc is told not to give memory back
to the system (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TOP_PAD_` of 4 GiB each), for all in that
column. Each contender runs in processes of its own, in turns. Gradient memory is the most that exists at once, of the
parameters' bytes."""
COLUMNS = {"1 thread": ("network", 1), "1 thread, memory kept": ("network", 1)}
_KEEP = str(4 << 30)
ENVIRONMENT = {
    "1 thread, memory kept": dict.fromkeys(
        ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"), _KEEP
    )
}
TARGETS = {"fluxpy, release=True": 0.70}
BASE, ALONE = "torch: forward, backward, AdamW(fused=True)", "torch: forward and backward alone"
Step = Callable[[], object]


def network(quick: bool) -> nn.Module:
    torch.manual_seed(0)
    width, depth = (256, 12) if quick else (1024, 21)
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())])


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def by_hand(model: nn.Module, x: Tensor, step: bool = True) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def run() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        if step:
            optimizer.step()
        return loss.item()

    return run


def by_fluxpy(model: nn.Module, x: Tensor, rule: Any = None, compile: bool = False, **options: Any) -> Step:
    state = fluxpy.setup(rule or fluxpy.AdamW(), model, compile=compile)
    return lambda: fluxpy.trainstep(loss_of, model, (x,), state, **options)


STEPS: dict[str, Callable[[nn.Module, Tensor], Step]] = {
    BASE: by_hand,
    ALONE: lambda model, x: by_hand(model, x, step=False),
    "fluxpy": by_fluxpy,
    "fluxpy, release=True": lambda model, x: by_fluxpy(model, x, release=True),
    "fluxpy, release=True, Lowered(AdamW), compiled": lambda model, x: by_fluxpy(
        model, x, fluxpy.Lowered(fluxpy.AdamW(betas=(0.9, 0.99))), compile=True, release=True
    ),
}


@contextmanager
def counted(model: nn.Module, peaks: list[int]) -> Iterator[None]:
    """The bytes of the gradients that exist whenever one is there."""
    held: list[tuple[int, weakref.ref[Tensor]]] = []

    def count(x: Tensor) -> None:
        assert x.grad is not None
        held.append((x.grad.nbytes, weakref.ref(x.grad)))
        peaks.append(sum(size for size, ref in held if ref() is not None))

    handles = [x.register_post_accumulate_grad_hook(count) for x in model.parameters()]
    yield
    for handle in handles:
        handle.remove()


def peak(make: Callable[[nn.Module, Tensor], Step], quick: bool, x: Tensor) -> float:
    """The most gradient memory at once, over that of the parameters."""
    model, peaks = network(quick), list[int]()
    step = make(model, x)
    step()
    with counted(model, peaks):
        step()
    return max(peaks) / sum(p.nbytes for p in model.parameters())


def alone(name: str, quick: bool) -> float:
    """Seconds per step, in a process of its own: what the allocator holds is that of this contender alone."""
    command = [sys.executable, "-m", __spec__.name, str([*STEPS].index(name)), *(["quick"] if quick else [])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(index: str, *quick: str) -> None:
    torch.set_num_threads(1)
    x = torch.randn(4, 256 if quick else 1024)
    contender = Contender([*STEPS.values()][int(index)](network(bool(quick)), x))
    contender.run(4)
    print(statistics.median(contender.run(1) for _ in range(6 if quick else 20)))


def measure(column: str, meter: Meter) -> Column:
    names = [name for name in STEPS if name == BASE or meter.wants(name)]
    names = [name for name in names if not (meter.quick and "compiled" in name)]
    rounds = [{name: alone(name, meter.quick) for name in names} for _ in range(3 if meter.quick else 7)]
    seconds = {name: [found[name] for found in rounds] for name in names}
    rows: Column = {BASE: figure(seconds[BASE], "s")}
    for name in names[1:]:
        rows[name] = figure(ratios(seconds[name], seconds[BASE]), target=TARGETS.get(name))
    x = torch.randn(4, 256 if meter.quick else 1024)
    for name in (BASE, "fluxpy, release=True"):
        share = peak(STEPS[name], meter.quick, x)
        rows[f"gradient memory, {name}"] = Figure(share, share, share, target=0.1 if name != BASE else None)
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:])

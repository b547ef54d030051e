"""Measuring side by side: contenders take turns, round after round, and what is told are medians of ratios."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "fluxpy",
    "torch",
    "numpy",
    "torch-optimi",
    "torchopt",
    "heavyball",
    "pytorch-optimizer",
    "schedulefree",
    "prodigyopt",
)


@dataclass
class Contender:
    """What is timed (`step`), what goes before each step untimed (`prepare`), and, after it all, `check(steps)`, which
    raises where that many steps should have led elsewhere."""

    step: Callable[[], object]
    prepare: Callable[[], object] = bool  # nothing
    check: Callable[[int], object] | None = None
    steps: int = 0

    def run(self, times: int) -> float:
        """Seconds per step."""
        total = 0.0
        for _ in range(times):
            self.prepare()
            _synchronise()
            start = time.perf_counter()
            self.step()
            _synchronise()
            total += time.perf_counter() - start
        self.steps += times
        return total / times


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Figure:
    """A cell of a table: median and quartiles over the rounds, and what was aimed at."""

    value: float
    low: float
    high: float
    unit: str = ""
    target: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool:
        assert self.target is not None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def __str__(self) -> str:
        scale, unit = 1.0, self.unit
        if unit == "s":
            scale, unit = next(
                pair for pair in ((1, "s"), (1e3, "ms"), (1e6, "µs")) if self.value * pair[0] >= 1 or pair[0] == 1e6
            )
        value, low, high = (
            f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"
            for x in (self.value * scale, self.low * scale, self.high * scale)
        )
        text = f"{value} {unit}".rstrip() + (f" ({low}–{high})" if low != high else "")
        return (
            text if self.target is None else f"{text}, target {self.target:.3g}: {'met' if self.met else '**not met**'}"
        )


Column = dict[str, Figure]  # by row


def figure(values: list[float], unit: str = "", target: float | None = None, at_least: bool = False) -> Figure:
    low, median, high = statistics.quantiles(values, n=4)
    return Figure(median, low, high, unit, target, at_least)


def ratios(ours: list[float], base: list[float]) -> list[float]:
    """Round by round, so that what slows the whole machine for a while slows both."""
    return [a / b for a, b in zip(ours, base, strict=True)]


@dataclass(frozen=True)
class Meter:
    """How long, where and what to measure."""

    quick: bool = False
    device: str = "cpu"
    only: str = ""

    def wants(self, row: str) -> bool:
        """Whether a row of that name was asked for."""
        return self.only.lower() in row.lower()

    def compare(self, contenders: Mapping[str, Contender | None], cycle: int = 1) -> dict[str, list[float]]:
        """Seconds per step of each contender in each round: A B C, A B C, ... None is left out.

        Where steps are not alike but repeat after `cycle` of them, each turn is made of whole cycles."""
        present = {name: c for name, c in contenders.items() if c is not None}
        least, limit = (0.005, 1.5) if self.quick else (0.03, 30.0)  # seconds of a turn, and of all
        times: dict[str, int] = {}
        round_takes = 1e-9
        for name, contender in present.items():
            contender.run(2 * cycle)  # warm-up: state is made, kernels are compiled
            once = contender.run(cycle)
            times[name] = cycle * max(1, min(1000, int(least / once)) // cycle)
            round_takes += once * times[name]
        found: dict[str, list[float]] = {name: [] for name in present}
        for _ in range(max(3, min(5 if self.quick else 15, int(limit / round_takes)))):
            gc.collect()
            gc.disable()
            for name, contender in present.items():
                found[name].append(contender.run(times[name]))
            gc.enable()
        for name, contender in present.items():
            try:
                if contender.check:
                    contender.check(contender.steps)
            except AssertionError as error:
                error.add_note(f"{name!r} did not do the {contender.steps} steps that it was timed for")
                raise
        return found


def table(title: str, note: str, columns: Mapping[str, Column]) -> str:
    """A Markdown table: rows in the order in which they were first told."""
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    lines = [f"## {title}", "", note, "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(str(c.get(row, "–")) for c in columns.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def machine(device: str) -> str:
    """What it ran on."""
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ", 1)[1] for line in info if line.startswith("model name")), platform.machine())
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return (
        f"{cpu}, {os.cpu_count()} cores{gpu}, {platform.system()}; {', '.join(versions)}; {time.strftime('%Y-%m-%d')}."
    )


def worked() -> float:
    """Seconds that all cores have worked since the machine started; 0 where /proc is not there to tell."""
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system, _idle, _waiting, *rest = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return sum(map(int, (user, nice, system, *rest[:2]))) / os.sysconf("SC_CLK_TCK")


def require_idle() -> None:
    """Refuse to measure on a machine that does something else. What has just ended gets a moment to go."""
    load = 0.0
    for _ in range(3):
        before = worked()
        time.sleep(1)
        load = worked() - before
        if load < 0.1:
            return
    raise SystemExit(f"the machine is busy ({load:.1f} cores): the figures would mean nothing (--force goes on)")

"""Rules beside the packages that they have their numbers from."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

import fluxpy

from . import sides
from .harness import Column, Meter, figure, ratios
from .sets import SETS, Problem

TITLE = "Rules beside their packages"
NOTE = """One update: ratios to `schedulefree`, `prodigyopt`, and `torch.optim`'s Muon and Adafactor (foreach), with the
same hyperparameters. Muon has the matrices of the set alone."""
COLUMNS = {"mlp, 1 thread": ("mlp", 1), "gpt, 2 threads": ("gpt", 2), "many, 1 thread": ("many", 1)}
TARGET = 1.0


class Pair(NamedTuple):
    """One of our rules, and the class in another package."""

    rule: fluxpy.Rule
    module: str
    name: str
    matrices: bool = False


PAIRS = (
    Pair(fluxpy.ScheduleFreeAdamW(1e-3), "schedulefree", "AdamWScheduleFree"),
    Pair(fluxpy.ScheduleFreeSGD(1e-3), "schedulefree", "SGDScheduleFree"),
    Pair(fluxpy.Prodigy(), "prodigyopt", "Prodigy"),
    Pair(fluxpy.Adafactor(), "torch.optim", "Adafactor"),
    Pair(fluxpy.Muon(), "torch.optim", "Muon", matrices=True),
)


def maker(pair: Pair) -> Callable[[list[Tensor]], Any] | None:
    """Of the other's optimiser on parameters; None where the package is not installed."""
    try:
        kind = getattr(importlib.import_module(pair.module), pair.name)
    except ImportError:
        return None

    def make(params: list[Tensor]) -> Any:
        optimizer = kind(params, **dataclasses.asdict(pair.rule))
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


def matrices_of(name: str) -> nn.Module:
    """The matrices of a set."""
    return nn.ParameterList(p for p in SETS[name]().parameters() if p.ndim == 2)


def measure(column: str, meter: Meter) -> Column:
    name = "mlp" if meter.quick else COLUMNS[column][0]
    found: Column = {}
    for pair in PAIRS:
        make, row = maker(pair), type(pair.rule).__name__
        if make is None or not meter.wants(row):
            continue
        problem = Problem((lambda: matrices_of(name)) if pair.matrices else name, meter.device)
        theirs = sides.of_torch(problem, make, check=False)
        times = meter.compare({"theirs": theirs, "ours": sides.of_fluxpy(problem, pair.rule, check=False)})
        found[row] = figure(ratios(times["ours"], times["theirs"]), target=None if meter.quick else TARGET)
    return found

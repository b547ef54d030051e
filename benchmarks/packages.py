"""Rules beside the packages that they have their numbers from, or that people take them from."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fluxpy
from fluxpy.rule import is_packable

from . import sides
from .harness import Column, Meter, figure, ratios
from .sets import SETS, Problem, apart

TITLE = "Rules beside their packages"
NOTE = """One update: ratios to `schedulefree`, `prodigyopt`, `pytorch_optimizer`, and `torch.optim`'s Muon and
Adafactor (foreach), with the same hyperparameters. Both sides must agree before they are timed. Muon has the matrices
of the set alone; Lookahead is around AdamW, theirs around torch's fused one; Cautious is around Lion. What is not
elementwise is not compiled. Each row is measured by a process of its own: what large temporary tensors cost depends on
what the process had before."""
COMPILED = "gpt, 2 threads, ours with `compile=True`"
COLUMNS = {
    "mlp, 1 thread": ("mlp", 1),
    "gpt, 2 threads": ("gpt", 2),
    COMPILED: ("gpt", 2),
    "many, 1 thread": ("many", 1),
}
TARGET = 1.0


class Pair(NamedTuple):
    """One of our rules, and the class in another package: it takes the hyperparameters of the rule (of a wrapper, of
    the one inside) and `options`. Over a few steps both may differ by `room` of the way that these go."""

    rule: fluxpy.Rule
    module: str
    name: str
    matrices: bool = False
    options: Mapping[str, Any] = {}
    room: float = 1e-3


PAIRS = (
    Pair(fluxpy.ScheduleFreeAdamW(1e-3), "schedulefree", "AdamWScheduleFree"),
    Pair(fluxpy.ScheduleFreeSGD(1e-3), "schedulefree", "SGDScheduleFree"),
    Pair(fluxpy.Prodigy(), "prodigyopt", "Prodigy", room=0.01),  # its first steps are so small that float32 shows
    Pair(fluxpy.Adafactor(), "torch.optim", "Adafactor"),
    Pair(fluxpy.Muon(), "torch.optim", "Muon", matrices=True, room=0.05),  # it computes in bfloat16
    Pair(fluxpy.AdEMAMix(), "pytorch_optimizer", "AdEMAMix", options={"weight_decouple": True}),
    # Theirs counts from 1 where the authors' code counts from 0.
    Pair(fluxpy.ADOPT(), "pytorch_optimizer", "ADOPT", options={"clip_lambda": lambda step: (step - 1) ** 0.25}),
    Pair(fluxpy.Lion(), "pytorch_optimizer", "Lion"),
    Pair(fluxpy.Lookahead(fluxpy.AdamW()), "pytorch_optimizer", "Lookahead", options={"k": 6, "alpha": 0.5}),
    # Theirs adds one to the elements that move.
    Pair(fluxpy.Cautious(fluxpy.Lion()), "pytorch_optimizer", "Lion", options={"cautious": True}, room=0.05),
)

ALONE = tuple(type(pair.rule).__name__ for pair in PAIRS)


def maker(pair: Pair) -> Callable[[list[Tensor]], Any] | None:
    """Of the other's optimiser on parameters; None where the package is not installed."""
    try:
        kind = getattr(importlib.import_module(pair.module), pair.name)
    except ImportError:
        return None
    rule = pair.rule.inner[0] if pair.rule.inner else pair.rule

    def make(params: list[Tensor]) -> Any:
        values = dataclasses.asdict(rule)
        if pair.name == "Lookahead":
            return kind(torch.optim.AdamW(params, fused=True, **values), **pair.options)
        optimizer = kind(params, **values, **pair.options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


def agree(problem: Problem, pair: Pair, make: Callable[[list[Tensor]], Any], compile: bool) -> None:
    """Both go the same way: AssertionError where they do not."""
    theirs: list[Any] = list(problem.fresh().parameters())
    model, optimizer = problem.fresh(), make(theirs)
    state = fluxpy.setup(pair.rule, model, compile=compile)
    for i in range(8):
        for p, q, g in zip(theirs, model.parameters(), problem.grads, strict=True):
            p.grad, q.grad = g * (1 + i % 3), g * (1 + i % 3)
        optimizer.step()
        fluxpy.update(state, model)
    off = apart(problem.params, model.parameters(), theirs)
    assert off <= pair.room, f"{pair.rule} and {pair.module}.{pair.name} differ by {off:.2%} of their way"


def matrices_of(name: str) -> nn.Module:
    """The matrices of a set."""
    return nn.ParameterList(p for p in SETS[name]().parameters() if p.ndim == 2)


def measure(column: str, meter: Meter) -> Column:
    name, compile = "mlp" if meter.quick else COLUMNS[column][0], column == COMPILED
    found: Column = {}
    for pair in PAIRS:
        make, row = maker(pair), type(pair.rule).__name__
        if make is None or not meter.wants(row) or (compile and not is_packable(pair.rule)):
            continue
        problem = Problem((lambda: matrices_of(name)) if pair.matrices else name, meter.device)
        agree(problem, pair, make, compile)
        theirs = sides.of_torch(problem, make, check=False)
        ours = sides.of_fluxpy(problem, pair.rule, check=False, compile=compile)
        times = meter.compare({"theirs": theirs, "ours": ours})
        found[row] = figure(ratios(times["ours"], times["theirs"]), target=None if meter.quick else TARGET)
    return found

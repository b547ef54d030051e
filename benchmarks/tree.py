"""The verbs on trees of 10,000 and of 100,000 leaves."""

import copy
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fluxpy

from .harness import Column, Contender, Figure, Meter, figure, ratios

TITLE = "The tree"
NOTE = """A model of many leaves, of one number each, with `OptimiserChain(ClipGlobalNorm, AdamW)`: ratios to the
constructor of `torch.optim.AdamW`. On 100,000 leaves each verb runs once."""
COLUMNS = {"10,000 leaves, 1 thread": ("10,000", 1), "100,000 leaves, 1 thread": ("100,000", 1)}
BASE = "torch.optim.AdamW(model.parameters(), fused=True)"
TARGETS = {  # a third of what the first form took; for the update after a freeze and a thaw much less
    "setup": 22 / 3,
    "first update": 40 / 3,
    "update after a freeze and a thaw": 3.0,
    "state_dict": 44 / 3,
    "load_state_dict": 125 / 3,
    "deepcopy": 80 / 3,
}
RULE = fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(1.0), fluxpy.AdamW(1e-3))


def of_leaves(leaves: int, device: str) -> nn.ModuleList:
    """A model of so many leaves, with gradients."""
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(leaves // 2)).to(device)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def measure(column: str, meter: Meter) -> Column:
    if COLUMNS[column][0] == "10,000":
        return in_turn(of_leaves(1_000 if meter.quick else 10_000, meter.device), meter)
    return once_each(of_leaves(3_000 if meter.quick else 100_000, meter.device))


def in_turn(model: nn.ModuleList, meter: Meter) -> Column:
    state, stepped = (fluxpy.update(fluxpy.setup(RULE, model), model)[0] for _ in range(2))
    saved = fluxpy.state_dict(state)
    half = len(model) // 2
    fresh: list[Any] = [None]

    def renew() -> None:
        fresh[0] = fluxpy.setup(RULE, model)

    def after_freeze_and_thaw() -> None:
        fluxpy.freeze(stepped[3])
        fluxpy.thaw(stepped[3])
        fluxpy.update(stepped, model)

    verbs: dict[str, Callable[[], object]] = {
        BASE: lambda: torch.optim.AdamW(model.parameters(), fused=True),
        "setup": lambda: fluxpy.setup(RULE, model),
        "setup, a rule for each of two patterns": lambda: fluxpy.setup({"*.weight": RULE, "*": fluxpy.Adam()}, model),
        "adjust(state, lr)": lambda: fluxpy.adjust(state, 3e-4),
        "adjust(state[:half], scale(1.0))": lambda: fluxpy.adjust(state[:half], fluxpy.scale(1.0)),
        "freeze(state[:half]), thaw(state)": lambda: (fluxpy.freeze(state[:half]), fluxpy.thaw(state)),
        'select(state, "*.bias")': lambda: fluxpy.select(state, "*.bias"),
        'state["3.weight"]': lambda: state["3.weight"],
        "str(state)": lambda: str(state),
        "summary(state)": lambda: str(fluxpy.summary(state)),
        "state_dict": lambda: fluxpy.state_dict(state),
        "load_state_dict": lambda: fluxpy.load_state_dict(state, saved),
        "deepcopy": lambda: copy.deepcopy(state),
        "update after a freeze and a thaw": after_freeze_and_thaw,
        "update": lambda: fluxpy.update(stepped, model),
    }
    contenders = {name: Contender(verb) for name, verb in verbs.items() if name == BASE or meter.wants(name)}
    if meter.wants("first update"):
        contenders["first update"] = Contender(lambda: fluxpy.update(fresh[0], model), renew)
    times = meter.compare(contenders)
    base = times.pop(BASE)
    found = {name: figure(ratios(t, base), target=TARGETS.get(name)) for name, t in times.items()}
    return {BASE: figure(base, "s"), **found}


def once_each(model: nn.ModuleList) -> Column:
    def seconds(verb: Callable[[], object]) -> float:
        gc.collect()
        gc.disable()
        start = time.perf_counter()
        verb()
        taken = time.perf_counter() - start
        gc.enable()
        return taken

    base = statistics.median(seconds(lambda: torch.optim.AdamW(model.parameters(), fused=True)) for _ in range(3))
    found = {BASE: Figure(base, base, base, "s")}

    def row(name: str, verb: Callable[[], Any]) -> Any:
        results = []
        ratio = seconds(lambda: results.append(verb())) / base
        found[name] = Figure(ratio, ratio, ratio, target=TARGETS.get(name))
        return results[0]

    state = row("setup", lambda: fluxpy.setup(RULE, model))
    row("first update", lambda: fluxpy.update(state, model))
    row("update", lambda: fluxpy.update(state, model))
    saved = row("state_dict", lambda: fluxpy.state_dict(state))
    other = fluxpy.setup(RULE, model)
    report = row("load_state_dict", lambda: fluxpy.load_state_dict(other, saved))
    assert len(report.loaded) == 2 * len(model)
    return found

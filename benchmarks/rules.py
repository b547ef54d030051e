"""Every elementwise rule, and some chains, against the bytes that they must move."""

from dataclasses import MISSING, fields

import optree
import torch

import fluxpy

from . import sides
from .harness import Column, Meter, figure, ratios
from .sets import Problem

TITLE = "Elementwise rules"
NOTE = """One update on the gpt set, two threads: ratios to the bytes that must move (parameters, gradients and each
array of state read once, parameters and state written once; where a global norm comes first, gradients are read for it
too) at the speed of a copy measured in the same rounds."""
COLUMNS = {"compiled": ("gpt", 2), "without compile": ("gpt", 2)}
CHAINS = (
    fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(), fluxpy.AdamW()),
    fluxpy.OptimiserChain(fluxpy.WeightDecay(), fluxpy.RMSProp()),
    fluxpy.OptimiserChain(fluxpy.SignDecay(), fluxpy.ClipGrad(), fluxpy.Lion()),
)
TARGET = 1.3  # of any rule, compiled
TARGETS = {"AdamW": 1.0, "OptimiserChain(ClipGlobalNorm, AdamW)": 1.0}


def elementwise() -> list[fluxpy.Rule]:
    """Each with its defaults. Those that need another rule are wrappers; the two others here do nothing alone."""
    kinds = [k for k in vars(fluxpy).values() if isinstance(k, type) and issubclass(k, fluxpy.Rule)]
    alone = [k for k in kinds if all(field.default is not MISSING for field in fields(k))]
    return [k() for k in alone if k.elementwise and k not in (fluxpy.OptimiserChain, fluxpy.AccumGrad)]


def bytes_of(rule: fluxpy.Rule) -> float:
    """The bytes that a step must move for each number. Counts beside the arrays are nothing."""
    x = {"x": torch.ones(64)}
    state, x = fluxpy.update(fluxpy.setup(rule, x), x, {"x": torch.ones(64)})
    arrays = [t for t in optree.tree_leaves(state["x"].state, namespace="fluxpy") if torch.is_tensor(t) and t.ndim]
    members = rule.rules if isinstance(rule, fluxpy.OptimiserChain) else (rule,)
    norms = sum(isinstance(member, fluxpy.ClipGlobalNorm) for member in members)
    return 4 * (3 + norms) + 2 * sum(t.nbytes for t in arrays) / 64


def title(rule: fluxpy.Rule) -> str:
    members = rule.rules if isinstance(rule, fluxpy.OptimiserChain) else ()
    return type(rule).__name__ + (f"({', '.join(type(m).__name__ for m in members)})" if members else "")


def measure(column: str, meter: Meter) -> Column:
    problem = Problem("mlp" if meter.quick else "gpt", meter.device)
    compile = column == "compiled"
    found: Column = {}
    for rule in [*elementwise()[:: 6 if meter.quick and not meter.only else 1], *CHAINS]:
        if not meter.wants(title(rule)):
            continue
        ours = sides.of_fluxpy(problem, rule, compile=compile, check=False)
        times = meter.compare({"copy": sides.copying(problem), "ours": ours})
        floor = [bytes_of(rule) / 8 * t for t in times["copy"]]
        target = TARGETS.get(title(rule), TARGET) if compile and not meter.quick else None
        found[title(rule)] = figure(ratios(times["ours"], floor), target=target)
    return found

"""Every elementwise rule, and two chains, against the bytes that they must move."""

import optree
import torch

import fluxpy

from . import sides
from .harness import Column, Meter, figure, ratios
from .sets import Problem

TITLE = "Elementwise rules"
NOTE = """One update on the gpt set, two threads: ratios to the bytes that must move (parameters, gradients and each
array of state read once, parameters and state written once) at the speed of a copy measured in the same rounds."""
COLUMNS = {"compiled": ("gpt", 2), "without compile": ("gpt", 2)}
CHAINS = (
    fluxpy.OptimiserChain(fluxpy.WeightDecay(), fluxpy.RMSProp()),
    fluxpy.OptimiserChain(fluxpy.SignDecay(), fluxpy.ClipGrad(), fluxpy.Lion()),
)


def elementwise() -> list[fluxpy.Rule]:
    """Each with its defaults. Those that have none are wrappers of others."""
    kinds = [k for k in vars(fluxpy).values() if isinstance(k, type) and issubclass(k, fluxpy.Rule)]
    wrappers = (fluxpy.OptimiserChain, fluxpy.AccumGrad, fluxpy.MixedPrecision)
    return [kind() for kind in kinds if kind.elementwise and kind not in wrappers]


def bytes_of(rule: fluxpy.Rule) -> float:
    """The bytes that a step must move for each number. Counts beside the arrays are nothing."""
    x = {"x": torch.ones(64)}
    state, x = fluxpy.update(fluxpy.setup(rule, x), x, {"x": torch.ones(64)})
    arrays = [t for t in optree.tree_leaves(state["x"].state, namespace="fluxpy") if torch.is_tensor(t) and t.ndim]
    return 3 * 4 + 2 * sum(t.nbytes for t in arrays) / 64


def measure(column: str, meter: Meter) -> Column:
    problem = Problem("mlp" if meter.quick else "gpt", meter.device)
    compile = column == "compiled"
    found: Column = {}
    for rule in [*elementwise()[:: 6 if meter.quick else 1], *CHAINS]:
        ours = sides.of_fluxpy(problem, rule, compile=compile, check=False)
        times = meter.compare({"copy": sides.copying(problem), "ours": ours})
        floor = [bytes_of(rule) / 8 * t for t in times["copy"]]
        name = type(rule).__name__
        if isinstance(rule, fluxpy.OptimiserChain):
            name = f"{name}({', '.join(type(r).__name__ for r in rule.rules)})"
        found[name] = figure(ratios(times["ours"], floor), target=1.3 if compile and not meter.quick else None)
    return found

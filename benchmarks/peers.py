"""AdamW of other libraries, where they are installed: for the report only."""

import importlib
from collections.abc import Callable
from typing import Any

from . import sides
from .harness import Column, Meter, figure, ratios
from .sets import Problem

TITLE = "Other libraries"
NOTE = "AdamW (StableAdamW of pytorch-optimizer): ratios to `torch.optim.AdamW(fused=True)`, for the report only."
COLUMNS = {"mlp, 1 thread": ("mlp", 1), "gpt, 2 threads": ("gpt", 2)}
CLASSES = {"optimi": "AdamW", "torchopt": "AdamW", "heavyball": "AdamW", "pytorch_optimizer": "StableAdamW"}


def _maker(module: str) -> Callable[[Any], Any] | None:
    try:
        kind = getattr(importlib.import_module(module), CLASSES[module])
    except (ImportError, AttributeError):
        return None
    return lambda params: kind(params, lr=1e-3, weight_decay=1e-2)


def measure(column: str, meter: Meter) -> Column:
    problem = Problem(COLUMNS[column][0], meter.device)
    found: Column = {}
    for name in CLASSES:
        maker = _maker(name)
        if maker is None or meter.quick:
            continue
        base, theirs = sides.of_torch(problem, sides.fused), sides.of_torch(problem, maker, check=False)
        times = meter.compare({"torch": base, name: theirs, "fluxpy": sides.of_fluxpy(problem)})
        found[name] = figure(ratios(times[name], times["torch"]))
        found["fluxpy"] = figure(ratios(times["fluxpy"], times["torch"]))
    return found

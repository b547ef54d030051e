"""The verbs on a tree of 10,000 leaves."""

import copy

import torch
from torch import nn

import fluxpy

from .harness import Column, Contender, Meter, figure

TITLE = "The tree"
NOTE = "A model of 10,000 leaves: what each verb takes. No targets: they are not part of a step."
COLUMNS = {"10,000 leaves, 1 thread": ("leaves", 1)}


def measure(column: str, meter: Meter) -> Column:
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(500 if meter.quick else 5_000)).to(meter.device)
    rule = fluxpy.OptimiserChain(fluxpy.ClipGlobalNorm(1.0), fluxpy.AdamW(1e-3))
    state = fluxpy.setup(rule, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    half = len(model) // 2
    verbs = {
        "torch.optim.AdamW(model.parameters(), fused=True)": lambda: torch.optim.AdamW(model.parameters(), fused=True),
        "setup": lambda: fluxpy.setup(rule, model),
        "setup, a rule for each of two patterns": lambda: fluxpy.setup({"*.weight": rule, "*": fluxpy.Adam()}, model),
        "adjust(state, lr)": lambda: fluxpy.adjust(state, 3e-4),
        "adjust(state[:half], scale(0.5))": lambda: fluxpy.adjust(state[:half], fluxpy.scale(1.0)),
        "freeze(state[:half]), thaw(state)": lambda: (fluxpy.freeze(state[:half]), fluxpy.thaw(state)),
        'select(state, "*.bias")': lambda: fluxpy.select(state, "*.bias"),
        'state["3.weight"]': lambda: state["3.weight"],
        "str(state)": lambda: str(state),
        "summary(state)": lambda: str(fluxpy.summary(state)),
        "state_dict": lambda: fluxpy.state_dict(state),
        "deepcopy": lambda: copy.deepcopy(state),
        "update": lambda: fluxpy.update(state, model),
        "update after a freeze and a thaw": lambda: (
            fluxpy.freeze(state[3]),
            fluxpy.thaw(state[3]),
            fluxpy.update(state, model),
        ),
    }
    return {name: figure(t, "s") for name, t in meter.compare({n: Contender(v) for n, v in verbs.items()}).items()}

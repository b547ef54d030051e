"""Flux-style optimiser state for PyTorch: a tree that you can see, address and change.

    state = fluxpy.setup(rule, model)
    loss, grads = fluxpy.withgradient(loss_of, model)
    fluxpy.update(state, model, grads)
    fluxpy.adjust(state.encoder, 3e-4)
"""

from . import schedules
from .adjust import adjust, freeze, reset, scale, thaw
from .data import DataLoader
from .flat import destructure, trainables
from .gradient import gradient, withgradient
from .rule import Ask, Assign, Rule, StagedRule, hyper
from .rules import *  # noqa: F403
from .rules import __all__ as _rules
from .show import summary
from .state import leaves, select, setup, value
from .train import train, trainstep
from .update import check, update

__all__ = sorted(
    [
        *_rules,
        *("Ask", "Assign", "DataLoader", "Rule", "StagedRule", "adjust", "check", "destructure", "freeze", "gradient", "hyper"),
        *("leaves", "reset", "scale", "schedules", "select", "setup", "summary", "thaw", "train", "trainables"),
        *("trainstep", "update", "value", "withgradient"),
    ]
)

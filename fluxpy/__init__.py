"""Flux-style optimiser state for PyTorch: a tree that you can see, address and change.

In short:

    state = fluxpy.setup(rule, model)
    loss, grads = fluxpy.withgradient(loss_of, model)
    fluxpy.update(state, model, grads)
    fluxpy.adjust(state.encoder, 3e-4)
"""

import typing as _typing

from . import schedules
from .adjust import adjust, freeze, reset, scale, thaw
from .checkpoint import load, save
from .data import DataLoader
from .flat import destructure, flatten_parameters, trainables
from .gradient import gradient, withgradient
from .rule import Ask, Assign, Rule, StagedRule, hyper
from .rules import (
    AccumGrad,
    AdaBelief,
    AdaDelta,
    AdaGrad,
    Adam,
    AdaMax,
    AdamW,
    AMSGrad,
    ClipGlobalNorm,
    ClipGrad,
    ClipNorm,
    Descent,
    Lion,
    MixedPrecision,
    Momentum,
    NAdam,
    Nesterov,
    OAdam,
    OptimiserChain,
    RAdam,
    RMSProp,
    Rprop,
    SignDecay,
    WeightDecay,
)
from .show import summary
from .state import leaves, select, setup, value
from .statedict import load_state_dict, state_dict
from .train import train, trainstep
from .update import check, update

__all__ = [
    "AMSGrad",
    "AccumGrad",
    "AdaBelief",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adam",
    "AdamW",
    "Ask",
    "Assign",
    "ClipGlobalNorm",
    "ClipGrad",
    "ClipNorm",
    "DataLoader",
    "Descent",
    "Learner",
    "Lion",
    "MixedPrecision",
    "Momentum",
    "NAdam",
    "Nesterov",
    "OAdam",
    "OptimiserChain",
    "RAdam",
    "RMSProp",
    "Rprop",
    "Rule",
    "SignDecay",
    "StagedRule",
    "WeightDecay",
    "adjust",
    "check",
    "destructure",
    "flatten_parameters",
    "freeze",
    "gradient",
    "hyper",
    "leaves",
    "load",
    "load_state_dict",
    "reset",
    "save",
    "scale",
    "schedules",
    "select",
    "setup",
    "state_dict",
    "summary",
    "thaw",
    "train",
    "trainables",
    "trainstep",
    "update",
    "value",
    "withgradient",
]


if _typing.TYPE_CHECKING:
    from .learner import Learner


def __getattr__(name: str) -> object:
    """`fluxpy.testing` and the Learner are imported when they are first used."""
    import importlib

    if name in ("learner", "testing"):
        return importlib.import_module(f".{name}", __name__)
    if name == "Learner":
        return importlib.import_module(".learner", __name__).Learner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

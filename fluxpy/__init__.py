"""Flux-style optimiser state for PyTorch: a tree that you can see, address and change.

In short:

    state = fluxpy.setup(rule, model)
    loss, grads = fluxpy.withgradient(loss_of, model)
    fluxpy.update(state, model, grads)
    fluxpy.adjust(state.encoder, 3e-4)
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import schedules
from .adjust import adjust, freeze, reset, scale, thaw
from .data import DataLoader
from .gradient import Gradients, gradient, withgradient
from .leaf import Leaf
from .parameters import destructure, flatten_parameters, trainables
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
    Rule,
    SignDecay,
    WeightDecay,
)
from .saving import load, load_state_dict, save, state_dict
from .show import summary
from .state import State, leaves, select, setup, value
from .train import train, trainstep
from .update import check_finite, update

if _TYPE_CHECKING:
    from . import learner, testing
    from .learner import Learner

__all__ = [
    "AMSGrad",
    "AccumGrad",
    "AdaBelief",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adam",
    "AdamW",
    "ClipGlobalNorm",
    "ClipGrad",
    "ClipNorm",
    "DataLoader",
    "Descent",
    "Gradients",
    "Leaf",
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
    "State",
    "WeightDecay",
    "adjust",
    "check_finite",
    "destructure",
    "flatten_parameters",
    "freeze",
    "gradient",
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

_LATER = {"learner": "learner", "testing": "testing", "Learner": "learner"}  # imported when first used: name -> module


def __dir__() -> list[str]:
    return [*__all__, "__version__", "learner", "rules", "testing"]


if not _TYPE_CHECKING:  # else a type checker would take any name

    def __getattr__(name: str) -> object:
        import importlib

        if name in _LATER:
            module = importlib.import_module(f".{_LATER[name]}", __name__)
            return module if name == _LATER[name] else getattr(module, name)
        if name == "__version__":
            return importlib.metadata.version("fluxpy")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=_MODULE)

    import sys as _sys

    _MODULE = _sys.modules[__name__]

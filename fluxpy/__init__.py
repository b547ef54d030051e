"""Flux-style optimiser state for PyTorch: a tree that you can see, address and change.

In short:

    state = fluxpy.setup(rule, model)
    loss, grads = fluxpy.withgradient(loss_of, model)
    fluxpy.update(state, model, grads)
    fluxpy.adjust(state.encoder, 3e-4)
"""

import typing as _typing

from . import rules as rules
from . import schedules
from .adjust import adjust, freeze, reset, scale, thaw
from .data import DataLoader
from .gradient import Gradients, gradient, withgradient
from .leaf import Leaf
from .parameters import destructure, flatten_parameters, trainables
from .rules import *  # noqa: F403
from .saving import load, load_state_dict, save, state_dict
from .state import State, leaves, select, setup, summary, value
from .train import train, trainstep
from .update import check_finite, update

if _typing.TYPE_CHECKING:
    from . import learner as learner
    from . import testing as testing
    from .learner import Learner

__all__ = [
    "DataLoader",
    "Gradients",
    "Leaf",
    "Learner",
    "State",
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
__all__ += rules.__all__

_LATER = {"learner": "learner", "testing": "testing", "Learner": "learner"}  # imported when first used: name -> module


def __dir__() -> list[str]:
    return [*__all__, "__version__", "learner", "rules", "testing"]


if not _typing.TYPE_CHECKING:  # else a type checker would take any name

    def __getattr__(name: str) -> object:
        import importlib.metadata

        if name in _LATER:
            module = importlib.import_module(f".{_LATER[name]}", __name__)
            return module if name == _LATER[name] else getattr(module, name)
        if name == "__version__":
            return importlib.metadata.version("fluxpy")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=_MODULE)

    import sys as _sys

    _MODULE = _sys.modules[__name__]

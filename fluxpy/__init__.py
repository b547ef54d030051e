"""Flux-style optimiser state for PyTorch: a tree that you can see, address and change.

In short:

    state = fluxpy.setup(rule, model)
    loss, grads = fluxpy.withgradient(loss_of, model)
    fluxpy.update(state, model, grads)
    fluxpy.adjust(state.encoder, 3e-4)
"""

import importlib.metadata
import sys
import typing

from . import rules as rules
from . import schedules, text
from .adjust import adjust, freeze, reset, scale, thaw
from .data import DataLoader
from .distributed.check import assert_same_on_all_ranks
from .evaluation import averaged
from .explain import explain
from .follow import follow
from .gradient import Gradients, gradient, withgradient
from .leaf import Leaf
from .parameters import destructure, flatten_parameters, module_paths, trainables, tree_map
from .roles import depths, roles
from .rules import *  # noqa: F403
from .saving import load, load_state_dict, save, state_dict
from .sharpen import sharpened
from .state import State, leaves, select, setup, summary, value
from .train import train, trainstep
from .update import check_finite, flush, update

if typing.TYPE_CHECKING:  # when running, these are imported at their first use
    from . import interop as interop
    from . import learner as learner
    from . import surgery as surgery
    from . import testing as testing
    from .learner import Learner

    __version__: str

__all__ = [
    "DataLoader",
    "Gradients",
    "Leaf",
    "Learner",
    "State",
    "adjust",
    "assert_same_on_all_ranks",
    "averaged",
    "check_finite",
    "depths",
    "destructure",
    "explain",
    "flatten_parameters",
    "flush",
    "follow",
    "freeze",
    "gradient",
    "leaves",
    "load",
    "load_state_dict",
    "module_paths",
    "reset",
    "roles",
    "save",
    "scale",
    "schedules",
    "select",
    "setup",
    "sharpened",
    "state_dict",
    "summary",
    "thaw",
    "train",
    "trainables",
    "trainstep",
    "tree_map",
    "update",
    "value",
    "withgradient",
]
__all__ += rules.__all__


def __dir__() -> list[str]:
    return [*__all__, "__version__", "interop", "learner", "rules", "surgery", "testing"]


if not typing.TYPE_CHECKING:  # a type checker would take any name
    _LATE = ("interop", "learner", "surgery", "testing")

    def __getattr__(name: str) -> object:
        if name in _LATE:
            return importlib.import_module(f".{name}", __name__)
        if name == "Learner":
            return importlib.import_module(".learner", __name__).Learner
        if name == "__version__":
            return importlib.metadata.version("fluxpy")
        late = (importlib.import_module(f".{late}", __name__) for late in _LATE)
        hint = "" if name.startswith("_") else text.elsewhere(name, (schedules, rules, *late))
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}{hint}", name=name, obj=sys.modules[__name__]
        )

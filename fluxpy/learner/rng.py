"""Random states as plain data: those of Python, NumPy and torch, of devices, and of the generators of data."""

import json
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from .data import Source

Sources = Iterable[Source | None]

_GLOBAL: tuple[Any, ...] = (random, np.random, torch.default_generator)  # modules with the methods of a generator


def random_state(sources: Sources) -> dict[str, Any]:
    """The state of all random numbers, those of the data too."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"global": list(map(_state, _GLOBAL)), "cuda": cuda, "data": data_state(sources)}


def set_random_state(d: dict[str, Any]) -> None:
    """Go back to what `random_state` gave, but for the data, whose loaders may have to be made first."""
    for generator, state in zip(_GLOBAL, d["global"], strict=True):
        _set_state(generator, state)
    torch.cuda.set_rng_state_all([state.cpu() for state in d["cuda"][: torch.cuda.device_count()]])


def data_state(sources: Sources) -> list[list[Any]]:
    """The states of the generators of each source."""
    return [[_state(g) for g in source.generators()] if source else [] for source in sources]


def set_data_state(sources: Sources, states: list[Any]) -> None:
    """Go back to what `data_state` gave."""
    for source, saved in zip(sources, states, strict=True):
        for generator, state in zip(source.generators() if source else [], saved, strict=False):
            _set_state(generator, state)


def _state(generator: Any) -> Any:
    """The state of a generator of torch, Python or NumPy as plain data. JSON has room for whole numbers of 128 bits."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state
    else:
        state = generator.getstate() if hasattr(generator, "getstate") else generator.get_state(legacy=False)
    return json.dumps(state, default=np.ndarray.tolist)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = json.loads(state)
    elif hasattr(generator, "getstate"):
        version, numbers, gauss = json.loads(state)
        generator.setstate((version, tuple(numbers), gauss))
    else:
        generator.set_state(json.loads(state))

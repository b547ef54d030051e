"""Random states as plain data: those of Python, NumPy and torch, of devices, and of the generators of data."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from .data import Source

Sources = Iterable[Source | None]


def random_state(sources: Sources) -> dict[str, Any]:
    """The state of all random numbers, those of the data too."""
    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = legacy
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "data": data_state(sources),
    }


def set_random_state(d: dict[str, Any]) -> None:
    """Go back to what `random_state` gave, but for the data, whose loaders may have to be made first."""
    version, numbers, gauss = d["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    kind, keys, *rest = d["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(d["torch"].cpu())
    if d["cuda"] and torch.cuda.is_available():
        for index, state in enumerate(d["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), index)


def data_state(sources: Sources) -> list[list[torch.Tensor]]:
    """The states of the generators of each source."""
    return [[g.get_state() for g in source.generators()] if source else [] for source in sources]


def set_data_state(sources: Sources, states: list[Any]) -> None:
    """Go back to what `data_state` gave."""
    for source, saved in zip(sources, states, strict=True):
        for generator, state in zip(source.generators() if source else [], saved, strict=False):
            generator.set_state(state.cpu())

"""Where a run is, and what random numbers come next: what exact resume needs beside model and state."""

import dataclasses
import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..checkpoint import _matched, _tensors
from ..statedict import load_state_dict, state_dict
from . import events
from .data import Source


@dataclass
class Position:
    """What comes next: of `epoch` its start, or its training from `batch` on, or its validation."""

    epoch: int = 0
    phase: str = "start"  # or training, validation
    batch: int = 0
    step: int = 0  # training batches of the fit so far


def random_state(sources: Iterable[Source | None]) -> dict[str, Any]:
    """The state of all random numbers: Python's, NumPy's, torch's, those of devices and of the data, as plain data."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],  # pyright: ignore
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "data": data_state(sources),
    }


def data_state(sources: Iterable[Source | None]) -> list[Any]:
    return [[g.get_state() for g in source.generators()] if source else [] for source in sources]


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


def set_data_state(sources: Iterable[Source | None], states: list[Any]) -> None:
    for source, saved in zip(sources, states, strict=True):
        for generator, state in zip(source.generators() if source else [], saved, strict=False):
            generator.set_state(state.cpu())


def clones(tree: Any) -> Any:
    """Plain data with its tensors copied."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: clones(value) for key, value in tree.items()}
    return type(tree)(map(clones, tree)) if isinstance(tree, list | tuple) else tree


def save(learner: Any) -> dict[str, Any]:
    """What `Learner.state_dict` gives."""
    if "batch" in learner._levels and learner.training and not learner._done:
        raise RuntimeError("state_dict cannot be taken within a training batch; take it at batch_end")
    callbacks = [
        [events.name_of(c), clones(c.state_dict()) if isinstance(c, events.Callback) else {}]
        for c in (*learner.callbacks, *learner._extra)
    ]
    if learner._saved is not None:  # a resumed run that has not yet gone on
        return clones(learner._saved) | {"callbacks": callbacks or clones(learner._saved["callbacks"])}
    at, within = learner._at, learner._at.phase == "training"
    # Validation is gone through again from its start.
    again = learner._opened if at.phase == "validation" else None
    return {
        "version": 1,
        "model": {name: t.detach().clone() for name, t in _tensors(learner.model)},
        "state": state_dict(learner.state),
        "position": dataclasses.asdict(at),
        "random": again or random_state(learner._sources),
        "opened": learner._opened if within else None,
        "metrics": clones(learner.metrics.state_dict()) if within else None,
        "row": dict(learner._row),
        "history": [dict(row) for row in learner.history if row["epoch"] < at.epoch],
        "callbacks": callbacks,
    }


def load(learner: Any, d: Any) -> None:
    """What `Learner.load_state_dict` does."""
    if learner._levels:
        raise RuntimeError("load_state_dict cannot be called while a fit is running")
    if not isinstance(d, dict) or d.get("version") != 1 or "position" not in d:
        raise ValueError("load_state_dict takes what Learner.state_dict gave")
    sums = (d["metrics"] or {}).get("sums", learner.metrics.names)
    if set(sums) != set(learner.metrics.names):
        raise ValueError(f"the saved run had the metrics {sorted(sums)}, this one has {sorted(learner.metrics.names)}")
    pairs, problems = _matched(dict(_tensors(learner.model)), d["model"])
    if problems:
        raise ValueError("what was saved does not fit the model; nothing was loaded" + "".join(problems))
    load_state_dict(learner.state, d["state"])
    with torch.no_grad():
        for here, saved in pairs:
            here.copy_(saved)
    learner.history = events.History(dict(row) for row in d["history"])
    restore_callbacks(learner.callbacks, d["callbacks"])
    learner._saved = d


def find(learner: Any, extra: list[Any]) -> None:
    """Load the run that a callback has saved, unless one was loaded before."""
    for callback in (*learner.callbacks, *extra):
        if learner._saved is None and isinstance(callback, events.Callback) and (run := callback.saved_run()):
            load(learner, run)


def restore_callbacks(callbacks: list[Any], saved: list[Any]) -> None:
    """Give callbacks their state back, by place and name."""
    for i, callback in enumerate(callbacks):
        name = events.name_of(callback)
        if i >= len(saved) or saved[i][0] != name:
            was = repr(saved[i][0]) if i < len(saved) else "nothing"
            where = f"the callback {name} was not saved at its place (there was {was})"
            warnings.warn(f"{where}; it starts afresh", stacklevel=2)
        elif isinstance(callback, events.Callback):
            callback.load_state_dict(clones(saved[i][1]))

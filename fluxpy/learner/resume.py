"""What a run needs to go on exactly as it would have, as plain data and back."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

from .. import leaves, load_state_dict, state_dict
from . import core, events
from .rng import random_state

if TYPE_CHECKING:
    from .learner import Learner
    from .loop import Loop

_VERSION = 4
_OPTION = 'hyperparameters="keep" (of Checkpoint or load_state_dict)'


def save(learner: "Learner", run: "Loop") -> dict[str, Any]:
    """The run as plain data."""
    callbacks = [
        [events.name_of(callback), clones(callback.state_dict()) if isinstance(callback, events.Callback) else {}]
        for callback in (*learner.callbacks, *run.callbacks)
    ]
    if run.saved is not None:  # no batch was taken since it was loaded
        saved = run.saved if run.dispatcher.levels else as_now(learner, run.saved)
        return learner.ranks.whole(clones(saved) | {"callbacks": callbacks or clones(saved["callbacks"])})
    progress, now = learner.progress, time.monotonic()
    in_epoch, in_phase = progress.within != "fit", progress.within in ("training", "validation")
    own = {
        "random": random_state(run.sources),
        "rng_at_start": run.rng_at_start,
        "metrics": clones(learner.metrics.state_dict()) if in_phase else None,
    }
    every = learner.ranks.gather("state_dict", own)
    history = [dict(row) for row in learner.history if row["epoch"] < progress.epoch]
    saved = {
        "version": _VERSION,
        "model": core.model_dict(learner.model, learner.state),
        "state": state_dict(learner.state),
        "position": progress.position(),
        "within": progress.within,
        **every[0],
        "window": clones(vars(run.window)),
        "nonfinite": run.nonfinite or learner.nonfinite if in_phase else None,
        "row": dict(run.row),
        "lengths": dict(run.lengths),
        "validates": learner.has_validation,
        **(run.beginning or beginning_of(learner.state)),
        "history": history,
        "seconds": {
            "epoch": in_epoch * (now - run.epoch_began),
            "phase": in_phase * (now - run.phase_began),
            "epochs": learner.history.seconds[: len(history)],
        },
        "callbacks": callbacks,
    }
    return learner.ranks.whole(saved if len(every) == 1 else saved | {"ranks": every})


def load(learner: "Learner", saved: Any, hyperparameters: str | None, last: "Loop") -> dict[str, Any]:
    """Model, state, history and callbacks as they were saved; ValueError where they do not fit, and nothing is done.
    What is left to go on with comes back. `last` is the Learner's last run."""
    if not isinstance(saved, dict) or not {"version", "position", "model"} <= saved.keys():
        raise ValueError("load_state_dict takes what Learner.state_dict gave")
    if saved["version"] != _VERSION:
        raise ValueError(f"the run was saved in format {saved['version']}, but this fluxpy reads {_VERSION}")
    saved = _of_rank(saved, learner.ranks.rank, learner.ranks.size)
    saved["hyperparameters"] = hyperparameters or saved.get("hyperparameters", "load")
    names = learner.metrics.names
    sums = names if saved["metrics"] is None else saved["metrics"]["sums"]
    if set(sums) != set(names):
        raise ValueError(f"the saved run had the metrics {sorted(sums)}, this one has {sorted(names)}")
    present = beginning_of(learner.state)
    frozen = last.beginning.get("frozen", present["frozen"])
    load_weights(learner, saved)
    if saved["hyperparameters"] == "keep":
        saved["rules"] = present["rules"]
    elif changed := core.changed_rules(core.changes_of_rules(present["rules"], saved["rules"]), _OPTION):
        learner.ranks.warn(changed)
    if changed := _changed_frozen(frozen, saved.get("frozen", frozen)):  # older files do not say
        learner.ranks.warn(changed)
    params = core.bind(learner.state, learner.model).params
    pairs = zip(saved["window"]["sums"], params, strict=False)
    saved["window"] = saved["window"] | {"sums": [None if g is None else core.copied(g, x) for g, x in pairs]}
    learner.history = history_of(saved)
    load_callbacks(learner.callbacks, saved["callbacks"], learner.ranks.warn)
    return saved


def compare(saved: dict[str, Any], epochs: int, validates: bool, warn: Callable[[str], None]) -> None:
    """ValueError where a fit cannot go on with a saved run; otherwise say what of it is another thing than it was."""
    done, had = saved["position"]["epoch"], saved.get("validates", validates)  # older files do not say
    if done >= epochs:
        warn(f"the run has done {done} epochs of {epochs}: nothing is left to do; Checkpoint(resume=False) begins anew")
    elif saved["within"] == "validation" and not validates:
        raise ValueError("the saved run was in the middle of validation, and this fit has no validation data to end it")
    elif had != validates:
        now = "no validation data, and this fit has some" if validates else "validation data, and this fit has none"
        warn(f"the saved run had {now}: a loss that callbacks compare with earlier ones is of other data")


def history_of(saved: dict[str, Any]) -> events.History:
    return events.History(map(dict, saved["history"]), saved["seconds"]["epochs"])


def as_now(learner: "Learner", saved: dict[str, Any]) -> dict[str, Any]:
    """A run that was loaded, with model and state as they are by now: a script may have changed them since."""
    now = {"model": core.model_dict(learner.model, learner.state), "state": state_dict(learner.state)}
    return saved | now | {"hyperparameters": "load"}


def _of_rank(saved: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    """A saved run as one of so many processes goes on with it. On another number than saved it there are random numbers
    for as many as there were; ValueError in the middle of a phase, where each has its place in data of its own."""
    every = saved.get("ranks", [{name: saved[name] for name in ("random", "rng_at_start", "metrics")}])
    if len(every) == size:
        return saved | every[rank]
    if saved["rng_at_start"] is not None:
        raise ValueError(
            f"the run was saved by {len(every)} process{'es' * (len(every) > 1)} in the middle of a phase, and cannot "
            f"go on with {size}: let as many end the epoch, and change their number after that"
        )
    return saved | (every[rank] if rank < len(every) else {"random": None})


def load_weights(learner: "Learner", saved: dict[str, Any]) -> None:
    """Model and state as they were saved; ValueError where they do not fit, and nothing is done."""
    pairs = core.match_model(learner.model, saved["model"])
    load_state_dict(learner.state, saved["state"], hyperparameters=saved["hyperparameters"])
    core.write_tensors(pairs)


def beginning_of(state: Any) -> dict[str, list[Any]]:
    """What is kept of the state with which a run begins: the rule of each leaf, and which are frozen."""
    found = dict(leaves(state))
    frozen = [path for path, leaf in found.items() if leaf.frozen]
    return {"rules": core.plain_rules({path: leaf.rule for path, leaf in found.items()}), "frozen": frozen}


def _changed_frozen(now: list[str], saved: list[str]) -> str | None:
    """What to warn of where this run began with other leaves frozen than the saved one."""
    told = {"frozen now, not then": set(now) - set(saved), "frozen then, not now": set(saved) - set(now)}
    lines = [f"{what}: {core.names_of(sorted(paths))}" for what, paths in told.items() if paths]
    first = "the saved run began with other frozen leaves than this one; those of the file count"
    last = "freeze and thaw others in a callback, or after Learner.load_state_dict"
    return "\n  ".join([first, *lines, last]) if lines else None


def load_callbacks(callbacks: list[Any], saved: list[Any], warn: Callable[..., None] | None = None) -> None:
    """Give callbacks their state back, to the first of a name what the first of that name gave, and so on."""
    found: dict[str, list[Any]] = defaultdict(list)
    for name, state in saved:
        found[name].append(state)
    for callback in callbacks:
        name = events.name_of(callback)
        state = found[name].pop(0) if found[name] else None
        if not isinstance(callback, events.Callback):
            continue
        if state is not None:
            callback.load_state_dict(clones(state))
        elif warn is not None and type(callback).load_state_dict is not events.Callback.load_state_dict:
            warn(f"the callback {name} was not saved; it starts afresh")


def clones(tree: Any) -> Any:
    """Plain data with its tensors copied."""
    return tree_map_only(torch.Tensor, lambda t: t.detach().clone(), tree)

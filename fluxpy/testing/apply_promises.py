"""What `apply` promises, on one tensor. Each function tries one promise of `check_rule`."""

import torch
from torch import Tensor

from ..leaf import init_state
from ..pytree import entries_of, partition, tensors_in
from ..text import dtype_name
from .compare import contents, require
from .trial import UPDATES, Trial, apply_once


def runs_on_all(trial: Trial) -> None:
    for call in trial.calls:
        if call.change is not None:
            got = tuple(call.change.shape) if isinstance(call.change, Tensor) else repr(call.change)
            require(got == tuple(call.inputs.parameter.shape), f"{call.where}: the change is {got}")
            finite = bool(call.change.isfinite().all())
            require(finite, f"{call.where}: finite gradients give a change with NaN or Inf")


def writes_to_nothing(trial: Trial) -> None:
    for call in trial.calls:
        for name, image in call.before.items():
            require(image == call.after[name], f"{call.where}: the {name} was written to")


def keeps_dtype(trial: Trial) -> None:
    for call in trial.calls:
        if call.change is not None:
            expected, got = dtype_name(call.inputs.parameter.dtype), dtype_name(call.change.dtype)
            require(expected == got, f"{call.where}: {expected} became {got}")


def keeps_state_form(trial: Trial) -> None:
    for call in trial.calls:
        odd = [part for _, part in entries_of(call.state) if not isinstance(part, Tensor | int | float | str | None)]
        require(not odd, f"{call.where}: it holds {', '.join(map(repr, odd))}")
        old_tensors, old_skeleton = partition(call.inputs.state)
        new_tensors, new_skeleton = partition(call.state)
        old, new = _forms(old_tensors), _forms(new_tensors)
        require(old == new, f"{call.where}: tensors {old} became {new}")
        if old_skeleton != new_skeleton:
            raise AssertionError(f"{call.where}: {call.inputs.state!r} became {call.state!r}")


def _forms(tensors: list[Tensor]) -> list[tuple[str, list[int]]]:
    return [(dtype_name(t.dtype), list(t.shape)) for t in tensors]


def keeps_no_reference(trial: Trial) -> None:
    for call in trial.calls:
        for name in ("parameter", "gradient"):
            given: Tensor = getattr(call.inputs, name)
            memory = given.untyped_storage().data_ptr()
            # The tensor itself may be kept: the engine clones that. A view of it would not be seen.
            views = [t for t in tensors_in(call.state) if t is not given and t.numel()]
            shared = any(t.untyped_storage().data_ptr() == memory for t in views)
            require(not shared, f"{call.where}: the state keeps a view of the {name}")


def evaluates_in_form(trial: Trial) -> None:
    for call in trial.calls:
        x, before = call.inputs.parameter, contents(call.state)
        value = trial.rule.evaluation_any(call.state, x)
        fits = isinstance(value, Tensor) and value.shape == x.shape
        require(fits, f"{call.where}: the evaluation is {_forms([value]) if isinstance(value, Tensor) else value!r}")
        require(contents(call.state) == before, f"{call.where}: the evaluation wrote to the state")


def is_deterministic(trial: Trial) -> None:
    for call in trial.calls:
        state, change = apply_once(trial.rule, *call.inputs)
        same = contents((state, change)) == contents((call.state, call.change))
        require(same, f"{call.where}: two calls differ")


def reads_nothing(trial: Trial) -> None:
    x = torch.zeros(trial.shapes["matrix"], device="meta")  # whose numbers cannot be read
    state = init_state(trial.rule, x, 0, "")
    for _ in range(UPDATES):
        state, _ = apply_once(trial.rule, state, x, torch.zeros_like(x))

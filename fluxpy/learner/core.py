"""What the Learner uses of the core beyond its public names. No other file of this package imports such names."""

# ruff: noqa: F401

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adjust import adjust, scale
from ..containers import open_data
from ..context import reads_at_once
from ..data import require_batches
from ..distributed.parallel import modules_in
from ..distributed.sharding import all_gather, whole_tensor
from ..gradient import Gradients
from ..grads import in_order
from ..leaf import Leaf
from ..members import members_of
from ..rule import Rule, hyperparameters, rules_in
from ..saving.checkpoint import write_checkpoint
from ..saving.file import read as read_file
from ..saving.file import remove_leftovers
from ..saving.model import match_tensors, model_tensors, write_tensors
from ..saving.state_dict import changed_rules, changes_of_rules, plain_rules
from ..show import tree_as_html
from ..state import Rules, State, bind, select, tree_context
from ..text import html_table, names_of, near, outside
from ..tracebacks import leave_to_the_user
from ..train import is_terminal, place, require_parts_of_model, takes, training_mode, why_it_failed
from ..update import check_finite


def as_gradients(state: State | Leaf, model: Any, values: list[Tensor | None]) -> Any:
    """What `gradient` returns, of the gradients in the order of the parameters."""
    spec = bind(state, model).walked
    return values[0] if spec.kind == "leaf" else Gradients(spec, values)


def note_loss(state: State | Leaf, finite: Tensor, what: str) -> None:
    """On a device: hold back this update and all after it unless the loss is finite. `check_finite` tells."""
    context = tree_context(state)
    context.flag.require(finite, context.updates, what)


def over_ranks(state: State | Leaf, model: Any, number: Tensor) -> Tensor:
    """The mean of a number over all processes that run a model, not read from its device."""
    parallel = bind(state, model).parallel
    if parallel is None:
        return number
    return parallel.mean(number if number.is_floating_point() else number.float())


def rates(leaf: Leaf, member: Any = None) -> list[Any]:
    """The learning rate of each member of the leaf's rule that has one; with `member`, of those in that member."""
    if leaf.rule is None:
        return []
    try:
        chosen = [leaf.rule] if member is None else members_of(leaf.rule, member)
    except ValueError:  # the rule has no such member
        return []
    found = [hyperparameters(rule) for outer in chosen for rule in rules_in(outer)]
    return [own["lr"] for own in found if "lr" in own]


class Changed(scale):
    """In `adjust`: what a function gives of each present value."""

    def __init__(self, f: Callable[[Any], Any]) -> None:
        super().__init__(1.0)
        self.f = f

    def of(self, value: Any) -> Any:
        return self.f(value)


def adjust_rates(state: State | Leaf, f: Callable[[Any], Any], member: Any = None) -> None:
    """Put what `f` gives of each learning rate in its place, on all leaves that have one."""
    adjust(select(state, lambda _, leaf: len(rates(leaf, member)) > 0), lr=Changed(f), member=member)


def model_dict(model: Any, state: State | Leaf | None = None) -> dict[str, Tensor]:
    """A copy of each tensor of the model by name, parameters and buffers, of tied ones the same; with the state, of
    parameters their training weights, also where they hold those to evaluate with."""
    own: dict[int, Tensor] = {}
    if state is not None:
        binding, aside = bind(state, model), tree_context(state).aside
        own = {id(x): aside.get(id(record), x) for x, record in zip(binding.params, binding.records, strict=True)}
    copies: dict[int, Tensor] = {}
    for _, t in (named := list(model_tensors(model))):
        if id(t) not in copies:
            copies[id(t)] = own.get(id(t), t).detach().clone()
    return {name: copies[id(t)] for name, t in named}


def match_model(model: Any, saved: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of the model with what `model_dict` saved of it; ValueError where they do not fit."""
    pairs, problems = match_tensors(dict(model_tensors(model)), saved)
    if problems:
        raise ValueError("\n  ".join(["what was saved does not fit the model; nothing was loaded", *problems]))
    return pairs


def copied(there: Tensor, like: Tensor) -> Tensor:
    """A copy where this parameter is, spread over the processes as that is."""
    here = torch.empty_like(like, dtype=there.dtype, requires_grad=False)
    write_tensors([(here, there)])
    return here

"""Runs of `torch.optim` that go on here, and runs of ours that go on there."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ..leaf import Leaf, init_state, replace_leaf
from ..parameters import trainables
from ..rule import Rule, replace, rules_in, title, value_key
from ..rules import Descent, WeightDecay
from ..state import State, bind, leaf_list, leaves, require_state, setup
from ..text import bare_name, names_of
from .groups import OPTIONS, Member, ParamGroup, ParamGroups
from .twins import TWINS, options_of, read_state, rule_of, stepper_of, write_state


def from_torch(optimizer: torch.optim.Optimizer, model: Any) -> Any:
    """The state for going on here with a run of `torch.optim`: hyperparameters, momenta and counts of an optimiser.

    Adam, AdamW, SGD, RMSprop, Rprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, Adafactor and Muon have rules with their
    numbers. A weight decay that is a penalty becomes a chain, `OptimiserChain(WeightDecay(λ), Adam(...))`. A parameter
    that the optimiser does not have gets no rule (None); one with `requires_grad=False` is frozen. SGD and Muon count
    no steps, so their leaves start at count 0. Neither the optimiser nor the model is changed, and nothing is shared
    with them.

    Raises ValueError, with the name, for another class, for modes that no rule has (`maximize`, `dampening`,
    `lr_decay`, ...), and where the optimiser has parameters that are not in the model.

    >>> from fluxpy.interop import from_torch
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    >>> from_torch(optimizer, model).weight.rule
    OptimiserChain(WeightDecay(weight_decay=0.01), Momentum(lr=0.1, momentum=0.9))
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"from_torch takes an optimiser of torch.optim, but got {type(optimizer).__name__}")
    name = _class_name(optimizer)
    state = setup(Descent(), model)
    params = dict(trainables(model, path=True))
    groups = [(group, rule_of(name, group)) for group in optimizer.param_groups]
    rules = {id(x): rule for group, rule in groups for x in group["params"]}
    if strange := sum(len(group["params"]) for group, _ in groups) - sum(id(x) in rules for x in params.values()):
        raise ValueError(f"from_torch: {strange} parameters of the optimiser are not in the model")
    found = [_momenta(rules.get(id(x)), x, optimizer.state.get(x, {}), path) for path, x in params.items()]
    for leaf, x, (own, count) in zip(leaf_list(state), params.values(), found, strict=True):
        rule = rules.get(id(x))
        frozen = leaf.frozen or rule is None
        if rule is not None and own is None and not frozen:
            own = init_state(rule, x, 0, "")
        replace_leaf(leaf, rule=rule, frozen=frozen, state=own, count=count, pending=None)
    return state


def _momenta(rule: Rule | None, x: Tensor, saved: Mapping[str, Any], path: str) -> tuple[Any, int]:
    """The state and the count of a rule, of torch's state of a parameter, which is empty before the first step."""
    if rule is None or not any(value is not None for value in saved.values()):
        return None, 0
    return read_state(rule, x, dict(saved), path)


def to_torch(state: State | Leaf, model: Any, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Give an optimiser of `torch.optim` over the parameters of `model` the hyperparameters, momenta and counts of a
    state, so that the run goes on there; returns the optimiser.

    The rules must be such as `from_torch` makes, equal within each param group, without schedules. ValueError names
    what torch cannot do: then nothing is changed. What is frozen here must have `requires_grad=False` there.

    >>> from fluxpy.interop import to_torch
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = to_torch(setup(Adam(0.3), model), model, torch.optim.Adam(model.parameters()))
    >>> optimizer.param_groups[0]["lr"]
    0.3
    """
    require_state(state, "to_torch")
    name = _class_name(optimizer)
    binding = bind(state, model)
    pairs = zip(binding.params, leaves(state), strict=True)
    members = {id(x): Member(leaf, 0, path, x) for x, (path, leaf) in pairs}
    missing = members.keys() - {id(x) for group in optimizer.param_groups for x in group["params"]}
    if lost := [m.path for key, m in members.items() if key in missing and not m.leaf.frozen]:
        raise ValueError(f"to_torch: the optimiser does not have the parameters {names_of(lost)}, which train here")
    saved = optimizer.state_dict()
    for group, packed in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        found = [members[id(x)] for x in group["params"] if id(x) in members]
        if len(found) < len(group["params"]):
            raise ValueError("to_torch: the optimiser has parameters that are not in the model")
        live = [m for m in found if m.leaf.rule is not None]
        _require_flags(found, group, name)
        if live:
            packed |= _options(live, name)
        for number, member in zip(packed["params"], found, strict=True):
            saved["state"].pop(number, None)
            if member.leaf.rule is not None:
                leaf, x = member.leaf, member.x
                own = init_state(leaf.rule, x, 0, member.path) if leaf.state is None else leaf.state
                saved["state"][number] = write_state(leaf.rule, own, leaf.count, x)
    optimizer.load_state_dict(saved)
    return optimizer


def _require_flags(found: Sequence[Member], group: dict[str, Any], name: str) -> None:
    if moves := [m.path for m in found if m.leaf.frozen and m.x.requires_grad]:
        raise ValueError(f"to_torch: {names_of(moves)} are frozen here; torch needs x.requires_grad_(False) for that")
    modes = {mode: group[mode] for mode in ("maximize", "capturable", "differentiable") if group.get(mode)}
    if modes:
        raise ValueError(f"to_torch: torch.optim.{name} with {modes} does not do what a rule does")


def _options(live: list[Member], name: str) -> dict[str, Any]:
    options = options_of(live[0].leaf.rule, name)
    for member in live[1:]:
        if member.leaf.rule is live[0].leaf.rule:
            continue
        if value_key(tuple(options_of(member.leaf.rule, name).items())) != value_key(tuple(options.items())):
            raise ValueError(
                f"to_torch: {live[0].path!r} and {member.path!r} are in one param group, but have different "
                f"hyperparameters here, {live[0].leaf.rule!r} and {member.leaf.rule!r}; give each its group there"
            )
    return options


def _class_name(optimizer: Any) -> str:
    """The name of a class of `torch.optim`. ValueError for any other, a subclass too: it may do anything."""
    kind = type(optimizer)
    if getattr(torch.optim, kind.__name__, None) is kind:
        return kind.__name__
    if hasattr(optimizer, "tree"):
        raise ValueError("this optimiser is of fluxpy: its state is optimizer.tree")
    hint = "; of a wrapper, pass what is inside: optimizer.optimizer" if hasattr(optimizer, "optimizer") else ""
    raise ValueError(f"{kind.__name__} is no class of torch.optim{hint}")


# --- State dicts of torch -----------------------------------------------------------------------------------------


def load_from_torch(groups: ParamGroups, d: Mapping[str, Any]) -> None:
    """Load a state dict of a class of `torch.optim` into the leaves of groups, and what schedulers kept in its own."""
    contents, kept = [], {}
    for member, packed, saved in _matched(groups.current(), d["param_groups"], d["state"]):
        rule = _with_options(member.leaf.rule, packed)
        contents.append((member.leaf, rule, *_momenta(rule, member.x, saved, member.path)))
        kept[id(member.leaf)] = {name: value for name, value in packed.items() if name not in OPTIONS}
    shared: dict[Any, Rule | None] = {}
    for leaf, rule, own, count in contents:
        replace_leaf(leaf, rule=shared.setdefault((id(leaf.rule), value_key(rule)), rule), count=count)
        replace_leaf(leaf, state=own)
    for group in groups.current():
        group.kept |= kept[id(group.members[0].leaf)]


def _matched(
    groups: Sequence[ParamGroup], packed: Sequence[dict[str, Any]], states: Mapping[Any, Any]
) -> list[tuple[Member, dict[str, Any], dict[str, Any]]]:
    """Each leaf with the group and the state that a dict has for its parameter, by name, else by order."""
    members = [member for group in groups for member in group.members]
    saved = [(group, number) for group in packed for number in group["params"]]
    if all("param_names" in group or all(isinstance(name, str) for name in group["params"]) for group in packed):
        names = [bare_name(name) for group in packed for name in group.get("param_names", group["params"])]
        where = dict(zip(names, saved, strict=True))
        if len(where) != len(names) or where.keys() != {member.path for member in members}:
            odd = sorted(where.keys() ^ {member.path for member in members})
            raise ValueError(f"load_state_dict: names that are not in both: {names_of(odd)}")
        found = [(member, *where[member.path]) for member in members]
    else:
        if len(packed) == 1:
            members.sort(key=lambda member: member.number)
        elif [len(group["params"]) for group in packed] != [len(group.members) for group in groups]:
            raise ValueError(
                "load_state_dict: this dict has no names, and its groups are not of the number and sizes of those "
                "here; save one of an optimiser that was given model.named_parameters()"
            )
        if len(saved) != len(members):
            raise ValueError(f"load_state_dict: this dict has {len(saved)} parameters, but {len(members)} are here")
        found = [(member, *pair) for member, pair in zip(members, saved, strict=True)]
    return [(member, group, states.get(number, {})) for member, group, number in found]


def _with_options(rule: Rule, group: dict[str, Any]) -> Rule:
    """The rule with the hyperparameters of a group of torch. A schedule stays: a number cannot say as much."""
    stepper = stepper_of(rule)
    read = rule_of(TWINS[type(stepper)].classes[0], group)
    theirs = {type(member): member for member in (read, *read.inner)}
    new = theirs.get(type(stepper))
    penalty = theirs.get(WeightDecay)
    if new is None:
        raise ValueError(f"load_state_dict: the dict is of {title(read)}, but the rule here is {title(rule)}")
    before = takewhile(lambda member: member is not stepper, rules_in(rule))
    penalties = [member for member in before if type(member) is WeightDecay]  # one after it is not torch's
    if penalty is not None and len(penalties) != 1:
        raise ValueError(f"load_state_dict: the dict is of {read!r}, but the rule here is {rule!r}")

    def change(member: Rule, name: str, old: Any) -> Any:
        if callable(old):
            return old
        if member is stepper:
            value = getattr(new, name)  # for a number a number: `capturable` users of torch keep tensors
            return value.item() if isinstance(value, Tensor) and not isinstance(old, Tensor) else value
        if any(member is known for known in penalties):
            return getattr(penalty, name, 0.0)
        return old

    return replace(rule, change)

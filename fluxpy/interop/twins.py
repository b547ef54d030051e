"""Which rule and which class of `torch.optim` are one algorithm, and what their numbers are called there.

Hyperparameters have the same names. A torch class of several modes has a rule for each.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .. import rules
from ..leaf import init_state
from ..pytree import entries_of, skeleton_of
from ..rule import Rule, hyperparameters
from ..text import names_of
from .groups import refuse_mode


@dataclass(frozen=True)
class Twin:
    """A rule and the classes of torch that have its algorithm, by their names.

    `parts` are torch's names for the parts of the rule's state, `modes` the options of torch that select it, with the
    values they must have.
    """

    rule: type[Rule]
    classes: tuple[str, ...]
    parts: dict[str, str]
    modes: dict[str, Any] = field(default_factory=dict)

    def wrong_modes(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options of a group that are not those of this rule."""
        return {name: group[name] for name, want in self.modes.items() if name in group and group[name] != want}


_MEAN = {"m": "exp_avg", "v": "exp_avg_sq", "t": "step"}
_PENALTY = {"decoupled_weight_decay": False}
_QUINTIC = {"ns_coefficients": (3.4445, -4.775, 2.0315), "eps": 1e-7}  # torch's defaults, and what our Muon computes

TWINS: dict[type[Rule], Twin] = {
    twin.rule: twin
    for twin in (
        Twin(rules.Descent, ("SGD",), {}, {"momentum": 0, "nesterov": False}),
        Twin(rules.Nesterov, ("SGD",), {"": "momentum_buffer"}, {"dampening": 0, "nesterov": True}),
        Twin(rules.Momentum, ("SGD",), {"": "momentum_buffer"}, {"dampening": 0, "nesterov": False}),
        Twin(rules.Adam, ("Adam",), _MEAN, {"amsgrad": False, **_PENALTY}),
        Twin(rules.AdamW, ("AdamW", "Adam"), _MEAN, {"amsgrad": False, "decoupled_weight_decay": True}),
        Twin(rules.AMSGrad, ("Adam",), {**_MEAN, "peak": "max_exp_avg_sq"}, {"amsgrad": True, **_PENALTY}),
        Twin(rules.NAdam, ("NAdam",), {**_MEAN, "mu_product": "mu_product"}, _PENALTY),
        Twin(rules.RAdam, ("RAdam",), _MEAN, _PENALTY),
        Twin(rules.AdaMax, ("Adamax",), {"m": "exp_avg", "v": "exp_inf", "t": "step"}),
        Twin(rules.AdaGrad, ("Adagrad",), {"": "sum"}, {"lr_decay": 0}),
        Twin(rules.AdaDelta, ("Adadelta",), {"v": "square_avg", "u": "acc_delta"}),
        Twin(rules.RMSProp, ("RMSprop",), {"v": "square_avg", "m": "grad_avg"}, {"momentum": 0}),
        Twin(rules.Rprop, ("Rprop",), {"dx": "prev", "size": "step_size"}),
        Twin(rules.Adafactor, ("Adafactor",), {"row": "row_var", "column": "col_var", "v": "variance", "t": "step"}),
        Twin(rules.Muon, ("Muon",), {"": "momentum_buffer"}, _QUINTIC),
    )
}


def rule_of(name: str, group: dict[str, Any]) -> Rule:
    """The rule that does what a group of the torch class `name` does. ValueError for modes that no rule has."""
    what = f"torch.optim.{name}"
    for mode, value in group.items():
        refuse_mode(mode, value, what)
    twins = [twin for twin in TWINS.values() if name in twin.classes]
    if not twins:
        known = sorted({name for twin in TWINS.values() for name in twin.classes})
        raise ValueError(f"{what} has no rule that does the same; known are {', '.join(known)}")
    twin = next((twin for twin in twins if not twin.wrong_modes(group)), None)
    if twin is None:
        wrong = ", ".join(f"{mode}={value!r}" for mode, value in twins[-1].wrong_modes(group).items())
        raise ValueError(f"{what} with {wrong}: no rule has this mode")
    names = [f.name for f in fields(twin.rule)]
    if missing := [f for f in names if f not in group]:
        raise ValueError(f"{what}: the param group lacks {names_of(missing)}")
    rule = twin.rule(**{f: _own(group[f]) for f in names})
    penalty = 0 if "weight_decay" in names else group.get("weight_decay", 0)
    return rules.OptimiserChain(rules.WeightDecay(_own(penalty)), rule) if penalty else rule


def options_of(rule: Rule, name: str) -> dict[str, Any]:
    """The options of a group of the torch class `name` that does what the rule does. ValueError if there is none."""
    what = f"torch.optim.{name}"
    if rule.scheduled:
        raise ValueError(f"{what} keeps no schedules: {rule!r}; adjust it to a number first, and schedule it there")
    penalty, inner = 0.0, rule
    if isinstance(rule, rules.OptimiserChain) and len(rule) == 2 and type(rule[0]) is rules.WeightDecay:
        penalty, inner = rule[0].weight_decay, rule[1]
    elif isinstance(rule, rules.OptimiserChain) and len(rule) == 1:
        inner = rule[0]
    twin = TWINS.get(type(inner))
    if twin is None or name not in twin.classes or (penalty and "weight_decay" in hyperparameters(inner)):
        raise ValueError(f"{what} does not do what {rule!r} does")
    return {"weight_decay": penalty, **hyperparameters(inner), **twin.modes}


def stepper_of(rule: Rule) -> Rule:
    """The member of a rule that torch has too. ValueError unless there is one."""
    found = [member for member in _members(rule) if type(member) in TWINS]
    if len(found) != 1:
        raise ValueError(f"a state of torch.optim is for one rule, but {rule!r} has {len(found)} that torch has too")
    return found[0]


def _members(rule: Rule) -> list[Rule]:
    """The rule and those inside it whose states are found in its own: members of chains, and what a master has."""
    inner = rule.inner if isinstance(rule, rules.OptimiserChain | rules.MixedPrecision) else ()
    return [rule, *(found for member in inner for found in _members(member))]


def read_state(rule: Rule, x: Tensor, saved: dict[str, Any], path: str) -> tuple[Any, int]:
    """The state of `rule` for a parameter, with torch's numbers for the one member that torch has too, and the count.
    ValueError where a part is missing or has another shape."""
    stepper = stepper_of(rule)
    fresh = init_state(rule, x, 0, path)
    step = int(saved.get("step", 0))

    def graft(inner: Rule, state: Any) -> Any:
        if inner is stepper:
            return _read(TWINS[type(stepper)], state, saved, x, path)
        return inner.map_inner_states(graft, state)

    return graft(rule, fresh), step


def _read(twin: Twin, fresh: Any, saved: dict[str, Any], x: Tensor, path: str) -> Any:
    parts = []
    for own_name, part in entries_of(fresh):
        name = twin.parts[own_name]
        if saved.get(name) is None:
            raise ValueError(f"the state of {path!r} has no {name!r}, which {twin.rule.__name__} needs")
        parts.append(_part(part, saved[name], x, f"{name!r} of {path!r}"))
    return skeleton_of(fresh).spec.build(parts)


def _part(example: Any, value: Any, x: Tensor, what: str) -> Any:
    if not isinstance(example, Tensor):
        return type(example)(value.item() if isinstance(value, Tensor) else value)
    value = value.detach()
    if value.is_complex() and not example.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    if value.shape != example.shape:
        raise ValueError(f"{what} has shape {list(value.shape)}, but {list(example.shape)} is needed")
    # In the dtype of a master copy, if there is one; else in its own.
    wider = example.dtype if example.dtype != x.dtype and not x.is_complex() else value.dtype
    return value.to(device=x.device, dtype=wider, copy=True)


def write_state(rule: Rule, state: Any, count: int, x: Tensor) -> dict[str, Any]:
    """A state as torch has it."""
    inner, own = (rule[len(rule) - 1], state[-1]) if isinstance(rule, rules.OptimiserChain) else (rule, state)
    twin = TWINS[type(inner)]
    saved: dict[str, Any] = {"step": torch.tensor(float(count))}
    for name, part in entries_of(own):
        if not isinstance(part, Tensor):
            part = torch.tensor(float(part), dtype=torch.float64)  # torch makes of it what it needs
        elif x.is_complex():
            part = torch.view_as_complex(part.contiguous())
        saved[twin.parts[name]] = part.detach().clone()
    if twin.classes in (("SGD",), ("Muon",)):  # which do not count
        del saved["step"]
    return saved


def _own(value: Any) -> Any:
    """A hyperparameter that nobody else writes to."""
    if isinstance(value, list | tuple):
        return tuple(map(_own, value))
    return value.detach().clone() if isinstance(value, Tensor) else value

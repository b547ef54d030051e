"""Rules, schedules and momenta from plain data, checked against the leaf that they are for.

What is decoded is data, never code: a rule is made with the class of the rule that it replaces, and of all other names
in a file only those of `fluxpy.schedules` are looked up.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..leaf import Leaf, record_of, replace_leaf
from ..pytree import HOLE, Skeleton, skeleton_of, tensors_in
from ..rule import Rule, field_of
from ..text import form, names_of
from .format import SCALARS, SCHEDULES, state_template
from .values import describe, is_none, kind_of_number, malformed, short_repr

# A tensor as hyperparameter may have as many elements as the parameter, or so many: tables, and factors for each row.
MAX_ELEMENTS = 65_536


class Misfit(Exception):
    """A saved leaf is sound, but not for this leaf. `kind` is the field of the report that lists it."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class NoCallable(Misfit):
    """A callable that could not be saved is not here either."""


@dataclasses.dataclass(slots=True)
class Contents:
    """New contents for a leaf. `pending` are the numbers that the state continues with after updates that the leaf
    missed: its place in an accumulation window. `setup_rule` is what `setup` was given, `rule` what it is now."""

    frozen: bool
    count: int
    rule: Rule | None = None
    setup_rule: Rule | None = None
    state: Any = None
    pending: Skeleton | None = None

    def write(self, leaf: Leaf) -> None:
        replace_leaf(leaf, rule=self.rule, frozen=self.frozen, count=self.count)
        replace_leaf(leaf, state=self.state, pending=self.pending)  # after the rule, whose state it is
        record_of(leaf).setup_rule = self.setup_rule


class Decoder:
    """Makes the new contents of leaves from saved entries. Changes no leaf.

    Raises Misfit where an entry is for another leaf, and other exceptions where it is malformed. `device` is for the
    momenta of leaves that have none yet. `keep` leaves hyperparameters as they are.
    """

    def __init__(self, device: torch.device | None, keep: bool) -> None:
        self._device, self._keep = device, keep
        # Rules with their notes, by the ids of the present rule and the saved one, which both outlive this decoder.
        self._rules: dict[tuple[int, int], tuple[Rule, list[str]]] = {}
        # Tensors that stand for hyperparameters, by the id of the saved one. Each is copied once: a rule may compare
        # tensors by identity, and several rules may hold one.
        self._copies: dict[int, Tensor] = {}
        # Making a state costs more than all other work on a leaf, and one template serves all leaves of a rule.
        self._templates: dict[tuple[int, torch.Size, torch.dtype], Skeleton | None] = {}

    def leaf(self, own: Leaf, entry: dict[str, Any]) -> tuple[Contents, list[str]]:
        """The new contents, and a note for each callable that could not be saved."""
        expected, got = form(own.shape, own.dtype), f"{entry['dtype']}{entry['shape']}"
        if expected != got:
            raise Misfit("shape", f"expected {expected}, got {got}")
        new = Contents(entry["frozen"], entry["count"])
        if own.rule is None or is_none(entry["rule"]):
            if own.rule is not None:
                raise Misfit("rule", "expected a rule, got none (None)")
            if not is_none(entry["rule"]) or entry["state"] is not None or not entry["frozen"]:
                raise Misfit("rule", "expected no rule (None), got one")
            return new, []
        new.rule, notes = self._rule(own.rule, entry["rule"], own.shape)
        new.setup_rule = self._setup_rule(own, entry["setup"])
        if entry["state"] is not None:
            new.state = self._state(own, new.rule, entry["state"])
        if entry["pending"] is not None:
            new.pending = self._pending(own, new.rule, entry["pending"])
        return new, notes

    def _rule(self, own: Rule, saved: Any, shape: torch.Size) -> tuple[Rule, list[str]]:
        key = id(own), id(saved)
        if key not in self._rules:
            decoder = RuleDecoder(self._keep, self._device, self._copies, max(shape.numel(), MAX_ELEMENTS))
            self._rules[key] = decoder.rule(own, saved, "['rule']"), decoder.notes
        return self._rules[key]

    def _setup_rule(self, own: Leaf, saved: Any) -> Rule | None:
        """The rule that the run was set up with; this script's, where that counts or the other is not to be had: it
        had a callable, in place of which there may be a number by now."""
        setup_rule = record_of(own).setup_rule
        if self._keep or is_none(saved):
            return setup_rule
        try:
            return self._rule(setup_rule or own.rule, saved, own.shape)[0]
        except NoCallable:
            return setup_rule

    def _state(self, own: Leaf, rule: Rule, saved: dict[str, Any]) -> Any:
        template = self._template(own, rule)
        if saved.keys() != set(template.spec.names):
            raise Misfit("rule", f"expected the momenta {names_of(template.spec.names)}, got {_names_in_file(saved)}")
        device = next((t.device for t in tensors_in(own.state)), self._device)
        pairs = zip(template.spec.names, template.parts, strict=True)
        return template.spec.build([_decode_part(name, saved[name], example, device) for name, example in pairs])

    def _pending(self, own: Leaf, rule: Rule, saved: dict[str, Any]) -> Skeleton:
        """The numbers that a state goes on with, or one that is still to be made."""
        spec = self._template(own, rule).spec
        if not saved.keys() <= set(spec.names):
            raise Misfit("rule", f"expected numbers among {names_of(spec.names)}, got {_names_in_file(saved)}")
        parts = [_decode_part(name, saved[name], None, self._device) if name in saved else HOLE for name in spec.names]
        return Skeleton(spec, parts)

    def _template(self, own: Leaf, rule: Rule) -> Skeleton:
        """An example of the state, to tell the form that it must have."""
        key = id(rule), own.shape, own.dtype
        if key not in self._templates:
            self._templates[key] = state_template(rule, own.shape, own.dtype)
        return self._templates[key] or skeleton_of(own.state)


def _decode_part(name: str, saved: Any, example: Any, device: torch.device | None) -> Any:
    """One part of a state. `example` says what it must be, unless that is None: then it may be anything plain."""
    place = f"['state'][{name!r}]"
    if isinstance(saved, Tensor):
        if isinstance(example, Tensor) and not _alike(saved, example):
            raise Misfit("shape", f"momentum {name!r}: expected {describe(example)}, got {describe(saved)}")
        number = type(example) in (int, float) and not saved.ndim  # a tensor, where a hyperparameter is one
        if not (isinstance(example, Tensor) or number or example is None):
            raise malformed(place, describe(example), saved)
        if example is None:
            _require_stored(saved, place)
        return _dense_copy(saved, device, place)
    saved = None if is_none(saved) else saved
    if not (saved is None or isinstance(saved, SCALARS)) or not (example is None or _alike(saved, example)):
        raise malformed(place, describe(example), saved)
    return saved


class RuleDecoder:
    """Makes a rule from saved data. `notes` gets a line for each callable that could not be saved."""

    def __init__(self, keep: bool, device: torch.device | None, copies: dict[int, Tensor], largest: int) -> None:
        self._keep, self._device, self._copies, self._largest = keep, device, copies, largest
        self.notes: list[str] = []

    def rule(self, own: Rule, saved: Any, place: str) -> Rule:
        """A rule like `own`, the present one."""
        names = [field.name for field in dataclasses.fields(own)]
        sound = isinstance(saved, dict) and saved.get("type") == type(own).__name__
        if not sound or saved.keys() != {"type", *names}:
            raise Misfit("rule", f"expected {type(own).__name__} ({names_of(names)}), got {_describe_rule(saved)}")
        values = {name: self._hyperparameter(own, name, saved[name], f"{place}.{name}") for name in names}
        rule = object.__new__(type(own))  # not by a call: a rule may write an __init__ of its own
        rule.__dict__.update(values)
        rule.__post_init__()
        return own if self._keep else rule

    def _hyperparameter(self, rule: Rule, name: str, saved: Any, place: str) -> Any:
        own, field = getattr(rule, name), field_of(rule, name)
        if isinstance(own, Rule):
            return self.rule(own, saved, place)
        if isinstance(own, tuple) and own and isinstance(own[0], Rule):
            if not isinstance(saved, list) or len(saved) != len(own):
                raise Misfit("rule", f"{name}: expected a list of {len(own)} rules, got {short_repr(saved)}")
            return tuple([self.rule(inner, saved[i], f"{place}[{i}]") for i, inner in enumerate(own)])
        if self._keep and not field.metadata.get("fixed"):
            return own
        value = self._value(saved, own, place)
        if isinstance(own, torch.dtype):
            value = _dtype_of(value, place)
        if not _may_replace(value, (own, field.default)):
            raise malformed(place, f"a value like {own!r}", saved)
        if self._keep and not isinstance(own, Tensor) and not isinstance(value, Tensor) and own != value:
            raise Misfit("rule", f"expected {name}={own!r}, got {name}={value!r}, and it shapes the state")
        return value

    def _value(self, saved: Any, own: Any, place: str) -> Any:
        """A hyperparameter or an argument of a schedule. `own` is the present value at that place, None if unknown."""
        if is_none(saved):
            return None
        if isinstance(saved, SCALARS):
            return saved
        if isinstance(saved, list):
            known = own if isinstance(own, tuple) and len(own) == len(saved) else [None] * len(saved)
            return tuple([self._value(v, known[i], f"{place}[{i}]") for i, v in enumerate(saved)])
        if isinstance(saved, Tensor) and not saved.is_complex():
            return self._tensor(saved, place)
        if isinstance(saved, dict) and isinstance(saved.get("callable"), str):
            return self._callable(saved["callable"], own, place)
        if isinstance(saved, dict) and isinstance(saved.get("type"), str) and saved["type"] in SCHEDULES:
            return self._schedule(saved, own, place)
        raise malformed(place, "a number, a string, a list of them or a schedule of fluxpy.schedules", saved)

    def _tensor(self, saved: Tensor, place: str) -> Tensor:
        if id(saved) not in self._copies:
            if saved.numel() > self._largest:
                expected, got = f"a tensor of at most {self._largest:,} elements", form(saved.shape, saved.dtype)
                raise ValueError(f"{place}: expected {expected}, got {got}")
            _require_stored(saved, place)
            self._copies[id(saved)] = _dense_copy(saved, self._device, place)
        return self._copies[id(saved)]

    def _callable(self, saved: str, own: Any, place: str) -> Any:
        note = f"{place} was {saved}, which a file cannot hold; this state has {own!r}"
        if not callable(own):
            raise NoCallable("rule", f"{note}: give setup that callable")
        self.notes.append(note)
        return own

    def _schedule(self, saved: dict[str, Any], own: Any, place: str) -> Any:
        name = saved["type"]
        # A callable may have been scaled or shifted before it was saved; the present one is then what is inside.
        inner = own if name in ("scaled", "shifted") else None
        arguments = {
            key: self._value(value, getattr(own, key, inner), f"{place}.{key}")
            for key, value in saved.items()
            if key != "type"
        }
        return SCHEDULES[name](**arguments)


# --- Single values, which may be anything -------------------------------------------------------------------------


def _describe_rule(saved: Any) -> str:
    if not isinstance(saved, dict):
        return short_repr(saved)
    name = saved.get("type")
    names = [key for key in saved if not (isinstance(key, str) and key == "type")]
    return f"{name if isinstance(name, str) else short_repr(name)} ({_names_in_file(names)})"


def _names_in_file(keys: Iterable[Any]) -> str:
    """The names in a file, which may be anything."""
    keys = list(keys)
    return names_of(keys) if all(isinstance(key, str) for key in keys) else short_repr(keys)


def _alike(a: Any, b: Any) -> bool:
    """Tensors of one shape and kind of number, two numbers, or two values of one type."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and kind_of_number(a) == kind_of_number(b)
    return type(a) is type(b) or (type(a) in (int, float) and type(b) in (int, float))


def _may_replace(value: Any, known: tuple[Any, ...]) -> bool:
    """Whether a hyperparameter may take a value, if these are known ones. Tensors and schedules go for any."""
    if any(isinstance(v, Tensor | Callable | None) for v in known) or isinstance(value, Tensor | Callable):
        return True
    return any(_alike(value, v) for v in known)


def _dtype_of(value: Any, place: str) -> torch.dtype:
    dtype = vars(torch).get(value) if isinstance(value, str) else None
    if not isinstance(dtype, torch.dtype):
        raise malformed(place, "the name of a dtype", value)
    return dtype


def _require_stored(t: Tensor, place: str) -> None:
    """Refuse a tensor that repeats stored numbers, as an expanded one: a copy of it may be of any size."""
    if t.layout is torch.strided and t.numel() * t.element_size() > t.untyped_storage().nbytes():
        raise ValueError(f"{place}: expected a tensor with all its elements, got an expanded {form(t.shape, t.dtype)}")


def _dense_copy(t: Tensor, device: torch.device | None, place: str) -> Tensor:
    if t.layout is not torch.strided or t.is_meta:
        raise malformed(place, "a dense tensor", t)
    return t.detach().to(device or t.device, copy=True)

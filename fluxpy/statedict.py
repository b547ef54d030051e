"""state_dict and load_state_dict: a state tree as plain data by name, and back, all or nothing.

What is loaded is data, never code: of all that a file names, only the schedules of `fluxpy.schedules` are made.
"""

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import schedules
from .pytree import Frame
from .rule import Rule, field_of
from .state import Leaf, State, slots, start
from .text import names_of

_VERSION = 1
_ENTRY: dict[str, Any] = {"names": list, "shape": list, "dtype": str, "rule": dict | None, "state": dict | None}
_ENTRY |= {"frozen": bool, "count": int, "missed": int}
_CLASSES = [cls for cls in vars(schedules).values() if isinstance(cls, type) and dataclasses.is_dataclass(cls)]
_SCHEDULES: dict[str, Any] = {cls.__name__: cls for cls in _CLASSES if dataclasses.fields(cls)}  # the others are bases


class Report(NamedTuple):
    """What `load_state_dict` did, by path. In `schedules` are those that no file holds, so that a leaf kept its own."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    shape: dict[str, str]
    rule: dict[str, str]
    ties: dict[str, str]
    schedules: dict[str, str]

    def __str__(self) -> str:
        lines = [f"\n  {kind}: {names_of(v)}" for kind in ("missing", "unexpected") if (v := getattr(self, kind))]
        lines += [f"\n  {kind}: {p!r} {why}" for kind in self._fields[3:] for p, why in getattr(self, kind).items()]
        return f"{len(self.loaded)} leaves loaded" + "".join(lines)


def state_dict(state: State | Leaf) -> dict[str, Any]:
    """The state, or the branch under a view, as plain data: `torch.load(..., weights_only=True)` takes it.

    Leaves are listed by dotted path, a tied one once with all its names, so their order never matters. Holds rules with
    their hyperparameters, momenta, counts and frozen flags. Tensors are copies, each in its own dtype: training on does
    not change them. Schedules of `fluxpy.schedules` are saved whole, any other callable is only noted. ValueError where
    a rule or its state has something else that cannot be saved.

    >>> d = state_dict(setup(Adam(0.1), {"w": torch.zeros(2)}))
    >>> d["leaves"]["w"]["rule"], d["leaves"]["w"]["state"]["m"]
    ({'type': 'Adam', 'lr': 0.1, 'betas': [0.9, 0.999], 'eps': 1e-08}, tensor([0., 0.]))
    """
    memo, saved = {}, {}
    for leaf, names in _targets(state, "state_dict"):
        places, frame = _parts(leaf.state)
        try:
            rule = _encode(leaf.rule, memo)
            momenta = {place: _encode(part, {}) for place, part in zip(places, frame.parts, strict=True)}
        except ValueError as error:
            raise ValueError(f"state_dict: the leaf {names[0]!r}: {error}") from error
        form = {"names": names, "shape": list(leaf._shape), "dtype": _encode(leaf._dtype, {}), "rule": rule}
        counts = {"frozen": leaf.frozen, "count": leaf._count, "missed": leaf._missed}
        saved[names[0]] = {**form, "state": None if leaf.state is None else momenta, **counts}
    return {"version": _VERSION, "leaves": saved}


def load_state_dict(
    state: State | Leaf,
    d: Mapping[str, Any],
    *,
    strict: bool = True,
    hyperparameters: Literal["load", "keep"] = "load",
    prefix: str = "",
    rename: Mapping[str, str] | None = None,
) -> Report:
    """Load what `state_dict` returned into the leaves of this state or view: all of it, or nothing with a ValueError.

    Leaves are matched by name, a tied one by any of its names; one that was saved tied may go to several. Momenta,
    counts and frozen flags are loaded, and hyperparameters, unless `"keep"` leaves those; the rules must be the same.
    ValueError lists all that is missing, unexpected or does not fit; with `strict=False` such a leaf stays as it was,
    and the report says so. A callable that could not be saved stays that of this state, which must have one there.

    With `prefix`, only saved names under it are read, and without it: `prefix="encoder"` loads a branch from the whole.
    Then `rename={"encoder": "backbone"}` replaces their leading part. Momenta keep their dtype and come to the device
    of those here. Nothing in a dict is run or imported; a malformed one is a ValueError that names the place.

    >>> state = setup(Adam(), torch.nn.Linear(2, 3))
    >>> saved = state_dict(adjust(state, 0.1))
    >>> load_state_dict(adjust(state, 0.2), saved).loaded, state.weight.rule.lr
    (['weight', 'bias'], 0.1)
    """
    if hyperparameters not in ("load", "keep"):
        raise ValueError(f"load_state_dict: hyperparameters={hyperparameters!r} must be 'load' or 'keep'")
    targets, entries = _targets(state, "load_state_dict"), _entries(d, prefix, rename or {})
    reader = _Reader(targets, hyperparameters == "keep")
    report, new, used = Report([], [], [], {}, {}, {}, {}), [], set()
    for leaf, names in targets:
        found = dict(entries[name] for name in names if name in entries)
        used.update(found)
        if not found:
            report.missing.append(names[0])
        elif len(found) > 1:
            report.ties[names[0]] = f"is one tied parameter here, but was saved as several: {names_of(found)}"
        for key, entry in found.items() if len(found) == 1 else ():
            try:
                new.append((leaf, reader.leaf(leaf, entry, names[0], report)))
                report.loaded.append(names[0])
            except _Misfit as misfit:
                getattr(report, misfit.args[0])[names[0]] = misfit.args[1]
            except Exception as error:  # whatever a value from outside upsets is an error of that value
                raise ValueError(f"load_state_dict: leaves[{key!r}]: {error}") from error
    report.unexpected.extend(key for key in dict(entries.values()) if key not in used)
    if strict and any(report[1:6]):
        raise ValueError(f"load_state_dict: this does not fit (see rename, strict): {report._replace(loaded=[])}")
    for leaf, values in new:
        leaf._set(**dict(zip(("rule", "state", "frozen", "count", "missed"), values, strict=True)))
    return report


def _targets(state: Any, verb: str) -> list[tuple[Leaf, list[str]]]:
    found: dict[int, tuple[Leaf, list[str]]] = {}  # each leaf once, with all its paths
    for path, leaf in slots(state, verb):
        found.setdefault(id(leaf), (leaf, []))[1].append(path)
    return list(found.values())


def _parts(tree: Any) -> tuple[list[str], Frame]:
    """A pytree as the places of its parts, `["[1].m", "[1].t"]`, and the frame with them."""
    frame = Frame(tree)
    return [place.codify("").removeprefix(".") for place in frame.spec.accessors()], frame


def _encode(value: Any, memo: dict[int, Any]) -> Any:
    """As plain data. What is one object stays one, so that leaves which share a rule will share it again."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, list | tuple):
        return [_encode(v, memo) for v in value]
    if value is None or id(value) in memo:
        return memo.get(id(value))
    if isinstance(value, Tensor):
        data: Any = value.detach().clone()
    elif isinstance(value, Rule) or type(value) in _CLASSES:
        data = {f.name: _encode(getattr(value, f.name), memo) for f in dataclasses.fields(value)}
        if "type" in data:
            raise ValueError(f"{type(value).__name__} has a hyperparameter 'type', the word for its class when saved")
        data = {"type": type(value).__name__, **data}
    elif callable(value):
        data = {"callable": repr(value)}
    else:
        raise ValueError(f"{reprlib.repr(value)} cannot be saved; tensors, numbers, strings and schedules can")
    return memo.setdefault(id(value), data)


class _Misfit(Exception):
    """(where in the report, why): a leaf that is well saved, but is another here."""


def _malformed(place: str, want: str, came: Any) -> ValueError:
    return ValueError(f"{place} must be {want}, but is {reprlib.repr(came)}")


def _entries(d: Any, prefix: str, rename: Mapping[str, str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """What was saved, as (key, entry), by the names it has here."""
    version, leaves = (d.get("version"), d.get("leaves")) if isinstance(d, Mapping) else (None, None)
    if type(version) is not int or version != _VERSION or not isinstance(leaves, dict):
        raise _malformed("load_state_dict: this", f"what state_dict returns, of version {_VERSION} and no newer", d)
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    cut, *moves = [(old.removesuffix(".") + "." if old else "", new) for old, new in ((prefix, ""), *rename.items())]
    for key, entry in leaves.items():
        place = f"load_state_dict: leaves[{key!r}]"
        if not isinstance(entry, dict) or set(entry) != set(_ENTRY):
            raise _malformed(place, f"a dict of {', '.join(_ENTRY)}", entry)
        for name, kind in _ENTRY.items():
            if not isinstance(v := entry[name], kind) or (kind is int and (isinstance(v, bool) or not 0 <= v < 2**63)):
                raise _malformed(f"{place}[{name!r}]", "a whole number, 0 or more" if kind is int else str(kind), v)
        if not all(isinstance(name, str) for name in entry["names"]) or key not in entry["names"]:
            raise _malformed(f"{place}['names']", f"a list of strings, {key!r} among them", entry["names"])
        for name in [name[len(cut[0]) :] for name in entry["names"] if f"{name}.".startswith(cut[0])]:
            old, new = max((m for m in moves if f"{name}.".startswith(m[0])), key=lambda m: len(m[0]), default=("", ""))
            name = ".".join(filter(None, (new, name[len(old) :])))
            if found.setdefault(name, (key, entry))[0] != key:
                raise ValueError(f"{place} and the saved leaf {found[name][0]!r} both have the name {name!r}")
    return found


class _Reader:
    """Makes rules and momenta from saved ones, like those of the leaves they are for. Changes nothing."""

    def __init__(self, targets: list[tuple[Leaf, list[str]]], keep: bool) -> None:
        self.keep = keep
        self.device = next((t.device for leaf, _ in targets for t in Frame.split(leaf.state)[0]), None)
        self.memo: dict[Any, Any] = {}  # what was one object becomes one

    def leaf(self, leaf: Leaf, entry: dict[str, Any], path: str, report: Report) -> tuple[Any, ...]:
        own, saved, counts = leaf.rule, entry["rule"], (entry["frozen"], entry["count"], entry["missed"])
        came, here = f"{entry['dtype']}{entry['shape']}", f"{_encode(leaf._dtype, {})}{list(leaf._shape)}"
        if came != here:
            raise _Misfit("shape", f"was saved as {came}, here it is {here}")
        if own is None or saved is None:
            if own is not saved or entry["state"] is not None or not entry["frozen"]:
                raise _Misfit("rule", "has no rule (None) " + ("here" if own is None else "as it was saved"))
            return None, None, *counts
        if (key := (id(own), id(saved))) not in self.memo:
            self.memo[key] = self.rule(own, saved, "['rule']", kept := []), kept
        rule, kept = self.memo[key]
        momenta = None if entry["state"] is None else self.momenta(leaf, rule, entry["state"], counts[1], path)
        report.schedules.update({path: "; ".join(kept)} if kept else {})
        return rule, momenta, *counts

    def rule(self, own: Rule, saved: Any, place: str, kept: list[str]) -> Rule:
        names = [field.name for field in dataclasses.fields(own)]
        if not isinstance(saved, dict) or saved.get("type") != type(own).__name__ or set(saved) != {"type", *names}:
            came = f"{saved.get('type')} ({names_of([*saved][1:])})" if isinstance(saved, dict) else reprlib.repr(saved)
            raise _Misfit("rule", f"was saved with {came}, here it has {type(own).__name__} ({names_of(names)})")
        new = {name: self.hyper(own, name, saved[name], f"{place}.{name}", kept) for name in names}
        rule = object.__new__(type(own))
        rule.__dict__.update(new)
        rule.__post_init__()
        return own if self.keep else rule

    def hyper(self, rule: Rule, name: str, saved: Any, place: str, kept: list[str]) -> Any:
        own, field = getattr(rule, name), field_of(rule, name)
        if isinstance(own, Rule):
            return self.rule(own, saved, place, kept)
        if isinstance(own, tuple) and own and isinstance(own[0], Rule):
            if not isinstance(saved, list) or len(saved) != len(own):
                raise _Misfit("rule", f"was saved with {reprlib.repr(saved)} as {name}, here it is {len(own)} rules")
            return tuple([self.rule(r, saved[i], f"{place}[{i}]", kept) for i, r in enumerate(own)])
        if self.keep and not field.metadata.get("fixed"):
            return own
        new = self.decode(saved, own, place, kept)
        new = vars(torch).get(new) if isinstance(own, torch.dtype) and isinstance(new, str) else new
        known = own, field.default
        free = isinstance(new, Tensor | Callable) or any(isinstance(v, Tensor | Callable | None) for v in known)
        if not free and _form(new) not in map(_form, known):
            raise _malformed(place, f"something like {own!r}", saved)
        if self.keep and not isinstance(own, Tensor) and not isinstance(new, Tensor) and own != new:
            raise _Misfit("rule", f"was saved with {name}={new!r}, which shapes the state; here {name}={own!r}")
        return new

    def decode(self, saved: Any, own: Any, place: str, kept: list[str]) -> Any:
        """A hyperparameter, or an argument of a schedule. `own` is what stands there here, where that is known."""
        if isinstance(saved, bool | int | float | str | None):
            return saved
        if isinstance(saved, list):
            owns = own if isinstance(own, tuple) and len(own) == len(saved) else [None] * len(saved)
            return tuple([self.decode(v, owns[i], f"{place}[{i}]", kept) for i, v in enumerate(saved)])
        if isinstance(saved, Tensor) and not saved.is_complex():
            return self.memo.setdefault(id(saved), _copied(saved, self.device, place))
        if isinstance(saved, dict) and "callable" in saved:
            why = f"was saved with {saved['callable']} at {place}, which a file cannot hold; here it is {own!r}"
            if not callable(own):
                raise _Misfit("rule", f"{why}: give setup that callable")
            kept.append(why)
            return own
        if isinstance(saved, dict) and isinstance(kind := saved.get("type"), str) and kind in _SCHEDULES:
            other = own if kind in ("scaled", "shifted") else None  # a schedule of this state may have been scaled
            args = {k: self.decode(v, getattr(own, k, other), f"{place}.{k}", kept) for k, v in saved.items()}
            return _SCHEDULES[args.pop("type")](**args)
        raise _malformed(place, "a number, a string, a list of them or a schedule of fluxpy.schedules", saved)

    def momenta(self, leaf: Leaf, rule: Rule, saved: Any, count: int, path: str) -> Any:
        try:
            like = start(rule, torch.empty(leaf._shape, dtype=leaf._dtype, device="meta"), count, path)
        except RuntimeError:  # an init that reads its parameter
            like = leaf.state
        names, frame = _parts(like)
        if set(saved) != set(names):
            raise _Misfit("rule", f"was saved with the momenta {names_of(saved)}, here they are {names_of(names)}")
        device = next((t.device for t in Frame.split(leaf.state)[0]), self.device)
        for i, (name, like) in enumerate(zip(names, frame.parts, strict=True)):
            part, place = saved[name], f"['state'][{name!r}]"
            came, here = _form(part), _form(like)
            if isinstance(part, Tensor) and isinstance(like, Tensor) and came != here:
                raise _Misfit("shape", f"was saved with {came} as its momentum {name!r}, here it is {here}")
            known = like is None or came == here or (isinstance(part, Tensor) and here == "a number" and not part.ndim)
            if not known or not isinstance(part, Tensor | bool | int | float | str | None):
                raise _malformed(place, here, part)
            frame.parts[i] = _copied(part, device, place) if isinstance(part, Tensor) else part
        return frame.join(())


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "complex" if value.is_complex() else "floating-point" if value.is_floating_point() else "whole"
        return f"a tensor {list(value.shape)} of {kind} numbers"
    return "a number" if type(value) in (int, float) else f"a {type(value).__name__}"


def _copied(t: Tensor, device: torch.device | None, place: str) -> Tensor:
    if t.layout is not torch.strided or t.is_meta:
        raise _malformed(place, "a dense tensor", t)
    return t.detach().to(device or t.device, copy=True)
